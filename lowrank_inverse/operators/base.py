"""Base classes of operators: checked products, columns by products, and dense matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import Array
from lowrank_inverse.arrays.checks import check_block, check_floating, check_indices, describe
from lowrank_inverse.arrays.control_flow import quietly
from lowrank_inverse.arrays.conversion import (
    eps,
    is_traced,
    like,
    scatter,
    take,
)
from lowrank_inverse.arrays.linalg import column_norm

NUM_SYMMETRY_ROWS = 16


class ProductOnly:
    """An operator of shape (n, n) whose products check what they are given."""

    shape: tuple[int, int]
    dtype: Any
    like: Array
    """An empty array whose library, dtype and device the products have."""

    def _multiply(self, block: Array) -> Array:
        raise NotImplementedError

    def __matmul__(self, block: Array) -> Array:
        """Return the product with `block`, shape (n,) or (n, m)."""
        self._check(block)
        return self._multiply(block)

    def matvec(self, block: Array) -> Array:
        """Return the product: the name under which SciPy looks for it, with ``M=`` and elsewhere.

        The operators are symmetric, so it also serves as SciPy's product with the transpose.
        """
        return self @ block

    matmat = rmatvec = rmatmat = __call__ = matvec

    def _check(self, block: Array, name: str = "block") -> None:
        check_block(name, block, self.shape[0])
        if self.like is not None and array_namespace(block) is not array_namespace(self.like):
            raise TypeError(
                f"the operator and `{name}` must come from one library: the operator has "
                f"{describe(self.like)}, `{name}` is {describe(block)}. Convert one of them."
            )
        if self.dtype is not None and block.dtype != self.dtype:
            raise TypeError(
                f"the operator has dtype {self.dtype} and `{name}` {block.dtype}. Convert one of "
                "them: nothing is promoted silently."
            )


class Operator(ProductOnly):
    """A symmetric operator with products, columns and, where it can, a diagonal."""

    def columns(self, indices: Any) -> Array:
        """Return the columns at `indices`, shape (n, k), by k products with unit vectors."""
        indices = check_indices(indices, self.shape[0])
        unit = like(np.eye(indices.size), self.like)
        return self @ scatter(unit, indices, self.shape[0])

    def diagonal(self) -> Array:
        """Return the diagonal, shape (n,)."""
        raise TypeError(
            f"{type(self).__name__} has no diagonal. Sample columns uniformly, pass `indices`, or "
            "give `diagonal=` to FunctionOperator."
        )


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

    def columns(self, indices: Any) -> Array:
        """Return the columns at `indices`, shape (n, k)."""
        return take(self.matrix, check_indices(indices, self.shape[0]), axis=1)

    def submatrix(self, indices: np.ndarray) -> Array:
        """Return the rows and columns at host `indices`, shape (k, k), and read nothing else."""
        return take(take(self.matrix, indices), indices, axis=1)

    def diagonal(self) -> Array:
        """Return the diagonal, shape (n,)."""
        return array_namespace(self.matrix).linalg.diagonal(self.matrix)


def check_square(A: Any) -> None:
    """Raise unless `A` has shape (n, n)."""
    shape = tuple(A.shape)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ValueError(f"`A` must be square, of shape (n, n) with n >= 1; got shape {shape}.")


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


def block_width(b: Array) -> int:
    """Count the columns of `b`, 1 for a vector."""
    return 1 if b.ndim == 1 else int(b.shape[1])


def apply_cost(operator: Any, width: int) -> int:
    """Count the products with A that applying `operator` to a block of `width` vectors costs."""
    cost = getattr(operator, "apply_cost", None)
    return int(cost(width)) if cost is not None else 0
