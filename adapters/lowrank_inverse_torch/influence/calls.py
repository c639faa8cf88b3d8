"""Calls of a user's model: its arguments, its outputs, and what makes them differentiable."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_inverse._typing import Batch, PyTree
from lowrank_inverse_torch.influence.data import LOW_PRECISION, flatten


def called(model: nn.Module, inputs: Any, values: dict[str, Tensor] | None = None) -> Any:
    """Call the model: a tuple or list spreads over its arguments, a dict over its keywords."""
    args = tuple(inputs) if isinstance(inputs, (tuple, list)) else ()
    kwargs = dict(inputs) if isinstance(inputs, Mapping) else {}
    if not args and not kwargs:
        args = (inputs,)
    if values is None:
        return model(*args, **kwargs)
    return torch.func.functional_call(model, values, args, kwargs)


def in_float32(model: nn.Module) -> nn.Module:
    """Return a copy that computes in float32 at the weights as they are."""
    model = copy.deepcopy(model)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype in LOW_PRECISION:
            tensor.data = tensor.data.float()
    return model


def pair(batch: Batch) -> tuple[Any, Any]:
    """Return inputs and targets of a batch that is a pair."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        kind = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else batch
        raise ValueError(
            f"a batch must be a pair (inputs, targets); got {kind}. Pass `split`, a function "
            "(batch) -> (inputs, targets). A dict is passed to model and loss unchanged."
        )
    return batch[0], batch[1]


def rows_of(batch: Batch, start: int, stop: int) -> Any:
    """Return some examples of a batch."""
    leaves, rebuild = flatten(batch)
    return rebuild([x[start:stop] if isinstance(x, Tensor) and x.ndim > 0 else x for x in leaves])


def has_rows(tree: PyTree, size: int) -> bool:
    """Whether all tensors of a structure have one row for each of `size` examples."""
    return all(x.shape[0] == size for x in flatten(tree)[0] if isinstance(x, Tensor) and x.ndim > 0)


def per_example(losses: Any) -> Any:
    """Return one loss for each example: those of its tokens are summed."""
    return losses.sum(1) if isinstance(losses, Tensor) and losses.ndim == 2 else losses


def to_evaluation(model: nn.Module) -> None:
    """Switch all modules to evaluation."""
    # Not model.eval(): what a module does besides in its own train() could not be undone.
    for part in model.modules():
        part.training = False
