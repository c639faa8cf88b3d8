"""MNIST data cleaning as benchopt's benchmark_bilevel states it, in JAX.

Pixels are standardised; of 20 000 training labels a part is drawn anew, 5 000 others are kept for
the outer loss. The inner loss is the mean of ``sigmoid(x_i)`` times the cross-entropy of example i,
plus ``.2 |z|^2``; x begins at -2 and z at 0.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.data.mnist import load_mnist
from lowrank_inverse.bilevel.evaluation import Evaluator
from lowrank_inverse_jax.bilevel.problem import Problem
from lowrank_inverse_jax.parameters import as_parameters

RIDGE = 0.4
"""``.2 |z|^2`` is ``RIDGE / 2 |z|^2``."""
NUM_CLASSES = 10
START = -2.0
BATCH = 64


class Cleaning(NamedTuple):
    """The examples: of the inner loss, and of the outer one."""

    x: jax.Array
    y: jax.Array
    outer_x: jax.Array
    outer_y: jax.Array

    @property
    def start(self) -> tuple[jax.Array, jax.Array]:
        """Where weights and parameters begin."""
        return (
            jnp.full(len(self.x), START, self.x.dtype),
            jnp.zeros(self.x.shape[1] * NUM_CLASSES, self.x.dtype),
        )

    def block(self, which: Any) -> tuple[Any, jax.Array, jax.Array]:
        """Return where a batch of the inner loss begins, and its examples."""
        at = jnp.minimum(which * BATCH, len(self.x) - BATCH)
        return at, *(jax.lax.dynamic_slice_in_dim(a, at, BATCH) for a in (self.x, self.y))

    def outer_block(self, which: Any) -> tuple[jax.Array, jax.Array]:
        """Return the examples of a batch of the outer loss."""
        at = jnp.minimum(which * BATCH, len(self.outer_x) - BATCH)
        return tuple(
            jax.lax.dynamic_slice_in_dim(a, at, BATCH) for a in (self.outer_x, self.outer_y)
        )

    @property
    def num_blocks(self) -> tuple[int, int]:
        """Batches of the inner and of the outer loss."""
        return -(-len(self.x) // BATCH), -(-len(self.outer_x) // BATCH)


def load_cleaning(data_dir: str, ratio: float, num_train: int, seed: int) -> Cleaning:
    """Draw the examples, a quarter as many for the outer loss, and the labels that are wrong."""
    images, labels, _, _ = load_mnist(Path(data_dir))
    rng = np.random.default_rng(seed)
    count = num_train + num_train // 4
    chosen = rng.permutation(len(images))[:count]
    x, y = images[chosen], labels[chosen].astype(np.int32)
    deviation = x[:num_train].std(axis=0)
    x = (x - x[:num_train].mean(axis=0)) / np.where(deviation > 0, deviation, 1)
    anew = rng.random(num_train) < ratio
    y[:num_train][anew] = rng.integers(0, NUM_CLASSES, int(anew.sum()))
    parts = x[:num_train], y[:num_train], x[num_train:], y[num_train:]
    return Cleaning(*map(jnp.asarray, parts))


def losses(z: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the cross-entropy of each example."""
    scores = x @ z.reshape(-1, NUM_CLASSES)
    chosen = jnp.take_along_axis(scores, y[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(scores, axis=1) - chosen


def inner_loss(z: jax.Array, w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the inner loss without its ridge."""
    return (jax.nn.sigmoid(w) * losses(z, x, y)).mean()


def outer_loss(z: jax.Array, w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the outer loss."""
    return losses(z, x, y).mean()


def problem(cleaning: Cleaning) -> Problem:
    """Return what `minimize_bilevel` makes of it."""
    w, z = map(as_parameters, cleaning.start)
    options = {"ridge": RIDGE, "solver": None, "rng": 0, "chunk_size": 1}
    args = tuple(cleaning[:2]), tuple(cleaning[2:])
    return Problem((inner_loss, outer_loss), args, z, w, **options)


def outer_values(cleaning: Cleaning, weights: list[np.ndarray]) -> list[float]:
    """Return the outer loss at the exact inner minimum of each of several weights."""
    evaluate = Evaluator(problem(cleaning), None, 1000, 0)
    evaluate.progress = 1e-2  # tolerances of 1e-4, whose error is taken off to first order
    values = []
    for each in weights:
        if not np.all(np.isfinite(each)):
            values.append(float("nan"))
            continue
        values.append(evaluate(np.asarray(each, np.float64))[0].value)
    return values
