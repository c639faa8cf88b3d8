"""What the regressions share: their kernel, and what they accept."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from lowrank_inverse.operators.kernel import KernelOperator


class KernelRegressor(MultiOutputMixin, RegressorMixin, BaseEstimator):
    """What the regressions share: their kernel, and what they accept."""

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


def row_blocks(n: int, size: int) -> list[slice]:
    """Return slices of `size` that cover n rows."""
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]
