"""Checks of the points and parameters of kernels."""

from __future__ import annotations

from typing import Any

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import Array
from lowrank_inverse.arrays.checks import (
    check_block,
    check_finite,
    check_floating,
    check_scalar,
    describe,
    namespace,
)
from lowrank_inverse.arrays.conversion import is_array, is_known, like, scalar_like
from lowrank_inverse.arrays.graph import is_recorded


def row_slices(n: int, size: int) -> list[slice]:
    """Return slices of `size` that cover n rows."""
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def in_memory(x: Array) -> Array:
    """Return a view of `x` that is no longer a memmap; computing with it reads it."""
    return np.asarray(x) if isinstance(x, np.ndarray) else x


def check_points(name: str, points: Any, others: Array | None = None) -> None:
    """Raise unless `points` are of shape (n, d), and like `others`."""
    check_floating(name, points)
    if points.ndim != 2 or 0 in points.shape:
        raise ValueError(
            f"`{name}` must have shape (n, d), one point per row; got shape {tuple(points.shape)}. "
            f"For points with one feature use {name}[:, None]."
        )
    if others is None:
        return
    namespace(**{"X": others, name: points})
    if points.shape[1] != others.shape[1] or points.dtype != others.dtype:
        raise ValueError(
            f"`{name}` must have {others.shape[1]} features of dtype {others.dtype}, like `X`; "
            f"got {describe(points)}."
        )


def checked_number(name: str, x: Any, empty: Array, *, positive: bool = False) -> Any:
    """Return a number as a Python float; as a 0-d array where its derivatives are recorded."""
    check_scalar(name, x, positive=positive)
    if is_recorded(x):
        namespace(**{"X": empty, name: x})
    return scalar_like(x, empty)


def checked_lengthscale(lengthscale: Any, empty: Array, d: int) -> Any:
    """Return a lengthscale as a number, or as an array of one for each feature."""
    if isinstance(lengthscale, (list, tuple)):
        lengthscale = like(lengthscale, empty)
    if not is_array(lengthscale) or lengthscale.ndim == 0:
        return checked_number("lengthscale", lengthscale, empty, positive=True)
    check_block("lengthscale", lengthscale, d)
    namespace(X=empty, lengthscale=lengthscale)
    positive = array_namespace(lengthscale).all(lengthscale > 0)
    if lengthscale.ndim != 1 or lengthscale.dtype != empty.dtype:
        raise ValueError(
            f"`lengthscale` must be a number or have shape ({d},) and dtype {empty.dtype}; got "
            f"{describe(lengthscale)}."
        )
    check_finite("lengthscale", lengthscale)
    if is_known(positive) and not bool(positive):
        raise ValueError("`lengthscale` must be > 0 for every feature; an entry is not.")
    return lengthscale
