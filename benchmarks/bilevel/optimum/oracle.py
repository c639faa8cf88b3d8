"""Derivatives of a bilevel problem on a batch, or on all examples."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.bilevel.optimum.problem import BATCH, Bilevel


class Oracle:
    """Derivatives of both losses on some examples of each, of all unless told which batches."""

    def __init__(self, problem: Bilevel, which: Any = None, outer_which: Any = None) -> None:
        self.problem, self.which, self.outer_which = problem, which, outer_which
        self._at, self._size, self._rows = _block(problem.rows, which)
        _, _, self._outer_rows = _block(problem.outer_rows, outer_which)

    def _part(self, w: jax.Array) -> jax.Array:
        """Return what the examples depend on."""
        if not self.problem.each:
            return w
        return jax.lax.dynamic_slice_in_dim(w, self._at, self._size)

    def _inner(self, z: jax.Array, part: jax.Array) -> jax.Array:
        return self.problem.inner(z, part, *self._rows) + self.problem.ridge / 2 * z @ z

    def gradient(self, z: jax.Array, w: jax.Array) -> jax.Array:
        """Of the inner loss by z."""
        return jax.grad(self._inner)(z, self._part(w))

    def product(self, z: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
        """Of the Hessian of the inner loss with v."""
        return jax.jvp(lambda z: self.gradient(z, w), (z,), (v,))[1]

    def along(self, z: jax.Array, w: jax.Array, v: jax.Array) -> jax.Array:
        """Derivative of ``<v, gradient>`` by the hyperparameters of the examples."""

        def slope(part: jax.Array) -> jax.Array:
            return jax.jvp(lambda z: self._inner(z, part), (z,), (v,))[1]

        return jax.grad(slope)(self._part(w))

    def slope(self, z: jax.Array, w: jax.Array) -> jax.Array:
        """Of the inner loss by the hyperparameters of the examples."""
        return jax.grad(self._inner, argnums=1)(z, self._part(w))

    def outer_gradients(self, z: jax.Array, w: jax.Array) -> tuple[jax.Array, Any]:
        """Of the outer loss by z, and by w."""
        if self.problem.each:
            return jax.grad(self.problem.outer)(z, w, *self._outer_rows), 0.0
        return jax.grad(self.problem.outer, argnums=(0, 1))(z, w, *self._outer_rows)

    def add(self, w: jax.Array, change: jax.Array) -> jax.Array:
        """Add to the hyperparameters of the examples, within the bounds."""
        if not self.problem.each:
            return jnp.clip(w + change, *self.problem.bounds)
        return jax.lax.dynamic_update_slice_in_dim(w, self._part(w) + change, self._at, 0)


def draw(problem: Bilevel, key: Any) -> Oracle:
    """Return the derivatives on a random batch of each loss."""
    keys, counts = jax.random.split(key), problem.num_batches
    return Oracle(
        problem, *(jax.random.randint(k, (), 0, n) for k, n in zip(keys, counts, strict=True))
    )


def _block(rows: tuple[jax.Array, ...], which: Any) -> tuple[Any, int, tuple[jax.Array, ...]]:
    """Return where a batch begins, its size and its examples."""
    n = len(rows[0])
    if which is None:
        return 0, n, rows
    at = jnp.minimum(which * BATCH, n - BATCH)
    return at, BATCH, tuple(jax.lax.dynamic_slice_in_dim(a, at, BATCH) for a in rows)
