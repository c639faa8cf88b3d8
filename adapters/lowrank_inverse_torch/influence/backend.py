"""Derivatives of the loss of each example of a torch model."""

from __future__ import annotations

import copy
import numbers
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, autograd, nn

from lowrank_inverse.arrays.checks import no_entries
from lowrank_inverse.arrays.spread import local, rows_beside
from lowrank_inverse.influence.checkpoint import digest
from lowrank_inverse.influence.dataset import Examples
from lowrank_inverse.influence.loss_checks import check_tokens
from lowrank_inverse_torch.allocations import Allocations
from lowrank_inverse_torch.curvature.gauss_newton import GaussNewtonOperator
from lowrank_inverse_torch.curvature.gradient_graph import GradientGraph
from lowrank_inverse_torch.curvature.hessian import HessianOperator
from lowrank_inverse_torch.influence.calls import (
    called,
    in_float32,
    pair,
    per_example,
    rows_of,
    to_evaluation,
)
from lowrank_inverse_torch.influence.data import LOW_PRECISION, as_examples, flatten
from lowrank_inverse_torch.influence.gradients_at_once import gradients_at_once
from lowrank_inverse_torch.influence.mean_curvature import mean_curvature
from lowrank_inverse_torch.model_guard import (
    RandomStates,
    explained,
    twice_differentiable_attention,
    untouched,
)
from lowrank_inverse_torch.parameters import Parameters, as_parameters

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from lowrank_inverse_torch.mesh.processes import Processes

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
        mesh: DeviceMesh | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module; got {type(model).__name__}.")
        if not callable(loss):
            raise TypeError(
                "`loss` must be a function (output, target) -> losses, shape (size,); "
                f"got {type(loss).__name__}."
            )
        self.model, self.loss, self.split = model, loss, split
        self.params: Parameters = as_parameters(
            model if params is None else params, gather=mesh is not None
        )
        self.chunk_size = chunk_size
        self.has_outputs = True
        self._names = _names(model, self.params)
        self._batched: bool | None = None
        self.is_widened = self.params.dtype in LOW_PRECISION
        if self.is_widened and self.params.sharded:
            raise TypeError(
                f"fully sharded parameters must be float32 or float64; got {self.params.dtype}. "
                "Keep them in float32, and give fully_shard a MixedPrecisionPolicy."
            )
        if self.is_widened:
            self.model = in_float32(model)
            parameters = dict(self.model.named_parameters())
            self.params = as_parameters([parameters[name] for name in self._names])
        self._guarded = self.params.modules if self.params.sharded else (self.model,)
        self.n, self.mesh = self.params.n, mesh
        self.group: Processes | None = None
        self.like = no_entries(self.vector())
        if mesh is not None:
            from lowrank_inverse_torch.mesh.processes import Processes

            self.group = group = Processes(mesh, self.params)
            self.like = no_entries(group.laid(self.vector()))
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
        guard = untouched(self.params.tensors, self._guarded)
        with guard as states, twice_differentiable_attention():
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
            return vector if vector.ndim == 0 else rows_beside(vector, self.like)
        if set(ridge) != set(self._names):
            raise ValueError(
                f"`ridge` must have one entry for each parameter, {self._names}; got {list(ridge)}."
            )
        pairs = zip(self._names, self.params.tensors, strict=True)
        parts = [self._as_like(ridge[name]).expand_as(tensor) for name, tensor in pairs]
        return rows_beside(self.params.flatten(parts), self.like)

    def fingerprint(self) -> str:
        """Hash all parameters and buffers."""
        return digest(*self.model.parameters(), *self.model.buffers())

    def examples(self, data: Any, name: str, batch_size: int | None, budget: int) -> Examples:
        """Return a data set as examples."""
        return as_examples(
            data,
            name,
            like=local(self.like),
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
        operator = mean_curvature(
            curvature,
            examples,
            None if weights is None else self._as_like(weights),
            model=self.model,
            guarded=self._guarded,
            params=self.params,
            forward=self._forward,
            loss=self.loss,
            chunk_size=self.chunk_size,
            mesh=self.mesh,
            group=self.group,
        )
        if curvature == "empirical_fisher":
            w, group = np.ones(examples.num) if weights is None else weights, self.group
            if group is None:
                operator.gradient = self.total(examples, w) / examples.num
            else:
                num = sum(group.everyone(examples.num))
                operator.gradient = group.spread(group.own_sum(self.total(examples, w) / num))
        return operator

    def product_bytes(self, batch: Any, curvature: str) -> int:
        """Measure the memory of a product with the curvature of one batch."""
        one = self.examples([batch], "batch", None, 0)
        with Allocations() as allocations:
            _ = self.operator(one, curvature) @ torch.ones_like(self.vector())
        return allocations.peak

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
            return self._slopes(self._losses(batch), Z)

    def token_slopes(self, batch: Any, Z: Tensor) -> Tensor:
        """Return the same for the loss of each token: (m, size, tokens)."""
        with self.evaluating():
            return self._slopes(check_tokens(self._raw_losses(batch)), Z)

    def token_gradients(self, batch: Any) -> Tensor:
        """Return the gradient of each token's loss in a batch of one example: (n, tokens)."""
        with self.evaluating():
            losses = check_tokens(self._raw_losses(batch))[0]
            rows = []
            for i, loss in enumerate(losses):
                with explained():
                    grads = autograd.grad(
                        loss,
                        self.params.tensors,
                        retain_graph=i + 1 < len(losses),
                        allow_unused=True,
                    )
                rows.append(self.params.flatten(grads))
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
        result = torch.zeros(self.n, dtype=self.params.dtype, device=self.params.device)
        for start, batch in examples.parts():
            w = weights[start : start + examples.size(batch)]
            if np.any(w):
                with self.evaluating():
                    result += self._gradient(batch, self._as_like(w))
        return result

    def split_batch(self, batch: Any) -> tuple[Any, Any]:
        """Return inputs and target; the whole of a dict where nothing says how to split it."""
        if self.split is not None:
            return self.split(batch)
        return (batch, batch) if isinstance(batch, Mapping) else pair(batch)

    def _forward(self, batch: Any, values: dict[str, Tensor] | None = None) -> tuple[Any, Any]:
        """Return output and target."""
        inputs, target = self.split_batch(batch)
        try:
            return called(self.model, inputs, values), target
        except TypeError as error:
            if inputs is not batch:
                raise
            raise TypeError(
                f"{error}. A batch that is a dict is given to the model as keywords, and to the "
                "loss as it is: give `split`, a function (batch) -> (inputs, targets), for others."
            ) from error

    def _losses(self, batch: Any, values: dict[str, Tensor] | None = None) -> Any:
        return per_example(self._raw_losses(batch, values))

    def _raw_losses(self, batch: Any, values: dict[str, Tensor] | None = None) -> Any:
        output, target = self._forward(batch, values)
        return self.loss(output, target)

    def _gradient(self, batch: Any, weights: Tensor | None) -> Tensor:
        losses = self._losses(batch)
        return self._flat_gradient((losses if weights is None else weights * losses).sum())

    def _flat_gradient(self, value: Tensor, *, retain_graph: bool = False) -> Tensor:
        with explained():
            grads = autograd.grad(
                value, self.params.tensors, retain_graph=retain_graph, allow_unused=True
            )
        return self.params.flatten(grads)

    def _gradients_at_once(self, batch: Any) -> Tensor:
        return gradients_at_once(self._losses, self._names, self.params.tensors, batch)

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
                f"`params` must be parameters of `model`; {place!r} is none of them. Give a "
                "submodule, or a list of tensors from model.parameters()."
            )
        names.append(known[id(tensor)])
    return names
