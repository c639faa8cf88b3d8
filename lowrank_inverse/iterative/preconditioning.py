"""Checks of preconditioners."""

from __future__ import annotations

from typing import Any

from array_api_compat import array_namespace

from lowrank_inverse._typing import Array
from lowrank_inverse.arrays.checks import describe
from lowrank_inverse.arrays.conversion import is_array
from lowrank_inverse.operators.function import aslinearoperator


def checked_preconditioner(preconditioner: Any, n: int) -> Any:
    """Return a preconditioner as an operator, or None; raise if it cannot be one."""
    if preconditioner is None:
        return None
    if not hasattr(preconditioner, "shape") or not hasattr(type(preconditioner), "__matmul__"):
        raise TypeError(
            f"`preconditioner` must be an operator with .shape and @; got "
            f"{describe(preconditioner)}. Wrap a function in FunctionOperator(matvec, n)."
        )
    if tuple(preconditioner.shape) != (n, n):
        raise ValueError(
            f"`preconditioner` must have shape {(n, n)} to match `A`; got "
            f"{tuple(preconditioner.shape)}."
        )
    return aslinearoperator(preconditioner) if is_array(preconditioner) else preconditioner


def apply_preconditioner(preconditioner: Any, r: Array) -> Array:
    """Apply the preconditioner to `r`; raise if the library or dtype changes."""
    z = preconditioner @ r
    if not is_array(z) or array_namespace(z) is not array_namespace(r) or z.dtype != r.dtype:
        raise TypeError(
            f"`preconditioner` must map {describe(r)} to the same library, dtype and shape; it "
            f"returned {describe(z)}. Convert its result: nothing is promoted silently."
        )
    return z
