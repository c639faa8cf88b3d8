"""The loss of each example of a live model, and its derivatives by the parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, autograd, nn

from lowrank_inverse._typing import Batch, PyTree
from lowrank_inverse.influence.checkpoint import digest
from lowrank_inverse.influence.dataset import Examples
from lowrank_inverse.influence.loss_checks import check_tokens
from lowrank_inverse_torch.curvature.gradient_graph import GradientGraph
from lowrank_inverse_torch.influence.calls import (
    called,
    in_float32,
    pair,
    per_example,
    rows_of,
    to_evaluation,
)
from lowrank_inverse_torch.influence.data import LOW_PRECISION, flatten
from lowrank_inverse_torch.influence.gradients_at_once import gradients_at_once
from lowrank_inverse_torch.model_guard import (
    RandomStates,
    explained,
    twice_differentiable_attention,
    untouched,
)
from lowrank_inverse_torch.parameters import Parameters, as_parameters

Split = Callable[[Any], tuple[Any, Any]]
T = TypeVar("T", bound="ExampleLosses")


class ExampleLosses:
    """The loss of each example of a live model; the model comes back as it was.

    A model with weights in less than float32 is copied to float32, once.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        params: PyTree,
        split: Split | None,
        *,
        gather: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module; got {type(model).__name__}.")
        if not callable(loss):
            raise TypeError(
                "`loss` must be a function (output, target) -> losses, shape (size,); "
                f"got {type(loss).__name__}."
            )
        self.model, self.loss, self.split = model, loss, split
        self.params: Parameters = as_parameters(model if params is None else params, gather=gather)
        self.names = _names(model, self.params)
        self._batched: bool | None = None
        self.is_widened = self.params.dtype in LOW_PRECISION
        if self.is_widened and self.params.sharded:
            raise TypeError(
                f"fully sharded parameters must be float32 or float64; got {self.params.dtype}. "
                "Keep them in float32, and pass a MixedPrecisionPolicy to fully_shard."
            )
        if self.is_widened:
            self.model = in_float32(model)
            parameters = dict(self.model.named_parameters())
            self.params = as_parameters([parameters[name] for name in self.names])
        self._guarded = self.params.modules if self.params.sharded else (self.model,)
        floats = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        self.unit = max(torch.finfo(dtype).eps for dtype in floats)
        self._watched = [*model.parameters(), *model.buffers()]  # the user's own
        self._versions = [tensor._version for tensor in self._watched]

    @contextmanager
    def evaluating(self) -> Iterator[RandomStates]:
        """Put the model to evaluation; all comes back as it was."""
        if [tensor._version for tensor in self._watched] != self._versions:
            raise RuntimeError(
                "Parameters or buffers were changed in place after this influence function was "
                "made, so its curvature is out of date. Create a new one."
            )
        guard = untouched(self.params.tensors, self._guarded)
        with guard as states, twice_differentiable_attention():
            to_evaluation(self.model)
            yield states
        self._versions = [tensor._version for tensor in self._watched]

    def vector(self) -> Tensor:
        """Return the parameters, shape (n,)."""
        return self.params.flatten(self.params.tensors)

    def sizes(self) -> dict[str, int]:
        """Return the number of entries of each parameter by its name in the model."""
        return dict(zip(self.names, self.params.sizes, strict=True))

    def fingerprint(self) -> str:
        """Hash all parameters and buffers."""
        return digest(*self.model.parameters(), *self.model.buffers())

    def measuring(self: T, loss: Callable[[Any, Any], Tensor]) -> T:
        """Return the same with another loss."""
        other = copy.copy(self)
        other.loss, other._batched = loss, None
        return other

    def losses(self, batch: Batch, *, anew: bool = False) -> Any:
        """Return the loss of each example, detached; `anew` with another random state."""
        with self.evaluating() as states, torch.no_grad():
            if anew:
                for device in states:
                    torch.rand(1, device=device)
            return self._losses(batch)

    def gradients(self, batch: Batch) -> Tensor:
        """Return the gradient of each example as a column, shape (n, size)."""
        leaves, _ = flatten(batch)
        size = next(x.shape[0] for x in leaves if isinstance(x, Tensor) and x.ndim > 0)
        with self.evaluating():
            if size == 1:
                return self._gradient(batch, None)[:, None]
            if self._batched is None:
                try:
                    self._gradients_at_once(rows_of(batch, 0, min(2, size)))
                    self._batched = True
                except Exception:  # what vmap cannot batch; a fault of the loss comes again below
                    self._batched = False
            if self._batched:
                return self._gradients_at_once(batch).mT
            rows = [self._gradient(rows_of(batch, i, i + 1), None) for i in range(size)]
        return torch.stack(rows).mT

    def slopes(self, batch: Batch, Z: Tensor) -> Tensor:
        """Return the inner products of all gradients with the columns of `Z`: (m, size)."""
        with self.evaluating():
            return self._slopes(self._losses(batch), Z)

    def token_slopes(self, batch: Batch, Z: Tensor) -> Tensor:
        """Return the same for the loss of each token: (m, size, tokens)."""
        with self.evaluating():
            return self._slopes(check_tokens(self._raw_losses(batch)), Z)

    def token_gradients(self, batch: Batch) -> Tensor:
        """Return the gradient of each token's loss in a batch of one example: (n, tokens)."""
        with self.evaluating():
            losses = check_tokens(self._raw_losses(batch))[0]
            last = len(losses) - 1
            rows = [
                self._flat_gradient(loss, retain_graph=i < last) for i, loss in enumerate(losses)
            ]
        return torch.stack(rows).mT

    def _slopes(self, losses: Tensor, Z: Tensor) -> Tensor:
        # <z, gradient of sum w_i loss_i> has the derivative <z, g_i> by w_i.
        weights = torch.ones_like(losses, requires_grad=True)
        graph = GradientGraph((weights * losses).sum(), self.params.tensors)
        rows = []
        for z in Z.mT.contiguous():
            (row,) = graph.vjp(self.params.unflatten(z), [weights])
            rows.append(torch.zeros_like(losses) if row is None else row)
        return torch.stack(rows).detach()

    def total(self, examples: Examples, weights: np.ndarray) -> Tensor:
        """Return ``sum_i w_i g_i``, shape (n,)."""
        result = torch.zeros(self.params.n, dtype=self.params.dtype, device=self.params.device)
        for start, batch in examples.parts():
            w = weights[start : start + examples.size(batch)]
            if np.any(w):
                with self.evaluating():
                    result += self._gradient(batch, self._as_like(w))
        return result

    def split_batch(self, batch: Batch) -> tuple[Any, Any]:
        """Return inputs and target; the whole of a dict where nothing says how to split it."""
        if self.split is not None:
            return self.split(batch)
        return (batch, batch) if isinstance(batch, Mapping) else pair(batch)

    def forward(self, batch: Batch, values: dict[str, Tensor] | None = None) -> tuple[Any, Any]:
        """Return output and target."""
        inputs, target = self.split_batch(batch)
        try:
            return called(self.model, inputs, values), target
        except TypeError as error:
            if inputs is not batch:
                raise
            raise TypeError(
                f"{error}. A batch that is a dict is passed to the model as keyword arguments, "
                "and to the loss unchanged. For others pass `split`, a function (batch) -> "
                "(inputs, targets)."
            ) from error

    def _losses(self, batch: Batch, values: dict[str, Tensor] | None = None) -> Any:
        return per_example(self._raw_losses(batch, values))

    def _raw_losses(self, batch: Batch, values: dict[str, Tensor] | None = None) -> Any:
        output, target = self.forward(batch, values)
        return self.loss(output, target)

    def _gradient(self, batch: Batch, weights: Tensor | None) -> Tensor:
        losses = self._losses(batch)
        return self._flat_gradient((losses if weights is None else weights * losses).sum())

    def _flat_gradient(self, value: Tensor, *, retain_graph: bool = False) -> Tensor:
        with explained():
            grads = autograd.grad(
                value, self.params.tensors, retain_graph=retain_graph, allow_unused=True
            )
        return self.params.flatten(grads)

    def _gradients_at_once(self, batch: Batch) -> Tensor:
        return gradients_at_once(self._losses, self.names, self.params.tensors, batch)

    def _as_like(self, values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=self.params.dtype, device=self.params.device)


def _names(model: nn.Module, params: Parameters) -> list[str]:
    """Return the name in the model of each tensor."""
    known = {id(tensor): name for name, tensor in model.named_parameters()}
    names = []
    tensors = params.sharded or params.tensors
    for tensor, place in zip(tensors, params.names, strict=True):
        if id(tensor) not in known:
            raise ValueError(
                f"`params` must be parameters of `model`; {place!r} is none of them. Pass a "
                "submodule, or a list of tensors from model.parameters()."
            )
        names.append(known[id(tensor)])
    return names
