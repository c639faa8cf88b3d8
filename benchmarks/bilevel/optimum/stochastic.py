"""Stochastic bilevel solvers of the literature, each written from its paper.

A step is a pure function of a state and a key; hyperparameters w, parameters z, and v, the solution
of ``H v = (gradient of the outer loss by z)``. Batches have 64 examples.

- StocBiO: K. Ji, J. Yang, Y. Liang. Bilevel Optimization: Convergence Analysis and Enhanced
  Design. ICML 2021.
- AmIGO: M. Arbel, J. Mairal. Amortized Implicit Differentiation for Stochastic Bilevel
  Optimization. ICLR 2022.
- SOBA, SABA: M. Dagréou, P. Ablin, S. Vaiter, T. Moreau. A Framework for Bilevel Optimization That
  Enables Stochastic and Global Variance Reduction Algorithms. NeurIPS 2022.
- F2SA: J. Kwon, D. Kwon, S. Wright, R. Nowak. A Fully First-Order Method for Stochastic Bilevel
  Optimization. ICML 2023.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.bilevel.optimum.oracle import Oracle, draw
from benchmarks.bilevel.optimum.problem import BATCH, Bilevel

STEPS = 10
"""Of the inner problem and of the linear system, where there are several to an outer step."""

State = Any
Solver = tuple[State, Callable[[State, Any], State], float]
"""What begins, takes a step, and how many batches that reads."""


def stocbio(problem: Bilevel, rate: float, outer_rate: float) -> Solver:
    """Inner steps, a Neumann series with a fresh batch in each term, an outer step."""

    def step(state: State, key: Any) -> State:
        w, z = state
        keys = jax.random.split(key, 2 * STEPS + 1)
        z = _trained(problem, rate, w, z, keys)
        last = draw(problem, keys[-1])
        b, direct = last.outer_gradients(z, w)

        def term(t: Any, carry: Any) -> Any:
            power, total = carry
            power = power - rate * draw(problem, keys[STEPS + t]).product(z, w, power)
            return power, total + power

        v = rate * jax.lax.fori_loop(0, STEPS, term, (b, b))[1]
        return last.add(w, -outer_rate * (direct - last.along(z, w, v))), z

    return problem.start, step, STEPS + 2 * STEPS + 3


def amigo(problem: Bilevel, rate: float, outer_rate: float) -> Solver:
    """Inner steps, steps on the linear system from where it was last, an outer step."""
    w, z = problem.start

    def step(state: State, key: Any) -> State:
        w, z, v = state
        keys = jax.random.split(key, 2 * STEPS + 1)
        z = _trained(problem, rate, w, z, keys)
        last = draw(problem, keys[-1])
        b, direct = last.outer_gradients(z, w)
        v = jax.lax.fori_loop(
            *(0, STEPS),
            lambda t, v: v - rate * (draw(problem, keys[STEPS + t]).product(z, w, v) - b),
            v,
        )
        return last.add(w, -outer_rate * (direct - last.along(z, w, v))), z, v

    return (w, z, jnp.zeros_like(z)), step, STEPS + 2 * STEPS + 3


def _trained(problem: Bilevel, rate: float, w: jax.Array, z: jax.Array, keys: Any) -> jax.Array:
    """Take the inner steps."""
    return jax.lax.fori_loop(
        *(0, STEPS),
        lambda t, z: z - rate * draw(problem, keys[t]).gradient(z, w),
        z,
    )


def soba(problem: Bilevel, rate: float, outer_rate: float) -> Solver:
    """One step of all three at once."""
    w, z = problem.start

    def step(state: State, key: Any) -> State:
        w, z, v = state
        batch = draw(problem, key)
        b, direct = batch.outer_gradients(z, w)
        change = direct - batch.along(z, w, v)
        return (
            batch.add(w, -outer_rate * change),
            z - rate * batch.gradient(z, w),
            v - rate * (batch.product(z, w, v) - b),
        )

    return (w, z, jnp.zeros_like(z)), step, 5


def saba(problem: Bilevel, rate: float, outer_rate: float) -> Solver:
    """SOBA with the variance reduction of SAGA: a table of the latest of each batch."""
    w, z = problem.start
    inner, outer = problem.num_batches

    def table(count: int, like: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros((count, like.size)), jnp.zeros_like(like)

    def reduced(table: Any, which: Any, new: jax.Array) -> tuple[Any, jax.Array]:
        rows, mean = table
        old, count = rows[which], rows.shape[0]
        direction = new - old + mean
        return (rows.at[which].set(new), mean + (new - old) / count), direction

    def outer_step(w: jax.Array, batch: Oracle, tables: Any, slope: Any, direct: Any) -> Any:
        if not problem.each:
            slopes, directs = tables
            slopes, along = reduced(slopes, batch.which, slope)
            directs, other = reduced(directs, batch.outer_which, direct)
            return batch.add(w, outer_rate * (along - other)), (slopes, directs)
        slopes, mean = tables
        change = slope - slopes[batch.which]
        w = batch.add(w + outer_rate * mean, outer_rate * change)
        mean = batch.add(mean, change * BATCH / w.size)
        return w, (slopes.at[batch.which].set(slope), mean)

    def step(state: State, key: Any) -> State:
        w, z, v, (first, second, third), tables = state
        batch = draw(problem, key)
        b, direct = batch.outer_gradients(z, w)
        first, along_z = reduced(first, batch.which, batch.gradient(z, w))
        second, product = reduced(second, batch.which, batch.product(z, w, v))
        third, b = reduced(third, batch.outer_which, b)
        w, tables = outer_step(w, batch, tables, batch.along(z, w, v), direct)
        return w, z - rate * along_z, v - rate * (product - b), (first, second, third), tables

    if problem.each:
        tables = jnp.zeros((inner, BATCH)), jnp.zeros_like(w)
    else:
        tables = table(inner, w), table(outer, w)
    kept = table(inner, z), table(inner, z), table(outer, z)
    return (w, z, jnp.zeros_like(z), kept, tables), step, 5


def f2sa(problem: Bilevel, rate: float, outer_rate: float) -> Solver:
    """First derivatives alone: a penalty whose weight grows as the cube root of the steps."""
    w, z = problem.start

    def step(state: State, key: Any) -> State:
        w, z, y, t = state
        batch = draw(problem, key)
        weight = 1 + 0.1 * t ** (1 / 3)
        z = z - rate * batch.gradient(z, w)
        b, _ = batch.outer_gradients(y, w)
        y = y - rate * (b / weight + batch.gradient(y, w))
        _, direct = batch.outer_gradients(y, w)
        change = direct + weight * (batch.slope(y, w) - batch.slope(z, w))
        return batch.add(w, -outer_rate * change), z, y, t + 1

    return (w, z, z, jnp.zeros(())), step, 4
