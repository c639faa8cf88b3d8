"""The outputs of a model on a batch as one tensor, and the loss of a batch as a function of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lowrank_inverse_torch.curvature.gauss_newton import RowLoss
from lowrank_inverse_torch.curvature.gradient_graph import graph_nodes
from lowrank_inverse_torch.influence.calls import has_rows, per_example, rows_of
from lowrank_inverse_torch.influence.data import flatten


class BatchLoss(RowLoss):
    """A weighted sum of the losses of a batch, by what the loss uses of the outputs.

    Parameters
    ----------
    loss : callable (output, target) -> Tensor, shape (size,) or (size, tokens)
    total : callable (losses, start) -> Tensor, scalar
        The weighted sum of the losses from example `start` of the batch on.
    """

    def __init__(
        self, loss: Callable[[Any, Any], Tensor], total: Callable[[Tensor, int], Tensor]
    ) -> None:
        self._loss, self._total = loss, total

    def take(self, output: Any, target: Any, size: int) -> Tensor:
        """Set the outputs and targets of the batch; return the outputs that the loss uses.

        Those that it does not use, such as a mean loss or the keys and values of attention, are
        constants: no product is spent on them.
        """
        leaves, rebuild = flatten(output)
        used = self._used(leaves, rebuild, target)
        cut = len(used) == 1 and has_rows(leaves, size) and has_rows(target, size)
        self.num_rows = size if cut else 0
        joined = [leaves[i] for i in used]
        self._leaves = [x.detach() if isinstance(x, Tensor) else x for x in leaves]
        self._rebuild, self._places, self._target = rebuild, used, target
        return joined[0] if len(used) == 1 else torch.cat([x.reshape(-1) for x in joined])

    def __call__(self, outputs: Tensor, start: int = 0) -> Tensor:
        """Return the weighted sum of the losses, of all rows or of those from `start` on."""
        leaves, target = self._leaves, self._target
        if self.num_rows and len(outputs) < self.num_rows:
            stop = start + len(outputs)
            leaves, target = rows_of(leaves, start, stop), rows_of(target, start, stop)
        values = list(leaves)
        if len(self._places) == 1:
            values[self._places[0]] = outputs
        else:
            parts = outputs.split([leaves[i].numel() for i in self._places])
            for i, part in zip(self._places, parts, strict=True):
                values[i] = part.reshape(leaves[i].shape).to(leaves[i].dtype)
        return self._total(per_example(self._loss(self._rebuild(values), target)), start)

    def _used(self, leaves: list[Any], rebuild: Callable[[list[Any]], Any], target: Any) -> Any:
        """Return the places of the differentiable outputs that the loss depends on."""
        own = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
        if not own:
            raise ValueError(
                "the outputs of `model` must depend on `params`; no tensor among them does. Was it "
                "evaluated under torch.no_grad(), or detached?"
            )
        if len(own) == 1:
            return own
        values = list(leaves)
        for i in own:
            values[i] = leaves[i].detach().requires_grad_()
        nodes = graph_nodes([self._loss(rebuild(values), target)])
        met = {id(getattr(node, "variable", None)) for node in nodes}
        return [i for i in own if id(values[i]) in met] or own
