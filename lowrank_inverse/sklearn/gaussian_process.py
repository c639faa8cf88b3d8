"""Gaussian process regression."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from lowrank_inverse._typing import ArrayLike, MatrixLike
from lowrank_inverse.operators.kernel import KernelOperator
from lowrank_inverse.sklearn.exact_covariance import ExactCovariance
from lowrank_inverse.sklearn.hyperparameters import (
    check_settings,
    checked_alpha,
    checked_bounds,
    checked_fixed,
    checked_start,
    maximiser,
)
from lowrank_inverse.sklearn.iterative_covariance import IterativeCovariance
from lowrank_inverse.sklearn.kernel_ridge import MEMORY_BUDGET
from lowrank_inverse.sklearn.posterior import covariance, draw, variance
from lowrank_inverse.sklearn.regressor import KernelRegressor


class GaussianProcessRegressor(KernelRegressor):
    """Gaussian process regression, exact for a few thousand points, iterative beyond.

    The prior of f has mean 0 and covariance ``signal_variance * kernel((x - y) / lengthscale)``.
    The observations are ``y_i = f(x_i) + e_i`` with independent e_i of variance ``noise + alpha_i``
    [1]_. `fit` maximises the log marginal likelihood over the hyperparameters by L-BFGS-B.

    Parameters
    ----------
    kernel : {"rbf", "matern"}
        See :class:`lowrank_inverse.KernelOperator`.
    nu : {0.5, 1.5, 2.5}
        Order of the Matérn kernel.
    lengthscale : float, array of shape (d,), "scale" or "features"
        Starting value. ``"scale"`` is the square root of the summed variances of the features, for
        all of them; ``"features"`` is the standard deviation of each times ``sqrt(d)``.
    signal_variance, noise : float
        Starting values; with `normalize_y`, as fractions of the variance of y.
    alpha : float or array of shape (n,)
        Known variance of the noise of each observation, beside `noise` and in its units.
    fixed : sequence of str
        Which of "signal_variance", "lengthscale" and "noise" keep their starting values.
    bounds : pair of floats
        Factors that limit the others relative to their starting values.
    optimizer : "fmin_l_bfgs_b" or None
        None keeps all starting values.
    n_restarts_optimizer : int
        Number of further optimisations, from starting values drawn log-uniformly within the bounds.
    normalize_y : bool
        Subtract the means of the targets and divide by their standard deviations. Predictions are
        in the units of y; the likelihood is that of the normalised targets.
    memory_budget : int
        Bytes. A covariance matrix of up to a quarter of it is factored. Beyond, preconditioned
        conjugate gradients solve the systems, and the matrix is stored if it fits.
    rank : int
        Number of columns of the preconditioner, and of the factor for variances.
    tol : float
        Relative residual of the solves.
    max_iter : int
        Maximum number of steps of a solve.
    num_probes : int
        Number of random vectors that estimate the log determinant and its derivatives.
    exact_variance : bool
        Solve a system for the variance of each prediction if the covariance is not factored.
    random_state : int, RandomState instance or None
        Seed of restarts, columns and probes.

    Attributes
    ----------
    signal_variance_, lengthscale_, noise_ : float or array
        The fitted hyperparameters.
    theta_ : ndarray
        Logarithms of those that are not fixed, in this order.
    log_marginal_likelihood_value_ : float
        At `theta_`, for all targets together.
    log_marginal_likelihood_error_ : float
        Its standard error; 0 if the covariance is factored.
    X_fit_, dual_coef_ : ndarray, shape (n, d); (n,) or (n, m)
        Training points, and coefficients of the mean.
    n_iter_ : int
        Number of steps of the slowest solve at `theta_`.

    Notes
    -----
    Factored: ``n**3`` operations for the likelihood and its derivatives, four n×n matrices. Else:
    ``n**2 / 2`` kernel evaluations per product, for all targets and probes; ``n * rank`` numbers.

    If the covariance is not factored, the variance is that of the best predictor with weights in
    a space of dimension `rank`: never too small, and exact for ``rank = n``. With `exact_variance`
    a solve gives the weights: never too small, too large by at most ``norm(residual)**2 / noise``.

    References
    ----------
    .. [1] C. E. Rasmussen, C. K. I. Williams. Gaussian Processes for Machine Learning. MIT
       Press, 2006.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank_inverse.sklearn import GaussianProcessRegressor
    >>> rng = np.random.default_rng(0)
    >>> X = rng.uniform(-3, 3, (200, 1))
    >>> y = np.sin(2 * X[:, 0]) + 0.1 * rng.standard_normal(200)
    >>> model = GaussianProcessRegressor().fit(X, y)
    >>> mean, std = model.predict([[0.5]], return_std=True)
    >>> print(
    ...     abs(mean[0] - np.sin(1.0)) < 3 * std[0],
    ...     0.08 < model.noise_**0.5 * y.std() < 0.12,
    ... )
    True True
    """

    def __init__(
        self,
        kernel: str = "rbf",
        *,
        nu: float = 2.5,
        lengthscale: Any = "scale",
        signal_variance: float = 1.0,
        noise: float = 0.1,
        alpha: Any = 0.0,
        fixed: Any = (),
        bounds: Any = (1e-5, 1e5),
        optimizer: str | None = "fmin_l_bfgs_b",
        n_restarts_optimizer: int = 0,
        normalize_y: bool = True,
        memory_budget: int = MEMORY_BUDGET,
        rank: int = 300,
        tol: float = 1e-6,
        max_iter: int = 1000,
        num_probes: int = 16,
        exact_variance: bool = False,
        random_state: Any = None,
    ) -> None:
        self.kernel = kernel
        self.nu = nu
        self.lengthscale = lengthscale
        self.signal_variance = signal_variance
        self.noise = noise
        self.alpha = alpha
        self.fixed = fixed
        self.bounds = bounds
        self.optimizer = optimizer
        self.n_restarts_optimizer = n_restarts_optimizer
        self.normalize_y = normalize_y
        self.memory_budget = memory_budget
        self.rank = rank
        self.tol = tol
        self.max_iter = max_iter
        self.num_probes = num_probes
        self.exact_variance = exact_variance
        self.random_state = random_state

    def fit(self, X: MatrixLike, y: ArrayLike) -> GaussianProcessRegressor:
        """Fit to points `X` (n, d) and targets `y` (n,) or (n, m).

        Warns with a ``ConvergenceWarning`` if the optimiser or a solve ended early.
        """
        X, y = validate_data(self, X, y, multi_output=True, y_numeric=True, dtype=np.float64)
        self._one_target = y.ndim == 1
        y = y.reshape(len(y), -1).astype(np.float64)
        self._mean, self._scale = np.zeros(y.shape[1]), np.ones(y.shape[1])
        if self.normalize_y:
            self._mean, deviation = y.mean(axis=0), y.std(axis=0)
            rounding = 16 * np.finfo(float).eps * np.abs(y).max(axis=0)
            self._scale = np.where(deviation > rounding, deviation, 1.0)
        self.X_fit_, self._y = X, (y - self._mean) / self._scale
        rng = check_random_state(self.random_state)
        self._seed, self._alpha = rng.randint(2**31 - 1), checked_alpha(self.alpha, len(y))
        check_settings(self)
        self._fixed, bounds = checked_fixed(self.fixed), checked_bounds(self.bounds)
        self._start = checked_start(self.signal_variance, self.lengthscale, self.noise, X)
        self.theta_, missed = self._start.free(self._fixed), ""
        if self.optimizer is not None and self.theta_.size:
            self.theta_, missed = maximiser(
                self._likelihood, self.theta_, bounds, self.n_restarts_optimizer, rng
            )
        self._covariance = self._at(self.theta_)
        for reason in filter(None, (missed, self._covariance.missed)):
            warnings.warn(reason, ConvergenceWarning, stacklevel=2)
        self.signal_variance_, self.lengthscale_, self.noise_ = self._covariance.at
        self.log_marginal_likelihood_value_ = self._covariance.log_likelihood
        self.log_marginal_likelihood_error_ = self._covariance.error
        self.dual_coef_ = self._shaped(self._covariance.coefficients)
        self.n_iter_ = max(1, self._covariance.num_steps)
        return self

    def predict(
        self,
        X: MatrixLike,
        return_std: bool = False,
        return_cov: bool = False,
        *,
        include_noise: bool = False,
    ) -> Any:
        """Return the mean of f at points `X` (p, d), and its standard deviations or covariance.

        With `exact_variance`, warns if a solve did not meet `tol`; the result is then too large.

        Parameters
        ----------
        X : array, shape (p, d)
            Points, one per row.
        return_std, return_cov : bool
            Also return standard deviations or the covariance, but not both.
        include_noise : bool
            Return them for new observations instead of f.

        Returns
        -------
        mean : ndarray, shape (p,) or (p, m)
        std or cov : ndarray, shape (p,) or (p, m); (p, p) or (p, p, m)
        """
        check_is_fitted(self)
        if return_std and return_cov:
            raise ValueError("only one of `return_std` and `return_cov` may be True; got both.")
        X = validate_data(self, X, reset=False, dtype=np.float64)
        G = self._covariance
        mean = self.signal_variance_ * G.K.cross(X, G.coefficients)
        mean = self._shaped(mean * self._scale + self._mean)
        if not return_std and not return_cov:
            return mean
        noise = self.noise_ if include_noise else 0.0
        if return_cov:
            cov, missed = covariance(G, X)
            result = (cov + noise * np.eye(len(X)))[..., None] * self._scale**2
        else:
            each, missed = variance(G, X)
            result = np.sqrt(each + noise)[:, None] * self._scale
        if missed:
            warnings.warn(missed, ConvergenceWarning, stacklevel=2)
        return mean, self._shaped(result)

    def sample_y(self, X: MatrixLike, n_samples: int = 1, random_state: Any = 0) -> np.ndarray:
        """Draw functions at points `X` (p, d): shape (p, n_samples) or (p, m, n_samples)."""
        rng = check_random_state(random_state)
        mean, cov = self.predict(X, return_cov=True)
        samples = draw(mean.reshape(len(mean), -1), cov.reshape(*cov.shape[:2], -1), n_samples, rng)
        return samples[:, 0] if self._one_target else samples

    def log_marginal_likelihood(self, theta: Any = None, eval_gradient: bool = False) -> Any:
        """Return the log marginal likelihood of the (normalised) targets, and its gradient.

        Parameters
        ----------
        theta : array, optional
            Logarithms of signal variance, lengthscale and noise, in this order, without those that
            are fixed. Default: `theta_`.
        eval_gradient : bool
            Also return the gradient with respect to `theta`.

        Returns
        -------
        float, or float and ndarray
            ``-inf`` and zeros if the covariance is not positive definite in float64.
        """
        check_is_fitted(self)
        if theta is None and not eval_gradient:
            return self.log_marginal_likelihood_value_
        theta = self.theta_ if theta is None else theta
        try:
            return self._likelihood(theta)[:2] if eval_gradient else self._at(theta).log_likelihood
        except np.linalg.LinAlgError:
            return (-math.inf, np.zeros_like(self.theta_)) if eval_gradient else -math.inf

    def _at(self, theta: Any) -> Any:
        """Return the covariance at some hyperparameters."""
        at = self._start.with_free(theta, self._fixed)
        K = KernelOperator(self.X_fit_, self.kernel, lengthscale=at.lengthscale, nu=self.nu)
        matrix = len(self._y) ** 2 * self._y.itemsize
        if 4 * matrix <= self.memory_budget:  # what a factorisation and its derivatives take
            return ExactCovariance(K, self._y, at, self._alpha)
        return IterativeCovariance(
            K,
            self._y,
            at,
            self._alpha,
            held=matrix <= self.memory_budget,
            rank=self.rank,
            tol=self.tol,
            max_steps=self.max_iter,
            num_probes=self.num_probes,
            exact_variance=self.exact_variance,
            seed=self._seed,
        )

    def _likelihood(self, theta: Any) -> tuple[float, np.ndarray, float]:
        """Return the likelihood, its gradient and its standard error."""
        G = self._at(theta)
        return G.log_likelihood, G.at.of_free(G.gradient(), self._fixed), G.error
