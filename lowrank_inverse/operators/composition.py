"""Shifted operators, and operators scaled by a diagonal from both sides."""

from __future__ import annotations

from typing import Any

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import Array, Indices, OperatorLike, Scalar
from lowrank_inverse.arrays.checks import check_scalar, no_entries
from lowrank_inverse.arrays.conversion import is_known, is_traced, take
from lowrank_inverse.arrays.linalg import added_diagonals, times_diagonal
from lowrank_inverse.arrays.spread import reduced
from lowrank_inverse.operators.base import CombinedOperator, Operator, entries_of
from lowrank_inverse.operators.diagonal import ShiftedOperator
from lowrank_inverse.operators.function import aslinearoperator


def shifted(A: OperatorLike, damping: Scalar) -> Operator:
    """Return ``A + damping * I`` as an operator.

    Parameters
    ----------
    A : linear operator, shape (n, n)
        Symmetric.
    damping : float or 0-d array
        Added to the diagonal; 0 or more.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank_inverse as li
    >>> print(li.shifted(np.eye(2), 0.5) @ np.ones(2))
    [1.5 1.5]
    """
    check_scalar("damping", damping)
    return ShiftedOperator(aslinearoperator(A), damping)


class DiagonallyScaledOperator(CombinedOperator):
    """``diag(s) A diag(s)``, for `s` of shape (n,)."""

    _parts = ("A", "s")

    def __init__(self, A: OperatorLike, s: Array) -> None:
        self.A, self.s, self.like = A, s, no_entries(s)
        self.shape, self.dtype = (int(A.shape[0]), int(A.shape[0])), s.dtype

    def _multiply(self, block: Array) -> Array:
        return times_diagonal(self.s, self.A @ times_diagonal(self.s, block))

    def columns(self, indices: Indices) -> Array:
        """Return the columns at `indices`, shape (n, k)."""
        return self.s[:, None] * self.A.columns(indices) * take(self.s, indices)

    def _operands(self) -> tuple[Any, ...]:
        return (self.A,)

    def _entries(self, indices: np.ndarray) -> Array:
        s = take(self.s, indices)
        return s[:, None] * entries_of(self.A, indices) * s

    def diagonal(self) -> Array:
        """Return the diagonal, shape (n,)."""
        return self.s * self.s * self.A.diagonal()


def scaled_by_diagonal(A: OperatorLike, s: Array) -> DiagonallyScaledOperator:
    """Return ``diag(s) A diag(s)``, for `s` of shape (n,)."""
    return DiagonallyScaledOperator(A, s)


def scaled(block: Array | None, s: Array | None) -> Array | None:
    """Return ``diag(s) @ block``; `block` itself where `s` is None."""
    if block is None or s is None:
        return block
    return s * block if block.ndim == 1 else s[:, None] * block


def split_shift(A: OperatorLike, damping: Scalar) -> tuple[Any, Any]:
    """Return ``(H, d)`` with ``H + d I = A + damping I`` for a number d, the largest part in d.

    Where d would be negative, `A` is returned as it is.
    """
    if isinstance(A, ShiftedOperator) and getattr(A.shift, "ndim", 0) == 0:
        total = added_diagonals(A.shift, damping)
        if not is_known(total) or total >= 0:
            return A.base, total
    return A, damping


def split_diagonal(A: OperatorLike, damping: Scalar) -> tuple[Any, Any, Array | None]:
    """Return ``(H, d, s)`` with ``H + d I = S (A + damping I) S``, S the identity if s is None.

    A diagonal D that `A` was shifted by stays out of H: with ``s = (D + damping)^{-1/2}`` it
    becomes the identity.
    """
    A, damping = split_shift(A, damping)
    if not isinstance(A, ShiftedOperator) or getattr(A.shift, "ndim", 0) == 0:
        return A, damping, None
    D = added_diagonals(A.shift, damping)
    positive = reduced(array_namespace(D).all(D > 0))
    if not is_traced(positive) and not bool(positive):
        raise ValueError(
            "`ridge` plus the damping of the solver must be > 0 everywhere; some entries are 0. "
            "Use a small damping."
        )
    s = D**-0.5
    return scaled_by_diagonal(A.base, s), 1.0, s
