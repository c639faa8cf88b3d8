"""What the array API standard leaves open: kinds of arrays, host values, dtypes, devices."""

from __future__ import annotations

import numbers
import sys
from typing import Any

import numpy as np
from array_api_compat import (
    array_namespace,
    device,
    is_array_api_obj,
    is_cupy_array,
    is_jax_array,
    is_torch_array,
)

from lowrank_inverse._typing import Array, Indices
from lowrank_inverse.arrays.spread import (
    everywhere,
    gathered,
    is_spread,
    local,
    owned_rows,
    scattered_rows,
    spread_rows,
    taken_rows,
    zeros_across,
)


def is_array(x: Any) -> bool:
    """Whether `x` is an array of a supported library (SciPy sparse matrices are not)."""
    return bool(is_array_api_obj(x))


def is_number(x: Any) -> bool:
    """Whether `x` is a real number or a 0-d array of one, which may be traced, and no bool."""
    if is_array(x):
        kinds = ("integral", "real floating")
        return x.ndim == 0 and bool(array_namespace(x).isdtype(x.dtype, kinds))
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


def is_traced(x: Any) -> bool:
    """Whether the values of `x` are unknown because a jax transformation is tracing."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(x, jax.core.Tracer)


def carries_gradient(x: Any) -> bool:
    """Whether `x` is a jax array that is traced, or a torch tensor with a derivative to take."""
    if not is_torch_array(x):
        return is_traced(x)
    torch = sys.modules["torch"]
    if x.requires_grad and torch.is_grad_enabled():
        return True
    functorch, forward = torch._C._functorch, torch.autograd.forward_ad
    if functorch.is_gradtrackingtensor(x) or functorch.is_batchedtensor(x):
        return True
    return forward._current_level >= 0 and forward.unpack_dual(x).tangent is not None


def is_batched(x: Any) -> bool:
    """Whether `x` is a tensor inside ``torch.vmap``, which shows no values."""
    if not is_torch_array(x):
        return False
    functorch = sys.modules["torch"]._C._functorch
    while functorch.is_gradtrackingtensor(x):
        x = functorch.get_unwrapped(x)
    return bool(functorch.is_batchedtensor(x))


def is_known(x: Any) -> bool:
    """Whether the values of `x` can be looked at."""
    return not is_traced(x) and not is_batched(x)


def concrete(x: Any) -> Any:
    """Return a 0-d array as a Python number; anything else, and a traced array, as it is."""
    if not is_array(x) or x.ndim != 0 or not is_known(x):
        return x
    x = gathered(x.detach()) if is_torch_array(x) else x  # of a sum, a process has its part
    xp = array_namespace(x)
    if xp.isdtype(x.dtype, "bool"):
        return bool(x)
    if xp.isdtype(x.dtype, "integral"):
        return int(x)
    return float(x) if xp.isdtype(x.dtype, "real floating") else x


class _Raising:
    """CuPy's linear algebra, which by default returns what a failure left in memory."""

    def __init__(self, functions: Any) -> None:
        self._functions = functions

    def __getattr__(self, name: str) -> Any:
        function, errstate = getattr(self._functions, name), sys.modules["cupyx"].errstate

        def run(*arrays: Array) -> Any:
            with errstate(linalg="raise"):
                return function(*arrays)

        return run


def algebra(x: Array) -> Any:
    """Return the decompositions and solutions of the library of `x`, which raise if they fail."""
    functions = array_namespace(x).linalg
    return _Raising(functions) if is_cupy_array(x) else functions


def without_graph(x: Array) -> Array:
    """Return a torch tensor without a graph, a tangent or the wrapping of ``torch.func``."""
    torch = sys.modules["torch"]
    x = torch.autograd.forward_ad.unpack_dual(x).primal.detach()
    while torch._C._functorch.is_gradtrackingtensor(x):  # after any operation, which wraps
        x = torch._C._functorch.get_unwrapped(x)
    return x


