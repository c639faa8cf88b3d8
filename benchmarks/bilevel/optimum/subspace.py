"""SubBiO and LancBiO: the linear system in a small subspace, on whole gradients.

Y. Gao, B. Yang, Y. Yuan. LancBiO: Dynamic Lanczos-aided Bilevel Optimization via Krylov Subspace.
ICLR 2025.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.bilevel.optimum.oracle import Oracle
from benchmarks.bilevel.optimum.problem import BATCH, Bilevel
from benchmarks.bilevel.optimum.stochastic import Solver, State

INNER_STEPS = 2
DIMENSION = 10
"""Of LancBiO's subspace, when it begins anew."""


def subbio(problem: Bilevel, rate: float, outer_rate: float) -> Solver:
    """The linear system in the space of b and ``v - rate * H v``."""
    w, z = problem.start
    whole = Oracle(problem)

    def step(state: State, key: Any) -> State:
        w, z, v = state
        z = _trained(whole, rate, w, z)
        product = jax.linearize(lambda z: whole.gradient(z, w), z)[1]
        b, direct = whole.outer_gradients(z, w)
        q = _unit(b)
        p = v - rate * product(v)
        p = _unit(p - (q @ p) * q)
        S = jnp.stack([q, p], axis=1)
        T = S.T @ jnp.stack([product(q), product(p)], axis=1)
        T = jnp.where(p.any(), T, T + jnp.diag(jnp.array([0.0, 1.0])))
        v = S @ jnp.linalg.solve(T, S.T @ b)
        return whole.add(w, -outer_rate * (direct - whole.along(z, w, v))), z, v

    return (w, z, jnp.zeros_like(z)), step, _batches(problem, 3)


def lancbio(problem: Bilevel, rate: float, outer_rate: float) -> Solver:
    """One Lanczos step for each outer step, while the Hessian changes with them.

    The residual of v when the subspace was begun is what the system in it is solved for.
    """
    w, z = problem.start
    whole = Oracle(problem)

    def begun(v: jax.Array, b: jax.Array, product: Any) -> State:
        image = product(v)
        Q = jnp.zeros((z.size, DIMENSION)).at[:, 0].set(_unit(b - image))
        return v, image, Q, jnp.eye(DIMENSION), jnp.zeros(())

    def step(state: State, key: Any) -> State:
        w, z, v, krylov, j = state
        z = _trained(whole, rate, w, z)
        product = jax.linearize(lambda z: whole.gradient(z, w), z)[1]
        b, direct = whole.outer_gradients(z, w)
        base, image, Q, T, beta = jax.lax.cond(j == 0, lambda: begun(v, b, product), lambda: krylov)
        q = Q[:, j]
        u = product(q) - beta * Q[:, j - 1]  # beta is 0 where there is no column before
        alpha = jnp.where(q.any(), q @ u, 1)  # or the subspace was invariant
        T = T.at[j, j].set(alpha).at[j, j - 1].set(beta).at[j - 1, j].set(beta)
        v = base + Q @ jnp.linalg.solve(T, Q.T @ (b - image))  # columns to come are 0
        u = u - alpha * q
        Q, beta = Q.at[:, j + 1].set(_unit(u), mode="drop"), jnp.linalg.norm(u)
        w = whole.add(w, -outer_rate * (direct - whole.along(z, w, v)))
        return w, z, v, (base, image, Q, T, beta), (j + 1) % DIMENSION

    zero = jnp.zeros_like(z)
    start = w, z, zero, begun(zero, zero, lambda v: v), jnp.zeros((), int)
    return start, step, _batches(problem, 1 + 1 / DIMENSION)


def _trained(whole: Oracle, rate: float, w: jax.Array, z: jax.Array) -> jax.Array:
    """Take the inner steps."""
    return jax.lax.fori_loop(0, INNER_STEPS, lambda _, z: z - rate * whole.gradient(z, w), z)


def _unit(x: jax.Array) -> jax.Array:
    """Return x with the norm 1, and 0 as it is."""
    length = jnp.linalg.norm(x)
    return x / jnp.where(length > 0, length, 1)


def _batches(problem: Bilevel, products: float) -> float:
    """Return what a step reads: inner gradients, products, and the derivative along v."""
    return (INNER_STEPS + 2 * products + 2) * len(problem.rows[0]) / BATCH
