"""Losses and functions that a user gives, checked."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_inverse.arrays.checks import describe


def as_list(functions: Any, *, name: str = "loss") -> list[Callable[..., Any]]:
    """Return one function, or several, as a list."""
    listed = list(functions) if isinstance(functions, (list, tuple)) else [functions]
    if not listed or not all(callable(function) for function in listed):
        raise TypeError(
            f"`{name}` must be a function, or a non-empty list of functions; "
            f"got {describe(functions)}. In JAX, pass the function and not its value."
        )
    return listed


def scalar(loss: Callable[..., Any], *, name: str = "loss") -> Callable[..., jax.Array]:
    """Return `loss` with its result checked to be one real number."""
    if not callable(loss):
        raise TypeError(
            f"`{name}` must be a function; got {describe(loss)}. Pass the function, not its value."
        )

    def checked(*args: Any) -> jax.Array:
        value = loss(*args)
        if not isinstance(value, (jax.Array, float)):
            raise TypeError(f"`{name}` must return a scalar array; got {describe(value)}.")
        value = jnp.asarray(value)
        if value.ndim != 0:
            raise ValueError(
                f"`{name}` must return a scalar; got shape {value.shape}. Take its mean or its sum."
            )
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(f"`{name}` must be real and floating-point; got {value.dtype}.")
        return value

    return checked
