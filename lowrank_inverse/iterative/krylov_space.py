"""An orthonormal basis of a Krylov space, and its products."""

from __future__ import annotations

from typing import Any, NamedTuple

from array_api_compat import array_namespace, is_jax_array

from lowrank_inverse._typing import RNG, Array, OperatorLike
from lowrank_inverse.arrays.checks import check_finite, check_rng
from lowrank_inverse.arrays.control_flow import while_loop
from lowrank_inverse.arrays.conversion import concrete, eps, is_traced, rows_like, zero_rows
from lowrank_inverse.arrays.decompositions import thin_svd
from lowrank_inverse.arrays.linalg import column_norm, set_rows
from lowrank_inverse.arrays.spread import reduced
from lowrank_inverse.operators.columns import empty_like


class _Basis(NamedTuple):
    """Orthonormal vectors, their products, and the block of vectors that comes next."""

    S: Array
    """Rows, shape (k, n): those filled so far lie one after the other in memory."""
    Y: Array
    block: Array
    """Shape (n, m)."""
    size: Any
    largest: Array
    """Norm of the longest product so far: what rounding is measured by."""


class KrylovSpace:
    """An orthonormal basis S of the Krylov space of `start`, with the products A S [1]_.

    The blocks ``start, A start, A² start, …`` are orthogonalised twice against all earlier ones
    [2]_, which is accurate in float32 too. A direction that consists of rounding only is set to
    zero. If this holds for a whole block, the space is invariant, and no more products are taken.

    Parameters
    ----------
    A : linear operator, shape (n, n)
        Symmetric.
    start : array, shape (n,) or (n, m), optional
        Default: one Gaussian vector, drawn on the host.
    rng : int or numpy.random.Generator, optional
        Seed of the Gaussian vector.

    References
    ----------
    .. [1] C. Musco, C. Musco. Randomized Block Krylov Methods for Stronger and Faster Approximate
       Singular Value Decomposition. NeurIPS 2015.
    .. [2] L. Giraud, J. Langou, M. Rozložník, J. van den Eshof. Rounding Error Analysis of the
       Classical Gram-Schmidt Orthogonalization Process. Numer. Math. 101, 2005.
    """

    def __init__(self, A: OperatorLike, start: Array | None, rng: RNG = 0) -> None:
        self._A = A
        n = int(A.shape[0])
        if start is None:
            start = rows_like(check_rng(rng).standard_normal(n), empty_like(A))
        check_finite("b", start)
        start = start if start.ndim == 2 else start[:, None]
        xp = array_namespace(start)
        norm = column_norm(start)  # a scale of its own for each right-hand side
        start = start / xp.where(norm > 0, norm, xp.ones_like(norm))[None, ...]
        one = xp.ones_like(norm[0])
        empty = zero_rows(0, start)
        self._basis = _Basis(empty, empty, _orthonormal(start, empty, one), 0, 0 * one)
        self._ended = False

    @property
    def size(self) -> Any:
        """Number of products taken."""
        return concrete(self._basis.size)

    @property
    def exhausted(self) -> bool:
        """Whether the space is invariant, so that more products would add nothing."""
        return self._ended

    @property
    def vectors(self) -> Array:
        """The basis S, shape (n, size); each column is a unit vector or zero."""
        return self._basis.S.T

    @property
    def products(self) -> Array:
        """``A @ S``, shape (n, size)."""
        return self._basis.Y.T

    def grow(self, count: int) -> None:
        """Extend the space to `count` products, by whole blocks."""
        old = self._basis
        xp = array_namespace(old.block)
        block, taken = old.block, old.S.shape[0]
        if taken == 0:  # fewer products than right-hand sides: their leading directions
            block = block[:, : min(count, block.shape[1])]
        width = block.shape[1]
        capacity = taken + (count - taken) // width * width
        if capacity <= taken or self._ended:
            return

        def going(basis: _Basis) -> Array:
            return (basis.size < capacity) & reduced(xp.any(basis.block != 0))

        def step(basis: _Basis) -> _Basis:
            products = self._A @ basis.block
            largest = xp.maximum(basis.largest, xp.max(column_norm(products)))
            S = set_rows(basis.S, basis.size, basis.block.T)
            Y = set_rows(basis.Y, basis.size, products.T)
            # Of one shape in jax, which compiles for each: the rows not yet filled are zero.
            known = S if is_jax_array(S) else S[: basis.size + width, :]
            block = _orthonormal(products, known, largest)
            return _Basis(S, Y, block, basis.size + width, largest)

        start = _Basis(_padded(old.S, capacity), _padded(old.Y, capacity), block, *old[3:])
        basis = while_loop(going, step, start)
        if not is_traced(basis.S):
            self._ended = not bool(reduced(xp.any(basis.block != 0)))
            used = max(basis.size, width)  # b = 0: a column of zeros
            basis = basis._replace(S=basis.S[:used, :], Y=basis.Y[:used, :])
        self._basis = basis


def _padded(X: Array, rows: int) -> Array:
    """Return `X` with zeros below, `rows` in all."""
    return array_namespace(X).concat([X, zero_rows(rows - X.shape[0], X.T)], axis=0)


def _orthonormal(X: Array, S: Array, largest: Array) -> Array:
    """Return an orthonormal basis of what the columns of `X` have beside the rows of `S`.

    Directions shorter than rounding, measured by `largest`, become zero.
    """
    xp = array_namespace(X)
    negligible = min(max(X.shape[0] ** 0.5, 100.0) * eps(X), eps(X) ** 0.5) * largest
    for _ in range(2):
        if S.shape[0]:
            X = X - S.T @ reduced(S @ X)
        if X.shape[1] == 1:
            lengths, Q = column_norm(X), X
        else:
            Q, lengths, _ = thin_svd(X)
        kept = lengths > negligible
        if X.shape[1] == 1:
            Q = Q / xp.where(kept, lengths, xp.ones_like(lengths))[None, :]
        X = xp.where(kept, Q, xp.zeros_like(Q))
        negligible = 0 * negligible + 0.5  # of unit vectors no more than rounding may be lost
    return X
