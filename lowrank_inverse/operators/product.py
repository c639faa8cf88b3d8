"""The base class of operators and inverses: checked products."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import Array, OperatorLike
from lowrank_inverse.arrays.checks import check_block, describe, no_entries
from lowrank_inverse.arrays.control_flow import full_precision
from lowrank_inverse.arrays.conversion import concrete, is_array, is_traced, scatter
from lowrank_inverse.arrays.conversion import like as like_array


class ProductOnly:
    """An operator of shape (n, n) that checks the operands of its products."""

    shape: tuple[int, int]
    dtype: Any
    like: Array
    """An empty array whose library, dtype and device the products have."""
    _parts: tuple[str, ...] | None = None
    """Attributes with all that products depend on: arrays, numbers, operators, tuples of them.

    None where that is unknown, as with functions that read what they like.
    """

    def _with_parts(self, parts: dict[str, Any]) -> Any:
        """Return a copy with other parts of the same kinds; itself where they are the same."""
        if all(getattr(self, name) is part for name, part in parts.items()):
            return self
        other = copy.copy(self)
        other.__dict__.update(parts)
        return other

    def _multiply(self, block: Array) -> Array:
        raise NotImplementedError

    def __matmul__(self, block: Array) -> Array:
        """Return the product with `block`, shape (n,) or (n, m)."""
        self._check(block)
        with full_precision():
            return self._multiply(block)

    def matvec(self, block: Array) -> Array:
        """Return the product with a vector or block, under the name that SciPy uses.

        The operators are symmetric, so this is also the product with the transpose.
        """
        return self @ block

    matmat = rmatvec = rmatmat = __call__ = matvec

    def _about(self) -> dict[str, Any]:
        """Return what a printed operator says beside its size and dtype."""
        return {}

    def __repr__(self) -> str:
        about = {"n": self.shape[0], "dtype": self.dtype} | self._about()
        told = {k: "traced" if is_traced(v) else concrete(v) for k, v in about.items()}
        parts = ", ".join(f"{k}={v}" for k, v in told.items() if v is not None)
        return f"{type(self).__name__}({parts})"

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


def check_square(A: OperatorLike) -> None:
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


def unit_vectors(indices: np.ndarray, n: int, like: Array) -> Array:
    """Return the columns of the identity at `indices`, shape (n, k), in the manner of `like`."""
    return scatter(like_array(np.eye(indices.size), like), indices, n)


def check_alike(A: OperatorLike, B: OperatorLike) -> None:
    """Raise unless two operators that are combined have one library and one dtype."""
    a, b = (no_entries(X) if is_array(X) else getattr(X, "like", None) for X in (A, B))
    one_library = a is None or b is None or array_namespace(a) is array_namespace(b)
    dtypes = [dtype for X in (A, B) if (dtype := getattr(X, "dtype", None)) is not None]
    if not one_library or any(dtype != dtypes[0] for dtype in dtypes):
        libraries = ["" if x is None else type(x).__module__.split(".")[0] + " " for x in (a, b)]
        kinds = " and ".join(f"{x}{X.dtype}" for x, X in zip(libraries, (A, B), strict=True))
        raise TypeError(
            "operators that are combined must have the same library and dtype; got "
            f"{kinds}. Convert one of them."
        )
