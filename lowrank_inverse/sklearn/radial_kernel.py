"""Kernels of a distance, and the derivatives of their matrices by tiles."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lowrank_inverse.operators.kernel import CPU_CHUNK, KernelOperator
from lowrank_inverse.operators.kernels.distances import MAX_DIFFERENCES, squared_distances
from lowrank_inverse.operators.kernels.points import row_slices

Weight = Callable[[slice, slice], np.ndarray]
"""A tile of a symmetric matrix M, at slices of rows and columns."""


def radial_derivative(squares: np.ndarray, kernel: str, nu: float) -> tuple[np.ndarray, np.ndarray]:
    """Return k and ``-2 dk/dr²`` at squared distances r², in units of the lengthscale.

    With u the part of one feature in r², the derivative of k with respect to the logarithm of its
    lengthscale is u times the latter. Where that is infinite, for the Matérn kernel of order 1/2
    at distance 0, it is 0 here, and so is u.
    """
    if kernel == "rbf":
        k = np.exp(-0.5 * squares)
        return k, k
    s = np.sqrt(2 * nu * squares)
    decay = np.exp(-s)
    if nu == 0.5:
        return decay, np.divide(decay, s, out=np.zeros_like(s), where=s > 0)
    if nu == 1.5:
        return (1 + s) * decay, 3 * decay
    return (1 + s + s * s / 3) * decay, 5 / 3 * (1 + s) * decay


def contract(K: KernelOperator, weight: Weight) -> tuple[float, np.ndarray]:
    """Return ``sum(M * K)`` and ``sum(M * dK/dlog(lengthscale))`` for a symmetric M.

    Parameters
    ----------
    K : KernelOperator
        Of "rbf" or "matern", with one lengthscale, or one for each of d features.
    weight : callable
        ``weight(rows, columns)`` is a tile of M; those below the diagonal are not asked for.

    Returns
    -------
    float, and ndarray of shape (1,) or (d,)

    Notes
    -----
    ``n**2 / 2`` evaluations of the kernel and of M, and with a lengthscale for each feature d times
    as many products; memory for a few tiles.
    """
    x = _centred(K)
    value, slope = 0.0, np.zeros(1)
    slices = row_slices(len(x), CPU_CHUNK)
    for i, rows in enumerate(slices):
        for columns in slices[i:]:
            part, change = _contracted(K, x[rows], x[columns], weight(rows, columns))
            times = 1 if rows is columns else 2
            value, slope = value + times * part, slope + times * change
    return value, slope


def contract_columns(
    K: KernelOperator, indices: np.ndarray, M: np.ndarray
) -> tuple[float, np.ndarray]:
    """Return the same sums over the columns at `indices` alone, for an M of shape (n, k)."""
    x = _centred(K)
    value, slope = 0.0, np.zeros(1)
    for rows in row_slices(len(x), CPU_CHUNK):
        part, change = _contracted(K, x[rows], x[indices], M[rows])
        value, slope = value + part, slope + change
    return value, slope


def contract_core(
    K: KernelOperator, indices: np.ndarray, M: np.ndarray
) -> tuple[float, np.ndarray]:
    """Return the same sums over the rows and columns at `indices`, for an M of shape (k, k)."""
    x = _centred(K)[indices]
    return _contracted(K, x, x, M)


def _centred(K: KernelOperator) -> np.ndarray:
    """Return the points in units of the lengthscale, less what is common to them.

    It cancels in distances, and would take digits along.
    """
    x = np.asarray(K.X / K.lengthscale)
    return x - x.mean(axis=0)


def _contracted(
    K: KernelOperator, x: np.ndarray, y: np.ndarray, M: np.ndarray
) -> tuple[float, np.ndarray]:
    squares = squared_distances(x, y)
    k, h = radial_derivative(squares, str(K.kernel), K.nu)
    value = float(np.sum(M * k))
    h = M * h
    if np.ndim(K.lengthscale) == 0:
        return value, np.array([np.sum(h * squares)])
    return value, _by_feature(x, y, h)


def _by_feature(x: np.ndarray, y: np.ndarray, W: np.ndarray) -> np.ndarray:
    """Return ``sum_ij W[i, j] * (x[i, l] - y[j, l])**2`` for each feature l, shape (d,)."""
    d = x.shape[1]
    if d <= MAX_DIFFERENCES:
        pairs = zip(x.T, y.T, strict=True)
        return np.array([np.sum(W * (u[:, None] - v) ** 2) for u, v in pairs])
    across = np.sum(x * (W @ y), axis=0)
    return W.sum(axis=1) @ (x * x) + W.sum(axis=0) @ (y * y) - 2 * across
