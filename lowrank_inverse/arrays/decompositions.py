"""Decompositions of small and of tall matrices, the same on all processes that share the rows."""

from __future__ import annotations

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import Array
from lowrank_inverse.arrays.conversion import algebra, astype, wide_dtype
from lowrank_inverse.arrays.devices import tall_qr
from lowrank_inverse.arrays.graph import constant
from lowrank_inverse.arrays.scale import matrix_scale
from lowrank_inverse.arrays.spread import from_first, is_spread, local, spread_rows, stacked_rows


def eigh(A: Array) -> tuple[Array, Array]:
    """Return the eigenvalues of a symmetric matrix, smallest first, and its eigenvectors.

    LAPACK scales what is far from 1 itself, by no power of two: the last bits would depend on the
    scale of `A`.
    """
    scale = matrix_scale(constant(A))
    w, V = converged_eigh(A / scale)
    return from_first(scale * w), from_first(V)


def converged_eigh(A: Array) -> tuple[Array, Array]:
    """Return the same for matrices of shape (..., n, n), as they are, by the library's own.

    Where it does not converge, as MKL in float32 for some matrices of low rank, it is asked again
    in the widest dtype.
    """
    solve, wide = algebra(A).eigh, wide_dtype(A)
    try:
        w, V = solve(A)
    except (RuntimeError, np.linalg.LinAlgError):  # the first is torch's
        if A.dtype == wide:
            raise
        w, V = (astype(x, A.dtype) for x in solve(astype(A, wide)))
    return w, V


def thin_qr(X: Array) -> tuple[Array, Array]:
    """Return Q, with orthonormal columns, and R of ``X = Q R`` for a tall `X`.

    Of rows spread over processes, each process decomposes its own, and then the stacked factors R
    of all: k² numbers are sent by each.
    """
    if not is_spread(X):
        return tall_qr(X)
    xp, k = array_namespace(X), X.shape[1]
    Q, R = algebra(X).qr(local(X))
    rank = R.shape[0]  # less than k where a process has fewer rows
    R = xp.concat([R, R.new_zeros((k - rank, k))], axis=0)
    rotation, R = (from_first(x) for x in algebra(X).qr(stacked_rows(R, X)))
    start = X.device_mesh.get_local_rank() * k
    return spread_rows(Q @ local(rotation)[start : start + rank, :], X, X.shape[0]), R


def thin_svd(X: Array) -> tuple[Array, Array, Array]:
    """Return U, shape (n, k), s and V of ``X = U diag(s) V.T`` for a tall `X`."""
    Q, R = thin_qr(X)
    U, s, Vh = (from_first(x) for x in algebra(R).svd(R))
    return Q @ U, s, Vh.T
