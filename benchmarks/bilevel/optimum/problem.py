"""Bilevel problems whose losses are means over examples, in JAX."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_inverse.bilevel.evaluation import Evaluator
from lowrank_inverse_jax.bilevel.problem import Problem
from lowrank_inverse_jax.parameters import as_parameters

BATCH = 64

Loss = Callable[..., jax.Array]


class Bilevel(NamedTuple):
    """Hyperparameters w of a fit with parameters z.

    Attributes
    ----------
    inner, outer : callable (z, w, *rows) -> scalar
        Mean losses of some examples.
    rows, outer_rows : tuples of arrays
        All examples of each.
    start : tuple of arrays
        Where w and z begin.
    ridge : float
        The inner loss has ``ridge / 2 |z|^2`` besides.
    each : bool
        Whether the inner loss of example i depends on ``w[i]`` alone, and the outer loss on none.
    bounds : pair of float
        Of w.
    """

    inner: Loss
    outer: Loss
    rows: tuple[jax.Array, ...]
    outer_rows: tuple[jax.Array, ...]
    start: tuple[jax.Array, jax.Array]
    ridge: float
    each: bool = False
    bounds: tuple[float, float] = (-np.inf, np.inf)

    @property
    def num_batches(self) -> tuple[int, int]:
        """Batches of the inner and of the outer loss; the last one overlaps."""
        return -(-len(self.rows[0]) // BATCH), -(-len(self.outer_rows[0]) // BATCH)

    def compiled(self) -> Problem:
        """Return what `minimize_bilevel` makes of it."""
        w, z = map(as_parameters, self.start)
        options = {"ridge": self.ridge, "solver": None, "rng": 0, "chunk_size": 1}
        args = self.rows, self.outer_rows
        return Problem((self.inner, self.outer), args, z, w, **options)

    def values(self, weights: list[np.ndarray]) -> list[float]:
        """Return the outer loss at the exact inner minimum of each of several w."""
        evaluate = Evaluator(self.compiled(), None, 1000, 0)
        evaluate.progress = 1e-2  # tolerances of 1e-4, whose error is taken off to first order
        values = []
        for each in weights:
            finite = np.all(np.isfinite(each))
            found = evaluate(np.asarray(each, np.float64))[0].value if finite else np.nan
            values.append(float(found))
        return values


def split(num_train: int, x: np.ndarray, y: np.ndarray) -> list[tuple[jax.Array, jax.Array]]:
    """Return the examples of the inner loss, and the others for the outer one."""
    parts = slice(num_train), slice(num_train, None)
    return [(jnp.asarray(x[part]), jnp.asarray(y[part])) for part in parts]
