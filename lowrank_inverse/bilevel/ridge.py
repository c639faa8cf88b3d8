"""Inverse products with a ridge in closed form."""

from __future__ import annotations

import dataclasses
from typing import Any

from array_api_compat import array_namespace

from lowrank_inverse._typing import RNG, Array
from lowrank_inverse.arrays.checks import check_finite, check_scalar
from lowrank_inverse.arrays.conversion import is_traced, scalar_like, take
from lowrank_inverse.bilevel.column_reuse import Factor, warm_cg
from lowrank_inverse.bilevel.state import HypergradientState, adopt, next_state, start
from lowrank_inverse.iterative.conjugate_gradients import cg
from lowrank_inverse.operators.base import apply_cost, block_width
from lowrank_inverse.operators.composition import shifted
from lowrank_inverse.operators.function import FunctionOperator, aslinearoperator
from lowrank_inverse.results.solution import Solution
from lowrank_inverse.solvers.base import (
    DEFAULT_RTOL,
    PreparedInverse,
    as_settings,
    direct_solution,
    has_damping,
    with_apply_cost,
)
from lowrank_inverse.solvers.low_rank import Nystrom, NystromCG


def inverse_product(
    H: Any,
    b: Array,
    *,
    solver: Any,
    ridge: Any = None,
    rng: RNG = None,
    state: HypergradientState | Solution | None = None,
) -> tuple[Solution, PreparedInverse]:
    """Solve ``(H + ridge + damping * I) x = b``, the ridge in closed form.

    A scalar ridge joins the damping. With a ridge for each parameter and ``D = ridge +
    damping``, Nyström approximates ``D^{-1/2} H D^{-1/2}`` at damping 1. `num_products` of the
    solution counts the preparation too.
    """
    return solve_with_state(as_settings(solver), H, b, ridge, rng, adopt(state, b))[:2]


def solve_with_state(
    settings: Any, H: Any, b: Array, ridge: Any, rng: RNG, state: Any
) -> tuple[Solution, PreparedInverse, HypergradientState]:
    """Do what :func:`inverse_product` does; also return the state for the next call."""
    if ridge is None:
        return _run(settings, H, b, rng, state)
    if getattr(ridge, "ndim", 0) == 0:
        check_scalar("ridge", ridge)
        if not has_damping(settings):
            return _run(settings, shifted(H, ridge), b, rng, state)
        damped = dataclasses.replace(settings, damping=settings.damping + ridge)
        return _run(damped, H, b, rng, state)
    _check_ridge(ridge, b)
    if not isinstance(settings, (Nystrom, NystromCG)):
        return _run(settings, _add_diagonal(H, ridge), b, rng, state)
    return _solve_scaled(settings, H, b, ridge + settings.damping, rng, state)


def smallest_shift(settings: Any, ridge: Any, b: Array) -> Any:
    """Return what at least is added to the eigenvalues of the Hessian."""
    damping = scalar_like(getattr(settings, "damping", 0.0), b)
    if getattr(ridge, "ndim", 0) > 0:
        ridge = array_namespace(b).min(ridge)
    return damping + (0.0 if ridge is None else ridge)


def _run(
    settings: Any, H: Any, b: Array, rng: RNG, state: Any
) -> tuple[Solution, PreparedInverse, HypergradientState]:
    inverse = settings.prepare(H, rng=rng, state=state)
    norm = None
    if isinstance(settings, NystromCG):
        solution, norm = warm_cg(
            aslinearoperator(H),
            b,
            start(state, b),
            preconditioner=inverse.preconditioner,
            rtol=settings.rtol,
            damping=settings.damping,
            max_steps=settings.max_steps,
            check_every=settings.check_every,
        )
    else:
        solution = inverse.solve(b)
    following = next_state(state, solution, inverse.factor, norm)
    total = inverse.num_products + solution.num_products
    return solution._replace(num_products=total), inverse, following


