"""Types shared by the core."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np

Array: TypeAlias = Any
"""An array of any library that follows the array API standard."""

Scalar: TypeAlias = float | Array
"""A number, or a 0-d array, which may be traced."""

Indices: TypeAlias = Sequence[int] | Array
"""Distinct whole numbers, or an array of them, which may be traced."""

RNG: TypeAlias = int | Sequence[int] | np.random.Generator | None
"""A seed, a ``numpy.random.Generator``, or None for fresh entropy (SPEC 7)."""

Sampling: TypeAlias = Literal[
    "auto",
    "uniform",
    "diagonal",
    "diagonal_squared",
    "greedy",
    "rpcholesky",
    "gaussian",
    "krylov",
]
"""Which columns of an operator are taken."""


class LinearOperator(Protocol):
    """Anything with ``.shape`` that multiplies a block of vectors."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __matmul__(self, block: Array, /) -> Array: ...


class Solver(Protocol):
    """Settings of a solver: they become an inverse by ``prepare``."""

    def prepare(self, A: Any, *, rng: RNG = 0, b: Array | None = None) -> Any:
        """Return the inverse of `A`, a ``PreparedInverse``, perhaps with `b` in view."""
        ...


SolveFunction: TypeAlias = Callable[[Callable[[Array], Array], Array], Array]
"""A function ``solve(matvec, b) -> x`` in the place of settings."""
