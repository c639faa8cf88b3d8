"""Standardised features with a column of ones, as the fits use them."""

from __future__ import annotations

import copy

import numpy as np
from scipy.sparse import issparse

from lowrank_inverse._typing import MatrixLike

CONSTANT = 16
"""Standard deviation below which a column is constant, in units of the rounding of its mean."""

BLOCK = 2048
"""Rows."""


class Design:
    """The columns of X less their means, over their deviations, and a column of ones.

    Coefficients of the standardised columns have penalties of their own, so that the scale of a
    column changes nothing. A sparse X stays as it is: means and scales are applied to what it is
    multiplied by.

    Parameters
    ----------
    X : array or sparse matrix, shape (n, d)
    weight : array, shape (n,)
    fit_intercept : bool
        Without, means are not taken off, and deviations are those from 0.
    """

    def __init__(self, X: MatrixLike, weight: np.ndarray, fit_intercept: bool) -> None:
        self.fit_intercept, self.dtype = fit_intercept, X.dtype
        self.shape = X.shape[0], X.shape[1] + fit_intercept
        share = (weight / weight.sum()).astype(X.dtype)
        self.mean = np.zeros(X.shape[1], dtype=X.dtype)
        if issparse(X):
            if fit_intercept:
                self.mean = X.T @ share
            squares = X.multiply(X).T @ share - self.mean**2
            self.scale = np.sqrt(np.maximum(squares, 0))
        else:
            for _ in range(2 if fit_intercept else 0):  # twice, for the rounding of a large mean
                self.mean = self.mean + share @ (X - self.mean)
            X = X - self.mean
            self.scale = np.sqrt(np.einsum("i,ij,ij->j", share, X, X))
        eps = np.finfo(X.dtype).eps
        largest = abs(self.mean) * CONSTANT * (eps**0.5 if issparse(X) else eps)
        varies = self.scale > largest
        self.square = np.where(varies, self.scale, 0).astype(np.float64) ** 2
        self.inverse = np.where(varies, 1 / np.where(varies, self.scale, 1), 0).astype(X.dtype)
        self._X = X if issparse(X) else X * self.inverse

    def rows(self, chosen: np.ndarray) -> Design:
        """Return some of the rows, with means and scales of all."""
        if len(chosen) == self.shape[0]:
            return self
        part = copy.copy(self)
        part._X, part.shape = self._X[chosen], (len(chosen), self.shape[1])
        return part

    def times(self, U: np.ndarray) -> np.ndarray:
        """Return the product with coefficients, shape (p, m) to (n, m)."""
        U = U.astype(self.dtype, copy=False)
        last = U[-1] if self.fit_intercept else 0
        V = U[: len(self.inverse)]
        if not issparse(self._X):
            return self._X @ V + last
        V = self.inverse[:, None] * V
        return self._X @ V + (last - self.mean @ V)

    def adjoint(self, R: np.ndarray) -> np.ndarray:
        """Return the product of the transpose, shape (n, m) to (p, m), in float64."""
        R = R.astype(self.dtype, copy=False)
        product, total = self._X.T @ R, R.sum(axis=0)
        if issparse(self._X):
            product = self.inverse[:, None] * (product - self.mean[:, None] * total)
        if self.fit_intercept:
            product = np.vstack([product, total])
        return product.astype(np.float64)

    def products(self, weight: np.ndarray, *more: np.ndarray) -> np.ndarray:
        """Return ``Z.T @ diag(weight) @ Z`` in float64, with Z the columns, and `more` as others.

        A sparse X is dense in blocks of rows alone.
        """
        total = np.zeros((self.shape[1] + len(more),) * 2)
        (chosen,) = np.nonzero(weight)
        for start in range(0, len(chosen), BLOCK):
            rows = chosen[start : start + BLOCK]
            X = self._X[rows]
            if issparse(X):
                X = (X.toarray() - self.mean) * self.inverse
            ones = np.ones((len(rows), int(self.fit_intercept)))
            Z = np.column_stack([X, ones, *(column[rows] for column in more)]).astype(self.dtype)
            total += Z.T @ (weight[rows, None].astype(self.dtype) * Z)
        return total

    def original(self, U: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return coefficients (d, m) and intercepts (m,) for X as it was given."""
        coefficients = self.inverse[:, None] * U[: len(self.inverse)]
        intercept = U[-1] if self.fit_intercept else np.zeros(U.shape[1])
        return coefficients, intercept - self.mean @ coefficients
