"""Derivatives of the loss of each example of a torch model."""

from __future__ import annotations

import copy
import numbers
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, autograd, nn

from lowrank_inverse.influence.checkpoint import digest
from lowrank_inverse.influence.dataset import Examples
from lowrank_inverse_torch.curvature.operators import (
    GaussNewtonOperator,
    GradientGraph,
    HessianOperator,
)
from lowrank_inverse_torch.influence.calls import (
    called,
    in_float32,
    joined_outputs,
    pair,
    rows_of,
    to_evaluation,
)
from lowrank_inverse_torch.influence.data import LOW_PRECISION, as_examples, flatten
from lowrank_inverse_torch.model_guard import RandomStates, explained, untouched
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
        self.model, self.loss, self.split = model, loss, split
        self.params: Parameters = as_parameters(model if params is None else params)
        self.chunk_size = chunk_size
        self.has_outputs = True
        self._names = _names(model, self.params)
        self._batched: bool | None = None
        self.is_widened = self.params.dtype in LOW_PRECISION
        if self.is_widened:
            self.model = in_float32(model)
            parameters = dict(self.model.named_parameters())
            self.params = as_parameters([parameters[name] for name in self._names])
        self.n, self.like = self.params.n, self.params.flatten(self.params.tensors)[:0]
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
                "made, which holds the curvature at the earlier ones. Make it anew."
            )
        with untouched(self.params.tensors, [self.model]) as states:
            to_evaluation(self.model)
            yield states
        self._versions = [tensor._version for tensor in self._watched]

    def vector(self) -> Tensor:
        """Return the parameters, shape (n,)."""
        return self.params.flatten(self.params.tensors)

    def ridge(self, ridge: Any) -> Any:
        """Return a number, a vector, or a dict of them by parameter, as number or vector."""
        if isinstance(ridge, numbers.Real):
            return ridge
        if not isinstance(ridge, Mapping):
            vector = self._as_like(ridge)
            if vector.shape not in ((), (self.n,)):
                raise ValueError(
                    f"`ridge` must be a number, an array of shape ({self.n},), or a dict by name "
                    f"of parameter; got shape {tuple(vector.shape)}."
                )
            return vector
        if set(ridge) != set(self._names):
            raise ValueError(
                f"`ridge` must have one entry for each parameter, {self._names}; got {list(ridge)}."
            )
        pairs = zip(self._names, self.params.tensors, strict=True)
        return self.params.flatten(
            [self._as_like(ridge[name]).expand_as(tensor) for name, tensor in pairs]
        )

    def fingerprint(self) -> str:
        """Hash all parameters and buffers."""
        return digest(*self.model.parameters(), *self.model.buffers())

    def examples(self, data: Any, name: str, batch_size: int | None, budget: int) -> Examples:
        """Return a data set as examples."""
        return as_examples(
            data,
            name,
            like=self.like,
            widen=self.is_widened,
            batch_size=batch_size,
            memory_budget=budget,
        )

    def measuring(self, loss: Callable[[Any, Any], Tensor]) -> TorchBackend:
        """Return the same with another loss."""
        other = copy.copy(self)
        other.loss, other._batched = loss, None
        return other

    def losses(self, batch: Any, *, anew: bool = False) -> Any:
        """Return the loss of each example, detached; `anew` with another random state."""
        with self.evaluating() as states, torch.no_grad():
            if anew:
                for device in states:
                    torch.rand(1, device=device)
            return self._losses(batch)

    def operator(
        self, examples: Examples, curvature: str, weights: np.ndarray | None = None
    ) -> HessianOperator | GaussNewtonOperator:
        """Return the weighted curvature over all examples, divided by their number."""
        starts = np.cumsum([0, *examples.sizes])
        scale = len(examples) / examples.num  # the operators take the mean over batches

        def weighted(losses: Tensor, i: int) -> Tensor:
            if weights is None:
                return scale * losses.sum()
            return scale * (self._as_like(weights[starts[i] : starts[i + 1]]) * losses).sum()

        def losses_of(i: int) -> Tensor:
            return loss_at(outputs_of(i), i)

        def outputs_of(i: int) -> Tensor:
            to_evaluation(self.model)  # within the operator's own guard
            rest.clear()
            output, target = self._forward(examples.get(i))
            joined, separate = joined_outputs(output)
            rest[i] = separate, target
            return joined

        def loss_at(z: Tensor, i: int) -> Tensor:
            separate, target = rest[i]
            return self.loss(separate(z), target)

        # Of the batch whose graph is being built: its targets, and the way back to its outputs.
        rest: dict[int, tuple[Callable[[Tensor], Any], Any]] = {}
        options: dict[str, Any] = {"chunk_size": self.chunk_size, "module": self.model}

        def each(function: Callable[..., Tensor]) -> list[Any]:
            return [partial(function, i=i) for i in range(len(examples))]

        if curvature == "hessian":
            losses = each(lambda i: weighted(losses_of(i), i))
            return HessianOperator(losses, self.params, **options)
        if curvature == "ggn":
            outer = each(lambda z, i: weighted(loss_at(z, i), i))
            return GaussNewtonOperator(outer, each(outputs_of), self.params, **options)
        # J^T diag(w) J of the losses themselves: the curvature of half their squares
        halves = each(lambda z, i: weighted(z**2, i) / 2)
        operator = GaussNewtonOperator(halves, each(losses_of), self.params, **options)
        w = np.ones(examples.num) if weights is None else weights
        operator.gradient = self.total(examples, w) / examples.num
        return operator

    def gradients(self, batch: Any) -> Tensor:
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
                    result += self._gradient(batch, self._as_like(w))
        return result

    def _forward(self, batch: Any, values: dict[str, Tensor] | None = None) -> tuple[Any, Any]:
        """Return output and target; the whole of a dict where nothing says how to split it."""
        if self.split is not None:
            inputs, target = self.split(batch)
        elif isinstance(batch, Mapping):
            inputs, target = batch, batch
        else:
            inputs, target = pair(batch)
        try:
            return called(self.model, inputs, values), target
        except TypeError as error:
            if inputs is not batch:
                raise
            raise TypeError(
                f"{error}. A batch that is a dict is given to the model as keywords, and to the "
                "loss as it is: give `split`, a function (batch) -> (inputs, targets), for others."
            ) from error

    def _losses(self, batch: Any, values: dict[str, Tensor] | None = None) -> Tensor:
        output, target = self._forward(batch, values)
        return self.loss(output, target)

    def _gradient(self, batch: Any, weights: Tensor | None) -> Tensor:
        losses = self._losses(batch)
        total = (losses if weights is None else weights * losses).sum()
        with explained():
            grads = autograd.grad(total, self.params.tensors, allow_unused=True)
        return self.params.flatten(grads)

    def _gradients_at_once(self, batch: Any) -> Tensor:
        """Return one gradient in each row, shape (size, n), by vmap."""
        leaves, rebuild = flatten(batch)
        has_rows = [isinstance(x, Tensor) and x.ndim > 0 for x in leaves]

        def loss_of_one(values: dict[str, Tensor], *rows: Any) -> Tensor:
            given = iter(rows)
            alone = [
                next(given).unsqueeze(0) if has else x
                for x, has in zip(leaves, has_rows, strict=True)
            ]
            return self._losses(rebuild(alone), values).sum()

        values = {
            name: tensor.detach()
            for name, tensor in zip(self._names, self.params.tensors, strict=True)
        }
        rows = [x for x, has in zip(leaves, has_rows, strict=True) if has]
        gradient = torch.func.vmap(torch.func.grad(loss_of_one), in_dims=(None, *(0 for _ in rows)))
        grads = gradient(values, *rows)
        return torch.cat([grads[name].flatten(1) for name in self._names], dim=1).detach()

    def _as_like(self, values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=self.params.dtype, device=self.params.device)


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
