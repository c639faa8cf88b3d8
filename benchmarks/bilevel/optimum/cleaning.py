"""MNIST data cleaning as benchopt's benchmark_bilevel states it.

Pixels are standardised; of 20 000 training labels a part is drawn anew, 5 000 others are kept for
the outer loss. The inner loss is the mean of ``sigmoid(w_i)`` times the cross-entropy of example i,
plus ``.2 |z|^2``; w begins at -2 and z at 0.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.bilevel.optimum.problem import Bilevel, split
from benchmarks.data.mnist import load_mnist

RIDGE = 0.4
"""``.2 |z|^2`` is ``RIDGE / 2 |z|^2``."""
NUM_CLASSES = 10
START = -2.0


def load(data_dir: str, ratio: float, num_train: int, seed: int) -> Bilevel:
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
    start = (
        jnp.full(num_train, START, x.dtype),
        jnp.zeros(x.shape[1] * NUM_CLASSES, x.dtype),
    )
    return Bilevel(weighted, plain, *split(num_train, x, y), start, RIDGE, each=True)


def losses(z: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the cross-entropy of each example."""
    scores = x @ z.reshape(-1, NUM_CLASSES)
    chosen = jnp.take_along_axis(scores, y[:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(scores, axis=1) - chosen


def weighted(z: jax.Array, w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the inner loss without its ridge."""
    return (jax.nn.sigmoid(w) * losses(z, x, y)).mean()


def plain(z: jax.Array, w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Return the outer loss."""
    return losses(z, x, y).mean()
