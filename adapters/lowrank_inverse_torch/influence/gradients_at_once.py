"""The gradients of the examples of a batch by one vectorised backward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_inverse._typing import Batch
from lowrank_inverse_torch.influence.data import flatten


def gradients_at_once(
    losses: Callable[[Any, dict[str, Tensor]], Tensor],
    names: Sequence[str],
    tensors: Sequence[Tensor],
    batch: Batch,
) -> Tensor:
    """Return the gradient of each example in a row, shape (size, n), by vmap.

    `losses` is called with one example and the parameters by their names.
    """
    leaves, rebuild = flatten(batch)
    has_rows = [isinstance(x, Tensor) and x.ndim > 0 for x in leaves]

    def loss_of_one(values: dict[str, Tensor], *rows: Any) -> Tensor:
        given = iter(rows)
        alone = [
            next(given).unsqueeze(0) if has else x for x, has in zip(leaves, has_rows, strict=True)
        ]
        return losses(rebuild(alone), values).sum()

    values = {name: tensor.detach() for name, tensor in zip(names, tensors, strict=True)}
    rows = [x for x, has in zip(leaves, has_rows, strict=True) if has]
    gradient = torch.func.vmap(torch.func.grad(loss_of_one), in_dims=(None, *(0 for _ in rows)))
    grads = gradient(values, *rows)
    return torch.cat([grads[name].flatten(1) for name in names], dim=1).detach()
