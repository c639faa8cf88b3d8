"""Types shared by the core."""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

Array: TypeAlias = Any
"""An array of any library that follows the array API standard."""

RNG: TypeAlias = Any
"""A seed, a ``numpy.random.Generator``, or None for fresh entropy (SPEC 7)."""


class LinearOperator(Protocol):
    """Anything with ``.shape`` that multiplies a block of vectors."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __matmul__(self, block: Array, /) -> Array: ...
