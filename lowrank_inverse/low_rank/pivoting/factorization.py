"""A pivoted Cholesky factorization that can grow."""

from __future__ import annotations

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import RNG, Array, OperatorLike
from lowrank_inverse.arrays.checks import check_finite, check_rng, check_scalar
from lowrank_inverse.arrays.conversion import astype, eps, like, on_cpu, take, to_host, wide_dtype
from lowrank_inverse.arrays.linalg import tall_times
from lowrank_inverse.arrays.spread import is_spread
from lowrank_inverse.operators.columns import finite_columns, joined, known_diagonal

METHODS = ("greedy", "rpcholesky")
BLOCK_SIZE = 64
NOISE_UNITS, NOISE_UNITS_PER_PIVOT = 8.0, 4.0


class Pivoting:
    """A pivoted Cholesky factorization that can grow; for its parameters see `pivoted_cholesky`."""

    def __init__(
        self,
        A: OperatorLike,
        method: str,
        *,
        chunk_size: int | None = None,
        rng: RNG = 0,
        rtol: float | None = None,
    ) -> None:
        if method not in METHODS:
            raise ValueError(
                f"`method` must be one of {', '.join(map(repr, METHODS))}; got {method!r}."
            )
        self._entries = getattr(A, "submatrix", None)
        if rtol is not None:
            check_scalar("rtol", rtol)
        self._A, self._method, self._rtol = A, method, rtol
        # A proposal costs a column where entries cannot be read: then each must be kept.
        self._block_size = BLOCK_SIZE if self._entries is not None else 1
        self._chunk_size, self._generator = chunk_size, check_rng(rng)
        d = known_diagonal(A, f"sampling={method!r}")
        self._unit, self.initial = eps(d), to_host(d).astype(np.float64)
        self._prototype = d[:0]
        self.diagonal_max = float(np.max(np.abs(self.initial)))
        self.trace = float(np.sum(self.initial))
        self.residual = self.initial.copy()
        self.exhausted, self.num_products = False, 0
        self.pivots = np.zeros(0, dtype=np.int64)
        self._columns: list[Array] = []
        self._factor: list[Array] = []

    @property
    def columns(self) -> Array:
        """The columns at the pivots, shape (n, k)."""
        if not self._columns:
            return self._empty()
        return joined(self._columns)

    @property
    def factor(self) -> Array:
        """F, in the library of the columns."""
        if not self._columns:
            return self._empty()
        F = joined(self._factor)
        return F if _is_like(F, self._columns[0]) else like(F, self._columns[0])

    @property
    def residual_trace(self) -> float:
        """Sum of the residual diagonal without negative rounding."""
        return float(np.sum(np.maximum(self.residual, 0.0)))

    @property
    def witness(self) -> int | None:
        """Index of a row whose residual diagonal entry is clearly negative, or None."""
        lowest = int(np.argmin(self.residual))
        return lowest if self.residual[lowest] < -4 * self._noise * self.diagonal_max else None

    @property
    def _noise(self) -> float:
        # The residual carries the rounding of one subtraction a pivot; and eigenvalues of W
        # below eps times its trace, up to k times the largest diagonal entry, are dropped anyway.
        return self._unit * (NOISE_UNITS + NOISE_UNITS_PER_PIVOT * self.pivots.size)

    def grow(self, rank: int, *, trace: float = 0.0) -> None:
        """Add pivots up to `rank`, until the residual trace is at most `trace` or nothing is left.

        A block may carry it past `trace`, but not past `rank`.
        """
        rank = min(rank, self.residual.size)
        while self.pivots.size < rank and self.residual_trace > trace:
            limits = self._limits()
            weights = np.where(self.residual > limits, self.residual, 0.0)
            if not np.any(weights):
                break
            proposed = self._propose(weights)
            C, block = self._read(proposed)
            F = to_host(self._factor_rows(proposed)).astype(np.float64)
            block = block - F @ F.T
            # A diagonal entry computed anew is more exact than one updated k times.
            self.residual[proposed] = np.diagonal(block)
            room = rank - self.pivots.size
            chosen, L = self._select(proposed, block, weights, limits[proposed], room)
            if chosen.size:
                self._append(proposed[chosen], L, None if C is None else take(C, chosen, axis=1))
        self.exhausted = not np.any(self.residual > self._limits())

    def _limits(self) -> np.ndarray:
        relative = self._noise if self._rtol is None else self._rtol
        limits = np.maximum(self._noise * np.abs(self.initial), relative * self.diagonal_max)
        limits[self.pivots] = np.inf
        return limits

    def _propose(self, weights: np.ndarray) -> np.ndarray:
        if self._method == "greedy":
            return _largest(weights, self._block_size)
        cumulative = np.cumsum(weights)
        points = self._generator.random(self._block_size) * cumulative[-1]
        last = np.flatnonzero(weights)[-1]
        # Rejection gives a repeated proposal a second chance.
        return np.minimum(np.searchsorted(cumulative, points, side="right"), last)

    def _read(self, proposed: np.ndarray) -> tuple[Array | None, np.ndarray]:
        """Return A at the rows and columns `proposed`, and the columns if they had to be read."""
        distinct, where = np.unique(proposed, return_inverse=True)
        C = None
        if self._entries is not None:
            block = self._entries(distinct)
        else:
            C = self._read_columns(distinct)
            block = take(C, distinct)
        check_finite("columns of A", block)
        self._unit = max(self._unit, eps(block))  # the diagonal may come in a wider dtype
        host = to_host(block).astype(np.float64)
        difference = np.max(np.abs(np.diagonal(host) - self.initial[distinct]))
        if difference > self._unit**0.5 * self.diagonal_max:
            raise ValueError(
                "the diagonal of `A` must be that of its columns; they differ by "
                f"{difference:.2g}. Correct `diagonal=` of the operator, or, for an estimate, use "
                "sampling='diagonal'."
            )
        host = (host + host.T) / 2
        return None if C is None else take(C, where, axis=1), host[np.ix_(where, where)]

    def _read_columns(self, indices: np.ndarray) -> Array:
        self.num_products += indices.size
        return finite_columns(self._A, indices, chunk_size=self._chunk_size)

    def _select(
        self,
        proposed: np.ndarray,
        block: np.ndarray,
        weights: np.ndarray,
        limits: np.ndarray,
        room: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return which proposals become pivots, and the Cholesky factor of `block` on them."""
        factor = np.zeros((proposed.size, min(room, proposed.size)))
        left = np.diagonal(block).copy()
        chosen: list[int] = []
        sequential = self._method == "rpcholesky"
        outside = weights.copy()
        outside[proposed] = 0.0
        best = int(np.argmax(outside))
        tickets = self._generator.random(proposed.size) if sequential else None
        for step in range(proposed.size):
            if len(chosen) == factor.shape[1]:
                break
            # The largest first loses the least to rounding.
            j = step if sequential else _first_largest(left, proposed)
            if left[j] <= limits[j]:
                left[j] = -np.inf
                continue
            if tickets is not None:
                if tickets[j] * weights[proposed[j]] > left[j]:
                    continue
            elif chosen and (left[j], -proposed[j]) < (outside[best], -best):
                break  # what is outside can only have fallen: until here, these were the largest
            k = len(chosen)
            column = (block[:, j] - factor[:, :k] @ factor[j, :k]) / np.sqrt(left[j])
            factor[:, k] = column
            left = left - column**2
            chosen.append(j)
            left[chosen] = -np.inf
        return np.array(chosen, dtype=np.int64), np.tril(factor[chosen, : len(chosen)])

    def _append(self, pivots: np.ndarray, L: np.ndarray, C: Array | None) -> None:
        C = self._read_columns(pivots) if C is None else C
        # In NumPy the same pivots for every library.
        R = to_host(C) if on_cpu(C) and not is_spread(C) else C
        for part in self._factor:
            R = R - part @ take(part, pivots).T
        F = tall_times(R, like(np.linalg.inv(L).T, R, wide_dtype(R)))
        squares = array_namespace(F).sum(astype(F, wide_dtype(F)) ** 2, axis=1)
        self.residual = self.residual - to_host(squares)
        self.residual[pivots] = 0.0
        self.pivots = np.concatenate([self.pivots, pivots])
        _append(self._columns, C)
        _append(self._factor, F)

    def _factor_rows(self, indices: np.ndarray) -> Array:
        if not self._factor:
            return np.zeros((indices.size, 0))
        return joined([take(part, indices) for part in self._factor])

    def _empty(self) -> Array:
        return like(np.zeros((self.residual.size, 0)), self._prototype)


def _largest(weights: np.ndarray, count: int) -> np.ndarray:
    """Return where the largest positive weights are, the first of equals first."""
    count = min(count, int(np.count_nonzero(weights)))
    if count == 1:
        return np.argmax(weights, keepdims=True)
    least = np.partition(weights, weights.size - count)[weights.size - count]
    candidates = np.flatnonzero(weights >= least)
    return candidates[np.argsort(-weights[candidates], kind="stable")[:count]]


def _first_largest(values: np.ndarray, indices: np.ndarray) -> int:
    """Return where the largest value is, among equals that of the lowest index."""
    where = np.flatnonzero(values == np.max(values))
    return int(where[np.argmin(indices[where])])


def _is_like(x: Array, other: Array) -> bool:
    return array_namespace(x) is array_namespace(other)


def _append(parts: list[Array], block: Array) -> None:
    """Append `block`, and join blocks of like widths: few parts, and few copies of each."""
    parts.append(block)
    while len(parts) > 1 and parts[-2].shape[1] <= parts[-1].shape[1]:
        parts[-2:] = [joined(parts[-2:])]
