"""Dense answers in extended precision, by other ways than the code under test."""

from __future__ import annotations

from typing import Any

import numpy as np

LONG = np.longdouble


def solve(A: Any, B: Any) -> np.ndarray:
    """Solve ``A X = B`` by Gaussian elimination with partial pivoting, in long double."""
    A, B = np.array(A, dtype=LONG), np.array(B, dtype=LONG)
    vector = B.ndim == 1
    B = B.reshape(len(A), -1)
    n = len(A)
    for j in range(n):
        pivot = j + int(np.argmax(np.abs(A[j:, j])))
        A[[j, pivot]], B[[j, pivot]] = A[[pivot, j]], B[[pivot, j]]
        factors = A[j + 1 :, j] / A[j, j]
        A[j + 1 :] -= factors[:, None] * A[j]
        B[j + 1 :] -= factors[:, None] * B[j]
    X = np.zeros_like(B)
    for j in reversed(range(n)):
        X[j] = (B[j] - A[j, j + 1 :] @ X[j + 1 :]) / A[j, j]
    return X[:, 0] if vector else X


def damped(A: Any, damping: float) -> np.ndarray:
    """Return ``A + damping I`` in long double."""
    return np.asarray(A, dtype=LONG) + LONG(damping) * np.eye(len(A), dtype=LONG)


def damped_solve(A: Any, damping: float, B: Any) -> np.ndarray:
    """Return ``(A + damping I)^{-1} B``."""
    return solve(damped(A, damping), B)


def damped_inverse(A: Any, damping: float) -> np.ndarray:
    """Return ``(A + damping I)^{-1}``."""
    return damped_solve(A, damping, np.eye(len(A)))


def nystrom(A: Any, indices: Any) -> np.ndarray:
    """Return ``C W^{-1} C.T`` for a W that is not singular in long double."""
    indices = np.asarray(indices)
    C = np.asarray(A, dtype=LONG)[:, indices]
    return C @ solve(C[indices], C.T)


def nystrom_truncated(A: Any, indices: Any, rtol: float) -> np.ndarray:
    """Return ``C W^+ C.T`` with the pseudo-inverse by singular values, cut off at `rtol`."""
    indices = np.asarray(indices)
    C = np.asarray(A, dtype=np.float64)[:, indices]
    return C @ np.linalg.lstsq(C[indices], C.T, rcond=rtol)[0]


def equation_6(C: np.ndarray, W: np.ndarray, damping: float, v: np.ndarray) -> np.ndarray:
    """Evaluate Eq. 6 of the paper as it stands, in the dtype of `C`."""
    damping = C.dtype.type(damping)
    inner = W + C.T @ C / damping
    return v / damping - C @ np.linalg.solve(inner, C.T @ v) / damping**2


def neumann_sum(B: Any, b: Any, step_size: float, num_terms: int) -> np.ndarray:
    """Return ``step_size * sum_{j < num_terms} (I - step_size B)^j b``, term by term."""
    B, b = np.asarray(B, dtype=LONG), np.asarray(b, dtype=LONG)
    term, total = b, np.zeros_like(b)
    for _ in range(num_terms):
        total = total + term
        term = term - LONG(step_size) * (B @ term)
    return LONG(step_size) * total


def krylov_optima(A: Any, b: Any, *, M: Any = None, x0: Any = None) -> list[np.ndarray]:
    """Return the minimiser of the A-norm of the error over each Krylov space, from j = 1 to n.

    The spaces ``x0 + span{M r, (M A) M r, ..., (M A)^{j-1} M r}`` are spanned by an orthonormal
    basis, orthogonalised twice; the minimiser solves the projected equations.
    """
    A = np.asarray(A, dtype=LONG)
    n = len(A)
    M = np.eye(n, dtype=LONG) if M is None else np.asarray(M, dtype=LONG)
    x0 = np.zeros(n, dtype=LONG) if x0 is None else np.asarray(x0, dtype=LONG)
    r = np.asarray(b, dtype=LONG) - A @ x0
    V = np.zeros((n, 0), dtype=LONG)
    optima, v = [], M @ r
    for _ in range(n):
        for _ in range(2):
            v = v - V @ (V.T @ v)
        v = v / np.sqrt(v @ v)
        V = np.column_stack([V, v])
        optima.append(x0 + V @ solve(V.T @ A @ V, V.T @ r))
        v = M @ (A @ v)
    return optima


def textbook_cg(A: Any, b: Any, rtol: float, max_steps: int) -> tuple[np.ndarray, int, bool]:
    """Run CG as in textbooks, in the dtype of `A`, and believe the residual that it carries."""
    x, r, p = np.zeros_like(b), b.copy(), b.copy()
    rr, target = r @ r, rtol**2 * (b @ b)
    for step in range(max_steps):
        if rr <= target:
            return x, step, True
        Ap = A @ p
        alpha = rr / (p @ Ap)
        x, r = x + alpha * p, r - alpha * Ap
        rr, old = r @ r, rr
        p = r + (rr / old) * p
    return x, max_steps, False


def norm(x: Any) -> np.ndarray:
    """Euclidean norm of each column, in long double."""
    x = np.asarray(x, dtype=LONG)
    return np.sqrt(np.sum(x * x, axis=0))


def residual_norm(A: Any, damping: float, x: Any, b: Any) -> np.ndarray:
    """Norm of ``b - (A + damping I) x`` of each column."""
    return norm(np.asarray(b, dtype=LONG) - damped(A, damping) @ np.asarray(x, dtype=LONG))


def relative_error(x: Any, reference: Any) -> float:
    """Return ``norm(x - reference) / norm(reference)``, in the Frobenius norm."""
    difference = np.asarray(x, dtype=LONG) - np.asarray(reference, dtype=LONG)
    reference = np.asarray(reference, dtype=LONG)
    return float(np.sqrt(np.sum(difference**2)) / np.sqrt(np.sum(reference**2)))


def operator_norm(A: Any) -> float:
    """Return the largest singular value."""
    return float(np.linalg.norm(np.asarray(A, dtype=np.float64), 2))


def gradient(f: Any, x: np.ndarray) -> np.ndarray:
    """Differentiate an analytic function of a vector by complex steps: right to rounding."""
    return np.stack([f(x + 1e-30j * e).imag / 1e-30 for e in np.eye(x.size)], axis=-1)


def jacobian(f: Any, x: np.ndarray, h: float = 1e-3) -> np.ndarray:
    """Differentiate a function of a vector by central differences of the fourth order."""
    steps = h * np.eye(x.size)
    columns = [8 * (f(x + e) - f(x - e)) - (f(x + 2 * e) - f(x - 2 * e)) for e in steps]
    return np.stack(columns, axis=-1) / (12 * h)
