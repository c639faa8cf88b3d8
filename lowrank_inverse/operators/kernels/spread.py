"""Kernel matrices whose points are spread over processes by rows.

Each process computes its own rows. The points, and the rows of what is multiplied, are sent round
from one process after the other, so that none ever holds more than those of two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lowrank_inverse._typing import Array
from lowrank_inverse.arrays.checks import check_finite, no_entries
from lowrank_inverse.arrays.graph import is_recorded
from lowrank_inverse.arrays.spread import (
    everywhere,
    gathered,
    is_spread,
    local,
    rows_beside,
    rows_in_turn,
    spread_rows,
    summed,
)


def check_points_of_all(X: Array, *parameters: Any) -> None:
    """Raise unless spread points `X` and the parameters of their kernel can be used."""
    check_finite("X", X)
    if is_recorded(X, *parameters):
        raise TypeError(
            "the kernel of points that are spread over processes has no derivatives; `X` or a "
            "parameter requires some. Pass them with detach()."
        )


def product(K: Any, block: Array) -> Array:
    """Return ``K @ block``, spread if the block is."""
    turns = zip(rows_in_turn(K.X), rows_in_turn(rows_beside(block, K.X)), strict=True)
    own = local(K.X)
    total = own.new_zeros((own.shape[0], *block.shape[1:]))
    for x, rows in turns:
        if own.shape[0]:
            total = total + _of(K, x).cross(own, rows)
    result = spread_rows(total, K.X, K.shape[0])
    return result if is_spread(block) else gathered(result)


def cross(K: Any, Z: Array, block: Array) -> Array:
    """Return ``K(Z, X) @ block`` for points `Z` that each process has."""
    own, rows = local(K.X), local(rows_beside(block, K.X))
    if own.shape[0]:
        part = _of(K, own).cross(Z, rows)
    else:
        part = own.new_zeros((Z.shape[0], *block.shape[1:]))
    return gathered(summed(part, K.X))


def columns(K: Any, chosen: Array) -> Array:
    """Return the kernel of all points and those `chosen`, shape (n, k), spread by rows."""
    return _by_rows(K, lambda own: own.columns_of(local(chosen)), chosen.shape[0])


def entries(K: Any, chosen: Array) -> Array:
    """Return the kernel of the points `chosen`, shape (k, k), whole on each process."""
    points = local(chosen)
    return everywhere(K.evaluate(points, points), K.X)


def diagonal(K: Any) -> Array:
    """Return the diagonal, shape (n,), spread."""
    return _by_rows(K, lambda own: own.diagonal())


def _by_rows(K: Any, compute: Callable[[Any], Array], *width: int) -> Array:
    own = local(K.X)
    rows = compute(_of(K, own)) if own.shape[0] else own.new_zeros((0, *width))
    return spread_rows(rows, K.X, K.shape[0])


def _of(K: Any, points: Array) -> Any:
    """Return the kernel of some points alone."""
    n = int(points.shape[0])
    return K._with_parts({"X": points, "shape": (n, n), "like": no_entries(points)})
