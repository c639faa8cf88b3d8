"""What a bilevel loop keeps from one outer step to the next."""

from __future__ import annotations

from os import PathLike
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace, is_jax_array

from lowrank_inverse._io import replace_file
from lowrank_inverse._typing import Array, Indices
from lowrank_inverse.arrays.checks import check_finite, describe, namespace
from lowrank_inverse.arrays.conversion import astype, eps, is_traced, like_device, to_host
from lowrank_inverse.bilevel.column_reuse import ReusedColumns
from lowrank_inverse.results.solution import Reason, Solution, code, ended

NUM_SETTLING = 3
"""Solves with fresh columns, the slowest of which says what to expect of them."""


class HypergradientState(NamedTuple):
    """The ``.state`` of a hypergradient: give it to the next call, and nothing else.

    CG and NystromCG start from `value`. NystromCG also keeps the sampled columns as its
    preconditioner, and pays for new ones only when the old ones have cost as much: see Notes.

    Attributes
    ----------
    value : array, shape (n,)
        The latest inverse product.
    columns : array, shape (n, k), or None
        Of the Hessian, without the ridge, from when they were last computed. None where the
        solver has none to keep.
    indices : array of int, shape (k,), or None
        Which columns these are.
    rate : array, shape (), or None
        Logarithm of the fall of the residual in one step with fresh columns; 0 while unknown.
    excess : array, shape (), or None
        Steps lost since then, because the columns have aged.
    age : array of int, shape (), or None
        Solves with these columns, after the first, that took a step.

    Notes
    -----
    A solve that lowers the residual from r to r' would have taken ``log(r / r') / rate`` steps
    with fresh columns, with the rate of the slowest of their first three solves. What it takes
    beyond that is lost, and what it takes less is won back. When the losses reach the k products
    that fresh columns cost, the next call computes them: as with skis that are rented until the
    rent has reached their price, at most about twice the least is spent. Columns of the bare
    Hessian are kept, so that a new damping or ridge is taken into account at once. A Gaussian
    sketch is no set of columns, and is made anew at every call.

    Products in one outer step: 1 to start, 1 for each step, 1 to confirm, and k where the columns
    are fresh. Memory ``n * (k + 1)`` numbers.

    It is a pytree of arrays: it may be carried by ``jax.jit`` and ``jax.lax.scan``. There the
    columns are computed within ``jax.lax.cond``, and only where needed; under ``jax.vmap``, which
    computes both sides of it, at every call.

    Examples
    --------
    >>> import os, tempfile
    >>> import numpy as np
    >>> import lowrank_inverse as li
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "state.npz")
    ...     li.HypergradientState(np.ones(3)).save(path)
    ...     print(li.HypergradientState.load(path).value)
    [1. 1. 1.]
    """

    value: Array
    columns: Array | None = None
    indices: Array | None = None
    rate: Array | None = None
    excess: Array | None = None
    age: Array | None = None

    def save(self, path: str | PathLike[str]) -> None:
        """Write the arrays to a file in NumPy's ``.npz`` format, bit for bit."""
        arrays: dict[str, Any] = {
            name: to_host(x) for name, x in self._asdict().items() if x is not None
        }
        replace_file(path, lambda file: np.savez(file, allow_pickle=False, **arrays))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> HypergradientState:
        """Read what :meth:`save` wrote, as NumPy arrays.

        They may be given as they are to a hypergradient in any library.
        """
        with np.load(path, allow_pickle=False) as file:
            missing = {"value"} - set(file.files)
            unknown = set(file.files) - set(cls._fields)
            if missing or unknown:
                raise ValueError(
                    f"`path` must be a file written by HypergradientState.save; {path} holds "
                    f"{', '.join(sorted(file.files)) or 'nothing'}."
                )
            return cls(**{name: file[name] for name in file.files})


