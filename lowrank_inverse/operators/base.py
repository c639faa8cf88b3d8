"""The base class of operators, and their sums and multiples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import Array, Indices, OperatorLike, Scalar
from lowrank_inverse.arrays.checks import (
    check_floating,
    check_indices,
    check_symmetric,
)
from lowrank_inverse.arrays.conversion import (
    is_array,
    is_number,
    take,
)
from lowrank_inverse.arrays.linalg import times_diagonal
from lowrank_inverse.operators.product import ProductOnly, check_alike, unit_vectors


class Operator(ProductOnly):
    """A symmetric operator with products, columns and, if it is known, a diagonal.

    Operators combine as ``A + B``, ``A - B``, ``c * A`` and ``-A``. ``A.T`` is A.
    """

    __array_ufunc__ = None  # NumPy's own scalars and arrays leave c * A to __rmul__
    _holds_diagonal = False

    @property
    def T(self) -> Operator:
        """The transpose: the operator itself."""
        return self

    def __add__(self, other: Any) -> Operator:
        if not hasattr(other, "shape") or not hasattr(type(other), "__matmul__"):
            return NotImplemented
        if tuple(self.shape) != tuple(other.shape):
            raise ValueError(
                f"operators in a sum must have the same shape; got {tuple(self.shape)} and "
                f"{tuple(other.shape)}."
            )
        return self._plus(other)

    __radd__ = __add__

    def _plus(self, other: Any) -> Operator:
        """Return the sum, in which an operator that holds a diagonal keeps it apart."""
        if getattr(other, "_holds_diagonal", False):
            return other._plus(self)
        return SumOperator(self, other)

    def __sub__(self, other: Any) -> Operator:
        return self + (-1.0) * other

    def __rsub__(self, other: Any) -> Operator:
        return -self + other

    def __neg__(self) -> Operator:
        return -1.0 * self

    def __mul__(self, factor: Scalar) -> Operator:
        return self._scaled(factor) if is_number(factor) else NotImplemented

    __rmul__ = __mul__

    def _scaled(self, factor: Scalar) -> Operator:
        return ScaledOperator(self, factor)

    def columns(self, indices: Indices) -> Array:
        """Return the columns at `indices`, shape (n, k), by k products with unit vectors."""
        indices = check_indices(indices, self.shape[0])
        return self @ unit_vectors(indices, self.shape[0], self.like)

    def diagonal(self) -> Array:
        """Return the diagonal, shape (n,)."""
        raise TypeError(
            f"{type(self).__name__} has no diagonal. Sample columns uniformly, pass `indices`, or "
            "pass `diagonal=` to FunctionOperator."
        )


class CombinedOperator(Operator):
    """An operator made of others. Its entries can be read if those of all its parts can."""

    def _operands(self) -> tuple[Any, ...]:
        """Return the arrays and operators that it is made of."""
        raise NotImplementedError

    def _entries(self, indices: np.ndarray) -> Array:
        raise NotImplementedError

    @property
    def submatrix(self) -> Callable[[np.ndarray], Array]:
        """A function that returns rows and columns at host indices, shape (k, k)."""
        if not all(is_array(A) or hasattr(A, "submatrix") for A in self._operands()):
            raise AttributeError(f"{type(self).__name__} has operands whose entries are unknown")
        return self._entries

    @property
    def entry_operations(self) -> int:
        """Approximate number of operations per entry of a matrix product."""
        return sum(getattr(A, "entry_operations", 2) for A in self._operands())


def entries_of(A: OperatorLike, indices: np.ndarray) -> Array:
    """Return the rows and columns of an array or operator at host `indices`, shape (k, k)."""
    return take(take(A, indices), indices, axis=1) if is_array(A) else A.submatrix(indices)


class SumOperator(CombinedOperator):
    """``A + B``."""

    _parts = ("parts",)

    def __init__(self, A: OperatorLike, B: OperatorLike) -> None:
        if is_array(B):
            check_floating("B", B)
            check_symmetric("B", B)
        check_alike(A, B)
        self.parts = A, B
        self.shape, self.dtype, self.like = A.shape, A.dtype, getattr(A, "like", None)

    def _multiply(self, block: Array) -> Array:
        A, B = self.parts
        return A @ block + B @ block

    def columns(self, indices: Indices) -> Array:
        """Return the columns at `indices`, shape (n, k)."""
        A, B = self.parts
        indices = check_indices(indices, self.shape[0])
        C = A.columns(indices)
        if is_array(B):
            return C + take(B, indices, axis=1)
        if callable(getattr(B, "columns", None)):
            return C + B.columns(indices)
        return C + B @ unit_vectors(indices, self.shape[0], C)

    def _operands(self) -> tuple[Any, ...]:
        return self.parts

    def _entries(self, indices: np.ndarray) -> Array:
        A, B = self.parts
        return entries_of(A, indices) + entries_of(B, indices)

    def diagonal(self) -> Array:
        """Return the diagonal, shape (n,)."""
        A, B = self.parts
        if is_array(B):
            return A.diagonal() + array_namespace(B).linalg.diagonal(B)
        return A.diagonal() + (B.diagonal() if hasattr(B, "diagonal") else super().diagonal())


class ScaledOperator(CombinedOperator):
    """``c * A`` for a number c."""

    _parts = ("A", "factor")

    def __init__(self, A: OperatorLike, factor: Scalar) -> None:
        self.A, self.factor = A, factor
        self.shape, self.dtype, self.like = A.shape, A.dtype, getattr(A, "like", None)

    def _about(self) -> dict[str, Any]:
        return {"factor": self.factor}

    def _multiply(self, block: Array) -> Array:
        return times_diagonal(self.factor, self.A @ block)

    def columns(self, indices: Indices) -> Array:
        """Return the columns at `indices`, shape (n, k)."""
        return times_diagonal(self.factor, self.A.columns(indices))

    def _operands(self) -> tuple[Any, ...]:
        return (self.A,)

    def _entries(self, indices: np.ndarray) -> Array:
        return times_diagonal(self.factor, entries_of(self.A, indices))

    def diagonal(self) -> Array:
        """Return the diagonal, shape (n,)."""
        return times_diagonal(self.factor, self.A.diagonal())
