"""A symmetric matrix held as an array."""

from __future__ import annotations

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
        """Return the root of the sum of the squared entries, as a 0-d array."""
        return column_norm(array_namespace(self.matrix).reshape(self.matrix, (-1,)))

    def columns(self, indices: Indices) -> Array:
        """Return the columns at `indices`, shape (n, k)."""
        return take(self.matrix, check_indices(indices, self.shape[0]), axis=1)

    def submatrix(self, indices: np.ndarray) -> Array:
        """Return the rows and columns at host `indices`, shape (k, k), and read nothing else."""
        return take(take(self.matrix, indices), indices, axis=1)

    def diagonal(self) -> Array:
        """Return the diagonal, shape (n,)."""
        return array_namespace(self.matrix).linalg.diagonal(self.matrix)
