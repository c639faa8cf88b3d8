"""A symmetric sparse matrix of SciPy."""

from __future__ import annotations

from typing import Any

import numpy as np

from lowrank_inverse._typing import Array, Indices
from lowrank_inverse.arrays.checks import check_floating, check_indices
from lowrank_inverse.operators.base import Operator


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
