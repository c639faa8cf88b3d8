"""Sources of the columns of a Nyström approximation, which can grow."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from array_api_compat import is_torch_array

from lowrank_inverse._typing import RNG, Array, OperatorLike, Sampling
from lowrank_inverse.arrays.checks import check_finite, check_rng
from lowrank_inverse.arrays.conversion import rows_like, to_host
from lowrank_inverse.arrays.graph import constant, is_recorded
from lowrank_inverse.arrays.linalg import tall_dot
from lowrank_inverse.iterative.krylov_space import KrylovSpace
from lowrank_inverse.low_rank.column_sampling import sample_columns
from lowrank_inverse.low_rank.pivoting.factorization import METHODS, Pivoting
from lowrank_inverse.operators.columns import (
    empty_like,
    finite_columns,
    index_chunks,
    joined,
    known_trace,
)


class Sketch(NamedTuple):
    """All that a Nyström approximation is made of: ``C = A S`` and ``W = S.T A S``."""

    columns: Array
    indices: np.ndarray | None = None
    core: Array | None = None
    """W, where it is not the rows of C at `indices`."""
    trace: float | None = None
    """Of A, where known."""
    num_products: int = 0
    witness: tuple[int, float] | None = None
    """Row of a negative residual diagonal entry, and the diagonal entry of A there."""
    vectors: Array | None = None
    """S, where its columns are orthonormal and of the Krylov space of a right-hand side."""


class DrawnColumns:
    """Columns in an order drawn beforehand."""

    exhausted, residual_trace = False, None

    def __init__(
        self, A: OperatorLike, order: np.ndarray, trace: float | None, chunk_size: int | None
    ):
        self._A, self._order, self.trace, self._chunk_size = A, order, trace, chunk_size
        self.size = 0
        self._parts: list[Array] = []

    def grow(self, count: int, *, trace: float = 0.0) -> None:
        """Read columns up to `count`; `trace` is not used."""
        if count > self.size:
            wanted = self._order[self.size : count]
            self._parts.append(finite_columns(self._A, wanted, chunk_size=self._chunk_size))
            self.size = count

    def sketch(self) -> Sketch:
        """Return what was read."""
        C = joined(self._parts)
        return Sketch(C, self._order[: self.size], trace=self.trace, num_products=self.size)


class PivotedColumns:
    """Columns chosen by pivoted Cholesky."""

    def __init__(self, A: OperatorLike, method: str, chunk_size: int | None, rng: RNG) -> None:
        self._A = A
        self._pivoting = Pivoting(A, method, chunk_size=chunk_size, rng=rng)
        self.trace: float | None = self._pivoting.trace

    @property
    def size(self) -> int:
        """Columns there are."""
        return int(self._pivoting.pivots.size)

    @property
    def exhausted(self) -> bool:
        """Whether the columns left are rounding."""
        return self._pivoting.exhausted

    @property
    def residual_trace(self) -> float:
        """What the pivots left over."""
        return self._pivoting.residual_trace

    def grow(self, count: int, *, trace: float = 0.0) -> None:
        """Add pivots up to `count`, or until the residual trace is at most `trace`."""
        self._pivoting.grow(count, trace=trace)

    def sketch(self) -> Sketch:
        """Return what was read; for a diagonal of zeros, the first column all the same."""
        found = self._pivoting
        indices, C, witness = found.pivots, found.columns, found.witness
        num_products = found.num_products
        if indices.size == 0:
            indices = np.zeros(1, dtype=np.int64)
            C = finite_columns(self._A, indices)
            num_products += 1
            entries = np.abs(to_host(C)[:, 0])
            if witness is None and np.any(entries > 0):  # beside a zero on the diagonal
                witness = int(np.argmax(entries))
            witness = None if witness == 0 else witness  # W shows it
        border = None if witness is None else (witness, float(found.initial[witness]))
        return Sketch(C, indices, trace=self.trace, num_products=num_products, witness=border)


class GaussianSketch:
    """Products with orthonormal Gaussian vectors, drawn on the host."""

    exhausted, residual_trace = False, None

    def __init__(
        self, A: OperatorLike, chunk_size: int | None, rng: RNG, trace: float | None = None
    ):
        self._A, self._chunk_size, self.trace = A, chunk_size, trace
        self._generator = check_rng(rng)
        self._basis = np.zeros((int(A.shape[0]), 0))
        self._parts: list[tuple[Array, Array]] = []

    @property
    def size(self) -> int:
        """Vectors multiplied."""
        return int(self._basis.shape[1])

    def grow(self, count: int, *, trace: float = 0.0) -> None:
        """Multiply vectors up to `count`; `trace` is not used."""
        if count <= self.size:
            return
        fresh = self._generator.standard_normal((self._basis.shape[0], count - self.size))
        for _ in range(2):  # once is not enough in floating point
            fresh = np.linalg.qr(fresh - self._basis @ (self._basis.T @ fresh))[0]
        self._basis = np.concatenate([self._basis, fresh], axis=1)
        empty = empty_like(self._A)
        for chunk in index_chunks(np.arange(fresh.shape[1]), self._chunk_size):
            vectors = rows_like(fresh[:, chunk], empty)
            Y = self._A @ vectors
            check_finite("products of A", Y)
            self._parts.append((vectors, Y))

    def sketch(self) -> Sketch:
        """Return the products, and W."""
        vectors, Y = (joined([part[i] for part in self._parts]) for i in (0, 1))
        core = tall_dot(vectors, Y)
        return Sketch(Y, core=core, trace=self.trace, num_products=self.size)


class KrylovSketch:
    """Products along the Krylov space of right-hand sides."""

    residual_trace = None

    def __init__(
        self, A: OperatorLike, start: Array | None, rng: RNG, trace: float | None = None
    ) -> None:
        self._A, self.trace = A, trace
        self._space = KrylovSpace(A, start, rng)

    @property
    def size(self) -> Any:
        """Products taken."""
        return self._space.size

    @property
    def exhausted(self) -> bool:
        """Whether the space is invariant."""
        return self._space.exhausted

    def grow(self, count: int, *, trace: float = 0.0) -> None:
        """Take products up to `count`; `trace` is not used."""
        self._space.grow(count)

    def sketch(self) -> Sketch:
        """Return the products, and W."""
        S, Y = self._space.vectors, self._space.products
        if is_torch_array(Y) and is_recorded(Y):  # of A in a fixed space, not of the steps to it
            S = constant(S)
            Y = self._A @ S
        check_finite("products of A", Y)
        return Sketch(Y, core=tall_dot(S, Y), trace=self.trace, num_products=self.size, vectors=S)


Source = DrawnColumns | PivotedColumns | GaussianSketch | KrylovSketch


def make_source(
    A: OperatorLike,
    rank: int,
    *,
    sampling: Sampling,
    rng: RNG,
    chunk_size: int | None,
    weights: Any = None,
    want_trace: bool = False,
    b: Array | None = None,
) -> Source:
    """Return the source of up to `rank` columns for one of ``column_sampling.SAMPLINGS``."""
    if sampling in METHODS:
        if weights is not None:
            raise ValueError(
                f"sampling={sampling!r} needs the true diagonal of `A`; `diagonal` is for weights "
                "and estimates. Pass the true one as FunctionOperator(diagonal=...), or use "
                "sampling='diagonal'."
            )
        return PivotedColumns(A, sampling, chunk_size, rng)
    trace = known_trace(A) if want_trace else None
    if sampling == "gaussian":
        return GaussianSketch(A, chunk_size, rng, trace)
    if sampling == "krylov":
        return KrylovSketch(A, b, rng, trace)
    order = sample_columns(A, rank, sampling=sampling, rng=rng, diagonal=weights)
    return DrawnColumns(A, order, trace, chunk_size)
