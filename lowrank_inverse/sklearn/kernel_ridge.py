"""Kernel ridge regression, solved to a tolerance."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from lowrank_inverse._typing import ArrayLike, MatrixLike, Sampling
from lowrank_inverse.arrays.checks import check_count, check_scalar
from lowrank_inverse.arrays.linalg import column_norm
from lowrank_inverse.operators.composition import scaled_by_diagonal
from lowrank_inverse.results.solution import Solution
from lowrank_inverse.sklearn.regressor import KernelRegressor, kernel_matrix
from lowrank_inverse.solvers.direct import Exact
from lowrank_inverse.solvers.preconditioned import NystromCG
from lowrank_inverse.solvers.solve import solve

MEMORY_BUDGET = 2**30
FACTORED = 8
"""Matrices that a factorization and its copies take."""
UNREACHABLE = 1e3


class KernelRidge(KernelRegressor):
    """Kernel ridge regression, solved to a tolerance without storing the kernel matrix.

    Minimises ``sum_i w_i (y_i - f(x_i))**2 + alpha * norm(f)**2``, like
    ``sklearn.kernel_ridge.KernelRidge``. That estimator factors the n×n matrix; this one uses
    conjugate gradients with a Nyström preconditioner.

    Parameters
    ----------
    alpha : float or array, shape (m,)
        Strength of the penalty, or one for each target; positive.
    kernel : str or callable
        See :class:`lowrank_inverse.KernelOperator`. Also ``"linear"``, ``x @ y``, for which `X` may
        be sparse, and ``"precomputed"``, for which `X` is the kernel matrix.
    nu, degree, coef0, chunk_size
        See :class:`lowrank_inverse.KernelOperator`.
    lengthscale : float, array of shape (d,), or "scale"
        ``"scale"`` is the square root of the summed variances of the features. Not used by
        ``"linear"``.
    fit_intercept : bool
        Add a constant to f, without a penalty.
    rank : int
        Number of columns of the preconditioner. Up to that many points are solved directly.
    sampling : str
        How to choose the columns; see :func:`lowrank_inverse.nystrom`.
    tol : float
        Relative error of the fit at the training points for each target, whatever the weights; at
        least 1e3 machine epsilons.
    max_iter : int, optional
        Maximum number of steps. Default: ``10 * n``.
    memory_budget : int
        Bytes. A kernel matrix that fits is stored, which makes the steps faster. One of up to an
        eighth of it is factored if the steps do not reach `tol`.
    random_state : int, RandomState instance or None
        Seed of the sampled columns.

    Attributes
    ----------
    X_fit_ : ndarray or sparse matrix, shape (n, d)
        Points with a positive weight; None for a precomputed kernel.
    dual_coef_ : ndarray, shape (n,) or (n, m)
        ``f(z) = sum_j kernel(z, X_fit_[j]) * dual_coef_[j] + intercept_``.
    intercept_ : float or ndarray of shape (m,)
        The constant; 0 without `fit_intercept`.
    lengthscale_ : float or array
        The lengthscale used.
    n_iter_ : int
        Number of steps of the slowest target.

    Notes
    -----
    Memory: ``n * rank`` numbers, and twice that while the columns are chosen. Cost: ``n**2 / 2``
    kernel evaluations per step for all targets with the same `alpha`; each `alpha` is a solve of
    its own.

    Examples
    --------
    >>> from sklearn.datasets import make_friedman1
    >>> from lowrank_inverse.sklearn import KernelRidge
    >>> X, y = make_friedman1(600, noise=0.1, random_state=0)
    >>> model = KernelRidge(alpha=0.01, random_state=0).fit(X[:400], y[:400])
    >>> print(f"{model.score(X[400:], y[400:]):.2f}")
    0.97
    """

    def __init__(
        self,
        alpha: Any = 1.0,
        *,
        kernel: Any = "rbf",
        lengthscale: Any = "scale",
        fit_intercept: bool = False,
        nu: float = 2.5,
        degree: int = 3,
        coef0: float = 1.0,
        rank: int = 200,
        sampling: Sampling = "rpcholesky",
        tol: float = 1e-7,
        max_iter: int | None = None,
        chunk_size: int | None = None,
        memory_budget: int = MEMORY_BUDGET,
        random_state: Any = None,
    ) -> None:
        self.alpha = alpha
        self.kernel = kernel
        self.lengthscale = lengthscale
        self.fit_intercept = fit_intercept
        self.nu = nu
        self.degree = degree
        self.coef0 = coef0
        self.rank = rank
        self.sampling = sampling
        self.tol = tol
        self.max_iter = max_iter
        self.chunk_size = chunk_size
        self.memory_budget = memory_budget
        self.random_state = random_state

    def fit(
        self, X: MatrixLike, y: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> KernelRidge:
        """Fit to points `X` (n, d) and targets `y` (n,) or (n, m).

        Points of zero weight are ignored. With kernel="precomputed", `X` is the kernel of the
        training points, shape (n, n). Warns with a ``ConvergenceWarning`` if `tol` was not met.
        """
        X, y, root = self._training(X, y, sample_weight)
        alphas = _checked_alpha(self.alpha, y.shape[1])
        check_count("rank", self.rank)
        K: Any = self._operator(X, self.lengthscale_)
        if X.shape[0] ** 2 * X.dtype.itemsize <= self.memory_budget:
            K = kernel_matrix(K)
        K, rng = _weighted(K, root), self._rng()
        coefficients, intercept = np.empty_like(y), np.zeros(y.shape[1], dtype=y.dtype)
        self.n_iter_, missed = 1, ""
        for alpha in np.unique(alphas):
            chosen = alphas == alpha
            found = self._solve(K, y[:, chosen], root, float(alpha), rng)
            coefficients[:, chosen], intercept[chosen] = found.coefficients, found.intercept
            self.n_iter_ = max(self.n_iter_, found.num_steps)
            missed = found.missed or missed
        if missed:
            warnings.warn(missed, ConvergenceWarning, stacklevel=2)
        self._keep(X, coefficients)
        self.intercept_ = self._shaped(intercept) if self.fit_intercept else 0.0
        return self

    def _solve(
        self, K: Any, y: np.ndarray, root: np.ndarray, alpha: float, rng: np.random.Generator
    ) -> _Found:
        """Solve for the targets of one `alpha`; `K` is weighted."""
        n, m = y.shape
        unit = float(np.finfo(y.dtype).eps)
        tol = max(self.tol, UNREACHABLE * unit)
        # What the residual of the weighted system may be, for the error of the lightest point.
        allowed = tol * float(root.min()) * column_norm(y)
        mean = np.zeros(m, dtype=y.dtype)
        targets = allowed
        b = root * y
        if self.fit_intercept:
            # G c + root * intercept = b and root.T c = 0 by two solves with G.
            mean = np.average(y, axis=0, weights=root[:, 0] ** 2).astype(y.dtype)
            b = np.hstack([root * (y - mean), root])
            targets = np.append(allowed, tol * float(root.min()) * n**0.5) / 2
        sizes = column_norm(b)
        shares = targets[sizes > 0] / sizes[sizes > 0]
        solver: Any = Exact(damping=alpha)
        if n > self.rank:
            solver = NystromCG(
                rank=self.rank,
                damping=alpha,
                sampling=self.sampling,
                rtol=max(float(shares.min(initial=tol)), unit),
                max_steps=self.max_iter,
            )
        solution = solve(K, b, solver=solver, rng=rng)
        c, shift, residual = _without_mean(solution, root, m)
        met = residual <= allowed if n > self.rank else _met(solution, m)
        held = isinstance(K, np.ndarray) and FACTORED * K.nbytes <= self.memory_budget
        if not met.all() and held and n > self.rank and self.max_iter is None:
            solution = solve(K, b, solver=Exact(damping=alpha))
            c, shift, residual = _without_mean(solution, root, m)
            met = _met(solution, m)
        missed = ""
        if not met.all():
            missed = (
                f"the tolerance was not met: {solution.message}. Raise `max_iter`, `rank` or "
                "`alpha`, or loosen `tol`. The fit is known to "
                f"{tol * np.max(residual[~met] / allowed[~met]):.1g} of the targets."
            )
        return _Found(root * c, mean + shift, int(solution.num_steps.max()), missed)


class _Found(NamedTuple):
    coefficients: np.ndarray
    intercept: np.ndarray
    num_steps: int
    missed: str


def _without_mean(solution: Solution, root: np.ndarray, m: int) -> tuple[Any, Any, Any]:
    """Return coefficients, intercepts and residual norms of m targets.

    A column beyond them is the solution for `root`, of which so much is taken off that the
    coefficients are orthogonal to `root`.
    """
    c, residual = solution.value, solution.residual_norm
    if c.shape[1] == m:
        return c, np.zeros(m, dtype=c.dtype), residual
    s = root[:, 0]
    shift = (s @ c[:, :m]) / (s @ c[:, m])
    return c[:, :m] - c[:, m:] * shift, shift, residual[:m] + np.abs(shift) * residual[m]


def _met(solution: Solution, m: int) -> np.ndarray:
    return solution.converged[:m] & solution.converged[m:].all()


def _weighted(K: Any, root: np.ndarray) -> Any:
    """Return ``S K S`` for the diagonal matrix S of `root`."""
    if np.all(root == 1):
        return K
    if isinstance(K, np.ndarray):
        return root * K * root.T
    return scaled_by_diagonal(K, root[:, 0])


def _checked_alpha(alpha: Any, m: int) -> np.ndarray:
    """Return one positive strength for each target, shape (m,)."""
    if np.ndim(alpha) == 0:
        check_scalar("alpha", alpha, positive=True)
        return np.full(m, float(alpha))
    alphas = np.asarray(alpha, dtype=np.float64)
    if alphas.shape != (m,):
        raise ValueError(
            f"`alpha` must be a number or one for each of {m} targets, shape ({m},); got shape "
            f"{alphas.shape}."
        )
    for entry in alphas:
        check_scalar("alpha", float(entry), positive=True)
    return alphas
