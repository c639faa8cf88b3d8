"""Quadratic forms of the logarithm of a matrix, by Lanczos quadrature."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import Array
from lowrank_inverse.arrays.control_flow import while_loop
from lowrank_inverse.arrays.conversion import astype, eps, like, like_device, wide_dtype
from lowrank_inverse.arrays.decompositions import converged_eigh
from lowrank_inverse.arrays.linalg import column_norm, set_rows


class LogQuadrature(NamedTuple):
    """The results of Lanczos quadrature for m vectors.

    Attributes
    ----------
    forms : array, shape (m,)
        ``w.T log(B) w`` for each column w, in the wide dtype; NaN if B was found to have an
        eigenvalue that is not positive.
    solutions : array, shape (n, m)
        ``B^{-1} w``.
    residual_norm : array, shape (m,)
        Relative residual of each solution.
    num_steps : int
        Number of Lanczos steps.
    """

    forms: Array
    solutions: Array
    residual_norm: Array
    num_steps: Any


class _Recursion(NamedTuple):
    """The state of Lanczos' recursion for m vectors at once, with T tridiagonal and T = L D L.T."""

    step: Any
    basis: Array
    """Orthonormal vectors, shape (max_steps, m, n)."""
    diagonal: Array
    beside: Array
    q: Array
    beta: Array
    pivot: Array
    """The last one of D, shape (m,)."""
    residual: Array
    """The next entry of ``L^{-1} e_1``: up to its sign, the norm of the residual of B^{-1} w."""
    scale: Array


def log_quadrature(
    product: Callable[[Array], Array],
    W: Array,
    *,
    max_steps: int,
    rtol: float,
    traced: bool = False,
) -> LogQuadrature:
    """Return ``w.T log(B) w`` and ``B^{-1} w`` for each column w of `W` [1]_.

    Lanczos with full orthogonalisation runs in a separate Krylov space for each column, until the
    relative residuals of ``B x = w`` are at most `rtol`. The error of the forms is about the square
    of that, since k steps are exact for polynomials of degree ``2 k - 1``.

    Parameters
    ----------
    product : callable
        ``product(block)`` is ``B @ block``, for a symmetric positive definite B.
    W : array, shape (n, m)
        The vectors w.
    max_steps : int
        Maximum number of steps. Memory: up to ``max_steps * n * m`` numbers.
    rtol : float
        Relative residual at which to stop.
    traced : bool
        Whether JAX traces the products, in which case all of this memory is allocated.

    References
    ----------
    .. [1] S. Ubaru, J. Chen, Y. Saad. Fast Estimation of tr(f(A)) via Stochastic Lanczos
       Quadrature. SIAM J. Matrix Anal. Appl. 38, 2017.
    """
    xp, (n, m) = array_namespace(W), W.shape
    max_steps = min(max_steps, n)
    norms = column_norm(W)
    ones, zeros = xp.ones_like(norms), xp.zeros_like(norms)
    kind = {"dtype": W.dtype, "device": like_device(W)}
    make = xp.zeros if traced else xp.empty  # a compiled loop reads what is not written yet

    def unfinished(state: _Recursion) -> Any:
        return xp.any(xp.abs(state.residual) > rtol) & (state.step < max_steps)

    def body(state: _Recursion) -> _Recursion:
        j, q = state.step, state.q
        alive = xp.any(q != 0, axis=1)
        basis = set_rows(state.basis, j, q[None, :, :])
        v = product(q.T).T
        alpha = xp.where(alive, xp.sum(q * v, axis=1), ones)
        known = xp.permute_dims(basis if traced else basis[: j + 1, :, :], (1, 0, 2))
        v = v[:, :, None]
        for _ in range(2):  # once is not enough in floating point
            v = v - xp.matrix_transpose(known) @ (known @ v)
        v = v[:, :, 0]
        beta = column_norm(v.T)
        scale = xp.maximum(state.scale, xp.abs(alpha) + beta)
        # A space that is exhausted has no more to tell; its T goes on as the identity.
        left = alive & (beta > n * eps(W) * scale)
        beta = xp.where(left, beta, zeros)
        pivot = alpha - state.beta**2 / state.pivot
        return _Recursion(
            j + 1,
            basis,
            set_rows(state.diagonal, j, alpha[None, :]),
            set_rows(state.beside, j, beta[None, :]),
            xp.where(left[:, None], v / xp.where(left, beta, ones)[:, None], xp.zeros_like(v)),
            beta,
            pivot,
            -state.residual * beta / pivot,
            scale,
        )

    start = _Recursion(
        0,
        make((max_steps, m, n), **kind),
        xp.ones((max_steps, m), **kind),
        xp.zeros((max_steps, m), **kind),
        (W / norms).T,
        zeros,
        ones,
        ones,
        zeros,
    )
    found = while_loop(unfinished, body, start)
    size = max_steps if traced else int(found.step)
    basis = found.basis[:size, :, :]
    T = _tridiagonal(found.diagonal[:size, :], found.beside[:size, :], found.step)
    theta, V = converged_eigh(T)
    positive = theta > 0
    safe = xp.where(positive, theta, xp.ones_like(theta))
    weights = V[:, 0, :]
    lengths = astype(norms, T.dtype)
    forms = lengths**2 * xp.sum(weights**2 * xp.log(safe), axis=1)
    forms = xp.where(xp.all(positive, axis=1), forms, xp.nan * forms)
    coefficients = lengths[:, None] * (V @ (weights / safe)[:, :, None])[:, :, 0]
    solutions = astype(coefficients, W.dtype)[:, None, :] @ xp.permute_dims(basis, (1, 0, 2))
    return LogQuadrature(forms, solutions[:, 0, :].T, xp.abs(found.residual), found.step)


def _tridiagonal(diagonal: Array, beside: Array, steps: Any) -> Array:
    """Return m matrices, shape (m, k, k), in the wide dtype, that end after `steps` rows."""
    xp, k = array_namespace(diagonal), diagonal.shape[0]
    wide = wide_dtype(diagonal)
    rows = like(np.arange(k), diagonal, wide)[:, None]
    inside = xp.where(rows < steps - 1, astype(beside, wide), 0 * astype(beside, wide))
    upper = inside.T[:, :, None] * like(np.eye(k, k=1), diagonal, wide)
    return (
        astype(diagonal, wide).T[:, :, None] * like(np.eye(k), diagonal, wide)
        + upper
        + xp.matrix_transpose(upper)
    )
