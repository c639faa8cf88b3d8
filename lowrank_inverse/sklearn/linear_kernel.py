"""The kernel matrix of inner products, for dense and sparse points."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.sparse import issparse

from lowrank_inverse._typing import Indices, MatrixLike
from lowrank_inverse.arrays.checks import check_indices
from lowrank_inverse.operators.base import Operator


class LinearKernel(Operator):
    """``X @ X.T`` for an array or a sparse matrix `X` of shape (n, d).

    A product takes two products with `X`.
    """

    def __init__(self, X: MatrixLike, chunk_size: int) -> None:
        self.X, self.chunk_size = X, chunk_size
        self.shape, self.dtype = (X.shape[0], X.shape[0]), X.dtype
        self.like = np.zeros(0, dtype=X.dtype)

    def _multiply(self, block: np.ndarray) -> np.ndarray:
        return self.cross(self.X, block)

    def columns(self, indices: Indices) -> np.ndarray:
        """Return the columns at `indices`, shape (n, k)."""
        return self.evaluate(self.X, self.X[check_indices(indices, self.shape[0])])

    def submatrix(self, indices: np.ndarray) -> np.ndarray:
        """Return the rows and columns at `indices`, shape (k, k)."""
        return self.evaluate(self.X[indices], self.X[indices])

    def diagonal(self) -> np.ndarray:
        """Return the diagonal, shape (n,)."""
        squares = self.X.multiply(self.X) if issparse(self.X) else self.X * self.X
        return np.asarray(squares.sum(axis=1)).reshape(-1)

    def cross(self, Z: Any, block: np.ndarray) -> np.ndarray:
        """Return ``Z @ X.T @ block``, shape (p,) or (p, m)."""
        return Z @ (self.X.T @ block)

    def evaluate(self, x: Any, y: Any) -> np.ndarray:
        """Return ``x @ y.T``, shape (p, q)."""
        inner = x @ y.T
        return inner.toarray() if issparse(inner) else inner
