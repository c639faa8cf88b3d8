"""The covariance matrix of the observations of a Gaussian process, by its products."""

from __future__ import annotations

import math
from functools import cached_property, partial
from typing import Any

import numpy as np
from scipy.linalg import cholesky, solve_triangular

from lowrank_inverse.iterative.conjugate_gradients import cg
from lowrank_inverse.operators.diagonal import ShiftedOperator
from lowrank_inverse.operators.function import FunctionOperator, aslinearoperator
from lowrank_inverse.operators.kernel import KernelOperator
from lowrank_inverse.operators.kernels.points import row_slices
from lowrank_inverse.sklearn.hyperparameters import Hyperparameters
from lowrank_inverse.sklearn.radial_kernel import contract, contract_columns, contract_core
from lowrank_inverse.sklearn.regressor import kernel_matrix
from lowrank_inverse.spectral.quadrature import LogQuadrature, log_quadrature
from lowrank_inverse.spectral.shifted_nystrom import shifted_nystrom

SOLVE_WIDTH = 32
NUM_STEPS = 100
PROBE_RTOL = 1e-3
"""Of the solves with probes, beside whose spread their errors are small."""


class IterativeCovariance:
    """``G = s (H + damping * I)``, with s the signal variance and ``s * damping`` the noise.

    H is ``K + diag(alpha) / s``. With ``P = K_k + level * I`` from a Nyström approximation and of
    the trace of ``H + damping * I``, ``B = P^{-1/2} (H + damping * I) P^{-1/2}``, and probes w of
    random signs [1]_, [2]_: the logarithm of the determinant is that of ``s P``, plus the mean of
    ``w.T log(B) w``, by Lanczos' quadrature; and the trace of ``G^{-1} dG`` is that of ``P^{-1}
    dK_k``, plus a mean over the same probes of what the two differ by. Both means vanish with ``K -
    K_k``, and so do their variances.

    Attributes
    ----------
    coefficients : ndarray, shape (n, m)
        ``G^{-1} y``.
    log_likelihood, error : float
        Of all targets together, and its standard error.
    num_steps : int
        Of the slowest solve.

    References
    ----------
    .. [1] J. R. Gardner, G. Pleiss, D. Bindel, K. Q. Weinberger, A. G. Wilson. GPyTorch: Blackbox
       Matrix-Matrix Gaussian Process Inference with GPU Acceleration. NeurIPS 2018.
    .. [2] J. Wenger, G. Pleiss, P. Hennig, J. P. Cunningham, J. R. Gardner. Preconditioning for
       Scalable Gaussian Process Hyperparameter Optimization. ICML 2022.
    """

    def __init__(
        self,
        K: KernelOperator,
        y: np.ndarray,
        at: Hyperparameters,
        alpha: np.ndarray,
        *,
        held: bool,
        rank: int,
        tol: float,
        max_steps: int,
        num_probes: int,
        exact_variance: bool,
        seed: int,
    ) -> None:
        self.K, self.y, self.at, self.exact_variance = K, y, at, exact_variance
        self.damping, n = at.noise / at.signal_variance, len(y)
        A, known = aslinearoperator(kernel_matrix(K)) if held else K, alpha / at.signal_variance
        self._H = ShiftedOperator(A, known) if np.any(known) else A
        rng, level = np.random.default_rng(seed), self.damping + float(np.mean(known))
        self._P = shifted_nystrom(A, min(rank, n), level, rng)
        self._signs = rng.choice([-1.0, 1.0], (n, num_probes))
        inverse = partial(self._P.power, exponent=-1.0)
        self._solve = partial(
            cg,
            self._H,
            damping=self.damping,
            preconditioner=FunctionOperator(inverse, n, matmat=inverse),  # of blocks alone
            rtol=tol,
            max_steps=max_steps,
        )
        solution = self._solve(y)
        self._solved = solution.value
        self.coefficients = self._solved / at.signal_variance
        self.num_steps = int(solution.num_steps.max())
        self._missed = "" if solution.converged.all() else _missed(solution, y)

    @cached_property
    def _quadrature(self) -> LogQuadrature:
        """Return what the probes tell."""

        def product(block: np.ndarray) -> np.ndarray:
            half = self._P.power(block, -0.5)
            return self._P.power(self._H @ half + self.damping * half, -0.5)

        found = log_quadrature(product, self._signs, max_steps=NUM_STEPS, rtol=PROBE_RTOL)
        if not np.isfinite(found.forms).all():
            raise np.linalg.LinAlgError(
                "the covariance is not positive definite in float64: raise `noise`"
            )
        return found

    @property
    def missed(self) -> str:
        """Message if a solve did not meet its tolerance, else empty."""
        worst = float(np.max(self._quadrature.residual_norm))
        if self._missed or worst <= PROBE_RTOL:
            return self._missed
        return (
            f"the quadrature of the likelihood ended after {NUM_STEPS} steps, at a relative "
            f"residual of {worst:.1g}. Raise `rank` or `noise`."
        )

    @property
    def log_likelihood(self) -> float:
        """Log marginal likelihood of all targets together."""
        n, m = self.y.shape
        fit = float(np.sum(self.y * self.coefficients))
        known = self._P.function_trace(np.log(self._P.inside), np.log(self._P.tail))
        log_det = n * math.log(self.at.signal_variance) + known + np.mean(self._quadrature.forms)
        return -(fit + m * (float(log_det) + n * math.log(2 * math.pi))) / 2

    @property
    def error(self) -> float:
        """The standard error of `log_likelihood`."""
        forms = self._quadrature.forms
        return self.y.shape[1] / 2 * float(np.std(forms, ddof=1)) / forms.size**0.5

    def gradient(self) -> tuple[float, np.ndarray, float]:
        """Return the derivatives with respect to the logarithms of the hyperparameters."""
        m, share, P = self.y.shape[1], 1 / self._signs.shape[1], self._P
        u, v = P.power(self._signs, -0.5), P.power(self._quadrature.solutions, -0.5)
        # What the samples show of K, less what they show of K_k, whose trace is known: with R = C
        # W^+, the derivative of C W^+ C.T is dC R.T + R dC.T - R dW R.T.
        p, pivots = P.R.T @ u, np.asarray(P.indices)
        left = np.hstack([self._solved / self.at.signal_variance, -m * share / 2 * v, u])
        right = np.hstack([self._solved, u, -m * share / 2 * v])
        parts = [
            contract(self.K, lambda rows, columns: left[rows] @ right[columns].T),
            contract_columns(self.K, pivots, 2 * m * (share * u @ p.T - P.Y)),
            contract_core(self.K, pivots, m * (P.Y.T @ P.R - share * p @ p.T)),
        ]
        value = float(np.sum([part for part, _ in parts]))
        slope = np.sum([part for _, part in parts], axis=0)
        samples = P.function_trace(1 / P.inside, 1 / P.tail) + share * np.sum(u * (v - u))
        trace = np.sum(self._solved**2) / self.at.signal_variance - m * samples
        return value / 2, slope / 2, self.damping / 2 * float(trace)

    def explained(self, Z: np.ndarray, *, diagonal: bool) -> tuple[np.ndarray, str]:
        """Return what is at most ``C.T G^{-1} C``, for the covariance C with `Z`, or its diagonal.

        And which solve did not meet its tolerance.
        """
        s = self.at.signal_variance
        if not self.exact_variance:
            C = s**0.5 * self.K.cross(Z, self._P.U)
            V = solve_triangular(self._subspace, C.T, lower=True, check_finite=False)
            return (np.sum(V * V, axis=0) if diagonal else V.T @ V), ""
        C = self.K.evaluate(self.K.X, Z)
        parts, missed = [], ""
        for columns in row_slices(len(Z), SOLVE_WIDTH):
            solution = self._solve(C[:, columns])
            parts.append(solution.value)
            if not solution.converged.all():
                missed = _missed(solution, C[:, columns])
        X = np.hstack(parts)
        # For any X at all, C.T G^{-1} C is at least C.T X + X.T C - X.T G X.
        rest = 2 * C - self._H @ X - self.damping * X
        return s * (np.sum(X * rest, axis=0) if diagonal else X.T @ rest), missed

    @cached_property
    def _subspace(self) -> np.ndarray:
        """Return the Cholesky factor of ``U.T (H + damping * I) U``: one for all predictions."""
        inner = self._P.U.T @ (self._H @ self._P.U)
        inner = (inner + inner.T) / 2 + self.damping * np.eye(len(inner))
        return cholesky(inner, lower=True, check_finite=False)


def _missed(solution: Any, b: np.ndarray) -> str:
    relative = np.max(solution.residual_norm / np.linalg.norm(b, axis=0))
    return (
        f"a solve did not meet its tolerance: {solution.message}, relative residual "
        f"{relative:.1g}. Raise `rank`, `max_iter` or `noise`, or loosen `tol`."
    )
