"""Kernel ridge regression on the functions that sampled points span."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from lowrank_inverse._typing import Sampling
from lowrank_inverse.arrays.checks import check_count, check_scalar
from lowrank_inverse.arrays.least_squares import inverse_root, ridge_by_gram, ridge_by_rotations
from lowrank_inverse.low_rank.column_sampling import sample_columns
from lowrank_inverse.operators.points import row_slices
from lowrank_inverse.sklearn.regressor import KernelRegressor

PIVOT_UNITS = 8.0
GRAM_ERROR = 1e-8
"""Relative error up to which the normal equations serve, which are the faster."""


class NystromRidge(KernelRegressor):
    """Kernel ridge regression on the functions spanned by the kernel at `rank` sampled points.

    Minimises what :class:`KernelRidge` minimises, over ``f = sum_j c_j kernel(·, X[K_j])``
    [1]_: the kernel matrix is replaced by its Nyström approximation from the columns K.

    Parameters
    ----------
    alpha : float
        Strength of the ridge; positive.
    rank : int
        Points to sample; all, where there are fewer.
    kernel : str or callable
        As in :class:`lowrank_inverse.KernelOperator`; or ``"linear"``, ``x @ y``, of which `X` may
        be sparse.
    nu, degree, coef0, chunk_size
        As in :class:`lowrank_inverse.KernelOperator`.
    lengthscale : float, array of shape (d,), or "scale"
        ``"scale"``: the root of the summed variances of the features.
    sampling : {"uniform", "diagonal", "diagonal_squared", "greedy", "rpcholesky"}
        See :func:`lowrank_inverse.nystrom`.
    random_state : int, RandomState instance or None

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
        if self._is("precomputed"):
            raise ValueError(
                "`kernel` must be evaluated at few points here: 'precomputed' is for KernelRidge."
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

    def predict(self, X: Any) -> np.ndarray:
        """Return the regression function at points `X` (p, d): shape (p,) or (p, m)."""
        X = self._points(X)
        A = self._operator(self.X_fit_, self.lengthscale_)
        # In float64: where the kernel is ill-conditioned, large coefficients cancel.
        parts = [
            A.evaluate(X[rows], self.X_fit_) @ self.dual_coef_
            for rows in row_slices(X.shape[0], A.chunk_size)
        ]
        return np.concatenate(parts, axis=0).astype(X.dtype, copy=False)
