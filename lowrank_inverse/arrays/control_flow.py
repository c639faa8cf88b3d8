"""Loops, eager or traced, and the silence of floating-point warnings."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, TypeVar

import numpy as np

from lowrank_inverse.arrays.conversion import is_traced

F = TypeVar("F", bound=Callable[..., Any])


def quietly(function: F) -> F:
    """Compute in `full_precision` and without NumPy's floating-point warnings.

    What goes wrong is a field of the result.
    """

    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"), full_precision():
            return function(*args, **kwargs)

    return wrapped  # type: ignore[return-value]


def full_precision() -> AbstractContextManager[Any]:
    """Return a context in which jax multiplies matrices in the precision of their entries.

    By default it takes TF32, with 10 bits, for float32 on a GPU.
    """
    jax = sys.modules.get("jax")
    return nullcontext() if jax is None else jax.default_matmul_precision("highest")


State = TypeVar("State", bound=tuple[Any, ...])


def while_loop(
    cond: Callable[[State], Any],
    body: Callable[[State], State],
    state: State,
    *,
    check_every: int = 1,
) -> State:
    """Repeat ``state = body(state)`` while ``cond(state)``, as ``jax.lax.while_loop`` does.

    A Python loop for concrete arrays: compiling a loop at each eager call would cost more than
    the solve. From where a part of the state is traced, ``jax.lax.while_loop`` itself.

    Reading `cond` makes the host wait for an accelerator. The Python loop reads it before every
    `check_every`-th repetition, so that `body` may be called up to ``check_every - 1`` times more.
    """
    while True:
        unfinished = cond(state)
        if is_traced(unfinished) or any(is_traced(leaf) for leaf in state):
            result: State = sys.modules["jax"].lax.while_loop(cond, body, state)
            return result
        if not bool(unfinished):
            return state
        for _ in range(check_every):
            state = body(state)


def cond(predicate: Any, on_true: Callable[[], Any], on_false: Callable[[], Any]) -> Any:
    """Return what one of two functions returns, as ``jax.lax.cond``, for a traced `predicate`."""
    return sys.modules["jax"].lax.cond(predicate, on_true, on_false)


def map_traced(function: Callable[[Any], Any], values: Any) -> Any:
    """Return what a function returns for each of `values`, as ``jax.lax.map``, while tracing.

    A derivative evaluates the function again, and holds nothing inside it.
    """
    jax = sys.modules["jax"]
    return jax.lax.map(jax.checkpoint(function), values)
