"""Where derivatives are recorded: what stays in the graph, and what is a constant of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Any

from array_api_compat import is_jax_array, is_torch_array

from lowrank_inverse._typing import Array
from lowrank_inverse.arrays.conversion import (
    carries_gradient,
    concrete,
    is_traced,
    without_graph,
)


def is_recorded(*arrays: Any) -> bool:
    """Whether a library may be recording derivatives with respect to one of some values.

    In jax, whenever it traces: a compiled function does not know whether it is differentiated.
    """
    return any(map(carries_gradient, arrays))


def constant(x: Array) -> Array:
    """Return `x` as a constant, which derivatives do not go through."""
    if is_traced(x):
        return sys.modules["jax"].lax.stop_gradient(x)
    return without_graph(x) if is_torch_array(x) else x


def with_derivatives_of(value: Array, other: Callable[[], Array], *inputs: Any) -> Array:
    """Return `value`, with the derivatives of ``other()``, a smoother way to the same numbers.

    It is called where derivatives with respect to `inputs` may be recorded; under ``jax.jit``
    nothing is left of it where they are not.
    """
    if not is_recorded(value, *inputs):
        return value
    return substituted(value, other())


def substituted(value: Array, smooth: Array) -> Array:
    """Return `value` with the derivatives of `smooth`."""
    if is_jax_array(smooth):
        return _jax_substitute()(value, smooth)
    return constant(value) + (smooth - constant(smooth))


@cache
def _jax_substitute() -> Callable[[Array, Array], Array]:
    first = sys.modules["jax"].custom_jvp(lambda value, other: value)
    first.defjvp(lambda primals, tangents: (first(*primals), tangents[1]))
    result: Callable[[Array, Array], Array] = first
    return result


def plain(x: Any) -> Any:
    """Return a 0-d array as a Python number, unless derivatives of it are recorded."""
    return x if is_recorded(x) else concrete(x)
