"""Estimates of the largest and the smallest eigenvalue."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import Array, OperatorLike, Scalar
from lowrank_inverse.arrays.conversion import astype, concrete, eps, rows_like
from lowrank_inverse.arrays.linalg import column_norm, dot
from lowrank_inverse.arrays.spread import reduced

NUM_POWER_STEPS = 8


def power_norm(multiply: Callable[[Array], Array], b: Array, num_steps: int) -> Array:
    """Estimate the norm of a symmetric operator from below, by steps of the power method."""
    xp = array_namespace(b)
    # A fixed vector: the answer must not depend on a hidden seed, nor on what b happens to hold.
    v = rows_like(np.random.default_rng(0).standard_normal(b.shape[0]), b)
    estimate = xp.zeros_like(column_norm(v))
    for _ in range(num_steps):
        v = multiply(v / column_norm(v))
        norm = column_norm(v)
        estimate = xp.where(norm > 0, norm, estimate)
        v = xp.where(norm > 0, v, xp.ones_like(v))
    return estimate


def largest_eigenvalue(A: OperatorLike, damping: Scalar, b: Array) -> Array:
    """Estimate the largest absolute eigenvalue of ``A + damping * I`` from below; 1 for zero."""
    norm = power_norm(lambda v: A @ v + damping * v, b, NUM_POWER_STEPS)
    xp = array_namespace(norm)
    return xp.where(norm > 0, norm, xp.ones_like(norm))


LANCZOS_STEPS = 100
RITZ_RTOL = 0.01


def lowest_ritz(A: OperatorLike, seed: int, b: Array) -> tuple[float, float, float]:
    """Return the lowest Ritz value of `A`, its residual, and the largest absolute Ritz value.

    The Lanczos method [1]_ with full orthogonalisation starts from a random vector. It stops when
    the residual is a hundredth of a negative Ritz value. `A` has an eigenvalue within the residual
    of the Ritz value.

    References
    ----------
    .. [1] C. Lanczos. An Iteration Method for the Solution of the Eigenvalue Problem of Linear
       Differential and Integral Operators. J. Res. Nat. Bur. Standards 45, 1950.
    """
    n = int(A.shape[0])
    xp = array_namespace(b)
    q = rows_like(np.random.default_rng(seed).standard_normal(n), b)
    basis = [q / column_norm(q)]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        w = A @ basis[-1]
        diagonal.append(float(concrete(dot(basis[-1], w))))
        Q = xp.stack(basis, axis=1)
        for _ in range(2):
            w = w - Q @ reduced(Q.T @ w)
        norm = float(concrete(column_norm(w)))
        T = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
        values, vectors = np.linalg.eigh(T)
        residual, largest = norm * abs(vectors[-1, 0]), float(np.abs(values).max())
        found = values[0] < 0 and residual < RITZ_RTOL * -values[0]
        spent = len(basis) == min(n, LANCZOS_STEPS) or norm <= n * eps(b) * largest
        if found or spent or not math.isfinite(norm):
            return float(values[0]), float(residual), largest
        beside.append(norm)
        basis.append(astype(w / norm, b.dtype))
