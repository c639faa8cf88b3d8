"""Kernel ridge regression with a penalty chosen by leave-one-out validation."""

from __future__ import annotations

from typing import Any

import numpy as np

from lowrank_inverse._typing import ArrayLike, MatrixLike
from lowrank_inverse.arrays.checks import check_scalar
from lowrank_inverse.sklearn.regressor import KernelRegressor, kernel_matrix


class KernelRidgeCV(KernelRegressor):
    """Kernel ridge regression with the `alpha` that best predicts each point from the others.

    It is the counterpart of ``sklearn.linear_model.RidgeCV`` for kernels. One factorization of the
    kernel matrix gives the leave-one-out errors of all penalties in closed form [1]_.

    Parameters
    ----------
    alphas : array of q positive numbers
        Penalties to choose from.
    kernel, lengthscale, fit_intercept, nu, degree, coef0, chunk_size
        See :class:`KernelRidge`.
    alpha_per_target : bool
        Choose a penalty for each target.
    store_cv_results : bool
        Keep `cv_results_`.

    Attributes
    ----------
    alpha_ : float, or ndarray of shape (m,) with `alpha_per_target`
        The best of `alphas`.
    best_score_ : float, or ndarray of shape (m,) with `alpha_per_target`
        Negative mean of the squared errors, each multiplied by the weight of its point.
    cv_results_ : ndarray, shape (n, q) or (n, m, q)
        The squared errors, each multiplied by the weight of its point.
    X_fit_, dual_coef_, intercept_, lengthscale_
        See :class:`KernelRidge`.

    Notes
    -----
    Let ``G = K + alpha * I`` and ``P = G^{-1}``, or with an intercept ``P = G^{-1} - G^{-1} 1 1.T
    G^{-1} / (1.T G^{-1} 1)``. The error at a point that is left out is ``(P y)[i] / P[i, i]``. The
    eigendecomposition of K takes about ``10 n**3`` operations and ``3 n**2`` numbers in float64;
    each penalty then takes ``n**2`` operations, and ``n**2`` per target.

    References
    ----------
    .. [1] R. M. Rifkin, R. A. Lippert. Notes on Regularized Least-Squares. MIT-CSAIL-TR-2007-025.

    Examples
    --------
    >>> from sklearn.datasets import make_friedman1
    >>> from lowrank_inverse.sklearn import KernelRidgeCV
    >>> X, y = make_friedman1(600, noise=0.1, random_state=0)
    >>> model = KernelRidgeCV(alphas=[1e-6, 1e-4, 1e-2, 1.0]).fit(X[:400], y[:400])
    >>> print(model.alpha_, f"{model.score(X[400:], y[400:]):.2f}")
    0.0001 0.97
    """

    def __init__(
        self,
        alphas: Any = (0.1, 1.0, 10.0),
        *,
        kernel: Any = "rbf",
        lengthscale: Any = "scale",
        fit_intercept: bool = False,
        nu: float = 2.5,
        degree: int = 3,
        coef0: float = 1.0,
        alpha_per_target: bool = False,
        store_cv_results: bool = False,
        chunk_size: int | None = None,
    ) -> None:
        self.alphas = alphas
        self.kernel = kernel
        self.lengthscale = lengthscale
        self.fit_intercept = fit_intercept
        self.nu = nu
        self.degree = degree
        self.coef0 = coef0
        self.alpha_per_target = alpha_per_target
        self.store_cv_results = store_cv_results
        self.chunk_size = chunk_size

    def fit(
        self, X: MatrixLike, y: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> KernelRidgeCV:
        """Fit to points `X` (n, d) and targets `y` (n,) or (n, m).

        Points of zero weight are ignored. With kernel="precomputed", `X` is the kernel of the
        training points, shape (n, n).
        """
        X, y, root = self._training(X, y, sample_weight)
        if len(y) < 2:
            raise ValueError(
                "leave-one-out needs at least two points of positive weight; got n_samples=1."
            )
        alphas = np.atleast_1d(np.asarray(self.alphas, dtype=np.float64))
        if alphas.ndim != 1 or alphas.size == 0:
            raise ValueError(f"`alphas` must be of shape (q,), q > 0; got shape {alphas.shape}.")
        for alpha in alphas:
            check_scalar("alphas", float(alpha), positive=True)
        K = kernel_matrix(self._operator(X, self.lengthscale_)).astype(np.float64)
        s = root[:, 0].astype(np.float64)
        eigenvalues, Q = np.linalg.eigh(s[:, None] * K * s)
        eigenvalues = np.maximum(eigenvalues, 0.0)
        mean = np.average(y, axis=0, weights=s**2) if self.fit_intercept else np.zeros(y.shape[1])
        projected, weights = Q.T @ (s[:, None] * (y - mean)), Q.T @ s
        squares: list[np.ndarray] = []
        fits: list[tuple[np.ndarray, np.ndarray]] = []
        for alpha in alphas:
            inverse = 1 / (eigenvalues + alpha)
            c, diagonal = Q @ (inverse[:, None] * projected), Q**2 @ inverse
            shift = np.zeros(y.shape[1])
            if self.fit_intercept:
                u = Q @ (inverse * weights)
                shift = (s @ c) / (s @ u)
                c = c - u[:, None] * shift
                diagonal = diagonal - u * u / (s @ u)
            squares.append((c / diagonal[:, None]) ** 2)
            fits.append((s[:, None] * c, mean + shift))
        scores = -np.mean(squares, axis=1)  # (q, m)
        if not self.alpha_per_target:
            scores = np.repeat(scores.mean(axis=1, keepdims=True), y.shape[1], axis=1)
        best, targets = np.argmax(scores, axis=0), range(y.shape[1])
        single = self._one_target or not self.alpha_per_target
        alpha, score = alphas[best], scores[best, targets]
        self.alpha_ = float(alpha[0]) if single else alpha
        self.best_score_ = float(score[0]) if single else score
        if self.store_cv_results:
            results = np.moveaxis(np.stack(squares), 0, -1)  # (n, m, q)
            self.cv_results_ = results[:, 0] if self._one_target else results
        coefficients = np.stack([fits[best[t]][0][:, t] for t in targets], axis=1)
        intercept = np.array([fits[best[t]][1][t] for t in targets])
        self._keep(X, coefficients.astype(X.dtype))
        self.intercept_ = self._shaped(intercept).astype(X.dtype) if self.fit_intercept else 0.0
        return self
