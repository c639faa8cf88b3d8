"""The columns of the Nyström solvers, chosen from their settings."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import RNG, Array, OperatorLike
from lowrank_inverse.arrays.checks import check_count, check_indices, check_rng
from lowrank_inverse.arrays.conversion import concrete, is_traced
from lowrank_inverse.estimators.diagonal import estimate_diagonal
from lowrank_inverse.low_rank.column_sampling import check_sampling, sample_columns
from lowrank_inverse.low_rank.nystrom_columns import check_rank, nystrom
from lowrank_inverse.operators.columns import known_or_none
from lowrank_inverse.solvers.base import (
    is_positive,
)
from lowrank_inverse.solvers.column_memory import (
    STREAMED_DAMPING,
)


def check_columns(settings: Any) -> None:
    """Raise unless rank, sampling and indices are in their ranges; keep indices as a tuple."""
    if settings.rank is None:
        raise TypeError("`rank` must be a whole number or 'auto'; got None.")
    check_rank(settings.rank)
    check_sampling(settings.sampling)
    if settings.max_rank is not None:
        check_count("max_rank", settings.max_rank)
    if settings.diagonal_products is not None:
        check_count("diagonal_products", settings.diagonal_products)
    if settings.indices is not None and not is_traced(settings.indices):
        indices = tuple(check_indices(settings.indices, sys.maxsize).tolist())
        object.__setattr__(settings, "indices", indices)


def _weights(settings: Any, A: OperatorLike, rng: RNG) -> tuple[Any, int]:
    """Return an estimate of the diagonal where one was asked for and is needed, and its price."""
    wanted = settings.diagonal_products is not None and settings.sampling.startswith("diagonal")
    if not wanted or known_or_none(A) is not None:
        return None, 0
    estimate = estimate_diagonal(A, settings.diagonal_products, rng=rng)
    return estimate, estimate.num_products


def chosen_indices(settings: Any, A: OperatorLike, rng: RNG) -> tuple[np.ndarray, int]:
    """Return the columns to take, and the products that it took to choose them."""
    n = int(A.shape[0])
    if settings.indices is not None:
        return check_indices(settings.indices, n), 0
    generator = check_rng(rng)
    weights, spent = _weights(settings, A, generator)
    rank = min(settings.rank, n)
    drawn = sample_columns(A, rank, sampling=settings.sampling, rng=generator, diagonal=weights)
    return drawn, spent


def chosen_approximation(
    settings: Any, A: OperatorLike, rng: RNG, aim: Any, b: Array | None = None, **arguments: Any
) -> Any:
    """Return the Nyström approximation of the settings; a rank that grows aims at `aim`."""
    if settings.indices is not None:
        return nystrom(A, indices=settings.indices, **arguments)
    generator = check_rng(rng)
    weights, spent = _weights(settings, A, generator)
    if settings.rank == "auto":
        damping = aim if is_positive(aim) else None
        # A solver with a tolerance takes steps, and need not take columns that save none.
        rtol = None if damping is None else getattr(settings, "rtol", None)
        arguments |= {"damping": damping, "rtol": rtol, "max_rank": settings.max_rank}
    fixed = settings.rank != "auto"
    wanted = settings.sampling == "krylov" or (settings.sampling == "auto" and fixed)
    approx = nystrom(
        A,
        settings.rank if settings.rank == "auto" else min(settings.rank, int(A.shape[0])),
        sampling=settings.sampling,
        rng=generator,
        diagonal=weights,
        b=b if wanted else None,
        **arguments,
    )
    approx.num_products += spent
    return approx


def is_lossy(inverse: Any) -> bool:
    """Whether the damping is too small for the streamed form in the precision of the operator."""
    largest = inverse.eigenvalues[0]
    if array_namespace(inverse.like).finfo(inverse.dtype).bits >= 64 or is_traced(largest):
        return False
    return bool(concrete(inverse.damping < STREAMED_DAMPING * largest))
