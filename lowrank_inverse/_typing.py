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

    def prepare(self, A: OperatorLike, *, rng: RNG = 0, b: Array | None = None) -> Any:
        """Return the inverse of `A`, a ``PreparedInverse``, perhaps with `b` in view."""
        ...


SolveFunction: TypeAlias = Callable[[Callable[[Array], Array], Array], Array]
"""A function ``solve(matvec, b) -> x`` in the place of settings."""

OperatorLike: TypeAlias = Any
"""What ``as_operator`` takes: an array, a sparse matrix, or anything with shape and ``@``."""

PyTree: TypeAlias = Any
"""Arrays, or nested containers of them; in torch a module, too."""

Batch: TypeAlias = Any
"""One batch of examples: arrays, or a tuple, dict or other container of them."""

Data: TypeAlias = Any
"""A set of examples: arrays, a list of batches, or an iterable that gives the same ones again."""

MatrixLike: TypeAlias = Any
"""What scikit-learn takes as X: an array, a data frame or a SciPy sparse matrix."""

ArrayLike: TypeAlias = Any
"""What scikit-learn takes as targets and weights: an array, a list or a column of a data frame."""
