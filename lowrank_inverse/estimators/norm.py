"""The Frobenius norm."""

from __future__ import annotations

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import Array, OperatorLike
from lowrank_inverse.arrays.conversion import rows_like
from lowrank_inverse.arrays.linalg import column_norm

NORM_PRODUCTS = 2
PROBE_SEED = 0


def certificate_cost(A: OperatorLike) -> int:
    """Return the number of products of a certificate beyond one per column."""
    return 0 if hasattr(A, "frobenius_norm") else NORM_PRODUCTS


def frobenius_norm(A: OperatorLike, b: Array) -> Array:
    """Return the Frobenius norm of `A`, or an estimate of it, as a 0-d array.

    For a Gaussian vector z, ``norm(A z)^2`` has the square of the norm as its mean. The product
    ``A (A z)`` guards against a z that is nearly orthogonal to the few dominant eigenvectors.
    """
    if hasattr(A, "frobenius_norm"):
        return A.frobenius_norm()
    n = int(A.shape[0])
    xp = array_namespace(b)
    z = rows_like(np.random.default_rng(PROBE_SEED).standard_normal(n), b)
    y = A @ z
    first = column_norm(y)
    second = column_norm(A @ (y / xp.where(first > 0, first, xp.ones_like(first))))
    return xp.where(second > first, second, first)
