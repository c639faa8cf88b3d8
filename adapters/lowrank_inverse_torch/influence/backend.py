"""What influence functions need of a live torch model and its loss."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from lowrank_inverse._typing import Batch, Data, PyTree
from lowrank_inverse.arrays.checks import no_entries
from lowrank_inverse.arrays.spread import local, rows_beside
from lowrank_inverse.influence.dataset import Examples
from lowrank_inverse_torch.allocations import Allocations
from lowrank_inverse_torch.curvature.gauss_newton import GaussNewtonOperator
from lowrank_inverse_torch.curvature.hessian import HessianOperator
from lowrank_inverse_torch.influence.data import as_examples
from lowrank_inverse_torch.influence.example_losses import ExampleLosses, Split
from lowrank_inverse_torch.influence.mean_curvature import mean_curvature

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from lowrank_inverse_torch.mesh.processes import Processes


class TorchBackend(ExampleLosses):
    """What the core needs of a live model and a loss of each example; see its `Backend`."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        params: PyTree,
        split: Split | None,
        chunk_size: int,
        mesh: DeviceMesh | None = None,
    ) -> None:
        super().__init__(model, loss, params, split, gather=mesh is not None)
        self.chunk_size, self.n, self.mesh = chunk_size, self.params.n, mesh
        self.has_outputs = True
        self.group: Processes | None = None
        self.like = no_entries(self.vector())
        if mesh is not None:
            from lowrank_inverse_torch.mesh.processes import Processes

            self.group = group = Processes(mesh, self.params)
            self.like = no_entries(group.laid(self.vector()))

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
        if set(ridge) != set(self.names):
            raise ValueError(
                f"`ridge` must have one entry for each parameter, {self.names}; got {list(ridge)}."
            )
        pairs = zip(self.names, self.params.tensors, strict=True)
        parts = [self._as_like(ridge[name]).expand_as(tensor) for name, tensor in pairs]
        return rows_beside(self.params.flatten(parts), self.like)

    def examples(self, data: Data, name: str, batch_size: int | None, budget: int) -> Examples:
        """Return a data set as examples."""
        return as_examples(
            data,
            name,
            like=local(self.like),
            widen=self.is_widened,
            batch_size=batch_size,
            memory_budget=budget,
        )

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
            forward=self.forward,
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

    def product_bytes(self, batch: Batch, curvature: str) -> int:
        """Measure the memory of a product with the curvature of one batch."""
        one = self.examples([batch], "batch", None, 0)
        with Allocations() as allocations:
            _ = self.operator(one, curvature) @ torch.ones_like(self.vector())
        return allocations.peak
