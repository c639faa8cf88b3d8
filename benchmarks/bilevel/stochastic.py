"""Bilevel solvers of the literature on data cleaning, each written from its paper.

A step is a pure function of a state and a key; weights w, parameters z, and v, the solution of
``H v = (gradient of the outer loss)``. Batches have 64 examples.

- StocBiO: K. Ji, J. Yang, Y. Liang. Bilevel Optimization: Convergence Analysis and Enhanced
  Design. ICML 2021.
- AmIGO: M. Arbel, J. Mairal. Amortized Implicit Differentiation for Stochastic Bilevel
  Optimization. ICLR 2022.
- SOBA, SABA: M. Dagréou, P. Ablin, S. Vaiter, T. Moreau. A Framework for Bilevel Optimization That
  Enables Stochastic and Global Variance Reduction Algorithms. NeurIPS 2022.
- F2SA: J. Kwon, D. Kwon, S. Wright, R. Nowak. A Fully First-Order Method for Stochastic Bilevel
  Optimization. ICML 2023.
- SubBiO: Y. Gao, B. Yang, Y. Yuan. LancBiO: Dynamic Lanczos-Aided Bilevel Optimization via Krylov
  Subspace. ICLR 2025.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.bilevel.mnist_cleaning import BATCH, RIDGE, Cleaning, losses

STEPS = 10
"""Of the inner problem and of the linear system, where there are several to an outer step."""

State = Any


class Batch:
    """Derivatives of both losses on one batch of each."""

    def __init__(self, data: Cleaning, key: Any) -> None:
        first, second = jax.random.split(key)
        inner, outer = data.num_blocks
        self.which = jax.random.randint(first, (), 0, inner)
        self.outer_which = jax.random.randint(second, (), 0, outer)
        self.at, self.x, self.y = data.block(self.which)
        self.outer_x, self.outer_y = data.outer_block(self.outer_which)

    def weights(self, w: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(w, self.at, BATCH)

    def gradient(self, z: jax.Array, w: jax.Array) -> jax.Array:
        """Of the inner loss by the parameters."""
        scale = jax.nn.sigmoid(self.weights(w))
        return jax.grad(lambda z: (scale * losses(z, self.x, self.y)).mean())(z) + RIDGE * z

    def product(self, z: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
        """Of the Hessian of the inner loss with v."""
        return jax.jvp(lambda z: self.gradient(z, w), (z,), (v,))[1]

    def cross(self, z: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
        """Derivative of ``<v, gradient>`` by the weights of the batch."""
        slopes = jax.jvp(lambda z: losses(z, self.x, self.y), (z,), (v,))[1]
        s = jax.nn.sigmoid(self.weights(w))
        return s * (1 - s) * slopes / BATCH

    def outer_gradient(self, z: jax.Array) -> jax.Array:
        return jax.grad(lambda z: losses(z, self.outer_x, self.outer_y).mean())(z)

    def add(self, w: jax.Array, change: jax.Array) -> jax.Array:
        """Add to the weights of the batch."""
        return jax.lax.dynamic_update_slice_in_dim(w, self.weights(w) + change, self.at, 0)


def stocbio(data: Cleaning, rate: float, outer_rate: float) -> tuple[State, Callable, float]:
    """Inner steps, a Neumann series with a fresh batch in each term, an outer step."""
    w, z = data.start

    def step(state: State, key: Any) -> State:
        w, z = state
        keys = jax.random.split(key, 2 * STEPS + 1)
        z = jax.lax.fori_loop(
            *(0, STEPS),
            lambda t, z: z - rate * Batch(data, keys[t]).gradient(z, w),
            z,
        )
        last = Batch(data, keys[-1])
        b = last.outer_gradient(z)

        def term(t: Any, carry: Any) -> Any:
            power, total = carry
            power = power - rate * Batch(data, keys[STEPS + t]).product(z, w, power)
            return power, total + power

        v = rate * jax.lax.fori_loop(0, STEPS, term, (b, b))[1]
        return last.add(w, outer_rate * last.cross(z, w, v)), z

    return (w, z), step, STEPS + 2 * STEPS + 3


def amigo(data: Cleaning, rate: float, outer_rate: float) -> tuple[State, Callable, float]:
    """Inner steps, steps on the linear system from where it was last, an outer step."""
    w, z = data.start

    def step(state: State, key: Any) -> State:
        w, z, v = state
        keys = jax.random.split(key, 2 * STEPS + 1)
        z = jax.lax.fori_loop(
            *(0, STEPS),
            lambda t, z: z - rate * Batch(data, keys[t]).gradient(z, w),
            z,
        )
        last = Batch(data, keys[-1])
        b = last.outer_gradient(z)
        v = jax.lax.fori_loop(
            *(0, STEPS),
            lambda t, v: v - rate * (Batch(data, keys[STEPS + t]).product(z, w, v) - b),
            v,
        )
        return last.add(w, outer_rate * last.cross(z, w, v)), z, v

    return (w, z, jnp.zeros_like(z)), step, STEPS + 2 * STEPS + 3


def soba(data: Cleaning, rate: float, outer_rate: float) -> tuple[State, Callable, float]:
    """One step of all three at once."""
    w, z = data.start

    def step(state: State, key: Any) -> State:
        w, z, v = state
        batch = Batch(data, key)
        change = batch.cross(z, w, v)
        along = batch.product(z, w, v) - batch.outer_gradient(z)
        return (
            batch.add(w, outer_rate * change),
            z - rate * batch.gradient(z, w),
            v - rate * along,
        )

    return (w, z, jnp.zeros_like(z)), step, 5


def saba(data: Cleaning, rate: float, outer_rate: float) -> tuple[State, Callable, float]:
    """SOBA with the variance reduction of SAGA: a table of the latest of each batch."""
    w, z = data.start
    inner, outer = data.num_blocks
    n = len(data.x)
    tables = (
        (jnp.zeros((inner, z.size)), jnp.zeros(z.size)),
        (jnp.zeros((inner, z.size)), jnp.zeros(z.size)),
        (jnp.zeros((outer, z.size)), jnp.zeros(z.size)),
    )

    def reduced(table: Any, which: Any, new: jax.Array) -> tuple[Any, jax.Array]:
        rows, mean = table
        old, count = rows[which], rows.shape[0]
        direction = new - old + mean
        return (rows.at[which].set(new), mean + (new - old) / count), direction

    def step(state: State, key: Any) -> State:
        w, z, v, (first, second, third), (slopes, mean) = state
        batch = Batch(data, key)
        first, along_z = reduced(first, batch.which, batch.gradient(z, w))
        second, product = reduced(second, batch.which, batch.product(z, w, v))
        third, b = reduced(third, batch.outer_which, batch.outer_gradient(z))
        new, old = batch.cross(z, w, v), slopes[batch.which]
        w = batch.add(w + outer_rate * mean, outer_rate * (new - old))
        mean = batch.add(mean, (new - old) * BATCH / n)
        kept = slopes.at[batch.which].set(new), mean
        return w, z - rate * along_z, v - rate * (product - b), (first, second, third), kept

    kept = jnp.zeros((inner, BATCH)), jnp.zeros(n)
    return (w, z, jnp.zeros_like(z), tables, kept), step, 5


def f2sa(data: Cleaning, rate: float, outer_rate: float) -> tuple[State, Callable, float]:
    """First derivatives alone: a penalty whose weight grows as the cube root of the steps."""
    w, z = data.start

    def step(state: State, key: Any) -> State:
        w, z, y, t = state
        batch = Batch(data, key)
        weight = 1 + 0.1 * t ** (1 / 3)
        z = z - rate * batch.gradient(z, w)
        y = y - rate * (batch.outer_gradient(y) / weight + batch.gradient(y, w))
        s = jax.nn.sigmoid(batch.weights(w))
        apart = losses(y, batch.x, batch.y) - losses(z, batch.x, batch.y)
        change = weight * s * (1 - s) * apart / BATCH
        return batch.add(w, -outer_rate * change), z, y, t + 1

    return (w, z, z, jnp.zeros(())), step, 4


def subbio(data: Cleaning, rate: float, outer_rate: float) -> tuple[State, Callable, float]:
    """Whole gradients; the linear system in the space of b and ``v - rate * H v``."""
    w, z = data.start

    def step(state: State, key: Any) -> State:
        w, z, v = state

        def inner(z: jax.Array, w: jax.Array) -> jax.Array:
            loss = (jax.nn.sigmoid(w) * losses(z, data.x, data.y)).mean()
            return loss + RIDGE / 2 * z @ z

        gradient = jax.grad(inner)
        z = jax.lax.fori_loop(0, 2, lambda _, z: z - rate * gradient(z, w), z)
        product = jax.linearize(lambda z: gradient(z, w), z)[1]
        b = jax.grad(lambda z: losses(z, data.outer_x, data.outer_y).mean())(z)
        q = b / jnp.linalg.norm(b)
        p = v - rate * product(v)
        p = p - (q @ p) * q
        length = jnp.linalg.norm(p)
        p = jnp.where(length > 0, p / jnp.where(length > 0, length, 1), 0)
        S = jnp.stack([q, p], axis=1)
        T = S.T @ jnp.stack([product(q), product(p)], axis=1)
        T = jnp.where(length > 0, T, T + jnp.diag(jnp.array([0.0, 1.0])))
        v = S @ jnp.linalg.solve(T, S.T @ b)
        slopes = jax.jvp(lambda z: losses(z, data.x, data.y), (z,), (v,))[1]
        s = jax.nn.sigmoid(w)
        return w + outer_rate * s * (1 - s) * slopes / len(data.x), z, v

    passes = (2 + 2 * 3 + 2) * len(data.x) / BATCH
    return (w, z, jnp.zeros_like(z)), step, passes


METHODS: dict[str, Callable[..., tuple[State, Callable, float]]] = {
    "StocBiO": stocbio,
    "AmIGO": amigo,
    "SOBA": soba,
    "SABA": saba,
    "F2SA": f2sa,
    "SubBiO": subbio,
}
"""What begins, takes a step, and how many batches that reads."""
