"""Columns that are kept from one solve to the next, and solves from where the last one ended."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from array_api_compat import array_namespace

from lowrank_inverse._typing import Array
from lowrank_inverse.arrays.checks import check_indices
from lowrank_inverse.arrays.control_flow import quietly
from lowrank_inverse.arrays.conversion import is_traced, scalar_like
from lowrank_inverse.arrays.linalg import add_scaled, column_norm
from lowrank_inverse.iterative.conjugate_gradients import cg
from lowrank_inverse.low_rank.column_sampling import DRAWN
from lowrank_inverse.results.solution import Reason, Solution, ended, tolerance


class Factor(NamedTuple):
    """Sampled columns, kept or fresh.

    Attributes
    ----------
    columns : array, shape (n, k), or None
        None for a Gaussian sketch, which is no set of columns and is never kept.
    indices : integers, shape (k,), or None
        On the host unless traced.
    num_products : int
        What they cost in this call.
    refreshed : bool
        Whether they were computed in this call.
    """

    columns: Array | None
    indices: Any
    num_products: Any
    refreshed: Any


def kept_columns(
    state: Any,
    settings: Any,
    n: int,
    *,
    fresh: Callable[[], Any],
    again: Callable[[Array, Any], Any],
) -> tuple[Any, Factor]:
    """Return an approximation from the columns in `state` while they are worth it, else anew.

    Parameters
    ----------
    state : HypergradientState or anything else
    settings : NystromCG
        Says how many columns are wanted; others are not kept.
    n : int
        Rows of the columns.
    fresh : callable () -> NystromApproximation
    again : callable (columns, indices) -> NystromApproximation
    """
    if not _wanted(state, settings, n):
        return _first(fresh())
    stale = state.excess >= state.columns.shape[1]
    if not is_traced(stale):
        if bool(stale):
            return _first(fresh())
        indices = check_indices(state.indices, n)
        return again(state.columns, indices), Factor(state.columns, indices, 0, False)
    xp = array_namespace(state.columns)
    cost = []

    def renew() -> tuple[Array, Array]:
        approx = fresh()
        cost.append(approx.num_products)
        return approx.columns, xp.asarray(approx.indices, dtype=state.indices.dtype)

    C, indices = sys.modules["jax"].lax.cond(stale, renew, lambda: (state.columns, state.indices))
    return again(C, indices), Factor(C, indices, xp.where(stale, cost[0], 0), stale)


def _first(approx: Any) -> tuple[Any, Factor]:
    kept = approx.indices is not None
    columns, indices = (approx.columns, approx.indices) if kept else (None, None)
    return approx, Factor(columns, indices, approx.num_products, True)


def _wanted(state: Any, settings: Any, n: int) -> bool:
    """Whether the columns in a state are such as the settings ask for."""
    columns = getattr(state, "columns", None)
    if columns is None or columns.shape[0] != n or settings.sampling == "gaussian":
        return False
    if settings.indices is not None:
        return bool(columns.shape[1] == len(settings.indices))
    if settings.rank == "auto":
        return True
    # Pivots end where no more is left than rounding.
    exact = settings.sampling in DRAWN
    return bool(columns.shape[1] == settings.rank if exact else columns.shape[1] <= settings.rank)


@quietly
def warm_cg(
    A: Any, b: Array, x0: Array | None, *, rtol: float, **options: Any
) -> tuple[Solution, Array | None]:
    """Solve as :func:`lowrank_inverse.cg` from `x0`; also the norm of the residual there.

    The correction of `x0` is solved for, at the same number of products. The norm is None for a
    block.
    """
    if b.ndim == 2:
        return cg(A, b, x0=x0, rtol=rtol, **options), None
    if x0 is None:
        return cg(A, b, rtol=rtol, **options), column_norm(b)
    xp = array_namespace(b)
    damping = scalar_like(options.get("damping", 0.0), b)
    x0 = xp.where(xp.any(b != 0), x0, xp.zeros_like(x0))
    r = b - add_scaled(A @ x0, damping, x0)
    norm = column_norm(r)
    finite = xp.isfinite(norm)
    x0 = xp.where(finite, x0, xp.zeros_like(x0))  # a start beyond all bounds is none
    r, norm = xp.where(finite, r, b), xp.where(finite, norm, column_norm(b))
    solution = cg(A, r, rtol=0.0, atol=tolerance(b, rtol), **options)
    # Where rounding leaves nothing to gain, no step is better than any.
    keep = ended(solution.reason, Reason.STAGNATED) & (solution.residual_norm > norm)
    solution = solution._replace(
        value=xp.where(keep, x0, x0 + solution.value),
        residual_norm=xp.where(keep, norm, solution.residual_norm),
        num_products=solution.num_products + 1,
    )
    return solution, norm
