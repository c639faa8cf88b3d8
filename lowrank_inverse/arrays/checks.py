"""Checks at the door: what is wrong with an argument, and what to do."""

from __future__ import annotations

import math
import numbers
import sys
from typing import Any

import numpy as np
from array_api_compat import array_namespace, is_torch_array

from lowrank_inverse._typing import Array, Scalar
from lowrank_inverse.arrays.control_flow import quietly
from lowrank_inverse.arrays.conversion import (
    astype,
    concrete,
    eps,
    is_array,
    is_known,
    is_traced,
    take,
    to_host,
)
from lowrank_inverse.arrays.spread import is_spread, local, spread_rows, summed

NUM_SYMMETRY_ROWS = 16


def describe(x: Any) -> str:
    """Kind, dtype and shape of `x`, for error messages."""
    kind = f"{type(x).__module__.split('.')[0]}.{type(x).__name__}"
    if not is_array(x):
        return kind
    return f"{kind} of dtype {x.dtype} and shape {tuple(x.shape)}"


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
    remedy = _conversion(x)
    if remedy is not None:
        raise TypeError(f"`{name}` cannot be {describe(x)}. {remedy}")
    xp = namespace(**{name: x})
    if xp.isdtype(x.dtype, "complex floating"):
        raise TypeError(
            f"`{name}` must have a real floating dtype; got {describe(x)}. Split a Hermitian "
            "system A x = b into the real one [[Re A, -Im A], [Im A, Re A]] [Re x, Im x] = "
            "[Re b, Im b]."
        )
    if not xp.isdtype(x.dtype, "real floating"):
        raise TypeError(
            f"`{name}` must have a real floating dtype; got {describe(x)}. "
            "Convert it to float32 or float64."
        )


def _conversion(x: Any) -> str | None:
    """Say how to convert what looks like an array and is none that can be computed with."""
    if hasattr(x, "to_numpy"):
        return "Use its .to_numpy()."
    if isinstance(x, np.ma.MaskedArray):
        return "Masks are not looked at: use .filled(value), or leave the masked rows out."
    if isinstance(x, np.matrix):
        return "Use numpy.asarray(...): a matrix has its own rules of multiplication."
    if isinstance(x, np.ndarray) and x.dtype.kind == "f":
        if not x.dtype.isnative:
            return "Its bytes are in another order: use .astype(x.dtype.newbyteorder('='))."
        if x.dtype.type not in (np.float32, np.float64):
            return "Use .astype(numpy.float64): there is no algebra in this dtype."
    if is_torch_array(x) and x.layout is not sys.modules["torch"].strided:
        return "It is sparse: use .to_dense()."
    return None


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
    finite = all_finite(x)
    if is_known(finite) and not bool(finite):
        raise ValueError(
            f"`{name}` must be finite; it holds NaN or Inf. Look for an overflow or a division "
            "by zero where it is computed."
        )


def all_finite(x: Array) -> Array:
    """Return whether all entries of `x` are finite, as an array of shape ()."""
    xp = array_namespace(x)
    if is_spread(x):  # every process must know, and the larger of NaN and a number may be either
        return summed(astype(~all_finite(local(x)), xp.int32), x) == 0
    if 0 in x.shape:
        return xp.asarray(True)
    # The extremes tell, NaN among them, and take no memory of the size of x.
    return xp.isfinite(xp.max(x)) & xp.isfinite(xp.min(x))


def check_scalar(name: str, x: Any, *, positive: bool = False, remedy: str = "") -> None:
    """Raise unless `x` is a finite real number >= 0 (> 0 if `positive`). Traced: unchecked."""
    if not is_known(x):
        return
    value = concrete(x)
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"`{name}` must be a real number; got {describe(x)}.")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(
            f"`{name}` must be finite and {'> 0' if positive else '>= 0'}; got {value}."
            f"{remedy if positive else ''}"
        )


def check_damping(damping: Scalar) -> None:
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


def check_rng(rng: Any) -> np.random.Generator:
    """Return the generator that `rng` is, or that starts from the seed that it is."""
    try:
        return np.random.default_rng(rng)
    except (TypeError, ValueError) as error:
        raise TypeError(
            "`rng` must be a whole number >= 0, a numpy.random.Generator, or None for fresh "
            f"entropy; got {rng if isinstance(rng, int) else describe(rng)}. Pass the seed itself; "
            "a PRNG key of jax is passed as `key`."
        ) from error


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
        raise ValueError("`indices` must be distinct; some are repeated. Pass each index once.")
    return host.astype(np.int64)


@quietly
def check_symmetric(name: str, A: Array) -> None:
    """Raise if some rows of a concrete square array differ from its columns: catches most slips."""
    xp = array_namespace(A)
    n = A.shape[0]
    rows = np.unique(np.linspace(0, n - 1, NUM_SYMMETRY_ROWS).astype(np.int64))
    across, down = take(A, rows, axis=0), take(A, rows, axis=1).T
    difference = xp.max(xp.abs(across - down))
    # NaN passes here: it is reported where the values are used. Traced values are unknown.
    asymmetric = difference > eps(A) ** 0.5 * xp.max(xp.abs(across))
    if is_known(asymmetric) and bool(asymmetric):
        raise ValueError(
            f"`{name}` must be symmetric; {name} and {name}.T differ by {float(difference):.2g}. "
            f"Use ({name} + {name}.T) / 2 if the difference is rounding, or solve "
            f"{name}.T @ {name} if {name} is not symmetric."
        )


def no_entries(x: Array) -> Array:
    """Return an empty vector of the library, dtype and device of `x`, and in its layout."""
    if is_spread(x):
        return spread_rows(no_entries(local(x)), x, 0)
    rows = x[:0, ...] if x.ndim else x  # to reshape all of them could be a copy
    return array_namespace(x).reshape(rows, (-1,))[:0]


def prototype(dtype: Any, like: Array | None, device: Any = None) -> Array:
    """Return an empty array of the library, dtype and device meant."""
    torch = sys.modules.get("torch")
    if like is not None:
        empty = no_entries(like)
        empty = empty if dtype is None else astype(empty, dtype)
    elif torch is not None and isinstance(dtype, torch.dtype):
        empty = torch.zeros(0, dtype=dtype, device=device)
    else:
        empty = np.zeros(0, dtype=np.float64 if dtype is None else dtype)
    check_floating("products of the operator", empty)
    return empty
