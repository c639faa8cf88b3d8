"""A symmetry test for a matrix that is known only through its products."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import Array
from lowrank_inverse.arrays.conversion import concrete, eps, is_traced, rows_like
from lowrank_inverse.arrays.linalg import column_norm, dot

PROBE_SEED = (2**31 - 1, 1)
"""Nobody's own: a `b` drawn from the same seed would be the probe itself."""


def warn_of_asymmetry(matvec: Callable[[Array], Array], b: Array, product: Array) -> None:
    """Warn if ``u.T A b`` and ``b.T A u`` differ by more than rounding.

    Takes one product with a Gaussian u per column. Traced arrays are not tested.

    Parameters
    ----------
    matvec : callable
        The product with A.
    b, product : array, shape (n,) or (n, m)
        Any vectors, and their products with A.
    """
    if is_traced(product):
        return
    xp = array_namespace(b)
    n = b.shape[0]
    u = rows_like(np.random.default_rng(PROBE_SEED).standard_normal(tuple(b.shape)), b)
    other = matvec(u)
    length = column_norm(b)
    length = xp.where(length > 0, length, xp.ones_like(length))
    difference = xp.abs(dot(u, product / length) - dot(b / length, other))
    scale = column_norm(product) / length + column_norm(other) / n**0.5
    if is_traced(difference) or not bool(xp.any(difference > eps(b) ** 0.5 * scale)):
        return
    share = float(concrete(xp.max(difference / scale)))
    warnings.warn(
        f"`matvec` is not symmetric: u.T A b and b.T A u differ by {share:.1g} of their size, so "
        "the result solves another system. Solve A.T A x = A.T b, or use a method for "
        "nonsymmetric matrices, such as GMRES.",
        RuntimeWarning,
        stacklevel=4,
    )
