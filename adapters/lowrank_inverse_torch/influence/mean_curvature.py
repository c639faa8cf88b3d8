"""The mean curvature over the examples of a data set as an operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn

from lowrank_inverse.influence.dataset import Examples
from lowrank_inverse_torch.curvature.gauss_newton import GaussNewtonOperator
from lowrank_inverse_torch.curvature.hessian import HessianOperator
from lowrank_inverse_torch.influence.batch_loss import BatchLoss
from lowrank_inverse_torch.influence.calls import per_example, to_evaluation
from lowrank_inverse_torch.model_guard import twice_differentiable_attention
from lowrank_inverse_torch.parameters import Parameters

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from lowrank_inverse_torch.mesh.processes import Processes


def mean_curvature(
    curvature: str,
    examples: Examples,
    weights: Tensor | None,
    *,
    model: nn.Module,
    guarded: Sequence[nn.Module],
    params: Parameters,
    forward: Callable[[Any], tuple[Any, Any]],
    loss: Callable[[Any, Any], Tensor],
    chunk_size: int,
    mesh: DeviceMesh | None = None,
    group: Processes | None = None,
) -> HessianOperator | GaussNewtonOperator:
    """Return ``1 / num * sum_i w_i C_i``; `forward` returns outputs and targets of a batch.

    On a mesh, the sum is over the examples of all processes of the group.
    """
    starts = np.cumsum([0, *examples.sizes])
    counts = [(len(examples), examples.num)]
    counts = counts if group is None else group.everyone(counts[0])
    num_batches, num = map(sum, zip(*counts, strict=True))
    scale = num_batches / num  # the operators take the mean over batches
    options: dict[str, Any] = {"chunk_size": chunk_size, "module": guarded, "mesh": mesh}

    def weighted(losses: Tensor, first: int, i: int) -> Tensor:
        if weights is None:
            return scale * losses.sum()
        start = starts[i] + first
        return scale * (weights[start : start + len(losses)] * losses).sum()

    def halved_squares(losses: Tensor, i: int) -> Tensor:
        return weighted(losses**2, 0, i) / 2

    def outputs_of(i: int) -> tuple[Any, Any]:
        to_evaluation(model)  # within the operator's own guard
        return forward(examples.get(i))

    def losses_of(i: int) -> Tensor:
        return per_example(loss(*outputs_of(i)))

    def used_of(i: int) -> Tensor:
        return batch_losses[i].take(*outputs_of(i), examples.sizes[i])

    def each(function: Callable[..., Any]) -> list[Any]:
        return [partial(function, i=i) for i in range(len(examples))]

    with twice_differentiable_attention():
        if curvature == "hessian":
            return HessianOperator(each(lambda i: weighted(losses_of(i), 0, i)), params, **options)
        if curvature == "ggn":
            batch_losses = [BatchLoss(loss, total) for total in each(weighted)]
            return GaussNewtonOperator(batch_losses, each(used_of), params, **options)
        # J^T diag(w) J of the losses themselves: the curvature of half their squares
        return GaussNewtonOperator(each(halved_squares), each(losses_of), params, **options)
