"""A symmetric matrix held as an array."""

from __future__ import annotations

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import Array, Indices
from lowrank_inverse.arrays.checks import check_floating, check_indices
from lowrank_inverse.arrays.control_flow import quietly
from lowrank_inverse.arrays.conversion import eps, is_traced, take
from lowrank_inverse.arrays.linalg import column_norm
from lowrank_inverse.operators.base import Operator, check_square

NUM_SYMMETRY_ROWS = 16


class DenseOperator(Operator):
    """A symmetric matrix held as an array of shape (n, n)."""

    def __init__(self, matrix: Array) -> None:
        check_floating("A", matrix)
        check_square(matrix)
        _check_symmetric(matrix)
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


@quietly
def _check_symmetric(A: Array) -> None:
    """Compare some rows of a concrete dense array with its columns: cheap, catches most slips."""
    xp = array_namespace(A)
    n = A.shape[0]
    rows = np.unique(np.linspace(0, n - 1, NUM_SYMMETRY_ROWS).astype(np.int64))
    across, down = take(A, rows, axis=0), take(A, rows, axis=1).T
    difference = xp.max(xp.abs(across - down))
    # NaN passes here: it is reported where the values are used. Traced values are unknown.
    asymmetric = difference > eps(A) ** 0.5 * xp.max(xp.abs(across))
    if not is_traced(asymmetric) and bool(asymmetric):
        raise ValueError(
            f"`A` must be symmetric; A and A.T differ by {float(difference):.2g}. Use (A + A.T) "
            "/ 2 if the difference is rounding, or solve A.T @ A if A is not symmetric."
        )
