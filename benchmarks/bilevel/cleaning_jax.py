"""Hyper-cleaning in JAX."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_inverse.low_rank.column_sampling import sample_columns
from lowrank_inverse_jax import hypergradient, minimize_bilevel

jax.config.update("jax_enable_x64", True)


class JaxCleaning:
    """Losses of a softmax regression on weighted examples, and their hypergradient, compiled."""

    def __init__(self, problem: Any, ridge: float) -> None:
        self.num_features = problem.train_x.shape[1]
        train = jnp.asarray(problem.train_x), jnp.asarray(problem.train_y)
        validation = jnp.asarray(problem.validation_x), jnp.asarray(problem.validation_y)

        def cross_entropy(theta: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
            scores = jax.nn.log_softmax(x @ theta)
            return -jnp.take_along_axis(scores, y[:, None], axis=1)[:, 0]

        def inner(theta: jax.Array, w: jax.Array) -> jax.Array:
            return (jax.nn.sigmoid(w) * cross_entropy(theta, *train)).mean()

        def outer(theta: jax.Array, w: jax.Array) -> jax.Array:
            return cross_entropy(theta, *validation).mean()

        @partial(jax.jit, static_argnames="solver")
        def differentiate(theta: jax.Array, w: jax.Array, indices: Any, *, solver: Any) -> Any:
            if indices is not None:
                solver = dataclasses.replace(solver, indices=indices)
            out = hypergradient(inner, outer, theta, w, solver=solver, ridge=ridge, chunk_size=50)
            return out.grads, out.info.num_products

        self._inner = jax.jit(jax.value_and_grad(inner))
        self._outer = jax.jit(outer)
        self._differentiate = differentiate
        self._losses, self._ridge, self._size = (inner, outer), ridge, len(problem.train_x)

    def inner(self, theta: np.ndarray, w: np.ndarray) -> tuple[float, np.ndarray]:
        """Weighted training loss without the ridge, and its gradient."""
        value, gradient = self._inner(theta, w)
        return float(value), np.asarray(gradient)

    def outer(self, theta: np.ndarray) -> float:
        """Validation loss."""
        return float(self._outer(theta, None))

    def hypergradient(
        self, theta: np.ndarray, w: np.ndarray, solver: Any, seed: int
    ) -> tuple[np.ndarray, int]:
        """Differentiate the validation loss by the weights; also the products it took."""
        indices = None
        if getattr(solver, "sampling", "") == "uniform":  # drawn on the host, as torch draws them
            shape = np.broadcast_to(0.0, (theta.size, theta.size))
            indices = sample_columns(shape, solver.rank, rng=seed)
        gradient, num_products = self._differentiate(
            jnp.asarray(theta), jnp.asarray(w), indices, solver=solver
        )
        return np.asarray(gradient), int(num_products)

    def minimum(self) -> Any:
        """Return the result of `minimize_bilevel`, from zero."""
        start = jnp.zeros((self.num_features, 10)), jnp.zeros(self._size)
        return minimize_bilevel(*self._losses, *start, ridge=self._ridge)
