"""The covariance of the observations of a Gaussian process, by its products alone."""

from __future__ import annotations

import math
from functools import cached_property, partial
from typing import Any

import numpy as np
from scipy.linalg import cholesky, solve_triangular

from lowrank_inverse.iterative.conjugate_gradients import cg
from lowrank_inverse.low_rank.nystrom_columns import nystrom
from lowrank_inverse.low_rank.preconditioner import NystromPreconditioner
from lowrank_inverse.operators.kernel import KernelOperator
from lowrank_inverse.sklearn.hyperparameters import Hyperparameters
from lowrank_inverse.sklearn.log_quadrature import log_quadratic_forms
from lowrank_inverse.sklearn.radial_kernel import contract, contract_columns, contract_core
from lowrank_inverse.sklearn.regressor import kernel_matrix, row_blocks

SOLVE_WIDTH = 32
NUM_STEPS = 100


class IterativeCovariance:
    """``G = s (K + damping * I)``, with s the signal variance and ``s * damping`` the noise.

    With ``P = K_k + level * I`` from a Nyström approximation and of the trace of ``K + damping *
    I``, ``B = P^{-1/2} (K + damping * I) P^{-1/2}``, and probes w of random signs [1]_, [2]_: the
    logarithm of the determinant is that of ``s P``, plus the mean of ``w.T log(B) w``, by Lanczos'
    quadrature; and the trace of ``G^{-1} dG`` is that of ``P^{-1} dK_k``, plus a mean over the same
    probes of what the two differ by. Both means vanish with ``K - K_k``, and so do their variances.

    Attributes
    ----------
    coefficients : ndarray, shape (n, m)
        ``G^{-1} y``.
    log_likelihood, error : float
        Of all targets together, and its standard error.
    num_steps : int
        Of the slowest solve.
    missed : str
        Which solve did not meet its tolerance, if one did not.

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
        self._A: Any = kernel_matrix(K) if held else K
        rng = np.random.default_rng(seed)
        approx = nystrom(self._A, min(rank, n), sampling="rpcholesky", rng=rng)
        self._approx = approx
        self._U, self._g = approx.eigenvectors()
        self._level = self.damping + approx.residual_trace / n
        self._signs = rng.choice([-1.0, 1.0], (n, num_probes))
        self._solve = partial(
            cg,
            self._A,
            damping=self.damping,
            preconditioner=NystromPreconditioner(approx, self.damping),
            rtol=tol,
            max_steps=max_steps,
        )
        # The targets and the probes share one Krylov space.
        block = np.hstack([y, self._root(self._signs, 0.5)])
        solution = self._solve(block, block_size=block.shape[1])
        m = y.shape[1]
        self._solved, self._solved_probes = solution.value[:, :m], solution.value[:, m:]
        self.coefficients = self._solved / at.signal_variance
        self.num_steps = int(solution.num_steps.max())
        self.missed = ""
        if not solution.converged.all():
            self.missed = _missed(solution, block)

    def _root(self, block: np.ndarray, power: float) -> np.ndarray:
        """Return ``P**power @ block``."""
        inside, outside = (self._g + self._level) ** power, self._level**power
        return outside * block + self._U @ ((inside - outside)[:, None] * (self._U.T @ block))

    @cached_property
    def _log_det(self) -> tuple[float, float]:
        """Return the logarithm of the determinant of G and its standard error."""
        n, k = self._U.shape

        def product(block: np.ndarray) -> np.ndarray:
            half = self._root(block, -0.5)
            return self._root(self._A @ half + self.damping * half, -0.5)

        forms = log_quadratic_forms(product, self._signs, NUM_STEPS)
        known = float(np.sum(np.log(self._g + self._level))) + (n - k) * math.log(self._level)
        error = float(np.std(forms, ddof=1)) / forms.size**0.5
        return n * math.log(self.at.signal_variance) + known + float(np.mean(forms)), error

    @property
    def log_likelihood(self) -> float:
        """Of all targets together."""
        n, m = self.y.shape
        fit = float(np.sum(self.y * self.coefficients))
        return -(fit + m * (self._log_det[0] + n * math.log(2 * math.pi))) / 2

    @property
    def error(self) -> float:
        """The standard error of `log_likelihood`."""
        return self.y.shape[1] * self._log_det[1] / 2

    def gradient(self) -> tuple[float, np.ndarray, float]:
        """Return the derivatives with respect to the logarithms of the hyperparameters."""
        m, share = self.y.shape[1], 1 / self._signs.shape[1]
        u, v = self._root(self._signs, -0.5), self._solved_probes
        # What the samples show of K, less what they show of K_k, whose trace is known: with R = C
        # W^+, the derivative of C W^+ C.T is dC R.T + R dC.T - R dW R.T.
        R = self._approx.columns @ (self._approx.whitening @ self._approx.whitening.T)
        Y, p = self._root(R, -1.0), R.T @ u
        left = np.hstack([self._solved / self.at.signal_variance, -m * share / 2 * v, u])
        right = np.hstack([self._solved, u, -m * share / 2 * v])
        pivots = np.asarray(self._approx.indices)
        parts = [
            contract(self.K, lambda rows, columns: left[rows] @ right[columns].T),
            contract_columns(self.K, pivots, 2 * m * (share * u @ p.T - Y)),
            contract_core(self.K, pivots, m * (Y.T @ R - share * p @ p.T)),
        ]
        value = float(np.sum([part for part, _ in parts]))
        slope = np.sum([part for _, part in parts], axis=0)
        known = float(np.sum(1 / (self._g + self._level))) + (len(u) - self._g.size) / self._level
        samples = known + share * float(np.sum(u * (v - u)))
        trace = float(np.sum(self._solved**2)) / self.at.signal_variance - m * samples
        return value / 2, slope / 2, self.damping / 2 * trace

    def explained(self, Z: np.ndarray, *, diagonal: bool) -> tuple[np.ndarray, str]:
        """Return what is at most ``C.T G^{-1} C``, for the covariance C with `Z`, or its diagonal.

        And which solve did not meet its tolerance.
        """
        s = self.at.signal_variance
        if not self.exact_variance:
            C = s**0.5 * self.K.cross(Z, self._U)
            V = solve_triangular(self._subspace, C.T, lower=True, check_finite=False)
            return (np.sum(V * V, axis=0) if diagonal else V.T @ V), ""
        C = self.K.evaluate(self.K.X, Z)
        parts, missed = [], ""
        for columns in row_blocks(len(Z), SOLVE_WIDTH):
            solution = self._solve(C[:, columns])
            parts.append(solution.value)
            if not solution.converged.all():
                missed = _missed(solution, C[:, columns])
        X = np.hstack(parts)
        # For any X at all, C.T G^{-1} C is at least C.T X + X.T C - X.T G X.
        rest = 2 * C - self._A @ X - self.damping * X
        return s * (np.sum(X * rest, axis=0) if diagonal else X.T @ rest), missed

    @cached_property
    def _subspace(self) -> np.ndarray:
        """Return the Cholesky factor of ``U.T (K + damping * I) U``: one for all predictions."""
        inner = self._U.T @ (self._A @ self._U)
        inner = (inner + inner.T) / 2 + self.damping * np.eye(len(inner))
        return cholesky(inner, lower=True, check_finite=False)


def _missed(solution: Any, b: np.ndarray) -> str:
    relative = np.max(solution.residual_norm / np.linalg.norm(b, axis=0))
    return (
        f"a solve did not meet its tolerance: {solution.message}, relative residual "
        f"{relative:.1g}. Raise `rank`, `max_iter` or `noise`, or loosen `tol`."
    )
