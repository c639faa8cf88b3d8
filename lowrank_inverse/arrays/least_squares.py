"""Ridge regression on tall matrices that come in blocks of rows, in NumPy's float64."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy.linalg import lapack, solve_triangular

Blocks = Iterable[tuple[np.ndarray, np.ndarray]]
"""Pairs of rows of F, shape (b, k), and of t, shape (b, m)."""


def inverse_root(W: np.ndarray, rtol: float) -> np.ndarray:
    """Return T, shape (k, r), with ``T T.T = W^+`` on the r rows that pivoted Cholesky takes.

    It takes rows of a positive semidefinite `W` until what is left of its diagonal is below
    `rtol` times its largest entry. Its error is a rounding of that entry, not of the norm of W.
    """
    factor, pivots, r, _ = lapack.dpstrf(W, tol=rtol * np.max(np.diagonal(W)), lower=1)
    T = np.zeros((len(W), r))
    T[pivots[:r] - 1] = solve_triangular(np.tril(factor[:r, :r]), np.eye(r), lower=True).T
    return T


def ridge_by_gram(blocks: Blocks, alpha: float) -> np.ndarray:
    """Return the c, shape (k, m), that minimises ``norm(t - F c)**2 + alpha * norm(c)**2``.

    By the normal equations: to about ``eps * trace(F.T F) / alpha``.
    """
    gram: Any = 0.0
    moment: Any = 0.0
    for F, t in blocks:
        gram, moment = gram + F.T @ F, moment + F.T @ t
    g, Z = np.linalg.eigh(gram)
    return Z @ ((Z.T @ moment) / (np.maximum(g, 0.0) + alpha)[:, None])


def ridge_by_rotations(blocks: Blocks, alpha: float) -> np.ndarray:
    """Return the same by QR decompositions, which square no condition number.

    Rows of very different sizes keep their digits if the largest come first [1]_.

    References
    ----------
    .. [1] A. J. Cox, N. J. Higham. Stability of Householder QR Factorization for Weighted Least
       Squares Problems. Numerical Analysis, Pitman Research Notes in Mathematics 380, 1998.
    """
    R: Any = None
    for F, t in blocks:
        k, rows = F.shape[1], np.hstack([F, t])
        R = np.linalg.qr(rows if R is None else np.vstack([R, rows]), mode="r")
    ridge = np.hstack([alpha**0.5 * np.eye(k), np.zeros((k, R.shape[1] - k))])
    R = np.linalg.qr(np.vstack([R, ridge]), mode="r")
    return solve_triangular(R[:k, :k], R[:k, k:])