def start(state: Any, b: Array) -> Array | None:
    """Return the solution in `state`, where a solve for `b` may start; None for no state."""
    if state is None:
        return None
    if not isinstance(state, (Solution, HypergradientState)):
        raise TypeError(
            "`state` must be a HypergradientState, as a hypergradient has it as `.state`, or the "
            f"Solution of an earlier solve; got {describe(state)}."
        )
    value = state.value
    namespace(b=b, state=value)
    if tuple(value.shape) != tuple(b.shape) or value.dtype != b.dtype:
        raise ValueError(
            f"`state` must come from a system of the same size, dtype {b.dtype} and shape "
            f"{tuple(b.shape)}; its value is {describe(value)}."
        )
    check_finite("state", value)
    return value


def adopt(state: Any, b: Array) -> Any:
    """Return a state read from a file in the library and on the device of `b`, others as is."""
    loaded = isinstance(state, HypergradientState) and isinstance(state.value, np.ndarray)
    if not loaded or isinstance(b, np.ndarray):
        return state
    xp = array_namespace(b)
    if state.value.dtype.itemsize * 8 != xp.finfo(b.dtype).bits:  # refused by `start`, not rounded
        return HypergradientState(state.value)
    where = like_device(b)

    def moved(x: np.ndarray | None) -> Array | None:
        # A copy: memory of the library's own, aligned as it likes, gives the same sums again.
        return None if x is None else xp.asarray(x, device=where, copy=True)

    return HypergradientState(*map(moved, state))


def next_state(
    state: Any, solution: Solution, reused: ReusedColumns | None = None
) -> HypergradientState:
    """Return the state for the call after that which gave `solution` with the columns `reused`.

    Parameters
    ----------
    state : HypergradientState or anything else
        What this call was given.
    solution : Solution
        Of one right-hand side.
    reused : ReusedColumns, optional
        The columns used.
    """
    x = solution.value
    xp = array_namespace(x)
    value = xp.where(xp.all(xp.isfinite(x)), x, xp.zeros_like(x))
    start_norm = solution.initial_residual_norm
    if reused is None or reused.columns is None or start_norm is None or x.ndim == 2:
        return HypergradientState(value)
    steps = astype(solution.num_steps, x.dtype)
    # Below rounding there is nothing left to fall, and no log of 0.
    end, floor = solution.residual_norm, eps(x) * start_norm
    end = xp.where(end > floor, end, floor)
    safe = (start_norm > 0) & xp.isfinite(end)
    one, zero = xp.ones_like(steps), xp.zeros_like(steps)
    fall = xp.log(xp.where(safe, start_norm, one)) - xp.log(xp.where(safe, end, one))
    fall = xp.where(fall > 0, fall, zero)
    ran = steps > 0
    speed = xp.where(ran, fall / xp.where(ran, steps, one), zero)

    fresh = xp.asarray(reused.refreshed, device=like_device(x)) | (zero > 0)
    kept = isinstance(state, HypergradientState) and state.rate is not None
    rate, excess, age = zero, zero, 0 * solution.reason
    if kept:
        rate, excess, age = state.rate, state.excess, state.age
    age = xp.where(fresh, xp.zeros_like(age), age + astype(ran, age.dtype))
    first = fresh | (rate <= 0)
    settling = first | (age < NUM_SETTLING)
    # At most halved each time: columns that were of use and are no more are not what to expect.
    slower = xp.where(speed > rate / 2, speed, rate / 2)
    slowest = xp.where(ran & (speed < rate), slower, rate)
    slowest = xp.where(first, speed, slowest)
    lost = xp.where(ran & ~settling, steps - fall / xp.where(settling, one, rate), zero)
    excess = excess + lost
    excess = xp.where(fresh | (excess < 0), zero, excess)
    broken = ended(solution.reason, Reason.INDEFINITE_PRECONDITIONER, Reason.NONFINITE)
    rank = reused.columns.shape[1]
    excess = xp.where(broken & ~fresh, code(excess, rank), excess)
    return HypergradientState(
        value,
        reused.columns,
        _as_array(reused.indices, x),
        xp.where(settling, slowest, rate),
        excess,
        age,
    )


def _as_array(indices: Indices, x: Array) -> Array:
    xp = array_namespace(x)
    if is_traced(indices):
        return indices
    wide = xp.int32 if is_jax_array(x) else xp.int64
    return xp.asarray(indices, dtype=wide, device=like_device(x))