def _solve_scaled(
    settings: Nystrom | NystromCG, H: Any, b: Array, D: Array, rng: RNG, state: Any
) -> tuple[Solution, PreparedInverse, HypergradientState]:
    """Solve ``(H + diag(D)) x = b`` with columns of ``D^{-1/2} H D^{-1/2}`` at damping 1."""
    _check_positive(D)
    s = D**-0.5
    x0 = start(state, b) if isinstance(settings, NystromCG) else None
    unit = dataclasses.replace(settings, damping=1.0)
    inverse = unit.prepare(_scale(H, s), rng=rng, state=_scale_state(state, s))
    system, approximate = _add_diagonal(H, D), _scale(inverse.preconditioner, s)
    if isinstance(settings, NystromCG):
        solution, norm = warm_cg(
            system,
            b,
            x0,
            preconditioner=approximate,
            rtol=settings.rtol,
            max_steps=settings.max_steps,
            check_every=settings.check_every,
        )
        factor = _unscale_factor(inverse.factor, s, state)
        following = next_state(state, solution, factor, norm)
    elif settings.refine == 0:
        cost = apply_cost(inverse.preconditioner, block_width(b))
        solution = direct_solution(system, 0.0, b, approximate @ b, cost)
        following = next_state(state, solution)
    else:
        steps = settings.refine + 1
        solution = cg(system, b, preconditioner=approximate, rtol=DEFAULT_RTOL, max_steps=steps)
        solution = with_apply_cost(solution, inverse.preconditioner, b)
        following = next_state(state, solution)
    total = inverse.num_products + solution.num_products
    return solution._replace(num_products=total), inverse, following


def _scale_state(state: Any, s: Array) -> Any:
    """Return a state whose columns are those of ``diag(s) H diag(s)``."""
    if getattr(state, "columns", None) is None:
        return state
    return state._replace(columns=s[:, None] * state.columns * take(s, state.indices))


def _unscale_factor(factor: Factor, s: Array, state: Any) -> Factor:
    """Return the columns of H itself: those in `state` as they are, where they were kept."""
    if factor.columns is None:
        return factor
    bare = factor.columns / (s[:, None] * take(s, factor.indices))
    if is_traced(factor.refreshed):
        bare = array_namespace(bare).where(factor.refreshed, bare, state.columns)
    elif not factor.refreshed:
        bare = state.columns
    return factor._replace(columns=bare)


def _add_diagonal(H: Any, d: Array) -> FunctionOperator:
    H = aslinearoperator(H)
    return FunctionOperator(
        lambda v: H @ v + d * v, int(H.shape[0]), like=d, matmat=lambda V: H @ V + d[:, None] * V
    )


def _scale(H: Any, s: Array) -> FunctionOperator:
    """Return ``diag(s) H diag(s)``."""
    H = aslinearoperator(H)

    def scaled_columns(indices: Any) -> Array:
        return s[:, None] * H.columns(indices) * take(s, indices)

    return FunctionOperator(
        lambda v: s * (H @ (s * v)),
        int(H.shape[0]),
        like=s,
        matmat=lambda V: s[:, None] * (H @ (s[:, None] * V)),
        columns=scaled_columns,
        diagonal=lambda: s * s * H.diagonal(),
    )


def _check_ridge(ridge: Array, b: Array) -> None:
    if tuple(ridge.shape) != tuple(b.shape) or ridge.dtype != b.dtype:
        raise ValueError(
            f"`ridge` must be a number or match the parameters, shape {tuple(b.shape)} and dtype "
            f"{b.dtype}; got shape {tuple(ridge.shape)} and dtype {ridge.dtype}."
        )
    check_finite("ridge", ridge)
    xp = array_namespace(ridge)
    negative = xp.any(ridge < 0)
    if not is_traced(negative) and bool(negative):
        raise ValueError("`ridge` must be >= 0 everywhere; it holds negative entries.")


def _check_positive(D: Array) -> None:
    xp = array_namespace(D)
    positive = xp.all(D > 0)
    if not is_traced(positive) and not bool(positive):
        raise ValueError(
            "`ridge` plus the damping of the solver must be > 0 everywhere; some entries are 0. "
            "Give the solver a small damping."
        )
