"""Symmetric matrices with stored entries, dense or sparse."""

from __future__ import annotations

from typing import Any

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import Array, Indices
from lowrank_inverse.arrays.checks import check_floating, check_indices, check_symmetric
from lowrank_inverse.arrays.conversion import take
from lowrank_inverse.arrays.linalg import column_norm
from lowrank_inverse.operators.base import Operator
from lowrank_inverse.operators.product import check_square


class DenseOperator(Operator):
    """A symmetric matrix held as an array of shape (n, n)."""

    _parts = ("matrix",)

    def __init__(self, matrix: Array) -> None:
        check_floating("A", matrix)
        check_square(matrix)
        check_symmetric("A", matrix)
        self.matrix = matrix
        self.shape, self.dtype = (matrix.shape[0], matrix.shape[0]), matrix.dtype
        self.like = matrix[:0, 0]

    def _multiply(self, block: Array) -> Array:
        return self.matrix @ block

    def frobenius_norm(self) -> Array:
        """Return the Frobenius norm, as a 0-d array."""
        return column_norm(array_namespace(self.matrix).reshape(self.matrix, (-1,)))

    def columns(self, indices: Indices) -> Array:
        """Return the columns at `indices`, shape (n, k)."""
        return take(self.matrix, check_indices(indices, self.shape[0]), axis=1)

    def submatrix(self, indices: np.ndarray) -> Array:
        """Return the rows and columns at host `indices`, shape (k, k); read nothing else."""
        return take(take(self.matrix, indices), indices, axis=1)

    def diagonal(self) -> Array:
        """Return the diagonal, shape (n,)."""
        return array_namespace(self.matrix).linalg.diagonal(self.matrix)


class SparseOperator(Operator):
    """A symmetric sparse matrix or array of SciPy, of shape (n, n), whose entries can be read."""

    _parts = ()  # of SciPy's own arrays there are no derivatives

    def __init__(self, matrix: Any) -> None:
        if not np.issubdtype(matrix.dtype, np.floating):
            raise TypeError(
                f"`A` must have a real floating dtype; got {matrix.dtype}. Use A.astype(float)."
            )
        self.like = np.zeros(0, dtype=matrix.dtype)
        check_floating("A", self.like)
        self.matrix = matrix.tocsc()
        self.shape, self.dtype = tuple(matrix.shape), matrix.dtype
        difference = abs(self.matrix - self.matrix.T)
        scale = abs(self.matrix).max() if self.matrix.nnz else 0.0
        if difference.nnz and difference.max() > np.finfo(self.dtype).eps ** 0.5 * scale:
            raise ValueError("`A` must be symmetric; A - A.T is not zero. Use (A + A.T) / 2.")

    def _multiply(self, block: Array) -> Array:
        return self.matrix @ block

    def columns(self, indices: Indices) -> Array:
        """Return the columns at `indices`, shape (n, k)."""
        return self.matrix[:, check_indices(indices, self.shape[0])].toarray()

    def submatrix(self, indices: np.ndarray) -> Array:
        """Return the rows and columns at host `indices`, shape (k, k)."""
        return self.matrix[:, indices][indices, :].toarray()

    def diagonal(self) -> Array:
        """Return the diagonal, shape (n,)."""
        return self.matrix.diagonal()
