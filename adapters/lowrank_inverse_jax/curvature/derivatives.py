"""Derivatives as linear functions, with or without a forward mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp


def full_precision() -> Any:
    """Return a context in which matrix products keep the precision of their operands."""
    return jax.default_matmul_precision("highest")


def linearized(gradient: Callable[[Any], Any], at: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Return a gradient and its derivative, a symmetric function.

    Forward over reverse; reverse over reverse for what has no forward mode, such as a custom_vjp
    within the backward pass of another: some slower, and with more memory.
    """
    value, product = jax.linearize(gradient, at)
    if _has_forward_mode(product, at):
        return value, product
    value, pull = jax.vjp(gradient, at)
    return value, lambda v: pull(v)[0]


def both_ways(
    function: Callable[[jax.Array], Any], at: jax.Array
) -> tuple[Any, Callable[[jax.Array], Any], Callable[[Any], jax.Array]]:
    """Return the value of a function, and products with its Jacobian and with the transpose."""
    value, push = jax.linearize(function, at)
    if _has_forward_mode(push, at):
        transposed = jax.linear_transpose(push, at)
        return value, push, lambda u: transposed(u)[0]
    value, pull = jax.vjp(function, at)
    # The pull-back is linear, and its own pull-back is the push-forward.
    _, twice = jax.vjp(lambda u: pull(u)[0], jax.tree.map(jnp.zeros_like, value))
    return value, lambda v: twice(v)[0], lambda u: pull(u)[0]


def _has_forward_mode(linear: Callable[[Any], Any], at: Any) -> bool:
    """Whether a linearized function can be called: jax marks what can be transposed only."""
    return "custom_lin" not in _primitives(jax.make_jaxpr(linear)(at).jaxpr)


def _primitives(jaxpr: Any) -> Iterator[str]:
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in equation.params.values():
            for inner in value if isinstance(value, (list, tuple)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from _primitives(inner)
