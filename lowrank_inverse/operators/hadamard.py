"""Entrywise products of operators."""

from __future__ import annotations

from typing import Any

import numpy as np

from lowrank_inverse._typing import Array, Indices, OperatorLike
from lowrank_inverse.arrays.checks import check_indices, describe
from lowrank_inverse.operators.base import CombinedOperator
from lowrank_inverse.operators.function import aslinearoperator
from lowrank_inverse.operators.product import check_alike

TILE_NUMBERS = 2**20


class HadamardOperator(CombinedOperator):
    """The entrywise product of two operators whose entries can be read."""

    _parts: tuple[str, ...] | None = ("A", "B")

    def __init__(self, A: OperatorLike, B: OperatorLike) -> None:
        self.A, self.B = A, B
        self.shape, self.dtype, self.like = A.shape, A.dtype, A.like

    def _operands(self) -> tuple[Any, ...]:
        return self.A, self.B

    def _multiply(self, block: Array) -> Array:
        n, product = self.shape[0], None
        width = max(1, TILE_NUMBERS // n)
        for start in range(0, n, width):
            stop = min(start + width, n)
            part = self.columns(np.arange(start, stop)) @ block[start:stop, ...]
            product = part if product is None else product + part
        return product

    def columns(self, indices: Indices) -> Array:
        """Return the columns at `indices`, shape (n, k)."""
        indices = check_indices(indices, self.shape[0])
        return self.A.columns(indices) * self.B.columns(indices)

    def _entries(self, indices: np.ndarray) -> Array:
        return self.A.submatrix(indices) * self.B.submatrix(indices)

    def diagonal(self) -> Array:
        """Return the diagonal, shape (n,)."""
        return self.A.diagonal() * self.B.diagonal()


def hadamard(A: OperatorLike, B: OperatorLike) -> HadamardOperator:
    """Return the entrywise product of `A` and `B`; for kernel matrices, that of the product kernel.

    It is positive semidefinite if both are (Schur product theorem).

    Parameters
    ----------
    A, B : arrays, sparse matrices or operators, shape (n, n)
        Symmetric, with entries that can be read.

    Returns
    -------
    operator, shape (n, n)

    Raises
    ------
    TypeError
        If entries cannot be read, or the libraries or dtypes differ.
    ValueError
        If the shapes differ.

    Notes
    -----
    A product reads all columns of both operators, ``2**20`` numbers at a time.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank_inverse as li
    >>> t, x = (
    ...     np.linspace(0, 1, 50)[:, None],
    ...     np.random.default_rng(0).standard_normal((50, 2)),
    ... )
    >>> A = li.hadamard(
    ...     li.KernelOperator(t, lengthscale=0.2), li.KernelOperator(x, "matern")
    ... )
    >>> print(A, float(A.diagonal()[0]))
    HadamardOperator(n=50, dtype=float64) 1.0
    """
    A, B = aslinearoperator(A), aslinearoperator(B)
    for name, operand in (("A", A), ("B", B)):
        if not hasattr(operand, "submatrix"):
            raise TypeError(
                f"`{name}` must have entries that can be read, as arrays and kernels do; got "
                f"{describe(operand)}, whose columns cost a product each."
            )
    if tuple(A.shape) != tuple(B.shape):
        raise ValueError(
            f"`A` and `B` must have the same shape; got {tuple(A.shape)} and {tuple(B.shape)}."
        )
    check_alike(A, B)
    return HadamardOperator(A, B)
