"""Operators made of operators."""

from __future__ import annotations

from typing import Any

import numpy as np

from lowrank_inverse._typing import Array
from lowrank_inverse.arrays.checks import (
    check_scalar,
)
from lowrank_inverse.arrays.conversion import like, scalar_like, scatter
from lowrank_inverse.operators.base import Operator
from lowrank_inverse.operators.function import FunctionOperator, aslinearoperator


def shifted(A: Any, damping: Any) -> Operator:
    """Return ``A + damping * I`` as an operator.

    Parameters
    ----------
    A : linear operator, shape (n, n)
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
    A = aslinearoperator(A)
    n = int(A.shape[0])

    def shifted_columns(indices: np.ndarray) -> Array:
        C = A.columns(indices)
        return C + scalar_like(damping, C) * scatter(like(np.eye(indices.size), C), indices, n)

    def shifted_diagonal() -> Array:
        d = A.diagonal()
        return d + scalar_like(damping, d)

    return FunctionOperator(
        lambda v: A @ v + scalar_like(damping, v) * v,
        n,
        dtype=A.dtype,
        like=getattr(A, "like", None),
        matmat=lambda block: A @ block + scalar_like(damping, block) * block,
        columns=shifted_columns,
        diagonal=shifted_diagonal,
    )
