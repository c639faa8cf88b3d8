"""Base classes of operators, and what becomes of them by addition and scaling."""

from __future__ import annotations

from typing import Any

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import Array, Indices, Scalar
from lowrank_inverse.arrays.checks import check_block, check_indices, describe
from lowrank_inverse.arrays.conversion import is_array, scalar_like, scatter, take
from lowrank_inverse.arrays.conversion import like as like_array


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

    def _about(self) -> dict[str, Any]:
        """Return what a printed operator says beside its size and dtype."""
        return {}

    def __repr__(self) -> str:
        about = {"n": self.shape[0], "dtype": self.dtype} | self._about()
        told = ", ".join(f"{name}={value}" for name, value in about.items() if value is not None)
        return f"{type(self).__name__}({told})"

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
    """A symmetric operator with products, columns and, where it can, a diagonal.

    Operators combine: ``A + B``, ``c * A``, ``-A``, ``A - B`` and ``A.T``, which is A.
    """

    __array_ufunc__ = None  # NumPy's own scalars and arrays leave c * A to __rmul__

    @property
    def T(self) -> Operator:
        """The transpose: the operator itself."""
        return self

    def __add__(self, other: Any) -> Operator:
        if not hasattr(other, "shape") or not hasattr(type(other), "__matmul__"):
            return NotImplemented
        if isinstance(other, DiagonalOperator):
            return ShiftedOperator(self, other.entries)
        if isinstance(self, DiagonalOperator) and isinstance(other, Operator):
            return ShiftedOperator(other, self.entries)
        return SumOperator(self, other)

    def __radd__(self, other: Any) -> Operator:
        return self + other

    def __sub__(self, other: Any) -> Operator:
        return self + (-1.0) * other

    def __neg__(self) -> Operator:
        return -1.0 * self

    def __mul__(self, factor: Scalar) -> Operator:
        if isinstance(factor, bool) or getattr(factor, "ndim", 0) != 0 or hasattr(factor, "matvec"):
            return NotImplemented
        return ScaledOperator(self, factor)

    __rmul__ = __mul__

    def columns(self, indices: Indices) -> Array:
        """Return the columns at `indices`, shape (n, k), by k products with unit vectors."""
        indices = check_indices(indices, self.shape[0])
        unit = like_array(np.eye(indices.size), self.like)
        return self @ scatter(unit, indices, self.shape[0])

    def diagonal(self) -> Array:
        """Return the diagonal, shape (n,)."""
        raise TypeError(
            f"{type(self).__name__} has no diagonal. Sample columns uniformly, pass `indices`, or "
            "give `diagonal=` to FunctionOperator."
        )


class SumOperator(Operator):
    """``A + B``."""

    def __init__(self, A: Operator, B: Any) -> None:
        if tuple(A.shape) != tuple(B.shape):
            raise ValueError(
                f"operators that are added must have one shape; got {tuple(A.shape)} and "
                f"{tuple(B.shape)}."
            )
        self.parts = A, B
        self.shape, self.dtype, self.like = A.shape, A.dtype, A.like

    def _multiply(self, block: Array) -> Array:
        A, B = self.parts
        return A @ block + B @ block

    def columns(self, indices: Indices) -> Array:
        """Return the columns at `indices`, shape (n, k)."""
        A, B = self.parts
        if is_array(B):
            return A.columns(indices) + take(B, check_indices(indices, self.shape[0]), axis=1)
        return A.columns(indices) + B.columns(indices)

    def diagonal(self) -> Array:
        """Return the diagonal, shape (n,)."""
        A, B = self.parts
        if is_array(B):
            return A.diagonal() + array_namespace(B).linalg.diagonal(B)
        return A.diagonal() + B.diagonal()


