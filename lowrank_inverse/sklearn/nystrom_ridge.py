"""Kernel ridge regression on the functions spanned by sampled points."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from lowrank_inverse._typing import ArrayLike, MatrixLike, Sampling
from lowrank_inverse.arrays.checks import check_count, check_scalar
from lowrank_inverse.arrays.least_squares import inverse_root, ridge_by_gram, ridge_by_rotations
from lowrank_inverse.low_rank.column_sampling import sample_columns
from lowrank_inverse.operators.kernels.points import row_slices
from lowrank_inverse.sklearn.regressor import KernelRegressor

PIVOT_UNITS = 8.0
GRAM_ERROR = 1e-8
"""Relative error up to which the normal equations serve, which are the faster."""


class NystromRidge(KernelRegressor):
    """Kernel ridge regression on the functions spanned by the kernel at `rank` sampled points.

    Minimises the objective of :class:`KernelRidge` over ``f = sum_j c_j kernel(·, X[K_j])`` [1]_.
    This replaces the kernel matrix by its Nyström approximation from the columns K.

    Parameters
    ----------
    alpha : float
        Strength of the penalty; positive.
    rank : int
        Number of points to sample; at most n are used.
    kernel : str or callable
        See :class:`lowrank_inverse.KernelOperator`. Also ``"linear"``, ``x @ y``, for which `X` may
        be sparse.
    nu, degree, coef0, chunk_size
        See :class:`lowrank_inverse.KernelOperator`.
    lengthscale : float, array of shape (d,), or "scale"
        ``"scale"`` is the square root of the summed variances of the features.
    sampling : {"uniform", "diagonal", "diagonal_squared", "greedy", "rpcholesky"}
        How to choose the points; see :func:`lowrank_inverse.nystrom`.
    random_state : int, RandomState instance or None
        Seed of the sampled points.

    Attributes
    ----------
    X_fit_ : ndarray, shape (k, d)
        The sampled points.
    indices_ : ndarray of int, shape (k,)
        Their rows in the training set, counting only points with a positive weight.
    dual_coef_ : ndarray of float64, shape (k,) or (k, m)
        The coefficients c.
    lengthscale_ : float or array
        The lengthscale used.

    Notes
    -----
    Cost: ``n * rank`` kernel evaluations and ``2 n rank**2`` operations. Memory: blocks of the
    kernel and ``rank**2`` numbers; ``2 n rank`` numbers while "greedy" or "rpcholesky" choose.
    Computations use float64 and do not square the condition number of the kernel. If `alpha` is
    less than 2e-8 of the weighted trace, QR decompositions with the heaviest points first also
    avoid squaring that of the least-squares problem, at half the speed.

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

    def fit(
        self, X: MatrixLike, y: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> NystromRidge:
        """Fit to points `X` (n, d) and targets `y` (n,) or (n, m).

        Points of zero weight are ignored.
        """
        if self._is("precomputed"):
            raise ValueError(
                "`kernel`: 'precomputed' is for KernelRidge; here it is evaluated at few points."
            )
        X, y, root = self._training(X, y, sample_weight)
        check_scalar("alpha", self.alpha, positive=True)
        rank = min(check_count("rank", self.rank), X.shape[0])
        A = self._operator(X, self.lengthscale_)
        self.indices_ = sample_columns(A, rank, sampling=self.sampling, rng=self._rng())
        self.X_fit_ = X[self.indices_]
        core = A.submatrix(self.indices_).astype(np.float64)
        T = inverse_root((core + core.T) / 2, PIVOT_UNITS * float(np.finfo(X.dtype).eps))
        order = np.argsort(-root[:, 0], kind="stable")  # heavy points first lose the least
        trace = float(np.sum(root[:, 0].astype(np.float64) ** 2 * A.diagonal()))
        squared = np.finfo(np.float64).eps * trace <= GRAM_ERROR * self.alpha

        def blocks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for rows in row_slices(X.shape[0], A.chunk_size if squared else 4 * A.chunk_size):
                chosen = order[rows]
                F = A.evaluate(X[chosen], self.X_fit_) @ T
                yield root[chosen] * F, (root[chosen] * y[chosen]).astype(np.float64)

        fit = ridge_by_gram if squared else ridge_by_rotations
        self.dual_coef_ = self._shaped(T @ fit(blocks(), self.alpha))
        return self

    def predict(self, X: MatrixLike) -> np.ndarray:
        """Return the regression function at points `X` (p, d): shape (p,) or (p, m)."""
        X = self._points(X)
        A = self._operator(self.X_fit_, self.lengthscale_)
        # In float64: where the kernel is ill-conditioned, large coefficients cancel.
        parts = [
            A.evaluate(X[rows], self.X_fit_) @ self.dual_coef_
            for rows in row_slices(X.shape[0], A.chunk_size)
        ]
        return np.concatenate(parts, axis=0).astype(X.dtype, copy=False)
