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


_TWICE = "{} has first derivatives only, in reverse mode."


def first_only(x: Array, what: str) -> Array:
    """Return `x`, of which second derivatives are refused: those of `what` would be wrong.

    In jax, the first ones are there in reverse mode alone.
    """
    if is_traced(x):
        return _jax_first_only(what)(x)
    return _torch_first_only(what)(x) if is_recorded(x) else x


@cache
def _torch_first_only(what: str) -> Callable[[Array], Array]:
    function = sys.modules["torch"].autograd.Function

    class Cotangent(function):  # type: ignore[valid-type, misc]
        """The first argument, as if it depended on the second in a way that nobody knows."""

        @staticmethod
        def forward(cotangent: Array, x: Array) -> Array:
            return cotangent.clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, cotangent: Array) -> Any:
            raise NotImplementedError(_TWICE.format(what))

        jvp = backward

    class FirstOnly(function):  # type: ignore[valid-type, misc]
        @staticmethod
        def forward(x: Array) -> Array:
            return x.clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx: Any, cotangent: Array) -> Array:
            return Cotangent.apply(cotangent, *ctx.saved_tensors)

    result: Callable[[Array], Array] = FirstOnly.apply
    return result


@cache
def _jax_first_only(what: str) -> Callable[[Array], Array]:
    jax = sys.modules["jax"]
    cotangent = jax.custom_jvp(lambda cotangent, x: cotangent)

    def refuse(primals: Any, tangents: Any) -> Any:
        raise NotImplementedError(_TWICE.format(what))

    cotangent.defjvp(refuse)
    identity = jax.custom_vjp(lambda x: x)
    identity.defvjp(lambda x: (x, x), lambda x, g: (cotangent(g, x),))
    result: Callable[[Array], Array] = identity
    return result


def plain(x: Any) -> Any:
    """Return a 0-d array as a Python number, unless derivatives of it are recorded."""
    return x if is_recorded(x) else concrete(x)