class ScaledOperator(Operator):
    """``c * A`` for a number c."""

    def __init__(self, A: Operator, factor: Scalar) -> None:
        self.A, self.factor = A, factor
        self.shape, self.dtype, self.like = A.shape, A.dtype, A.like

    def _multiply(self, block: Array) -> Array:
        return scalar_like(self.factor, block) * (self.A @ block)

    def columns(self, indices: Indices) -> Array:
        """Return the columns at `indices`, shape (n, k)."""
        C = self.A.columns(indices)
        return scalar_like(self.factor, C) * C

    def diagonal(self) -> Array:
        """Return the diagonal, shape (n,)."""
        d = self.A.diagonal()
        return scalar_like(self.factor, d) * d


class DiagonalOperator(Operator):
    """A diagonal matrix: ``DiagonalOperator(n, entries)``.

    Parameters
    ----------
    n : int
        Number of rows.
    entries : float, 0-d array or array of shape (n,)
        The diagonal. The identity by default.
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

    def __init__(self, n: int, entries: Any = 1.0, *, like: Array | None = None) -> None:
        self.entries = entries
        if like is None:
            like = entries if getattr(entries, "ndim", 0) == 1 else np.zeros(0)
        if getattr(entries, "ndim", 0) == 1:
            check_block("entries", entries, n)
        self.like = array_namespace(like).reshape(like, (-1,))[:0]
        self.shape, self.dtype = (n, n), self.like.dtype

    def _multiply(self, block: Array) -> Array:
        return times_diagonal(self.entries, block)

    def __mul__(self, factor: Scalar) -> Operator:
        return DiagonalOperator(self.shape[0], factor * self.entries, like=self.like)

    __rmul__ = __mul__

    def diagonal(self) -> Array:
        """Return the diagonal, shape (n,)."""
        return times_diagonal(self.entries, like_array(np.ones(self.shape[0]), self.like))


class ShiftedOperator(Operator):
    """``A + diag(shift)``; solvers keep the shift out of what they approximate.

    Attributes
    ----------
    base : operator
    shift : float, 0-d array or array of shape (n,)
    """

    def __init__(self, A: Any, shift: Scalar) -> None:
        self.base, self.shift = A, shift
        if isinstance(A, ShiftedOperator):
            self.base, self.shift = A.base, A.shift + shift
        self.shape, self.dtype = (int(A.shape[0]), int(A.shape[0])), A.dtype
        self.like = getattr(A, "like", None)

    def _multiply(self, block: Array) -> Array:
        return self.base @ block + times_diagonal(self.shift, block)

    def columns(self, indices: Indices) -> Array:
        """Return the columns at `indices`, shape (n, k)."""
        indices = check_indices(indices, self.shape[0])
        C = self.base.columns(indices)
        shift = self.shift if getattr(self.shift, "ndim", 0) == 0 else take(self.shift, indices)
        return C + scatter(
            times_diagonal(shift, like_array(np.eye(indices.size), C)), indices, self.shape[0]
        )

    def diagonal(self) -> Array:
        """Return the diagonal, shape (n,)."""
        d = self.base.diagonal()
        return d + times_diagonal(self.shift, like_array(np.ones(self.shape[0]), d))


def times_diagonal(d: Any, block: Array) -> Array:
    """Return ``diag(d) @ block`` for a number or a vector d."""
    if getattr(d, "ndim", 0) == 0:
        return scalar_like(d, block) * block
    return d * block if block.ndim == 1 else d[:, None] * block


def check_square(A: Any) -> None:
    """Raise unless `A` has shape (n, n)."""
    shape = tuple(A.shape)
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ValueError(f"`A` must be square, of shape (n, n) with n >= 1; got shape {shape}.")


def block_width(b: Array) -> int:
    """Count the columns of `b`, 1 for a vector."""
    return 1 if b.ndim == 1 else int(b.shape[1])


def apply_cost(operator: Any, width: int) -> int:
    """Count the products with A that applying `operator` to a block of `width` vectors costs."""
    cost = getattr(operator, "apply_cost", None)
    return int(cost(width)) if cost is not None else 0
