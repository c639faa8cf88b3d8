"""Squared distances between points."""

from __future__ import annotations

from collections.abc import Callable

from array_api_compat import array_namespace

from lowrank_inverse._typing import Array
from lowrank_inverse.arrays.conversion import (
    astype,
    eps,
    is_narrow,
    wide_dtype,
)

MAX_DIFFERENCES = 16


def squared_distances(x: Array, y: Array) -> Array:
    """Return squared Euclidean distances, shape (p, q), exactly 0 between equal points."""
    xp = array_namespace(x)
    d = x.shape[1]
    if d <= MAX_DIFFERENCES or is_narrow(x):
        return by_features(lambda difference: difference * difference, x, y)
    dtype, wide = x.dtype, wide_dtype(x)
    x, y = astype(x, wide), astype(y, wide)
    centre = xp.mean(x, axis=0)  # a common shift would cancel, and take digits along
    x, y = x - centre, y - centre
    x_squares, y_squares = xp.sum(x * x, axis=1), xp.sum(y * y, axis=1)
    squares = x @ (-2 * y.T)
    squares += x_squares[:, None]
    squares += y_squares
    # A bound of the rounding of the three sums: below it, the distance may as well be 0.
    noise = 2 * (d + 2) * eps(x) * (xp.max(x_squares) + xp.max(y_squares))
    return astype(xp.where(squares > noise, squares, xp.zeros_like(squares)), dtype)


def by_features(function: Callable[[Array], Array], x: Array, y: Array) -> Array:
    """Return the sum of ``function(x[i, l] - y[j, l])`` over the features l, shape (p, q)."""
    total = function(x[:, 0][:, None] - y[:, 0][None, :])
    for feature in range(1, x.shape[1]):
        total += function(x[:, feature][:, None] - y[:, feature][None, :])
    return total