def to_host(x: Any) -> np.ndarray:
    """Return `x` as a NumPy array; bfloat16, which NumPy lacks, as float32."""
    if is_torch_array(x):
        x = gathered(x.float() if str(x.dtype) == "torch.bfloat16" else x)
        x = without_graph(x.cpu())
        if sys.modules["torch"]._C._functorch.peek_interpreter_stack() is not None:
            functorch = sys.modules["torch._functorch.pyfunctorch"]
            with functorch.temporarily_clear_interpreter_stack():  # which would wrap it again
                return x.numpy()
    if is_jax_array(x) and not x.is_fully_addressable and not x.is_fully_replicated:
        jax: Any = sys.modules["jax"]  # parts lie with other processes: fetch them
        mesh = getattr(x.sharding, "mesh", None)
        x = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    return x.get() if is_array(x) and hasattr(x, "get") else np.asarray(x)  # CuPy has it


def like(values: Any, x: Array, dtype: Any = None) -> Array:
    """Return host `values` as an array in the namespace and on the device of `x`.

    Where `x` is spread over processes, they lie whole on each.
    """
    xp = array_namespace(x)
    dtype = x.dtype if dtype is None else dtype
    array = xp.asarray(values, dtype=dtype, device=like_device(x))
    return everywhere(array, x) if is_spread(x) else array


def rows_like(values: np.ndarray, x: Array) -> Array:
    """Return host `values`, one row for each of those that `x` stands for, in its layout."""
    if not is_spread(x):
        return like(values, x)
    mine = owned_rows(x, len(values))
    return spread_rows(like(values[mine.start : mine.stop], local(x)), x, len(values))


def zero_rows(count: int, x: Array) -> Array:
    """Return zeros, shape (count, n), for `x` of shape (n,) or (n, m)."""
    if is_spread(x):
        return zeros_across(count, x)
    shape = (count, x.shape[0])
    return array_namespace(x).zeros(shape, dtype=x.dtype, device=like_device(x))


def take(x: Array, indices: Indices, axis: int = 0) -> Array:
    """Gather rows or columns of `x` at host `indices`."""
    xp = array_namespace(x)
    if is_spread(x) and axis == 0:
        return taken_rows(x, np.asarray(indices))
    return xp.take(x, like(indices, x, xp.int64 if not is_jax_array(x) else xp.int32), axis=axis)


def scatter(values: Array, indices: np.ndarray, n: int) -> Array:
    """Return E_K values: zeros with `n` rows, and `values` in the rows `indices`."""
    xp = array_namespace(values)
    if is_spread(values):
        return scattered_rows(values, indices, n)
    out = xp.zeros((n, *values.shape[1:]), dtype=values.dtype, device=like_device(values))
    if is_jax_array(values):
        return out.at[indices].set(values)
    for row, index in enumerate(indices.tolist()):  # the standard has no integer-array assignment
        out[index, ...] = values[row, ...]
    return out


def like_device(x: Array) -> Any:
    """Device of `x`; None where a jax array is traced, or bound to no device or to several."""
    if is_jax_array(x) and (
        is_traced(x) or not getattr(x, "committed", True) or len(x.devices()) > 1
    ):
        return None
    return device(x)


def on_cpu(x: Array) -> bool:
    """Whether a concrete `x` lies in the memory of the host."""
    return "cpu" in str(device(x)).lower()


def astype(x: Array, dtype: Any) -> Array:
    """Convert `x`, without a copy where it already has `dtype`."""
    return array_namespace(x).astype(x, dtype, copy=False)


def copied(x: Array) -> Array:
    """Return a copy of `x`, which a graph of gradients goes through; jax never writes over one."""
    if is_jax_array(x):
        return x
    return x.clone() if is_torch_array(x) else array_namespace(x).asarray(x, copy=True)


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
    """Return a number as a Python float; in the dtype of `array` if it is traced or has a graph."""
    return astype(x, array.dtype) if carries_gradient(x) else float(concrete(x))
