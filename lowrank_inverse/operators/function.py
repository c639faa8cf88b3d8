"""Operators given by functions, sparse matrices, and other libraries' operators."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import Array, Indices
from lowrank_inverse.arrays.checks import check_count, check_indices, describe, prototype
from lowrank_inverse.arrays.conversion import is_array
from lowrank_inverse.operators.base import Operator, check_square
from lowrank_inverse.operators.dense import DenseOperator


class FunctionOperator(Operator):
    """A symmetric operator given by functions.

    Parameters
    ----------
    matvec : callable
        Takes a vector of shape (n,) and returns its product, shape (n,).
    n : int
        Number of rows.
    dtype : dtype, optional
        Of the products: a NumPy or a PyTorch dtype, which also says the library.
        Default: that of `like`, or NumPy's float64.
    like : array, optional
        An array of the library, dtype and device of the products. Needed for JAX and CuPy, and
        for PyTorch on an accelerator.
    matmat : callable, optional
        Takes a block of shape (n, m). Default: `matvec` on one column after the other.
    columns : callable, optional
        Takes distinct host indices of length k and returns columns, shape (n, k).
        Default: products with unit vectors.
    diagonal : callable, optional
        Takes nothing and returns the diagonal, shape (n,).

    Raises
    ------
    TypeError
        If `matvec` is not callable or its products have another dtype or library.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank_inverse as li
    >>> A = li.FunctionOperator(lambda v: 2.0 * v, 3)
    >>> print(A @ np.ones(3))
    [2. 2. 2.]
    """

    def __init__(
        self,
        matvec: Callable[[Array], Array],
        n: int,
        *,
        dtype: Any = None,
        like: Array | None = None,
        matmat: Callable[[Array], Array] | None = None,
        columns: Callable[[np.ndarray], Array] | None = None,
        diagonal: Callable[[], Array] | None = None,
    ) -> None:
        if not callable(matvec):
            raise TypeError(f"`matvec` must be callable; got {describe(matvec)}.")
        n = check_count("n", n)
        self.like = prototype(dtype, like)
        self.shape, self.dtype = (n, n), self.like.dtype
        self._matvec, self._matmat = matvec, matmat
        self._columns, self._diagonal = columns, diagonal

    def _multiply(self, block: Array) -> Array:
        if block.ndim == 1:
            return self._checked(self._matvec(block), block.shape)
        if self._matmat is not None:
            return self._checked(self._matmat(block), block.shape)
        products = [
            self._checked(self._matvec(block[:, j]), block.shape[:1]) for j in range(block.shape[1])
        ]
        return array_namespace(block).stack(products, axis=1)

    def _checked(self, product: Any, shape: tuple[int, ...]) -> Array:
        if not is_array(product) or product.dtype != self.dtype or tuple(product.shape) != shape:
            raise TypeError(
                f"`matvec` must return dtype {self.dtype} and shape {tuple(shape)}; got "
                f"{describe(product)}. Give FunctionOperator the right `dtype` or `like`."
            )
        return product

    def columns(self, indices: Indices) -> Array:
        """Return the columns at `indices`, shape (n, k)."""
        if self._columns is None:
            return super().columns(indices)
        indices = check_indices(indices, self.shape[0])
        return self._checked(self._columns(indices), (self.shape[0], indices.size))

    def diagonal(self) -> Array:
        """Return the diagonal, shape (n,)."""
        return self._diagonal() if self._diagonal is not None else super().diagonal()


def aslinearoperator(A: Any) -> Any:
    """Return `A` as an operator with ``@``, ``.columns(indices)`` and ``.diagonal()``.

    Parameters
    ----------
    A : array, SciPy sparse matrix or LinearOperator, or any operator, shape (n, n)
        Symmetric. Whatever has ``.shape``, ``.dtype`` and ``@`` qualifies; columns that it does
        not supply itself are taken by products with unit vectors.

    Returns
    -------
    Operator
        `A` itself if it has all three already.

    Raises
    ------
    TypeError
        If `A` is no operator, or not of a real floating dtype.
    ValueError
        If `A` is not square, or visibly not symmetric (16 rows of a dense array, all of a
        sparse matrix; other operators are not checked).

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank_inverse as li
    >>> A = li.aslinearoperator(np.diag([1.0, 2.0, 3.0]))
    >>> print(A.diagonal(), A.columns([1])[:, 0])
    [1. 2. 3.] [0. 2. 0.]
    """
    if isinstance(A, Operator):
        return A
    if is_array(A):
        return DenseOperator(A)
    if not hasattr(A, "shape") or not hasattr(type(A), "__matmul__"):
        raise TypeError(
            f"`A` must be an array or have .shape and @; got {describe(A)}. Wrap a function in "
            "FunctionOperator(matvec, n)."
        )
    check_square(A)
    sparse = sys.modules.get("scipy.sparse")
    if sparse is not None and sparse.issparse(A):
        return _from_sparse(A)
    own_columns, own_diagonal = getattr(A, "columns", None), getattr(A, "diagonal", None)
    if callable(own_columns) and callable(own_diagonal):
        return A
    dtype, empty = getattr(A, "dtype", None), getattr(A, "like", None)
    if empty is None and hasattr(A, "device") and dtype is not None:
        empty = prototype(dtype, None, A.device)
    return FunctionOperator(
        lambda v: A @ v,
        int(A.shape[0]),
        dtype=dtype,
        like=empty,
        matmat=lambda block: A @ block,
        columns=own_columns if callable(own_columns) else None,
        diagonal=own_diagonal if callable(own_diagonal) else None,
    )


def _from_sparse(A: Any) -> FunctionOperator:
    if not np.issubdtype(A.dtype, np.floating):
        raise TypeError(f"`A` must have a real floating dtype; got {A.dtype}. Use A.astype(float).")
    A = A.tocsc()
    difference = abs(A - A.T)
    scale = abs(A).max() if A.nnz else 0.0
    if difference.nnz and difference.max() > np.finfo(A.dtype).eps ** 0.5 * scale:
        raise ValueError("`A` must be symmetric; A - A.T is not zero. Use (A + A.T) / 2.")
    return FunctionOperator(
        lambda block: A @ block,
        A.shape[0],
        dtype=A.dtype,
        matmat=lambda block: A @ block,
        columns=lambda indices: A[:, indices].toarray(),
        diagonal=A.diagonal,
    )
