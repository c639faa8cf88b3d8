"""Derivatives of the loss of each example of a torch model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, autograd, nn
from torch.utils import _pytree as pytree

from lowrank_inverse.influence.dataset import Examples
from lowrank_inverse_torch.curvature.operators import (
    GaussNewtonOperator,
    GradientGraph,
    HessianOperator,
)
from lowrank_inverse_torch.influence.data import as_examples
from lowrank_inverse_torch.model_guard import explained, untouched
from lowrank_inverse_torch.parameters import Parameters, as_parameters

Split = Callable[[Any], tuple[Any, Any]]


class TorchBackend:
    """What the core needs of a live model and a loss of each example; see its `Backend`."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        params: Any,
        split: Split | None,
        chunk_size: int,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module; got {type(model).__name__}.")
        if not callable(loss):
            raise TypeError(
                "`loss` must be a function (output, target) -> losses, shape (size,); "
                f"got {type(loss).__name__}."
            )
        self.model, self.loss, self.split = model, loss, split or _pair
        self.params: Parameters = as_parameters(model if params is None else params)
        self.n, self.like = self.params.n, self.params.flatten(self.params.tensors)[:0]
        self.chunk_size = chunk_size
        self.has_outputs = True
        self._names = _names(model, self.params)
        self._batched: bool | None = None
        self._versions = [tensor._version for tensor in self.params.tensors]

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put the model to evaluation; all comes back as it was."""
        if [tensor._version for tensor in self.params.tensors] != self._versions:
            raise RuntimeError(
                "The parameters were changed in place after this influence function was made, "
                "which holds the curvature at the earlier ones. Make it anew."
            )
        with untouched(self.params.tensors, [self.model]):
            _to_evaluation(self.model)
            yield
        self._versions = [tensor._version for tensor in self.params.tensors]

    def vector(self) -> Tensor:
        """Return the parameters, shape (n,)."""
        return self.params.flatten(self.params.tensors)

    def examples(self, data: Any, name: str, batch_size: int | None, budget: int) -> Examples:
        """Return a data set as examples."""
        return as_examples(
            data, name, device=self.params.device, batch_size=batch_size, memory_budget=budget
        )

    def losses(self, batch: Any) -> Any:
        """Return the loss of each example, detached."""
        with self.evaluating(), torch.no_grad():
            output, target = self._forward(batch)
            self.has_outputs = isinstance(output, Tensor)
            losses = self.loss(output, target)
        return losses

    def operator(
        self, examples: Examples, curvature: str, weights: np.ndarray | None = None
    ) -> HessianOperator | GaussNewtonOperator:
        """Return the weighted curvature over all examples, divided by their number."""
        starts = np.cumsum([0, *examples.sizes])
        scale = len(examples) / examples.num  # the operators take the mean over batches

        def weighted(losses: Tensor, i: int) -> Tensor:
            if weights is None:
                return scale * losses.sum()
            return scale * (self._host(weights[starts[i] : starts[i + 1]]) * losses).sum()

        def losses_of(i: int) -> Tensor:
            return self.loss(outputs_of(i), targets[i])

        def outputs_of(i: int) -> Any:
            _to_evaluation(self.model)  # within the operator's own guard
            targets.clear()
            output, targets[i] = self._forward(examples.get(i))
            return output

        targets: dict[int, Any] = {}  # of the batch whose graph is being built
        options: dict[str, Any] = {"chunk_size": self.chunk_size, "module": self.model}

        def each(function: Callable[..., Tensor]) -> list[Any]:
            return [partial(function, i=i) for i in range(len(examples))]

        if curvature == "hessian":
            losses = each(lambda i: weighted(losses_of(i), i))
            return HessianOperator(losses, self.params, **options)
        if curvature == "ggn":
            outer = each(lambda z, i: weighted(self.loss(z, targets[i]), i))
            return GaussNewtonOperator(outer, each(outputs_of), self.params, **options)
        # J^T diag(w) J of the losses themselves: the curvature of half their squares
        halves = each(lambda z, i: weighted(z**2, i) / 2)
        operator = GaussNewtonOperator(halves, each(losses_of), self.params, **options)
        w = np.ones(examples.num) if weights is None else weights
        operator.gradient = self.total(examples, w) / examples.num
        return operator

    def gradients(self, batch: Any) -> Tensor:
        """Return the gradient of each example as a column, shape (n, size)."""
        leaves, _ = pytree.tree_flatten(batch)
        size = next(x.shape[0] for x in leaves if isinstance(x, Tensor) and x.ndim > 0)
        with self.evaluating():
            if self._batched is None:
                try:
                    self._gradients_at_once(_rows(batch, 0, min(2, size)))
                    self._batched = True
                except RuntimeError:  # what vmap cannot batch
                    self._batched = False
            if self._batched:
                return self._gradients_at_once(batch).mT
            rows = [self._gradient(_rows(batch, i, i + 1), None) for i in range(size)]
        return torch.stack(rows).mT

    def slopes(self, batch: Any, Z: Tensor) -> Tensor:
        """Return the inner products of all gradients with the columns of `Z`: (m, size)."""
        with self.evaluating():
            losses = self._losses(batch)
            # <z, gradient of sum w_i loss_i> has the derivative <z, g_i> by w_i.
            weights = torch.ones_like(losses, requires_grad=True)
            graph = GradientGraph((weights * losses).sum(), self.params.tensors)
            columns = Z.mT.contiguous()
            rows = []
            for z in columns:
                (row,) = graph.vjp(self.params.unflatten(z), [weights])
                rows.append(torch.zeros_like(losses) if row is None else row)
        return torch.stack(rows).detach()

    def total(self, examples: Examples, weights: np.ndarray) -> Tensor:
        """Return ``sum_i w_i g_i``, shape (n,)."""
        result = torch.zeros(self.n, dtype=self.params.dtype, device=self.params.device)
        for start, batch in examples.parts():
            w = weights[start : start + examples.size(batch)]
            if np.any(w):
                with self.evaluating():
                    result += self._gradient(batch, self._host(w))
        return result

    def _forward(self, batch: Any) -> tuple[Any, Any]:
        inputs, target = self.split(batch)
        return _called(self.model, inputs), target

    def _losses(self, batch: Any) -> Tensor:
        output, target = self._forward(batch)
        return self.loss(output, target)

    def _gradient(self, batch: Any, weights: Tensor | None) -> Tensor:
        losses = self._losses(batch)
        total = (losses if weights is None else weights * losses).sum()
        with explained():
            grads = autograd.grad(total, self.params.tensors, allow_unused=True)
        return self.params.flatten(grads)

    def _gradients_at_once(self, batch: Any) -> Tensor:
        """Return one gradient in each row, shape (size, n), by vmap."""
        leaves, structure = pytree.tree_flatten(batch)
        has_rows = [isinstance(x, Tensor) and x.ndim > 0 for x in leaves]

        def loss_of_one(values: dict[str, Tensor], *rows: Any) -> Tensor:
            given = iter(rows)
            alone = [
                next(given).unsqueeze(0) if has else x
                for x, has in zip(leaves, has_rows, strict=True)
            ]
            inputs, target = self.split(pytree.tree_unflatten(alone, structure))
            output = _called(self.model, inputs, values)
            return self.loss(output, target).sum()

        values = {
            name: tensor.detach()
            for name, tensor in zip(self._names, self.params.tensors, strict=True)
        }
        rows = [x for x, has in zip(leaves, has_rows, strict=True) if has]
        gradient = torch.func.vmap(torch.func.grad(loss_of_one), in_dims=(None, *(0 for _ in rows)))
        grads = gradient(values, *rows)
        return torch.cat([grads[name].flatten(1) for name in self._names], dim=1).detach()

    def _host(self, weights: np.ndarray) -> Tensor:
        return torch.as_tensor(weights, dtype=self.params.dtype, device=self.params.device)


def _called(model: nn.Module, inputs: Any, values: dict[str, Tensor] | None = None) -> Any:
    """Call the model: a tuple or list spreads over its arguments, a dict over its keywords."""
    args = tuple(inputs) if isinstance(inputs, (tuple, list)) else ()
    kwargs = dict(inputs) if isinstance(inputs, dict) else {}
    if not args and not kwargs:
        args = (inputs,)
    if values is None:
        return model(*args, **kwargs)
    return torch.func.functional_call(model, values, args, kwargs)


def _pair(batch: Any) -> tuple[Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        kind = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else batch
        raise ValueError(
            f"a batch must be a pair (inputs, targets); got {kind}. Give `split`, a function "
            "(batch) -> (inputs, targets)."
        )
    return batch[0], batch[1]


def _rows(batch: Any, start: int, stop: int) -> Any:
    return pytree.tree_map(
        lambda x: x[start:stop] if isinstance(x, Tensor) and x.ndim > 0 else x, batch
    )


def _to_evaluation(model: nn.Module) -> None:
    # Not model.eval(): what a module does besides in its own train() could not be undone.
    for part in model.modules():
        part.training = False


def _names(model: nn.Module, params: Parameters) -> list[str]:
    """Return the name in the model of each tensor."""
    known = {id(tensor): name for name, tensor in model.named_parameters()}
    names = []
    for tensor, place in zip(params.tensors, params.names, strict=True):
        if id(tensor) not in known:
            raise ValueError(
                f"`params` must be parameters of `model`; {place!r} is none of them. Give a "
                "submodule, or a list of tensors from model.parameters()."
            )
        names.append(known[id(tensor)])
    return names
