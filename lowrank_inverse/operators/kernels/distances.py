"""Squared distances between points, and kernels of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from array_api_compat import array_namespace, is_jax_array
from scipy.spatial.distance import cdist

from lowrank_inverse._typing import Array
from lowrank_inverse.arrays.conversion import astype, eps, is_narrow, is_traced, wide_dtype
from lowrank_inverse.arrays.graph import constant, is_recorded

MAX_DIFFERENCES, MAX_COMPILED = 16, 32
"""Up to how many features differences are as fast as inner products; in NumPy by compiled code."""
CANCELLED = 1e-4
"""A squared distance below this share of its terms is computed anew, by differences."""
CENTRE_ROWS = 32
PAIR_NUMBERS = 2**20


def squared_distances(x: Array, y: Array) -> Array:
    """Return squared Euclidean distances, shape (p, q), exactly 0 between equal points.

    Beyond `MAX_DIFFERENCES` features they come from inner products in float64, where no more than
    four digits cancel, to a relative error of ``4e-12 (d + 2)`` at most; else from differences.
    """
    xp = array_namespace(x)
    d = x.shape[1]
    if isinstance(x, np.ndarray) and d <= MAX_COMPILED:
        return astype(cdist(x, y, "sqeuclidean"), x.dtype)
    if d <= MAX_DIFFERENCES or is_narrow(x):
        return by_features(_square, x, y)
    dtype, wide = x.dtype, wide_dtype(x)
    x, y = astype(x, wide), astype(y, wide)
    centre = _centre(x)  # a common shift would cancel, and take digits along
    u, v = x - centre, y - centre
    terms = xp.sum(u * u, axis=1)[:, None] + xp.sum(v * v, axis=1)
    squares = u @ (-2 * v.T)
    squares += terms
    if is_traced(squares):
        # The pairs are unknown: what is below the rounding of the three sums is taken for 0.
        noise = 2 * (d + 2) * eps(x) * terms
        # The derivatives stay those of the squares: the second do not vanish with the distance.
        zero = squares - constant(squares)
        return astype(xp.where(squares > noise, squares, zero), dtype)
    terms *= CANCELLED
    close = ~(squares > terms)  # and where the terms overflow
    if bool(xp.any(close)):
        exact = _between_pairs(x, y, *xp.nonzero(close))
        if is_jax_array(squares):
            squares = squares.at[close].set(exact)
        else:
            squares[close] = exact
    return astype(squares, dtype)


def l1_distances(x: Array, y: Array) -> Array:
    """Return the sums of absolute differences, shape (p, q)."""
    if isinstance(x, np.ndarray):
        return astype(cdist(x, y, "cityblock"), x.dtype)
    return by_features(array_namespace(x).abs, x, y)


def matern(nu: float, squares: Array) -> Array:
    """Return the Matérn kernel of order `nu` for squared distances over squared lengthscales.

    The root has no derivative at 0, the kernel has. Where derivatives are recorded, below the
    rounding of 1 it is the polynomial in the squares that it begins with: so are they.
    """
    xp = array_namespace(squares)
    squares = 2 * nu * squares
    small = squares <= (0.0 if nu == 0.5 else eps(squares)) if is_recorded(squares) else None
    s = xp.sqrt(squares if small is None else xp.where(small, xp.ones_like(squares), squares))
    values = xp.exp(-s)
    if nu != 0.5:
        values = (1 + s if nu == 1.5 else 1 + s + squares / 3) * values
    if small is None:
        return values
    slope = {0.5: 0.0, 1.5: -1 / 2, 2.5: -1 / 6}[nu]
    return xp.where(small, 1 + slope * squares, values)


def _square(difference: Array) -> Array:
    return difference * difference


def _centre(x: Array) -> Array:
    """Return the medians of the features of some rows: outliers do not move them."""
    rows = array_namespace(x).sort(x[:: max(1, x.shape[0] // CENTRE_ROWS), :], axis=0)
    return rows[rows.shape[0] // 2, :]


def _between_pairs(x: Array, y: Array, i: Array, j: Array) -> Array:
    """Return the squared distances between x[i[l]] and y[j[l]], for each l."""
    xp = array_namespace(x)
    size = max(1, PAIR_NUMBERS // x.shape[1])
    parts = []
    for start in range(0, i.shape[0], size):
        chunk = slice(start, min(start + size, i.shape[0]))
        parts.append(
            xp.sum(_square(xp.take(x, i[chunk], axis=0) - xp.take(y, j[chunk], axis=0)), axis=1)
        )
    return parts[0] if len(parts) == 1 else xp.concat(parts, axis=0)


def by_features(function: Callable[[Array], Array], x: Array, y: Array) -> Array:
    """Return the sum of ``function(x[i, l] - y[j, l])`` over the features l, shape (p, q)."""
    total = function(x[:, 0][:, None] - y[:, 0][None, :])
    for feature in range(1, x.shape[1]):
        total += function(x[:, feature][:, None] - y[:, feature][None, :])
    return total
