"""Diagonal operators, and operators with a shifted diagonal."""

from __future__ import annotations

from typing import Any

import numpy as np

from lowrank_inverse._typing import Array, Indices, OperatorLike, Scalar
from lowrank_inverse.arrays.checks import (
    check_block,
    check_count,
    check_indices,
    describe,
    no_entries,
)
from lowrank_inverse.arrays.conversion import is_number, rows_like, take
from lowrank_inverse.arrays.conversion import like as like_array
from lowrank_inverse.arrays.linalg import added_diagonals, scaled_diagonal, times_diagonal
from lowrank_inverse.operators.base import (
    CombinedOperator,
    Operator,
    ScaledOperator,
    SumOperator,
    entries_of,
)
from lowrank_inverse.operators.product import check_alike, unit_vectors


class DiagonalOperator(CombinedOperator):
    """A diagonal matrix.

    Parameters
    ----------
    n : int
        Number of rows.
    entries : float, 0-d array or array of shape (n,)
        The diagonal. Default: the identity.
    like : array, optional
        An array of the library, dtype and device of the products. Default: `entries`, or NumPy's
        float64.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank_inverse as li
    >>> A = li.aslinearoperator(np.ones((2, 2)))
    >>> print((A + 0.5 * li.DiagonalOperator(2)) @ np.ones(2))
    [2.5 2.5]
    """

    _parts = ("entries",)
    _holds_diagonal = True

    def __init__(self, n: int, entries: Any = 1.0, *, like: Array | None = None) -> None:
        n = check_count("n", n)
        number = is_number(entries)
        if not number:
            check_block("entries", entries, n)
            if entries.ndim != 1:
                raise ValueError(
                    f"`entries` must be a number or have shape ({n},); got {describe(entries)}."
                )
        if like is None:
            like = np.zeros(0) if number else entries
        self.entries = entries
        self.like = no_entries(like)
        self.shape, self.dtype = (n, n), self.like.dtype
        if not number:
            self._check(entries, "entries")

    def _about(self) -> dict[str, Any]:
        return {"entries": self.entries if is_number(self.entries) else None}

    def _multiply(self, block: Array) -> Array:
        return times_diagonal(self.entries, block)

    def _plus(self, other: Any) -> Operator:
        if isinstance(other, DiagonalOperator):
            like = self.like if is_number(other.entries) else other.like
            entries = added_diagonals(self.entries, other.entries)
            return DiagonalOperator(self.shape[0], entries, like=like)
        if not callable(getattr(other, "columns", None)):  # an array, or of another library
            return SumOperator(self, other)
        if not is_number(self.entries):
            check_alike(other, self)
        return ShiftedOperator(other, self.entries)

    def _scaled(self, factor: Scalar) -> Operator:
        entries = scaled_diagonal(factor, self.entries)
        return DiagonalOperator(self.shape[0], entries, like=self.like)

    def _operands(self) -> tuple[Any, ...]:
        return ()

    def _entries(self, indices: np.ndarray) -> Array:
        return _diagonal_entries(self.entries, indices, self.like)

    def diagonal(self) -> Array:
        """Return the diagonal, shape (n,)."""
        return times_diagonal(self.entries, rows_like(np.ones(self.shape[0]), self.like))


class ShiftedOperator(CombinedOperator):
    """``A + diag(shift)``. Solvers approximate A only and treat the shift exactly.

    Attributes
    ----------
    base : operator
        A.
    shift : float, 0-d array or array of shape (n,)
        Added to the diagonal.
    """

    _parts = ("base", "shift")
    _holds_diagonal = True

    def __init__(self, A: OperatorLike, shift: Scalar) -> None:
        self.base, self.shift = A, shift
        if isinstance(A, ShiftedOperator):
            self.base, self.shift = A.base, added_diagonals(A.shift, shift)
        self.shape, self.dtype = (int(A.shape[0]), int(A.shape[0])), A.dtype
        self.like = getattr(A, "like", None)

    def _about(self) -> dict[str, Any]:
        return {"shift": self.shift if is_number(self.shift) else None}

    def _plus(self, other: Any) -> Operator:
        if isinstance(other, DiagonalOperator):
            return other._plus(self)
        own = isinstance(self.base, Operator)  # and not of another library
        total = self.base._plus(other) if own else Operator._plus(self.base, other)
        return ShiftedOperator(total, self.shift)

    def _scaled(self, factor: Scalar) -> Operator:
        return ShiftedOperator(
            ScaledOperator(self.base, factor), scaled_diagonal(factor, self.shift)
        )

    def _multiply(self, block: Array) -> Array:
        return self.base @ block + times_diagonal(self.shift, block)

    def columns(self, indices: Indices) -> Array:
        """Return the columns at `indices`, shape (n, k)."""
        indices = check_indices(indices, self.shape[0])
        C = self.base.columns(indices)
        return C + times_diagonal(self.shift, unit_vectors(indices, self.shape[0], C))

    def _operands(self) -> tuple[Any, ...]:
        return (self.base,)

    def _entries(self, indices: np.ndarray) -> Array:
        block = entries_of(self.base, indices)
        return block + _diagonal_entries(self.shift, indices, block)

    def diagonal(self) -> Array:
        """Return the diagonal, shape (n,)."""
        d = self.base.diagonal()
        return d + times_diagonal(self.shift, rows_like(np.ones(self.shape[0]), d))


def _diagonal_entries(d: Any, indices: np.ndarray, like: Array) -> Array:
    d = take(d, indices) if getattr(d, "ndim", 0) == 1 else d
    return times_diagonal(d, like_array(np.eye(len(indices)), like))
