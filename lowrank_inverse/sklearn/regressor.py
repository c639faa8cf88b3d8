"""The common base of the regressions: kernel and input checks."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from lowrank_inverse._typing import ArrayLike, MatrixLike, OperatorLike
from lowrank_inverse.arrays.checks import check_count
from lowrank_inverse.operators.kernel import CPU_CHUNK, KernelOperator
from lowrank_inverse.operators.kernels.points import row_slices
from lowrank_inverse.sklearn.linear_kernel import LinearKernel

FLOATS = [np.float64, np.float32]


class KernelRegressor(MultiOutputMixin, RegressorMixin, BaseEstimator):
    """The common base of the regressions: kernel and input checks."""

    intercept_: Any = 0.0

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = self._is("linear")
        tags.input_tags.pairwise = self._is("precomputed")
        return tags

    def _is(self, kernel: str) -> bool:
        return isinstance(self.kernel, str) and self.kernel == kernel

    def _operator(self, X: MatrixLike, lengthscale: Any) -> Any:
        if self._is("precomputed"):
            return X
        if self._is("linear"):
            chunk_size = CPU_CHUNK if self.chunk_size is None else self.chunk_size
            return LinearKernel(X, check_count("chunk_size", chunk_size))
        return KernelOperator(
            X,
            self.kernel,
            lengthscale=lengthscale,
            nu=self.nu,
            degree=self.degree,
            coef0=self.coef0,
            chunk_size=self.chunk_size,
        )

    def _training(
        self, X: MatrixLike, y: ArrayLike, sample_weight: ArrayLike | None
    ) -> tuple[Any, Any, Any]:
        """Return checked points, targets of shape (n, m), and square roots of weights (n, 1)."""
        X, y = self._validated(X, y, multi_output=True, y_numeric=True)
        if self._is("precomputed") and X.shape[0] != X.shape[1]:
            raise ValueError(
                "`X` must be the kernel of the training points, of shape (n, n), with "
                f"kernel='precomputed'; got shape {X.shape}."
            )
        self._one_target, self._dtype = y.ndim == 1, X.dtype
        y = y.reshape(len(y), -1).astype(X.dtype)
        weight = np.ones(len(y), dtype=X.dtype)
        if sample_weight is not None:
            weight = _check_sample_weight(sample_weight, X, dtype=X.dtype, ensure_non_negative=True)
        self._kept = np.flatnonzero(weight)
        if len(self._kept) == 0:
            raise ValueError("`sample_weight` must have positive entries; all are zero.")
        if len(self._kept) < len(y):
            X, y, weight = X[self._kept], y[self._kept], weight[self._kept]
            X = X[:, self._kept] if self._is("precomputed") else X
        self.lengthscale_ = self.lengthscale
        if isinstance(self.lengthscale, str):
            if self.lengthscale != "scale":
                raise ValueError(
                    f"`lengthscale` must be positive or 'scale'; got {self.lengthscale!r}."
                )
            scaled = not self._is("linear") and not self._is("precomputed")
            self.lengthscale_ = spread(X, weight) if scaled else 1.0
        return X, y, np.sqrt(weight)[:, None]

    def _rng(self) -> np.random.Generator:
        return np.random.default_rng(check_random_state(self.random_state).randint(2**31 - 1))

    def _validated(self, X: MatrixLike, *y: Any, **options: Any) -> Any:
        if issparse(X) and not self._is("linear"):
            raise TypeError(
                f"sparse `X` needs kernel='linear'; got kernel={self.kernel!r}. Use X.toarray()."
            )
        return validate_data(self, X, *y, accept_sparse="csr", dtype=FLOATS, **options)

    def _keep(self, X: MatrixLike, coefficients: np.ndarray) -> None:
        """Keep what makes the regression function: points and coefficients, shape (n, m)."""
        if self._is("precomputed"):  # the columns to come are those of all points
            full = np.zeros((self.n_features_in_, coefficients.shape[1]), dtype=coefficients.dtype)
            full[self._kept] = coefficients
            coefficients = full
        else:
            self.X_fit_ = X
        self.dual_coef_ = self._shaped(coefficients)

    def _points(self, X: MatrixLike) -> Any:
        check_is_fitted(self)
        X = self._validated(X, reset=False)
        return X.astype(self._dtype, copy=False)

    def predict(self, X: MatrixLike) -> np.ndarray:
        """Return the regression function at points `X` (p, d), shape (p,) or (p, m).

        With kernel="precomputed", `X` is their kernel with all training points, shape (p, n).
        """
        X = self._points(X)
        if self._is("precomputed"):
            return X @ self.dual_coef_ + self.intercept_
        A = self._operator(self.X_fit_, self.lengthscale_)
        return A.cross(X, self.dual_coef_) + self.intercept_

    def _shaped(self, values: np.ndarray) -> np.ndarray:
        return values[..., 0] if self._one_target else values


def spread(X: np.ndarray, weight: np.ndarray) -> float:
    """Return the root of the summed variances of the features."""
    centred = X - np.average(X, axis=0, weights=weight)
    spread = np.average((centred**2).sum(axis=1, dtype=np.float64), weights=weight)
    return float(spread) ** 0.5 or 1.0


def kernel_matrix(A: OperatorLike) -> np.ndarray:
    """Return the whole matrix; each tile is computed once, and nothing is held twice."""
    if isinstance(A, np.ndarray):
        return A
    n = A.shape[0]
    K = np.empty((n, n), dtype=A.dtype)
    slices = row_slices(n, A.chunk_size)
    for i, rows in enumerate(slices):
        for others in slices[i:]:
            tile = A.evaluate(A.X[rows], A.X[others])
            K[rows, others] = tile
            K[others, rows] = tile.T
    return K
