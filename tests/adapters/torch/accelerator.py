"""A device that is not there: what leaves it is counted, and what mixes with the host's fails.

Its tensors claim to lie on torch's device ``meta`` and hold their numbers beside it, so that a
program for an accelerator runs on any machine, its gradients too. As on CUDA, an operation on
tensors here and there is refused, but for numbers (0-d tensors) and for indices.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

AWAY = torch.device("meta")
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
WAITING = {"nonzero", "masked_select", "unique_dim", "_unique2", "equal"}


class Away(Tensor):
    """A tensor on the device; `held` is on the host."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Away:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=AWAY,
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return emulated(func, args, kwargs or {})


class Transfers(TorchDispatchMode):
    """Counts what an accelerator, emulated or of CUDA, sends to the host.

    Attributes
    ----------
    reads : int
        Single numbers that the host waited for.
    copies : list of tuple
        Shapes of the tensors that were copied to the host.
    waits : Counter
        Other operations that make the host wait.
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0
        self.copies: list[tuple[int, ...]] = []
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        away, goes = placed(args, kwargs)
        name = name_of(func)
        if not away:
            pass
        elif name == "_local_scalar_dense":
            self.reads += 1
        elif name in WAITING:
            self.waits[name] += 1
        elif name == "_to_copy" and not goes:
            self.copies.append(tuple(args[0].shape))
        elif name == "copy_" and args[0].device.type == "cpu":
            self.copies.append(tuple(args[1].shape))
        return emulated(func, args, kwargs)


def name_of(func: Any) -> str:
    """Return the name of an operation, such as ``add``."""
    return str(func._schema.name.removeprefix("aten::"))


def placed(args: Any, kwargs: Any) -> tuple[list[Tensor], bool]:
    """Return the operands of an operation on a device, and whether its results lie on one."""
    given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    away = [x for x in given if x.device.type != "cpu"]
    device = kwargs.get("device")
    return away, bool(away) if device is None else torch.device(device).type != "cpu"


def emulated(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operation; one of the emulated device on the numbers held."""
    given = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    made = kwargs.get("device") is not None and torch.device(kwargs["device"]) == AWAY
    if not made and not any(isinstance(x, Away) for x in given):
        return func(*args, **kwargs)
    name, (away, goes) = name_of(func), placed(args, kwargs)
    here = [tuple(x.shape) for x in given if x.device.type == "cpu" and x.ndim > 0]
    if here and away and name not in {"_to_copy", "copy_", *INDEXING}:
        raise RuntimeError(f"`{name}` of tensors on two devices; on the host: {here}")
    args, kwargs = pytree.tree_map(lambda x: x.held if isinstance(x, Away) else x, (args, kwargs))
    if kwargs.get("device") is not None:
        kwargs["device"] = torch.device("cpu")
    result = func(*args, **kwargs)
    if name.endswith("_"):  # in place
        return given[0]
    return pytree.tree_map(lambda x: Away(x) if goes and isinstance(x, Tensor) else x, result)
