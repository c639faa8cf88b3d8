"""Kernel ridge regression as scikit-learn estimators; this module needs scikit-learn."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np

try:
    from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
except ImportError as error:
    raise ImportError(
        "lowrank_inverse.sklearn needs scikit-learn 1.6 or newer: "
        'pip install "lowrank-inverse[sklearn]".'
    ) from error

from lowrank_inverse._typing import Sampling
from lowrank_inverse.arrays.checks import check_count, check_scalar
from lowrank_inverse.arrays.least_squares import inverse_root, ridge_by_gram, ridge_by_rotations
from lowrank_inverse.arrays.linalg import column_norm
from lowrank_inverse.low_rank.column_sampling import sample_columns
from lowrank_inverse.operators.composition import scaled_by_diagonal
from lowrank_inverse.operators.kernel import KernelOperator
from lowrank_inverse.solvers.direct import Exact
from lowrank_inverse.solvers.low_rank import NystromCG
from lowrank_inverse.solvers.solve import solve

__all__ = ["KernelRidge", "NystromRidge"]

MEMORY_BUDGET = 2**30
FACTORED = 8
"""Matrices that a factorization and its copies take."""
UNREACHABLE = 1e3
PIVOT_UNITS = 8.0
GRAM_ERROR = 1e-8
"""Relative error up to which the normal equations serve, which are the faster."""


class _KernelRegressor(MultiOutputMixin, RegressorMixin, BaseEstimator):
    """What both regressions share: their kernel, and what they accept."""

    def _operator(self, X: np.ndarray, lengthscale: Any) -> KernelOperator:
        return KernelOperator(
            X,
            self.kernel,
            lengthscale=lengthscale,
            nu=self.nu,
            degree=self.degree,
            coef0=self.coef0,
            chunk_size=self.chunk_size,
        )

    def _training(self, X: Any, y: Any, sample_weight: Any) -> tuple[Any, Any, Any]:
        """Return checked points, targets of shape (n, m), and square roots of weights (n, 1)."""
        X, y = validate_data(
            self, X, y, multi_output=True, y_numeric=True, dtype=[np.float64, np.float32]
        )
        self._one_target = y.ndim == 1
        y = y.reshape(len(y), -1).astype(X.dtype)
        weight = np.ones(len(y), dtype=X.dtype)
        if sample_weight is not None:
            weight = _check_sample_weight(sample_weight, X, dtype=X.dtype, ensure_non_negative=True)
            X, y, weight = X[weight > 0], y[weight > 0], weight[weight > 0]
            if len(X) == 0:
                raise ValueError(
                    "`sample_weight` must be positive somewhere; it is zero throughout."
                )
        self.lengthscale_ = self.lengthscale
        if isinstance(self.lengthscale, str):
            if self.lengthscale != "scale":
                raise ValueError(
                    f"`lengthscale` must be positive or 'scale'; got {self.lengthscale!r}."
                )
            centred = X - np.average(X, axis=0, weights=weight)
            spread = np.average((centred**2).sum(axis=1, dtype=np.float64), weights=weight)
            self.lengthscale_ = float(spread) ** 0.5 or 1.0
        return X, y, np.sqrt(weight)[:, None]

    def _rng(self) -> np.random.Generator:
        return np.random.default_rng(check_random_state(self.random_state).randint(2**31 - 1))

    def _points(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        X = validate_data(self, X, reset=False, dtype=[np.float64, np.float32])
        return X.astype(self.X_fit_.dtype, copy=False)

    def _shaped(self, values: np.ndarray) -> np.ndarray:
        return values[:, 0] if self._one_target else values


class KernelRidge(_KernelRegressor):
    """Kernel ridge regression, solved to a tolerance without forming the kernel matrix.

    Minimises ``sum_i w_i (y_i - f(x_i))**2 + alpha * norm(f)**2``, as
    ``sklearn.kernel_ridge.KernelRidge`` does, by Nyström-preconditioned conjugate gradients
    where that one factorises the n×n matrix.

    Parameters
    ----------
    alpha : float
        Strength of the ridge; positive.
    kernel, nu, degree, coef0, chunk_size
        As in :class:`lowrank_inverse.KernelOperator`.
    lengthscale : float, array of shape (d,), or "scale"
        ``"scale"``: the root of the summed variances of the features.
    rank : int
        Columns of the preconditioner. Up to that many points are solved directly.
    sampling : str
        Which columns; see :func:`lowrank_inverse.nystrom`.
    tol : float
        Error of the fit at the training points that every target is solved to, relative to its
        norm, whatever the weights; no less than 1e3 machine epsilons.
    max_iter : int, optional
        Default: ten for each point.
    memory_budget : int
        In bytes. A kernel matrix that takes no more is held, which makes the steps faster; one
        that takes no more than an eighth is factored where the steps do not reach `tol`.
    random_state : int, RandomState or None

    Attributes
    ----------
    X_fit_ : ndarray, shape (n, d)
        Points with a positive weight.
    dual_coef_ : ndarray, shape (n,) or (n, m)
        ``f(z) = sum_j kernel(z, X_fit_[j]) * dual_coef_[j]``.
    lengthscale_ : float or array
    n_iter_ : int
        Steps of the slowest target.

    Notes
    -----
    ``n * rank`` numbers, twice while the columns are chosen, and ``n**2 / 2`` kernel evaluations
    a step for all targets at once.

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
        alpha: float = 1.0,
        *,
        kernel: Any = "rbf",
        lengthscale: Any = "scale",
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

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> KernelRidge:
        """Fit to points `X` (n, d) and targets `y` (n,) or (n, m).

        Zero weights leave their points out. Warns with a ``ConvergenceWarning`` where `tol` was
        not met.
        """
        X, y, root = self._training(X, y, sample_weight)
        check_scalar("alpha", self.alpha, positive=True)
        check_count("rank", self.rank)
        n = len(X)
        K: Any = self._operator(X, self.lengthscale_)
        if n**2 * X.dtype.itemsize <= self.memory_budget:
            K = _matrix(K)
        unit = float(np.finfo(X.dtype).eps)
        tol = max(self.tol, UNREACHABLE * unit)
        b = root * y
        # What the residual of the weighted system may be, for the error of the lightest point.
        allowed = tol * float(root.min()) * column_norm(y)
        sizes = column_norm(b)
        shares = allowed[sizes > 0] / sizes[sizes > 0]
        solver: Any = Exact(damping=self.alpha)
        if n > self.rank:
            solver = NystromCG(
                rank=self.rank,
                damping=self.alpha,
                sampling=self.sampling,
                rtol=max(float(shares.min(initial=tol)), unit),
                max_steps=self.max_iter,
            )
        K = _weighted(K, root)
        solution = solve(K, b, solver=solver, rng=self._rng())
        met = solution.residual_norm <= allowed if n > self.rank else solution.converged
        held = isinstance(K, np.ndarray) and FACTORED * K.nbytes <= self.memory_budget
        if not met.all() and held and n > self.rank and self.max_iter is None:
            solution = solve(K, b, solver=Exact(damping=self.alpha))
            met = solution.converged
        if not met.all():
            warnings.warn(
                f"the tolerance was not met: {solution.message}. Raise `max_iter`, `rank` or "
                "`alpha`, or loosen `tol`. The fit is known to "
                f"{tol * np.max(solution.residual_norm[~met] / allowed[~met]):.1g} of the targets.",
                ConvergenceWarning,
                stacklevel=2,
            )
        self.X_fit_, self.dual_coef_ = X, self._shaped(root * solution.value)
        self.n_iter_ = max(1, int(solution.num_steps.max()))
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Return the regression function at points `X` (p, d): shape (p,) or (p, m)."""
        X = self._points(X)
        return self._operator(self.X_fit_, self.lengthscale_).cross(X, self.dual_coef_)


class NystromRidge(_KernelRegressor):
    """Kernel ridge regression on the functions spanned by the kernel at `rank` sampled points.

    Minimises what :class:`KernelRidge` minimises, over ``f = sum_j c_j kernel(·, X[K_j])``
    [1]_: the kernel matrix is replaced by its Nyström approximation from the columns K.

    Parameters
    ----------
    alpha : float
        Strength of the ridge; positive.
    rank : int
        Points to sample; all, where there are fewer.
    kernel, nu, degree, coef0, chunk_size
        As in :class:`lowrank_inverse.KernelOperator`.
    lengthscale : float, array of shape (d,), or "scale"
        ``"scale"``: the root of the summed variances of the features.
    sampling : {"uniform", "diagonal", "diagonal_squared", "greedy", "rpcholesky"}
        See :func:`lowrank_inverse.nystrom`.
    random_state : int, RandomState or None

    Attributes
    ----------
    X_fit_ : ndarray, shape (k, d)
        The points sampled.
    indices_ : ndarray of int, shape (k,)
        Their rows in the training set, among those with a positive weight.
    dual_coef_ : ndarray of float64, shape (k,) or (k, m)
    lengthscale_ : float or array

    Notes
    -----
    ``n * rank`` kernel evaluations, ``2 n rank**2`` operations, and memory for blocks and
    ``rank**2`` numbers; ``2 n rank`` numbers while "greedy" or "rpcholesky" choose. The algebra
    is done in float64, without squaring the condition number of the kernel; nor that of the
    least-squares problem, where `alpha` is less than 2e-8 of the weighted trace: then it is
    solved by QR decompositions, the heaviest points first, in half the speed.

    References
    ----------
    .. [1] A. Rudi, R. Camoriano, L. Rosasco. Less is More: Nyström Computational Regularization.
       NeurIPS 2015.

    Examples
    --------
    >>> from sklearn.datasets import make_friedman1
    >>> from lowrank_inverse.sklearn import NystromRidge
    >>> X, y = make_friedman1(600, noise=0.1, random_state=0)
    >>> model = NystromRidge(alpha=0.01, rank=200, random_state=0).fit(X[:400], y[:400])
    >>> print(f"{model.score(X[400:], y[400:]):.2f}")
    0.94
    """

    def __init__(
        self,
        alpha: float = 1.0,
        *,
        rank: int = 300,
        kernel: Any = "rbf",
        lengthscale: Any = "scale",
        nu: float = 2.5,
        degree: int = 3,
        coef0: float = 1.0,
        sampling: Sampling = "uniform",
        chunk_size: int | None = None,
        random_state: Any = None,
    ) -> None:
        self.alpha = alpha
        self.rank = rank
        self.kernel = kernel
        self.lengthscale = lengthscale
        self.nu = nu
        self.degree = degree
        self.coef0 = coef0
        self.sampling = sampling
        self.chunk_size = chunk_size
        self.random_state = random_state

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> NystromRidge:
        """Fit to points `X` (n, d) and targets `y` (n,) or (n, m).

        Zero weights leave their points out.
        """
        X, y, root = self._training(X, y, sample_weight)
        check_scalar("alpha", self.alpha, positive=True)
        rank = min(check_count("rank", self.rank), len(X))
        A = self._operator(X, self.lengthscale_)
        self.indices_ = sample_columns(A, rank, sampling=self.sampling, rng=self._rng())
        self.X_fit_ = X[self.indices_]
        core = A.submatrix(self.indices_).astype(np.float64)
        T = inverse_root((core + core.T) / 2, PIVOT_UNITS * float(np.finfo(X.dtype).eps))
        order = np.argsort(-root[:, 0], kind="stable")  # heavy points first lose the least
        trace = float(np.sum(root[:, 0].astype(np.float64) ** 2 * A.diagonal()))
        squared = np.finfo(np.float64).eps * trace <= GRAM_ERROR * self.alpha

        def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for rows in _row_blocks(len(X), A.chunk_size if squared else 4 * A.chunk_size):
                chosen = order[rows]
                F = A.evaluate(X[chosen], self.X_fit_) @ T
                yield root[chosen] * F, (root[chosen] * y[chosen]).astype(np.float64)

        fit = ridge_by_gram if squared else ridge_by_rotations
        self.dual_coef_ = self._shaped(T @ fit(blocks(), self.alpha))
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Return the regression function at points `X` (p, d): shape (p,) or (p, m)."""
        X = self._points(X)
        A = self._operator(self.X_fit_, self.lengthscale_)
        # In float64: where the kernel is ill-conditioned, large coefficients cancel.
        parts = [
            A.evaluate(X[rows], self.X_fit_) @ self.dual_coef_
            for rows in _row_blocks(len(X), A.chunk_size)
        ]
        return np.concatenate(parts, axis=0).astype(X.dtype, copy=False)


def _matrix(A: KernelOperator) -> np.ndarray:
    """Return the whole matrix; each tile is computed once, and nothing is held twice."""
    n = A.shape[0]
    K = np.empty((n, n), dtype=A.dtype)
    slices = _row_blocks(n, A.chunk_size)
    for i, rows in enumerate(slices):
        for others in slices[i:]:
            tile = A.evaluate(A.X[rows], A.X[others])
            K[rows, others] = tile
            K[others, rows] = tile.T
    return K


def _weighted(K: Any, root: np.ndarray) -> Any:
    """Return ``S K S`` for the diagonal matrix S of `root`."""
    if np.all(root == 1):
        return K
    if isinstance(K, np.ndarray):
        return root * K * root.T
    return scaled_by_diagonal(K, root[:, 0])


def _row_blocks(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]
