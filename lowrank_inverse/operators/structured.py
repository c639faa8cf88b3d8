"""Kronecker products and block diagonals of operators."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import Array, Indices, OperatorLike
from lowrank_inverse.arrays.checks import check_indices
from lowrank_inverse.arrays.conversion import is_traced, like, take
from lowrank_inverse.operators.base import CombinedOperator, entries_of
from lowrank_inverse.operators.function import aslinearoperator
from lowrank_inverse.operators.product import check_alike


class KroneckerOperator(CombinedOperator):
    """``A ⊗ B``: entry ``(i q + k, j q + l)`` is ``A[i, j] B[k, l]``, with B of shape (q, q)."""

    _parts: tuple[str, ...] | None = ("A", "B")

    def __init__(self, A: OperatorLike, B: OperatorLike) -> None:
        self.A, self.B = A, B
        self._sizes = int(A.shape[0]), int(B.shape[0])
        n = self._sizes[0] * self._sizes[1]
        self.shape, self.dtype, self.like = (n, n), A.dtype, A.like

    def _operands(self) -> tuple[Any, ...]:
        return self.A, self.B

    def _multiply(self, block: Array) -> Array:
        xp, (p, q) = array_namespace(block), self._sizes
        m = 1 if block.ndim == 1 else block.shape[1]
        rows = xp.reshape(self.A @ xp.reshape(block, (p, q * m)), (p, q, m))
        turned = xp.reshape(xp.permute_dims(rows, (1, 0, 2)), (q, p * m))
        columns = xp.reshape(self.B @ turned, (q, p, m))
        return xp.reshape(xp.permute_dims(columns, (1, 0, 2)), block.shape)

    def columns(self, indices: Indices) -> Array:
        """Return the columns at `indices`, shape (n, k)."""
        indices = check_indices(indices, self.shape[0])
        C = _columns(self.A, indices // self._sizes[1])
        D = _columns(self.B, indices % self._sizes[1])
        products = C[:, None, :] * D[None, :, :]
        return array_namespace(C).reshape(products, (self.shape[0], products.shape[2]))

    def _entries(self, indices: np.ndarray) -> Array:
        (i, at_i), (k, at_k) = (
            np.unique(part, return_inverse=True) for part in np.divmod(indices, self._sizes[1])
        )
        E, F = entries_of(self.A, i), entries_of(self.B, k)
        return take(take(E, at_i), at_i, axis=1) * take(take(F, at_k), at_k, axis=1)

    def diagonal(self) -> Array:
        """Return the diagonal, shape (n,)."""
        products = self.A.diagonal()[:, None] * self.B.diagonal()[None, :]
        return array_namespace(products).reshape(products, (self.shape[0],))


def _columns(A: OperatorLike, indices: Indices) -> Array:
    """Return columns, of which some may be asked for twice."""
    if is_traced(indices):
        return A.columns(indices)
    distinct, places = np.unique(indices, return_inverse=True)
    return take(A.columns(distinct), places, axis=1)


def kron(A: OperatorLike, B: OperatorLike) -> KroneckerOperator:
    """Return the Kronecker product of `A` and `B`, as ``numpy.kron`` does for arrays.

    For kernel matrices of points x and z, that of the product kernel on the grid of all pairs,
    with the points z of one x after the other. It is positive semidefinite if both are.

    Parameters
    ----------
    A, B : arrays, sparse matrices or operators, shapes (p, p) and (q, q)
        Symmetric.

    Returns
    -------
    operator, shape (p * q, p * q)
        A product takes q products with `A` and p with `B`.

    Raises
    ------
    TypeError
        If the libraries or dtypes differ.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank_inverse as li
    >>> times, places = np.linspace(0, 1, 30)[:, None], np.linspace(0, 5, 40)[:, None]
    >>> K = li.kron(
    ...     li.KernelOperator(times, lengthscale=0.2),
    ...     li.KernelOperator(places, "matern"),
    ... )
    >>> solution = li.solve(K, np.ones(1200), solver=li.CG(damping=1e-2))
    >>> print(K, solution.message)
    KroneckerOperator(n=1200, dtype=float64) converged
    """
    A, B = aslinearoperator(A), aslinearoperator(B)
    check_alike(A, B)
    return KroneckerOperator(A, B)


class BlockDiagonalOperator(CombinedOperator):
    """Operators along the diagonal, and zeros elsewhere."""

    _parts: tuple[str, ...] | None = ("blocks",)

    def __init__(self, blocks: tuple[OperatorLike, ...]) -> None:
        self.blocks = blocks
        ends = accumulate((int(block.shape[0]) for block in blocks), initial=0)
        self._rows = [slice(*pair) for pair in pairwise(ends)]
        n = self._rows[-1].stop
        self.shape, self.dtype, self.like = (n, n), blocks[0].dtype, blocks[0].like

    def _operands(self) -> tuple[Any, ...]:
        return self.blocks

    def _multiply(self, block: Array) -> Array:
        parts = [A @ block[rows, ...] for A, rows in zip(self.blocks, self._rows, strict=True)]
        return array_namespace(block).concat(parts, axis=0)

    def _entries(self, indices: np.ndarray) -> Array:
        return take(self.columns(indices), indices)

    def columns(self, indices: Indices) -> Array:
        """Return the columns at `indices`, shape (n, k), at the cost of k columns of blocks."""
        indices = check_indices(indices, self.shape[0])
        if is_traced(indices):
            return super().columns(indices)
        xp, parts = array_namespace(self.like), []
        for A, rows in zip(self.blocks, self._rows, strict=True):
            inside = (rows.start <= indices) & (indices < rows.stop)
            zeros = like(np.zeros((rows.stop - rows.start, 1)), self.like)
            own = [A.columns(indices[inside] - rows.start)] if inside.any() else []
            places = np.where(inside, np.cumsum(inside) - 1, inside.sum())
            parts.append(take(xp.concat([*own, zeros], axis=1), places, axis=1))
        return xp.concat(parts, axis=0)

    def diagonal(self) -> Array:
        """Return the diagonal, shape (n,)."""
        return array_namespace(self.like).concat([A.diagonal() for A in self.blocks], axis=0)


def block_diag(*blocks: OperatorLike) -> BlockDiagonalOperator:
    """Return the operator with `blocks` along its diagonal, as ``scipy.linalg.block_diag``.

    Parameters
    ----------
    *blocks : arrays, sparse matrices or operators, shapes (n_i, n_i)
        Symmetric; at least one.

    Returns
    -------
    operator, shape (n, n), with n the sum of all n_i

    Raises
    ------
    TypeError
        If there is no block, or the libraries or dtypes differ.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank_inverse as li
    >>> A = li.block_diag(np.eye(2), 3 * np.eye(1))
    >>> print(A @ np.ones(3))
    [1. 1. 3.]
    """
    if not blocks:
        raise TypeError("`block_diag` needs at least one block; got none.")
    operators = tuple(aslinearoperator(block) for block in blocks)
    for other in operators[1:]:
        check_alike(operators[0], other)
    return BlockDiagonalOperator(operators)
