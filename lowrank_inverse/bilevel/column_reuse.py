"""Sampled columns that serve as a preconditioner from one outer step to the next."""

from __future__ import annotations

from typing import Any, NamedTuple

from array_api_compat import array_namespace

from lowrank_inverse._typing import RNG, Array, Indices
from lowrank_inverse.arrays.checks import check_indices
from lowrank_inverse.arrays.control_flow import cond
from lowrank_inverse.arrays.conversion import is_traced, take
from lowrank_inverse.low_rank.approximation import NystromApproximation
from lowrank_inverse.low_rank.column_sampling import DRAWN
from lowrank_inverse.operators.composition import split_diagonal
from lowrank_inverse.solvers.low_rank import NystromCG


class ReusedColumns(NamedTuple):
    """Sampled columns, kept or fresh.

    Attributes
    ----------
    columns : array, shape (n, k), or None
        Of the Hessian without its ridge. None for a Gaussian sketch, which is no set of columns
        and is never kept.
    indices : integers, shape (k,), or None
        On the host unless traced.
    num_products : int
        What they cost in this call.
    refreshed : bool
        Whether they were computed in this call.
    """

    columns: Array | None
    indices: Indices
    num_products: Any
    refreshed: Any


def reuse_columns(
    state: Any, settings: NystromCG, A: Any, rng: RNG
) -> tuple[NystromApproximation, ReusedColumns]:
    """Return an approximation from the columns in `state` while they are worth it, else anew."""
    _, _, s = split_diagonal(A, settings.damping)

    def scale(C: Array, indices: Indices) -> Array:
        return C if s is None else s[:, None] * C * take(s, indices)

    def unscale(C: Array, indices: Indices) -> Array:
        return C if s is None else C / (s[:, None] * take(s, indices))

    def fresh() -> tuple[NystromApproximation, ReusedColumns]:
        approx = settings.approximate(A, rng=rng)
        C, indices = None, approx.indices
        if indices is not None:
            C = unscale(approx.columns, indices)
        return approx, ReusedColumns(C, indices, approx.num_products, True)

    if not _wanted(state, settings, int(A.shape[0])):
        return fresh()
    stale = state.excess >= state.columns.shape[1]
    if not is_traced(stale):
        if bool(stale):
            return fresh()
        indices = check_indices(state.indices, int(A.shape[0]))
        approx = settings.approximation_from(scale(state.columns, indices), indices)
        return approx, ReusedColumns(state.columns, indices, 0, False)
    xp = array_namespace(state.columns)
    cost = []

    def renew() -> tuple[Array, Array]:
        _, new = fresh()
        cost.append(new.num_products)
        return new.columns, xp.asarray(new.indices, dtype=state.indices.dtype)

    C, indices = cond(stale, renew, lambda: (state.columns, state.indices))
    approx = settings.approximation_from(scale(C, indices), indices)
    return approx, ReusedColumns(C, indices, xp.where(stale, cost[0], 0), stale)


def _wanted(state: Any, settings: NystromCG, n: int) -> bool:
    """Whether the columns in a state are such as the settings ask for."""
    columns = getattr(state, "columns", None)
    if columns is None or columns.shape[0] != n or settings.sampling == "gaussian":
        return False
    if settings.indices is not None:
        return bool(columns.shape[1] == len(settings.indices))
    if settings.rank == "auto":
        return True
    # Pivots end where no more is left than rounding.
    exact, rank = settings.sampling in DRAWN, min(settings.rank, n)
    return bool(columns.shape[1] == rank if exact else columns.shape[1] <= rank)
