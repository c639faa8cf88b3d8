"""Gaussian process regression."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
from scipy.optimize import minimize
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from lowrank_inverse.arrays.checks import check_count, check_scalar
from lowrank_inverse.operators.kernel import KernelOperator
from lowrank_inverse.sklearn.exact_covariance import ExactCovariance
from lowrank_inverse.sklearn.hyperparameters import Hyperparameters, checked_bounds, checked_fixed
from lowrank_inverse.sklearn.iterative_covariance import IterativeCovariance
from lowrank_inverse.sklearn.kernel_ridge import MEMORY_BUDGET
from lowrank_inverse.sklearn.regressor import KernelRegressor, row_blocks, spread

MATRICES = 4
"""What a factorisation and its derivatives take."""
BLOCK_NUMBERS = 2**22
KERNELS = ("rbf", "matern")


class GaussianProcessRegressor(KernelRegressor):
    """Gaussian process regression, exact for a few thousand points, iterative beyond.

    The prior of f has mean 0 and covariance ``signal_variance * kernel((x - y) / lengthscale)``,
    and ``y_i = f(x_i) + e_i`` with independent e_i of variance `noise` [1]_. `fit` maximises the
    log marginal likelihood over the logarithms of the hyperparameters by L-BFGS-B.

    Parameters
    ----------
    kernel : {"rbf", "matern"}
        As in :class:`lowrank_inverse.KernelOperator`.
    nu : {0.5, 1.5, 2.5}
        Order of the Matérn kernel.
    lengthscale : float, array of shape (d,), "scale" or "features"
        Where the optimisation starts: one for all features, or one for each. ``"scale"``: the root
        of the summed variances of the features, one for all. ``"features"``: for each feature its
        standard deviation times ``sqrt(d)``.
    signal_variance, noise : float
        Where the optimisation starts; variances, in units of those of y with `normalize_y`.
    fixed : sequence of str
        Which of "signal_variance", "lengthscale" and "noise" stay where they start.
    bounds : pair of floats
        The others stay within these factors of their start.
    optimizer : "fmin_l_bfgs_b" or None
        None: all stay where they start.
    n_restarts_optimizer : int
        Optimisations from starts drawn within the bounds, log-uniformly, beside the first one.
    normalize_y : bool
        Model the targets less their means, over their standard deviations. Predictions are in the
        units of y; the likelihood is that of the normalised targets.
    memory_budget : int
        In bytes. Up to a quarter of it, the covariance is factored; beyond, its systems are solved
        by preconditioned conjugate gradients, and it is held if it takes no more than the budget.
    rank : int
        Columns of the preconditioner, and of the factor that variances come from.
    tol : float
        Relative residual of the solves.
    max_iter : int
        Steps of a solve.
    num_probes : int
        Random vectors that the logarithm of the determinant and its derivatives are estimated from.
    exact_variance : bool
        Solve for each prediction's variance where the covariance is not factored.
    random_state : int, RandomState or None
        Of restarts, columns and probes.

    Attributes
    ----------
    signal_variance_, lengthscale_, noise_ : float or array
    theta_ : ndarray
        Logarithms of the free ones, in this order.
    log_marginal_likelihood_value_ : float
        At `theta_`, of all targets together.
    log_marginal_likelihood_error_ : float
        Its standard error: 0 where the covariance is factored.
    X_fit_ : ndarray, shape (n, d)
    dual_coef_ : ndarray, shape (n,) or (n, m)
    n_iter_ : int
        Steps of the slowest solve at `theta_`.

    Notes
    -----
    Factored: ``n**3`` operations for the likelihood and its derivatives, and four matrices.
    Iterative: ``n**2 / 2`` kernel evaluations for each product, with all targets and probes at
    once, and ``n * rank`` numbers.

    Without the factorisation, the variance at a point is that of the best predictor of f there
    whose weights lie in a space of dimension `rank`: never too small, and right for ``rank = n``.
    With `exact_variance`, a solve to `tol` gives the weights: never too small either, and too large
    by ``norm(r)**2 / noise`` at most, where r is the residual.

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
    >>> print(abs(mean[0] - np.sin(1.0)) < 3 * std[0], 0.08 < model.noise_**0.5 * y.std() < 0.12)
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

    def fit(self, X: Any, y: Any) -> GaussianProcessRegressor:
        """Fit to points `X` (n, d) and targets `y` (n,) or (n, m).

        Warns with a ``ConvergenceWarning`` where the optimiser or a solve ended early.
        """
        X, y = validate_data(self, X, y, multi_output=True, y_numeric=True, dtype=np.float64)
        self._one_target = y.ndim == 1
        y = y.reshape(len(y), -1).astype(np.float64)
        self._mean, self._scale = np.zeros(y.shape[1]), np.ones(y.shape[1])
        if self.normalize_y:
            self._mean, deviation = y.mean(axis=0), y.std(axis=0)
            self._scale = np.where(deviation > 0, deviation, 1.0)
        self.X_fit_, self._y = X, (y - self._mean) / self._scale
        rng = check_random_state(self.random_state)
        self._seed = rng.randint(2**31 - 1)
        self._fixed = checked_fixed(self.fixed)
        self._start = self._checked_start(X)
        theta = self._optimised(rng)
        self._covariance = self._at(theta)
        if self._covariance.missed:
            warnings.warn(self._covariance.missed, ConvergenceWarning, stacklevel=2)
        self.theta_ = theta
        self.signal_variance_, self.lengthscale_, self.noise_ = self._covariance.at
        self.log_marginal_likelihood_value_ = self._covariance.log_likelihood
        self.log_marginal_likelihood_error_ = self._covariance.error
        self.dual_coef_ = self._shaped(self._covariance.coefficients)
        self.n_iter_ = max(1, self._covariance.num_steps)
        return self

    def predict(
        self,
        X: Any,
        return_std: bool = False,
        return_cov: bool = False,
        *,
        include_noise: bool = False,
    ) -> Any:
        """Return the mean of f at points `X` (p, d), with its standard deviations or covariance.

        Parameters
        ----------
        X : array, shape (p, d)
        return_std, return_cov : bool
            At most one of them.
        include_noise : bool
            Of new observations in the place of f.

        Returns
        -------
        mean : ndarray, shape (p,) or (p, m)
        std or cov : ndarray, shape (p,) or (p, m); (p, p) or (p, p, m)

        Warns
        -----
        ConvergenceWarning
            With `exact_variance`, where a solve did not meet `tol`; the result is too large then.
        """
        check_is_fitted(self)
        if return_std and return_cov:
            raise ValueError("one of `return_std` and `return_cov` may be asked for; got both.")
        X = validate_data(self, X, reset=False, dtype=np.float64)
        G = self._covariance
        mean = self.signal_variance_ * G.K.cross(X, G.coefficients) * self._scale + self._mean
        mean = self._shaped(mean)
        if not return_std and not return_cov:
            return mean
        noise = self.noise_ if include_noise else 0.0
        if return_cov:
            explained, missed = G.explained(X, diagonal=False)
            prior = KernelOperator(X, self.kernel, lengthscale=self.lengthscale_, nu=self.nu)
            cov = self.signal_variance_ * prior.evaluate(X, X) - explained
            cov = (cov + cov.T) / 2 + noise * np.eye(len(X))
            cov[np.diag_indices_from(cov)] = np.maximum(np.diagonal(cov), noise)
            result = cov[..., None] * self._scale**2
        else:
            size = max(1, BLOCK_NUMBERS // len(self.X_fit_))
            parts = [G.explained(X[rows], diagonal=True) for rows in row_blocks(len(X), size)]
            missed = max((reason for _, reason in parts), key=len)
            variance = self.signal_variance_ - np.concatenate([part for part, _ in parts])
            result = np.sqrt(np.maximum(variance, 0.0) + noise)[:, None] * self._scale
        if missed:
            warnings.warn(missed, ConvergenceWarning, stacklevel=2)
        return mean, self._shaped(result)

    def sample_y(self, X: Any, n_samples: int = 1, random_state: Any = 0) -> np.ndarray:
        """Draw functions from the posterior, at points `X` (p, d).

        Returns
        -------
        ndarray, shape (p, n_samples) or (p, m, n_samples)
        """
        rng = check_random_state(random_state)
        mean, cov = self.predict(X, return_cov=True)
        p = len(mean)
        mean, cov = mean.reshape(p, -1), cov.reshape(p, p, -1)
        samples = np.empty((*mean.shape, n_samples))
        for target in range(mean.shape[1]):
            values, vectors = np.linalg.eigh(cov[..., target])
            root = vectors * np.sqrt(np.maximum(values, 0.0))
            normal = rng.standard_normal((p, n_samples))
            samples[:, target] = mean[:, target, None] + root @ normal
        return samples[:, 0] if self._one_target else samples

    def log_marginal_likelihood(self, theta: Any = None, eval_gradient: bool = False) -> Any:
        """Return the log marginal likelihood of the (normalised) targets, and its gradient.

        Parameters
        ----------
        theta : array, optional
            Logarithms of the free ones of signal variance, lengthscale and noise, in this order.
            Default: `theta_`.
        eval_gradient : bool
            Return the derivatives with respect to `theta` as well.

        Returns
        -------
        float, or float and ndarray
            ``-inf`` and zeros where the covariance is not positive definite in float64.
        """
        check_is_fitted(self)
        try:
            G = self._covariance if theta is None else self._at(theta)
        except np.linalg.LinAlgError:
            return (-math.inf, np.zeros_like(self.theta_)) if eval_gradient else -math.inf
        return (G.log_likelihood, self._gradient(G)) if eval_gradient else G.log_likelihood

    def _checked_start(self, X: np.ndarray) -> Hyperparameters:
        if self.kernel not in KERNELS:
            raise ValueError(f"`kernel` must be 'rbf' or 'matern'; got {self.kernel!r}.")
        for name in ("signal_variance", "noise"):
            check_scalar(name, getattr(self, name), positive=True)
        check_scalar("tol", self.tol, positive=True)
        check_count("rank", self.rank)
        check_count("num_probes", self.num_probes)
        check_count("max_iter", self.max_iter)
        lengthscale = self.lengthscale
        if isinstance(lengthscale, str):
            if lengthscale not in ("scale", "features"):
                raise ValueError(
                    f"`lengthscale` must be positive, 'scale' or 'features'; got {lengthscale!r}."
                )
            each = X.std(axis=0) * X.shape[1] ** 0.5
            each = np.where(each > 0, each, 1.0)
            lengthscale = each if lengthscale == "features" else spread(X, np.ones(len(X)))
        elif np.ndim(lengthscale) == 1:
            lengthscale = np.asarray(lengthscale, dtype=np.float64)
        checked = KernelOperator(X, self.kernel, lengthscale=lengthscale, nu=self.nu).lengthscale
        return Hyperparameters(float(self.signal_variance), checked, float(self.noise))

    def _at(self, theta: Any) -> Any:
        """Return the covariance at some hyperparameters."""
        at = self._start.with_free(theta, self._fixed)
        K = KernelOperator(self.X_fit_, self.kernel, lengthscale=at.lengthscale, nu=self.nu)
        matrix = len(self._y) ** 2 * self._y.itemsize
        if MATRICES * matrix <= self.memory_budget:
            return ExactCovariance(K, self._y, at)
        return IterativeCovariance(
            K,
            self._y,
            at,
            held=matrix <= self.memory_budget,
            rank=self.rank,
            tol=self.tol,
            max_steps=self.max_iter,
            num_probes=self.num_probes,
            exact_variance=self.exact_variance,
            seed=self._seed,
        )

    def _gradient(self, G: Any) -> np.ndarray:
        parts = dict(zip(Hyperparameters._fields, G.gradient(), strict=True))
        free = [np.atleast_1d(part) for name, part in parts.items() if name not in self._fixed]
        return np.concatenate([np.zeros(0), *free])

    def _optimised(self, rng: Any) -> np.ndarray:
        """Return the logarithms with the largest likelihood that was found."""
        start = self._start.free(self._fixed)
        low, high = checked_bounds(self.bounds)
        if self.optimizer not in ("fmin_l_bfgs_b", None):
            raise ValueError(
                f"`optimizer` must be 'fmin_l_bfgs_b' or None; got {self.optimizer!r}."
            )
        if self.optimizer is None or start.size == 0 or low == high:
            return start

        def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
            try:
                G = self._at(theta)
            except np.linalg.LinAlgError:
                return math.inf, np.zeros_like(theta)
            return -G.log_likelihood, -self._gradient(G)

        limits = [(x + low, x + high) for x in start]
        starts = [start]
        for _ in range(self.n_restarts_optimizer):
            starts.append(rng.uniform(start + low, start + high))
        found = [minimize(loss, x, jac=True, method="L-BFGS-B", bounds=limits) for x in starts]
        best = min(found, key=lambda result: result.fun)
        if not best.success:
            warnings.warn(
                f"the optimiser ended early: {best.message}. Raise `noise`, narrow `bounds`, or "
                "scale the data.",
                ConvergenceWarning,
                stacklevel=3,
            )
        return best.x
