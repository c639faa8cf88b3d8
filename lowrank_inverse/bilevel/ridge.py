"""Inverse products with a ridge that is known exactly, from one outer step to the next."""

from __future__ import annotations

from typing import Any, NamedTuple

from array_api_compat import array_namespace

from lowrank_inverse._typing import RNG, Array, Scalar, SolveFunction, Solver
from lowrank_inverse.arrays.checks import check_finite, check_scalar
from lowrank_inverse.arrays.conversion import is_traced, scalar_like
from lowrank_inverse.bilevel.column_reuse import reuse_columns
from lowrank_inverse.bilevel.state import HypergradientState, adopt, next_state, start
from lowrank_inverse.operators.base import ShiftedOperator
from lowrank_inverse.operators.function import aslinearoperator
from lowrank_inverse.results.solution import Solution
from lowrank_inverse.solvers.base import PreparedInverse, as_settings
from lowrank_inverse.solvers.low_rank import NystromCG

DEFAULT_SOLVER = NystromCG(rank=20, max_steps=20)
"""For Hessians, which cost a product whatever is asked of them: at most 42 products."""


def default_solver(solver: Solver | SolveFunction | None) -> Any:
    """Return `solver` as settings, or the default where there is none."""
    return DEFAULT_SOLVER if solver is None else as_settings(solver)


class InverseProduct(NamedTuple):
    """An inverse product, and what the next call may go on from."""

    solution: Solution
    inverse: PreparedInverse
    state: HypergradientState
    refreshed: Any
    """Whether NystromCG computed its columns in this call; None for other solvers."""


def inverse_product(
    H: Any,
    b: Array,
    *,
    solver: Solver | SolveFunction | None = None,
    ridge: Scalar = None,
    rng: RNG = 0,
    state: HypergradientState | Solution | None = None,
) -> InverseProduct:
    """Solve ``(H + ridge + damping * I) x = b``; the ridge stays out of what is approximated.

    A ridge is a number or a vector of shape (n,). `num_products` of the solution counts the
    preparation too.
    """
    settings, A = default_solver(solver), aslinearoperator(H)
    if ridge is not None:
        _check_ridge(ridge, b)
        A = ShiftedOperator(A, ridge)
    state = adopt(state, b)
    x0, reused = start(state, b), None
    if isinstance(settings, NystromCG):
        approximation, reused = reuse_columns(state, settings, A, rng)
        inverse = settings.prepare(A, approximation=approximation)
    else:
        inverse = settings.prepare(A, rng=rng)
    solution = inverse.solve(b, x0=x0)
    spent = inverse.num_products if reused is None else reused.num_products
    solution = solution._replace(num_products=spent + solution.num_products)
    following = next_state(state, solution, reused)
    return InverseProduct(
        solution, inverse, following, None if reused is None else reused.refreshed
    )


def smallest_shift(settings: Any, ridge: Scalar, b: Array) -> Any:
    """Return what at least is added to the eigenvalues of the Hessian."""
    damping = scalar_like(getattr(settings, "damping", 0.0), b)
    if getattr(ridge, "ndim", 0) > 0:
        ridge = array_namespace(b).min(ridge)
    return damping + (0.0 if ridge is None else ridge)


def _check_ridge(ridge: Any, b: Array) -> None:
    if getattr(ridge, "ndim", 0) == 0:
        check_scalar("ridge", ridge)
        return
    if tuple(ridge.shape) != tuple(b.shape)[:1] or ridge.dtype != b.dtype:
        raise ValueError(
            f"`ridge` must be a number or match the parameters, shape {tuple(b.shape)} and dtype "
            f"{b.dtype}; got shape {tuple(ridge.shape)} and dtype {ridge.dtype}."
        )
    check_finite("ridge", ridge)
    xp = array_namespace(ridge)
    negative = xp.any(ridge < 0)
    if not is_traced(negative) and bool(negative):
        raise ValueError("`ridge` must be >= 0 everywhere; it holds negative entries.")
