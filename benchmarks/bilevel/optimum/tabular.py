"""Two problems on tables: a penalty for each feature, and a quadratic."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.datasets import make_classification

from benchmarks.bilevel.optimum.problem import Bilevel, split

NUM_TRAIN = 4096
NUM_FEATURES, INFORMATIVE = 100, 20
BOUNDS, START = (-10.0, 1.0), -4.0
CONDITION, OUTER_RIDGE = 10.0, 0.1


def penalties(num_train: int, seed: int) -> Bilevel:
    """Return logistic regression with the penalty ``exp(w_j) / 2 z_j^2`` on feature j."""
    x, y = make_classification(
        num_train + num_train // 4,
        NUM_FEATURES,
        n_informative=INFORMATIVE,
        n_redundant=0,
        class_sep=0.5,
        random_state=seed,
    )
    x = (x - x[:num_train].mean(axis=0)) / x[:num_train].std(axis=0)

    def outer(z: jax.Array, w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return jax.nn.softplus(-y * (x @ z)).mean()

    def inner(z: jax.Array, w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return outer(z, w, x, y) + jnp.exp(w) @ z**2 / 2

    rows = split(num_train, x.astype(np.float32), (2 * y - 1).astype(np.float32))
    start = jnp.full(NUM_FEATURES, START, "float32"), jnp.zeros(NUM_FEATURES)
    return Bilevel(inner, outer, *rows, start, 0.0, bounds=BOUNDS)


def quadratic(num_train: int, seed: int) -> Bilevel:
    """Return least squares on targets that w moves.

    The inner loss is the mean of ``(x_i . (z - B w) - y_i)^2 / 2``, the outer one that of
    ``(x_i . z - y_i)^2 / 2`` and a ridge on w. Both Hessians have a condition of about 10, as the
    quadratics of benchmark_bilevel.
    """
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((num_train + num_train // 4, NUM_FEATURES))
    x = x * np.geomspace(1, CONDITION**-0.5, NUM_FEATURES)
    B = jnp.asarray(rng.standard_normal((NUM_FEATURES,) * 2) / NUM_FEATURES**0.5, "float32")
    y = x @ rng.standard_normal(NUM_FEATURES) + rng.standard_normal(len(x))

    def inner(z: jax.Array, w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return ((x @ (z - B @ w) - y) ** 2).mean() / 2

    def outer(z: jax.Array, w: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
        return ((x @ z - y) ** 2).mean() / 2 + OUTER_RIDGE / 2 * w @ w

    rows = split(num_train, x.astype(np.float32), y.astype(np.float32))
    start = jnp.zeros(NUM_FEATURES), jnp.zeros(NUM_FEATURES)
    return Bilevel(inner, outer, *rows, start, 0.0)
