"""Columns drawn from a jax PRNG key."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_inverse._typing import RNG, SolveFunction, Solver
from lowrank_inverse.arrays.checks import describe
from lowrank_inverse.solvers.low_rank import Nystrom
from lowrank_inverse.solvers.preconditioned import NystromCG


def with_drawn_columns(solver: Solver | SolveFunction, key: Any, rng: RNG, n: int) -> Any:
    """Return the settings with `rank` columns drawn uniformly from a jax key."""
    if rng is not None:
        raise ValueError("pass one of `key` and `rng`, not both.")
    if not isinstance(solver, (Nystrom, NystromCG)):
        raise TypeError(f"`key` needs Nystrom or NystromCG settings; got {describe(solver)}.")
    if solver.indices is not None:
        return solver
    if solver.sampling not in ("auto", "uniform"):
        raise ValueError(
            f"`key` draws columns uniformly; got sampling={solver.sampling!r}. Choose them outside "
            "and pass `indices` in the settings."
        )
    if isinstance(solver.rank, str):
        raise ValueError(
            f"`key` needs a fixed number of columns; got rank={solver.rank!r}. Compute the rank "
            "outside, or use `rng`."
        )
    _check_key(key)
    drawn = jax.random.choice(key, n, (min(solver.rank, n),), replace=False)
    return dataclasses.replace(solver, indices=drawn)


def _check_key(key: Any) -> None:
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    raw = isinstance(key, (jax.Array, np.ndarray)) and key.dtype == jnp.uint32
    if not (typed and key.ndim == 0) and not (raw and key.ndim == 1):
        raise TypeError(
            f"`key` must be one PRNG key, such as jax.random.key(0); got {describe(key)}. Pass a "
            "seed as `rng`, and several keys by jax.vmap."
        )
