"""The Frobenius norm."""

from __future__ import annotations

from typing import Any

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import Array
from lowrank_inverse.arrays.conversion import rows_like
from lowrank_inverse.arrays.linalg import column_norm

NORM_PRODUCTS = 2
PROBE_SEED = 0


def certificate_cost(A: Any) -> int:
    """Count the products with `A` that a certificate needs besides one for each column."""
    return 0 if hasattr(A, "frobenius_norm") else NORM_PRODUCTS


def frobenius_norm(A: Any, b: Array) -> Array:
    """Return the Frobenius norm of `A`, or an estimate, as a 0-d array.

    For a Gaussian vector z, ``E norm(A z)^2`` is the square of that norm; and where z happens to
    be nearly orthogonal to the few large eigenvectors, ``A (A z)`` is not.
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
