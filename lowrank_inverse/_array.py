"""What the array API standard leaves open: checks at the door, host values, dtypes."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import numpy as np
from array_api_compat import (
    array_namespace,
    device,
    is_array_api_obj,
    is_cupy_array,
    is_jax_array,
    is_torch_array,
)

from lowrank_inverse._typing import Array

F = TypeVar("F", bound=Callable[..., Any])


def is_array(x: Any) -> bool:
    """Whether `x` is an array of a supported library (SciPy sparse matrices are not)."""
    return bool(is_array_api_obj(x))


def is_traced(x: Any) -> bool:
    """Whether the values of `x` are unknown because a jax transformation is tracing."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(x, jax.core.Tracer)


def concrete(x: Any) -> Any:
    """Return a 0-d array as a Python number; anything else, and a traced array, as it is."""
    if is_traced(x) or not is_array(x) or x.ndim != 0:
        return x
    xp = array_namespace(x)
    if xp.isdtype(x.dtype, "bool"):
        return bool(x)
    if xp.isdtype(x.dtype, "integral"):
        return int(x)
    return float(x) if xp.isdtype(x.dtype, "real floating") else x


def describe(x: Any) -> str:
    """Kind, dtype and shape of `x`, for error messages."""
    kind = f"{type(x).__module__.split('.')[0]}.{type(x).__name__}"
    if not is_array(x):
        return kind
    return f"{kind} of dtype {x.dtype} and shape {tuple(x.shape)}"


def quietly(function: F) -> F:
    """Silence NumPy's floating-point warnings: what goes wrong is a field of the result."""

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            return function(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


def namespace(**arrays: Any) -> Any:
    """Return the array namespace that all named arrays share; None values are left out."""
    given = {name: x for name, x in arrays.items() if x is not None}
    for name, x in given.items():
        if not is_array(x):
            raise TypeError(
                f"`{name}` must be an array of NumPy, CuPy, PyTorch or JAX; got {describe(x)}. "
                "Convert it, for example with numpy.asarray."
            )
    try:
        return array_namespace(*given.values())
    except TypeError:
        kinds = ", ".join(f"`{name}` is {describe(x)}" for name, x in given.items())
        raise TypeError(
            f"all arrays must come from one library: {kinds}. Convert them to one library first."
        ) from None


def check_floating(name: str, x: Array) -> None:
    """Raise unless `x` is a real floating array."""
    xp = namespace(**{name: x})
    if not xp.isdtype(x.dtype, "real floating"):
        raise TypeError(
            f"`{name}` must have a real floating dtype; got {describe(x)}. "
            "Convert it to float32 or float64."
        )


def check_block(name: str, x: Array, n: int) -> None:
    """Raise unless `x` is a real floating array of shape (n,) or (n, m)."""
    check_floating(name, x)
    if x.ndim not in (1, 2) or x.shape[0] != n:
        raise ValueError(
            f"`{name}` must have {n} rows to match the operator of shape ({n}, {n}), as (n,) or "
            f"(n, m); got shape {tuple(x.shape)}."
        )


def check_finite(name: str, x: Array) -> None:
    """Raise if `x` holds NaN or Inf. Unknown, hence unchecked, while jax traces."""
    if 0 in x.shape:
        return
    xp = array_namespace(x)
    # The extremes tell, NaN among them, and take no memory of the size of x.
    finite = xp.isfinite(xp.max(x)) & xp.isfinite(xp.min(x))
    if not is_traced(finite) and not bool(finite):
        raise ValueError(
            f"`{name}` must be finite; it holds NaN or Inf. Look for an overflow or a division "
            "by zero where it is computed."
        )


def check_scalar(name: str, x: Any, *, positive: bool = False, remedy: str = "") -> None:
    """Raise unless `x` is a finite real number >= 0 (> 0 if `positive`). Traced: unchecked."""
    if is_traced(x):
        return
    value = concrete(x)
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be a real number; got {describe(x)}.")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(
            f"`{name}` must be finite and {'> 0' if positive else '>= 0'}; got {value}."
            f"{remedy if positive else ''}"
        )


def check_damping(damping: Any) -> None:
    """Raise unless `damping` is positive, as the inverse of a low-rank matrix needs it."""
    remedy = " The inverse of a low-rank matrix exists only with a positive damping."
    check_scalar("damping", damping, positive=True, remedy=remedy)


def check_count(name: str, x: Any, *, most: int | None = None) -> int:
    """Return `x` as an int if it is a whole number from 1 to `most`."""
    if isinstance(x, bool) or not isinstance(x, numbers.Integral):
        raise TypeError(f"`{name}` must be a whole number; got {describe(x)}.")
    count = int(x)
    if count < 1 or (most is not None and count > most):
        bounds = f"from 1 to {most}" if most is not None else "at least 1"
        raise ValueError(f"`{name}` must be {bounds}; got {count}.")
    return count


