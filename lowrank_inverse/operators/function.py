"""Operators defined by functions, and conversion to operators."""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
from array_api_compat import array_namespace, is_torch_array

from lowrank_inverse._typing import Array, Indices, OperatorLike
from lowrank_inverse.arrays.checks import check_count, check_indices, describe, prototype
from lowrank_inverse.arrays.conversion import copied, is_array
from lowrank_inverse.operators.base import Operator
from lowrank_inverse.operators.matrix import DenseOperator, SparseOperator
from lowrank_inverse.operators.product import check_square


class FunctionOperator(Operator):
    """A symmetric operator defined by functions.

    Parameters
    ----------
    matvec : callable
        Maps a vector of shape (n,) to its product, shape (n,).
    n : int
        Number of rows.
    dtype : dtype, optional
        Dtype of the products, of NumPy or PyTorch, which also selects the library. Default: that
        of `like`, or NumPy's float64.
    like : array, optional
        An array of the library, dtype and device of the products. Needed for JAX and CuPy, and
        for PyTorch on an accelerator.
    matmat : callable, optional
        Maps a block of shape (n, m) to its product. Default: `matvec` column by column.
    columns : callable, optional
        Maps k distinct host indices to the columns, shape (n, k). Default: products with unit
        vectors.
    diagonal : callable, optional
        Takes no argument and returns the diagonal, shape (n,).
    parameters : sequence of arrays
        Passed to each function after its own argument, as ``matvec(v, *parameters)``. Solutions
        have derivatives of any order with respect to them, under ``torch.func`` too. With respect
        to other tensors that a function reads, PyTorch has first derivatives only, JAX has all.

    Raises
    ------
    TypeError
        If `matvec` is not callable, or its products have another dtype or library.

    Notes
    -----
    The results of functions are copied, so `matvec` may reuse its output array.

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
        matvec: Callable[..., Array],
        n: int,
        *,
        dtype: Any = None,
        like: Array | None = None,
        matmat: Callable[..., Array] | None = None,
        columns: Callable[..., Array] | None = None,
        diagonal: Callable[..., Array] | None = None,
        parameters: Sequence[Array] = (),
    ) -> None:
        if not callable(matvec):
            raise TypeError(f"`matvec` must be callable; got {describe(matvec)}.")
        for name, given in (("matmat", matmat), ("columns", columns), ("diagonal", diagonal)):
            if given is not None and not callable(given):
                raise TypeError(
                    f"`{name}` must be a function; got {describe(given)}. For a known diagonal "
                    "d, pass diagonal=lambda: d."
                )
        n = check_count("n", n)
        self.like = prototype(dtype, like)
        self.shape, self.dtype = (n, n), self.like.dtype
        self._matvec, self._matmat = matvec, matmat
        self._columns, self._diagonal = columns, diagonal
        self.parameters = tuple(parameters)
        # Without them, the functions read what they like.
        self._parts = ("parameters",) if self.parameters else None

    def _multiply(self, block: Array) -> Array:
        if block.ndim == 1:
            return self._checked(self._matvec(block, *self.parameters), block.shape)
        if self._matmat is not None:
            return self._checked(self._matmat(block, *self.parameters), block.shape)
        products = [
            self._checked(self._matvec(block[:, j], *self.parameters), block.shape[:1])
            for j in range(block.shape[1])
        ]
        return array_namespace(block).stack(products, axis=1)

    def _checked(self, product: Any, shape: tuple[int, ...]) -> Array:
        if not is_array(product) or product.dtype != self.dtype or tuple(product.shape) != shape:
            raise TypeError(
                f"`matvec` must return dtype {self.dtype} and shape {tuple(shape)}; got "
                f"{describe(product)}. Pass the right `dtype` or `like` to FunctionOperator."
            )
        return copied(product)  # the function may use its array again

    def columns(self, indices: Indices) -> Array:
        """Return the columns at `indices`, shape (n, k)."""
        if self._columns is None:
            return super().columns(indices)
        indices = check_indices(indices, self.shape[0])
        chosen = self._columns(indices, *self.parameters)
        return self._checked(chosen, (self.shape[0], indices.size))

    def diagonal(self) -> Array:
        """Return the diagonal, shape (n,)."""
        if self._diagonal is None:
            return super().diagonal()
        return self._diagonal(*self.parameters)


def aslinearoperator(A: OperatorLike) -> Any:
    """Return `A` as an operator with ``@``, ``.columns(indices)`` and ``.diagonal()``.

    Parameters
    ----------
    A : array, SciPy sparse matrix or LinearOperator, or any operator, shape (n, n)
        Symmetric. Any object with ``.shape``, ``.dtype`` and ``@`` is accepted. If it has no
        ``columns``, they are computed as products with unit vectors.

    Returns
    -------
    Operator
        `A` itself if it has all three already.

    Raises
    ------
    TypeError
        If `A` is not an operator, or its dtype is not real floating.
    ValueError
        If `A` is not square, or is found not to be symmetric. The test covers 16 rows of a dense
        array and all of a sparse matrix; other operators are not tested.

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
    if is_torch_array(A) and "sparse" in str(A.layout):
        return _by_products(A, A.dtype, prototype(A.dtype, None, A.device))
    if is_array(A) or isinstance(A, (np.matrix, np.ma.MaskedArray)) or hasattr(A, "to_numpy"):
        return DenseOperator(A)
    if not hasattr(A, "shape") or not hasattr(type(A), "__matmul__"):
        raise TypeError(
            f"`A` must be an array or have .shape and @; got {describe(A)}. Wrap a function in "
            "FunctionOperator(matvec, n)."
        )
    sparse = sys.modules.get("scipy.sparse")
    if sparse is not None and sparse.issparse(A):
        check_square(A)
        return SparseOperator(A)
    own_columns, own_diagonal = getattr(A, "columns", None), getattr(A, "diagonal", None)
    if callable(own_columns) and callable(own_diagonal):
        check_square(A)
        return A
    dtype, empty = getattr(A, "dtype", None), getattr(A, "like", None)
    if isinstance(dtype, np.dtype) and dtype.kind in "biu":
        dtype = None  # SciPy looks for it with products of whole numbers
    if empty is None and hasattr(A, "device") and dtype is not None:
        empty = prototype(dtype, None, A.device)
    return _by_products(A, dtype, empty, own_columns, own_diagonal)


def _by_products(
    A: OperatorLike, dtype: Any, like: Array | None, columns: Any = None, diagonal: Any = None
) -> FunctionOperator:
    check_square(A)
    product = partial(operator.matmul, A)
    return FunctionOperator(
        product,
        int(A.shape[0]),
        dtype=dtype,
        like=like,
        matmat=product,
        columns=columns if callable(columns) else None,
        diagonal=diagonal if callable(diagonal) else None,
    )
