"""Kernel ridge regression, solved to a tolerance."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from sklearn.exceptions import ConvergenceWarning

from lowrank_inverse._typing import Sampling
from lowrank_inverse.arrays.checks import check_count, check_scalar
from lowrank_inverse.arrays.linalg import column_norm
from lowrank_inverse.operators.composition import scaled_by_diagonal
from lowrank_inverse.operators.kernel import KernelOperator
from lowrank_inverse.sklearn.regressor import KernelRegressor, row_blocks
from lowrank_inverse.solvers.direct import Exact
from lowrank_inverse.solvers.low_rank import NystromCG
from lowrank_inverse.solvers.solve import solve

MEMORY_BUDGET = 2**30
FACTORED = 8
"""Matrices that a factorization and its copies take."""
UNREACHABLE = 1e3


class KernelRidge(KernelRegressor):
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


def _matrix(A: KernelOperator) -> np.ndarray:
    """Return the whole matrix; each tile is computed once, and nothing is held twice."""
    n = A.shape[0]
    K = np.empty((n, n), dtype=A.dtype)
    slices = row_blocks(n, A.chunk_size)
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