def check_indices(indices: Any, n: int) -> Any:
    """Return `indices` as host integers if they are distinct and within 0 … n - 1.

    Traced ones are returned as they are: their values are unknown, and so unchecked.
    """
    if is_traced(indices):
        xp = array_namespace(indices)
        if indices.ndim != 1 or not xp.isdtype(indices.dtype, "integral"):
            raise TypeError(f"`indices` must be integers of shape (k,); got {describe(indices)}.")
        return indices
    host = to_host(indices)
    if host.ndim != 1 or host.size == 0 or not np.issubdtype(host.dtype, np.integer):
        raise TypeError(
            "`indices` must be a non-empty one-dimensional sequence of integers; "
            f"got dtype {host.dtype} and shape {host.shape}."
        )
    if host.min() < 0 or host.max() >= n:
        raise ValueError(
            f"`indices` must lie in 0 … {n - 1}; got values from {host.min()} to {host.max()}."
        )
    if np.unique(host).size != host.size:
        raise ValueError("`indices` must be distinct; some are repeated. Pass each column once.")
    return host.astype(np.int64)


def to_host(x: Any) -> np.ndarray:
    """Return `x` as a NumPy array."""
    if is_torch_array(x):
        x = x.detach().cpu()
    return x.get() if is_cupy_array(x) else np.asarray(x)


def on_host(x: Array) -> Array:
    """Return `x` in the memory of the host: in its own library, CuPy's as NumPy."""
    if is_torch_array(x):
        return x.detach().cpu()
    if is_jax_array(x):
        jax = sys.modules["jax"]
        return jax.device_put(x, jax.devices("cpu")[0])
    return x.get() if is_cupy_array(x) else x


def beside(x: Array, y: Array) -> Array:
    """Return `x`, which may lie in the memory of the host, in the library and device of `y`."""
    if is_torch_array(x):
        return x.to(y.device)
    if is_jax_array(x):
        same = is_traced(x) or is_traced(y) or device(x) == device(y)
        return x if same else sys.modules["jax"].device_put(x, device(y))
    return array_namespace(y).asarray(x) if is_cupy_array(y) else x


def like(values: Any, x: Array, dtype: Any = None) -> Array:
    """Return host `values` as an array in the namespace and on the device of `x`."""
    xp = array_namespace(x)
    where = None if is_traced(x) else device(x)
    return xp.asarray(values, dtype=x.dtype if dtype is None else dtype, device=where)


def take(x: Array, indices: np.ndarray, axis: int = 0) -> Array:
    """Gather rows or columns of `x` at host `indices`."""
    xp = array_namespace(x)
    return xp.take(x, like(indices, x, xp.int64 if not is_jax_array(x) else xp.int32), axis=axis)


def scatter(values: Array, indices: np.ndarray, n: int) -> Array:
    """Return E_K values: zeros with `n` rows, and `values` in the rows `indices`."""
    xp = array_namespace(values)
    out = xp.zeros((n, *values.shape[1:]), dtype=values.dtype, device=like_device(values))
    if is_jax_array(values):
        return out.at[indices].set(values)
    for row, index in enumerate(indices.tolist()):  # the standard has no integer-array assignment
        out[index, ...] = values[row, ...]
    return out


def like_device(x: Array) -> Any:
    """Device of `x`, or None where a traced array has none."""
    return None if is_traced(x) else device(x)


def on_cpu(x: Array) -> bool:
    """Whether a concrete `x` lies in the memory of the host."""
    return "cpu" in str(device(x)).lower()


def astype(x: Array, dtype: Any) -> Array:
    """Convert `x`, without a copy where it already has `dtype`."""
    return array_namespace(x).astype(x, dtype, copy=False)


def eps(x: Array) -> float:
    """Machine epsilon of the dtype of `x`."""
    return float(array_namespace(x).finfo(x.dtype).eps)


def wide_dtype(x: Array) -> Any:
    """float64 where the library and device of `x` have it, else the dtype of `x`."""
    xp = array_namespace(x)
    if is_jax_array(x):
        return xp.float64 if sys.modules["jax"].config.jax_enable_x64 else xp.float32
    if str(like_device(x)).startswith("mps"):
        return xp.float32
    return xp.float64


def is_narrow(x: Array) -> bool:
    """Whether the widest dtype at hand for `x` is less than float64."""
    return bool(array_namespace(x).finfo(wide_dtype(x)).bits < 64)


def scalar_like(x: Any, array: Array) -> Any:
    """Return a traced 0-d array in the dtype of `array`, any other number as a Python float."""
    return astype(x, array.dtype) if is_traced(x) else float(concrete(x))
