"""The covariance matrix of the observations of a Gaussian process, by Cholesky factorization."""

from __future__ import annotations

import math

import numpy as np
from scipy.linalg import cho_solve, lapack, solve_triangular

from lowrank_inverse.operators.kernel import KernelOperator
from lowrank_inverse.sklearn.hyperparameters import Hyperparameters
from lowrank_inverse.sklearn.radial_kernel import contract
from lowrank_inverse.sklearn.regressor import kernel_matrix


class ExactCovariance:
    """``G = signal_variance * K + noise * I + diag(alpha)`` by Cholesky's factorisation [1]_.

    See Algorithm 2.1 there.

    Attributes
    ----------
    coefficients : ndarray, shape (n, m)
        ``G^{-1} y``.
    log_likelihood : float
        Of all targets together.
    error : float
        0: nothing is estimated.

    Raises
    ------
    numpy.linalg.LinAlgError
        If G is not positive definite in float64.

    References
    ----------
    .. [1] C. E. Rasmussen, C. K. I. Williams. Gaussian Processes for Machine Learning. MIT
       Press, 2006.
    """

    error = 0.0
    num_steps = 1
    missed = ""

    def __init__(
        self, K: KernelOperator, y: np.ndarray, at: Hyperparameters, alpha: np.ndarray
    ) -> None:
        self.K, self.y, self.at = K, y, at
        G = kernel_matrix(K)
        G *= at.signal_variance
        G[np.diag_indices_from(G)] += at.noise + alpha
        # Of G.T, which is G, in the memory of G: LAPACK reads columns first.
        factor, failed = lapack.dpotrf(G.T, lower=1, clean=1, overwrite_a=1)
        if failed:
            raise np.linalg.LinAlgError(
                "the covariance is not positive definite in float64: raise `noise`"
            )
        self.factor = factor
        self.coefficients = cho_solve((factor, True), y, check_finite=False)
        n, m = y.shape
        log_det = 2 * float(np.sum(np.log(np.diagonal(factor))))
        fit = float(np.sum(y * self.coefficients))
        self.log_likelihood = -(fit + m * (log_det + n * math.log(2 * math.pi))) / 2

    def gradient(self) -> tuple[float, np.ndarray, float]:
        """Return the derivatives with respect to the logarithms of the hyperparameters."""
        lower, _ = lapack.dpotri(self.factor, lower=1)  # the lower half of the inverse
        m, a = self.y.shape[1], self.coefficients

        def weight(rows: slice, columns: slice) -> np.ndarray:
            inverse = lower[columns, rows].T
            if rows == columns:
                inverse = np.triu(inverse) + np.triu(inverse, 1).T
            return a[rows] @ a[columns].T - m * inverse

        value, slope = contract(self.K, weight)
        trace = float(np.sum(a * a) - m * np.sum(np.diagonal(lower)))
        half = self.at.signal_variance / 2
        return half * value, half * slope, self.at.noise / 2 * trace

    def explained(self, Z: np.ndarray, *, diagonal: bool) -> tuple[np.ndarray, str]:
        """Return ``C.T G^{-1} C`` for the covariance C with points `Z`, or its diagonal.

        And what went wrong: nothing.
        """
        C = self.at.signal_variance * self.K.evaluate(self.K.X, Z)
        V = solve_triangular(self.factor, C, lower=True, check_finite=False)
        return (np.sum(V * V, axis=0) if diagonal else V.T @ V), ""
