"""Tensors that make one vector: of one kind, and alike those that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def check_one_kind(
    tensors: Sequence[Tensor], names: Sequence[str], name: str, spread: bool
) -> None:
    """Raise unless `tensors` are real, of one dtype and device, and whole unless `spread`."""
    first = tensors[0]
    for tensor, place in zip(tensors, names, strict=True):
        if hasattr(tensor, "full_tensor") and not spread:
            raise TypeError(
                f"`{name}` must hold whole tensors; {place!r} is a DTensor, sharded over devices "
                "(by FSDP or tensor parallelism). Pass the `mesh` of the data, or gather it "
                "with full_tensor()."
            )
        if tensor.is_complex():
            raise TypeError(
                f"`{name}` must be real; {place!r} is {tensor.dtype}. "
                "Store its real and imaginary parts as two tensors."
            )
        if tensor.dtype != first.dtype:
            raise TypeError(
                f"`{name}` must have one dtype; {names[0]!r} is {first.dtype} and {place!r} is "
                f"{tensor.dtype}. Convert one of them, or freeze it with requires_grad_(False)."
            )
        if tensor.device != first.device:
            raise ValueError(
                f"`{name}` must be on one device; {names[0]!r} is on {first.device} and {place!r} "
                f"on {tensor.device}. Move one of them, or freeze it with requires_grad_(False)."
            )


def check_alike(value: Any, like: Tensor, where: str) -> None:
    """Raise unless `value` is a tensor of the dtype and device of `like`."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{where} must be a torch.Tensor; got {type(value).__name__}.")
    if value.dtype != like.dtype:
        raise TypeError(
            f"{where} must have the dtype of the parameters, {like.dtype}; got {value.dtype}. "
            f"Convert it with .to({like.dtype})."
        )
    if value.device != like.device:
        raise ValueError(
            f"{where} must be on the device of the parameters, {like.device}; got {value.device}."
        )
