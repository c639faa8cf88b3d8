"""The k×k algebra of a Nyström approximation: its core whitened, its spectrum, its signs."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import Array, Scalar
from lowrank_inverse.arrays.conversion import algebra, astype, concrete, like
from lowrank_inverse.arrays.decompositions import eigh
from lowrank_inverse.arrays.graph import constant, with_derivatives_of
from lowrank_inverse.arrays.linalg import row_blocks, symmetric_part
from lowrank_inverse.arrays.spread import flipped, is_spread, local, reduced, summed

INDEFINITE_PIVOT_RTOL = 1e-4


FLOAT64_EPS = 2.0**-52


class Whitening(NamedTuple):
    """T with ``T T.T = W^+``, shape (k, k): a zero column for each eigenvalue dropped."""

    matrix: Array
    num_dropped: Any
    num_negative: Any
    core_eigenvalues: Array


def whiten(
    W: Array,
    unit: float,
    indefinite_pivot_rtol: float = INDEFINITE_PIVOT_RTOL,
    *,
    indefinite: bool = False,
) -> Whitening:
    """Return the whitening of the symmetric k×k matrix `W`, known to a precision `unit`.

    Where it has a clearly negative eigenvalue, or the matrix that it is a part of is known to be
    `indefinite`, eigenvalues up to `indefinite_pivot_rtol` times the largest are dropped.

    Eigenvalues are dropped up to `unit` times the largest and, in float64, up to ``k * eps``, the
    rounding of the decomposition itself (the rule of LAPACK). In float32 that rule would drop
    what a small damping needs, for a matrix whose eigenvalues fall steadily.
    """
    xp = array_namespace(W)
    w, V = eigh(W)
    unit = max(unit, W.shape[0] * FLOAT64_EPS)
    largest = xp.max(xp.abs(w))
    negative = negative_eigenvalues(w, unit)
    if indefinite:
        rtol = indefinite_pivot_rtol + 0 * largest
    else:
        rtol = xp.where(xp.any(negative), indefinite_pivot_rtol + 0 * largest, unit + 0 * largest)
    keep = w > rtol * largest
    scale = xp.where(keep, 1 / xp.sqrt(xp.where(keep, w, xp.ones_like(w))), xp.zeros_like(w))
    return Whitening(
        V * scale[None, :],
        concrete(xp.sum(astype(~keep, xp.int32), dtype=xp.int32)),
        concrete(xp.sum(astype(negative, xp.int32), dtype=xp.int32)),
        w,
    )


def negative_eigenvalues(w: Array, unit: float) -> Array:
    """Say which eigenvalues of a matrix known to a precision `unit` are clearly negative."""
    return w < -_noise(w, unit)


def is_indefinite(core_eigenvalues: Array, damping: Scalar, unit: float) -> Any:
    """Whether the core proves ``A + damping * I`` indefinite, beyond rounding by `unit`.

    The eigenvalues of a principal submatrix lie between those of the matrix (Cauchy).
    """
    lowest = array_namespace(core_eigenvalues).min(core_eigenvalues)
    return concrete(lowest + damping < -_noise(core_eigenvalues, unit))


def _noise(w: Array, unit: float) -> Array:
    """Return what rounding by `unit` may do to an eigenvalue of a matrix with eigenvalues `w`."""
    xp = array_namespace(w)
    return unit * w.shape[0] * xp.max(xp.abs(w))


def spectrum(gram: Array) -> tuple[Array, Array]:
    """Return eigenvalues (largest first, negative rounding set to 0) and eigenvectors."""
    xp = array_namespace(gram)
    g, Z = eigh(symmetric_part(gram))
    g = xp.where(g > 0, g, xp.zeros_like(g))
    return flipped(g), flipped(Z, axis=1)


def whitened_gram(C: Array, T: Array) -> Array:
    """Return ``F.T F`` for ``F = C T``, by blocks of rows.

    ``T.T (C.T C) T`` squares the condition number of W, which is at most ``1 / eps(C)``. Columns
    as wide as T cannot afford that: then F is formed before it is squared.
    """
    if is_spread(C):
        return summed(whitened_gram(local(C), local(reduced(T))), C)
    total = 0 * T
    wide = C.dtype == T.dtype
    for rows in row_blocks(C, C.shape[1]):
        # Transposed before it is cut: columns that lie one after the other in memory stay so.
        part = astype(C.T[:, rows], T.dtype)
        part = T.T @ part if wide else part
        total = total + part @ part.T
    return total if wide else T.T @ total @ T


def differentiable_whitening(T: Array, W: Array) -> Array:
    """Return the whitening T of `W`, with the derivatives of ``T T.T = W^+``.

    Those that keep the range of W, within which ``d(W^+) = -W^+ dW W^+``. They come from Cholesky's
    factor of ``T.T W T = I``: eigenvectors have none where eigenvalues are equal.
    """

    def smooth() -> Array:
        inner = T.T @ W @ T
        identity = like(np.eye(T.shape[1]), T)
        L = algebra(inner).cholesky(identity + inner - constant(inner))
        return T @ algebra(L).inv(L).T

    return with_derivatives_of(T, smooth, W)
