"""Gradients of the outer loss with respect to parameters and hyperparameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, autograd, nn

from lowrank_inverse_torch.bilevel.ridge import sums
from lowrank_inverse_torch.curvature.gradient_graph import dense, refuse_cut_graphs
from lowrank_inverse_torch.model_guard import evaluate_loss, explained, untouched
from lowrank_inverse_torch.parameters import Parameters

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def outer_gradients(
    outer_loss: Any,
    params: Parameters,
    hparams: Parameters,
    modules: Sequence[nn.Module],
    mesh: DeviceMesh | None,
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the gradients of the outer loss with respect to `params`, flat, and `hparams`."""
    losses = list(outer_loss) if isinstance(outer_loss, (list, tuple)) else [outer_loss]
    if mesh is not None:
        return _shared_outer_gradients(losses, params, hparams, modules, mesh)
    if not losses:
        raise ValueError("`outer_loss` must hold at least one closure; got an empty list.")
    totals = _outer_totals(losses, params, hparams, modules)
    means = [None if total is None else total / len(losses) for total in totals]
    by_params, by_hparams = means[: len(params.tensors)], means[len(params.tensors) :]
    if all(grad is None for grad in by_params):
        raise ValueError(_INDEPENDENT)
    return params.flatten(by_params), by_hparams


_INDEPENDENT = (
    "`outer_loss` must depend on `params`; it depends on none of the tensors there. Was it "
    "evaluated under torch.no_grad(), detached, or with another model?"
)


def _shared_outer_gradients(
    losses: list[Any],
    params: Parameters,
    hparams: Parameters,
    modules: Sequence[nn.Module],
    mesh: DeviceMesh,
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the gradients of the mean over the closures of all processes."""
    from lowrank_inverse_torch.mesh.processes import Processes

    processes = Processes(mesh, params)
    totals, error = processes.attempt(lambda: _outer_totals(losses, params, hparams, modules))
    totals = totals or [None] * (len(params.tensors) + len(hparams.tensors))
    by_params, by_hparams = totals[: len(params.tensors)], totals[len(params.tensors) :]
    by_hparams = processes.summed_each(by_hparams, hparams.tensors, error)
    depends = any(grad is not None for grad in by_params)
    counts = processes.total(
        torch.tensor([float(len(losses)), float(depends)], dtype=params.dtype, device=params.device)
    )
    if counts[0] == 0:
        raise ValueError("`outer_loss` must hold a closure in some process; all lists are empty.")
    if counts[1] == 0:
        raise ValueError(_INDEPENDENT)
    mean = params.flatten(by_params) / counts[0]
    return (
        processes.spread(processes.own_sum(mean)),
        [None if grad is None else grad / counts[0] for grad in by_hparams],
    )


def _outer_totals(
    losses: list[Any], params: Parameters, hparams: Parameters, modules: Sequence[nn.Module]
) -> list[Tensor | None]:
    """Return the sums of the gradients of some outer losses by `params` and by `hparams`."""
    tensors = [*params.tensors, *hparams.tensors]
    totals: list[Tensor | None] = [None] * len(tensors)
    with untouched(tensors, modules), explained():
        for loss in losses:
            value = _settled(loss, params)
            if value.requires_grad:
                refuse_cut_graphs([value])
                # Retained, for closures may share what was computed outside of them.
                grads = autograd.grad(value, tensors, retain_graph=True, allow_unused=True)
                totals = sums(totals, dense(grads))
    return totals


def _settled(loss: Any, params: Parameters) -> Tensor:
    """Evaluate the outer loss, twice if it writes to `params`: they must have come to rest."""
    versions = [tensor._version for tensor in params.tensors]
    value = evaluate_loss(loss, name="outer_loss")
    if [tensor._version for tensor in params.tensors] == versions:
        return value
    # Embedding(max_norm=...) has scaled its rows, and leaves them alone from now on.
    before = params.flatten(params.tensors)
    value = evaluate_loss(loss, name="outer_loss")
    if not torch.equal(params.flatten(params.tensors), before):
        raise RuntimeError(
            "`outer_loss` changed `params` in place. Pass a closure that returns the loss and "
            "takes no step."
        )
    return value
