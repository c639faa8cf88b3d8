"""Settings of the direct solvers."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import RNG, Array, OperatorLike, Scalar
from lowrank_inverse.arrays.checks import check_scalar
from lowrank_inverse.arrays.conversion import astype, concrete, eps, is_traced, like, wide_dtype
from lowrank_inverse.arrays.decompositions import eigh
from lowrank_inverse.arrays.linalg import (
    cholesky,
    cholesky_solve,
    relative_asymmetry,
    symmetric_part,
    times_diagonal,
)
from lowrank_inverse.arrays.scale import power_of_two
from lowrank_inverse.arrays.spread import laid_as, reduced
from lowrank_inverse.operators.columns import finite_columns
from lowrank_inverse.operators.composition import split_shift
from lowrank_inverse.operators.differentiation import constant
from lowrank_inverse.operators.function import aslinearoperator
from lowrank_inverse.results.solution import Solution, check_system
from lowrank_inverse.solvers.base import (
    PreparedInverse,
    differentiable,
    direct_solution,
    is_positive,
)


@dataclass(frozen=True, kw_only=True)
class Exact:
    """The dense (pseudo-)inverse, for small n and for comparison.

    It computes all n columns of A. If ``A + damping * I`` is positive definite, it uses a Cholesky
    factorization; otherwise an eigendecomposition, in which eigenvalues below ``n * eps`` times
    the largest count as 0. Cost: n products and O(n³) operations; memory: n² numbers.

    Notes
    -----
    A matrix with a positive diagonal is first scaled by powers of two, so that the entries of its
    diagonal have similar size. Variables in small units are then as accurate as those in large
    units [1]_, and `converged` also requires a small residual of the scaled system. For a
    singular matrix whose units differ by more than ``eps**-0.25``, the solution has least norm in
    the scaled variables.

    References
    ----------
    .. [1] N. J. Higham. Accuracy and Stability of Numerical Algorithms. SIAM, 2002, Section 10.1.
    """

    damping: Scalar = 0.0

    def __post_init__(self) -> None:
        check_scalar("damping", self.damping)

    @differentiable
    def prepare(self, A: OperatorLike, *, rng: RNG = 0, b: Array | None = None) -> PreparedInverse:
        """Return the inverse of ``A + damping * I``."""
        A, damping = split_shift(A, self.damping)
        n = int(A.shape[0])
        H = reduced(finite_columns(A, np.arange(n)))
        M = symmetric_part(astype(H, wide_dtype(H)))
        M = M + damping * like(np.eye(n), M)
        # Without a damping, what may be the rounding of H is taken for zero.
        inverse = _DenseInverse(M, eps(H), eps(M) if is_positive(damping) else eps(H))
        return PreparedInverse(
            A,
            partial(_solve_directly, A, damping, inverse.apply, inverse.units),
            apply=inverse.apply,
            num_products=n,
            rank=inverse.rank,
            negative_curvature=inverse.negative_curvature,
            asymmetry=concrete(relative_asymmetry(H)),
        )


class _DenseInverse:
    """The (pseudo-)inverse of a symmetric matrix M that is known to a precision."""

    def __init__(self, M: Array, precision: float, unit: float) -> None:
        xp = array_namespace(M)
        n = M.shape[0]
        self.units, B = _scaled(M)
        self._left, self._factor = self.units, None if self.units is None else cholesky(B)
        if self._factor is not None:
            pivots = xp.linalg.diagonal(self._factor) ** 2
            largest = xp.max(xp.sum(xp.abs(B), axis=0))  # no eigenvalue is larger
            if bool(xp.min(pivots) > n * unit * largest):
                self.rank, self.negative_curvature = n, False
                return
            self._factor = None
        # The pseudo-inverse is that of M itself, where its small units survive.
        if self.units is None or bool(xp.min(self.units) > eps(M) ** 0.25 * xp.max(self.units)):
            self._left, B = None, M
        w, self._vectors = eigh(B)
        largest = xp.max(xp.abs(w))
        keep = xp.abs(w) > n * unit * largest
        safe = xp.where(keep, w, xp.ones_like(w))
        self._reciprocal = xp.where(keep, 1 / safe, xp.zeros_like(w))
        self.rank = concrete(xp.sum(astype(keep, xp.int32), dtype=xp.int32))
        self.negative_curvature = concrete(xp.any(w < -n * precision * largest))

    def apply(self, b: Array) -> Array:
        x = astype(reduced(b), wide_dtype(b))
        if self._left is not None:
            x = times_diagonal(self._left, x)
        if self._factor is not None:
            x = cholesky_solve(self._factor, x)
        else:
            x = self._vectors @ times_diagonal(self._reciprocal, self._vectors.T @ x)
        if self._left is not None:
            x = times_diagonal(self._left, x)
        return laid_as(astype(x, b.dtype), b)


def _scaled(M: Array) -> tuple[Array | None, Array]:
    """Return powers of two s and ``diag(s) M diag(s)``, with a diagonal between 1/4 and 1, or 0.

    None and `M` where there is no such s, where an entry beside it is larger, which makes M
    indefinite, and while jax traces.
    """
    xp = array_namespace(M)
    d = xp.linalg.diagonal(M)
    if is_traced(M) or not bool(xp.all(d >= 0) & xp.any(d > 0)):
        return None, M
    s = power_of_two(xp.where(d > 0, d, xp.max(d)) ** -0.5)
    B = s[:, None] * M * s[None, :]
    return (s, B) if bool(xp.max(xp.abs(B)) < 2) else (None, M)


@dataclass(frozen=True, kw_only=True)
class Identity:
    """``scale * I`` in place of the inverse: a baseline that takes no products."""

    scale: Scalar = 1.0

    def __post_init__(self) -> None:
        check_scalar("scale", self.scale, positive=True)

    def prepare(self, A: OperatorLike, *, rng: RNG = 0, b: Array | None = None) -> PreparedInverse:
        """Return ``scale * I``."""
        A = aslinearoperator(A)
        apply = partial(operator.mul, self.scale)
        return PreparedInverse(A, partial(_solve_by_identity, constant(A), apply), apply=apply)


def _solve_by_identity(A: OperatorLike, apply: Any, b: Array, x0: Array | None) -> Solution:
    check_system(A, b, 0.0)
    x = apply(b)
    return direct_solution(A, 0.0, constant(b), constant(x), 0)._replace(value=x)


def _solve_directly(
    A: OperatorLike,
    damping: Scalar,
    apply: Callable[[Array], Array],
    units: Array | None,
    b: Array,
    x0: Array | None,
) -> Solution:
    check_system(A, b, damping)
    return direct_solution(A, damping, b, apply(b), 0, scale=units)
