"""Quadratic forms of the logarithm of a matrix, by Lanczos' quadrature."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

RTOL = 1e-3
"""Of the spread of the forms: up to that they may yet change."""


def log_quadratic_forms(
    product: Callable[[np.ndarray], np.ndarray], W: np.ndarray, max_steps: int
) -> np.ndarray:
    """Return ``w.T log(B) w`` for each column w, shape (p,), of a positive definite B [1]_.

    Parameters
    ----------
    product : callable
        ``product(block)`` is ``B @ block``.
    W : ndarray, shape (n, p)
    max_steps : int
        It ends before where a step changes the forms by a thousandth of their spread, or by their
        rounding.

    Notes
    -----
    Each column has its own Krylov space, orthogonalised in full: ``max_steps * n * p`` numbers.

    References
    ----------
    .. [1] S. Ubaru, J. Chen, Y. Saad. Fast Estimation of tr(f(A)) via Stochastic Lanczos
       Quadrature. SIAM J. Matrix Anal. Appl. 38, 2017.
    """
    n, p = W.shape
    squares = np.sum(W * W, axis=0)
    q = W / np.sqrt(squares)
    basis, T = [q], np.zeros((p, 0, 0))
    forms = beside = np.zeros(p)
    while True:
        v = product(basis[-1])
        k = len(basis)
        T = np.pad(T, ((0, 0), (0, 1), (0, 1)))
        T[:, -1, -1] = np.sum(basis[-1] * v, axis=0)
        if k > 1:
            T[:, -1, -2] = T[:, -2, -1] = beside
        before, forms = forms, squares * _log_of_first(T)
        rounding = n * np.finfo(float).eps * np.max(np.abs(T))
        changed = np.abs(forms - before).max()
        if k == min(max_steps, n) or changed <= max(RTOL * np.std(forms), rounding * n):
            return forms
        for _ in range(2):
            for other in basis:
                v = v - np.sum(other * v, axis=0) * other
        beside = np.linalg.norm(v, axis=0)
        alive = beside > rounding  # a space that is exhausted has no more to tell
        beside = np.where(alive, beside, 0.0)
        basis.append(np.where(alive, v / np.where(alive, beside, 1.0), 0.0))


def _log_of_first(T: np.ndarray) -> np.ndarray:
    """Return the first entries of the logarithms of the matrices `T`, shape (p, k, k)."""
    values, vectors = np.linalg.eigh(T)
    weights = vectors[:, 0, :] ** 2
    safe = np.where(weights > 0, values, 1.0)
    return np.sum(weights * np.log(np.maximum(safe, np.finfo(float).tiny)), axis=1)
