"""Peak memory of the tensors in a block of code, on any device."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Within, the memory of all tensors that are made is counted until they are gone.

    Attributes
    ----------
    peak : int
        Bytes held at most at a time, beside what was there before. What a kernel takes for itself
        is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._held = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if _is_plain(x)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if _is_plain(tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in given and id(storage) not in self._alive:
                    self._count(storage)
        return result

    def _count(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()

        def gone(_: Any) -> None:
            self._held -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, gone)
        self._held += size
        self.peak = max(self.peak, self._held)


def _is_plain(x: Any) -> bool:
    """Whether `x` has memory of its own, which tensors without values and wrappers have not."""
    if not isinstance(x, Tensor) or hasattr(x, "__tensor_flatten__"):
        return False
    return x.untyped_storage().device.type != "meta"
