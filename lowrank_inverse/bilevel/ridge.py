"""Inverse products with a ridge that is known exactly, from one outer step to the next."""

from __future__ import annotations

from typing import Any

from array_api_compat import array_namespace

from lowrank_inverse._typing import RNG, Array, Scalar, SolveFunction, Solver
from lowrank_inverse.arrays.checks import check_finite, check_scalar
from lowrank_inverse.arrays.conversion import is_traced, scalar_like
from lowrank_inverse.arrays.spread import reduced
from lowrank_inverse.operators.diagonal import ShiftedOperator
from lowrank_inverse.operators.function import aslinearoperator
from lowrank_inverse.results.solution import Solution
from lowrank_inverse.solvers.base import as_settings
from lowrank_inverse.solvers.iterative import CG
from lowrank_inverse.solvers.state import Continued, HypergradientState, solve_from

DEFAULT_SOLVER = CG(max_steps=40)
"""For Hessians, which cost a product whatever is asked of them: at most 42 products."""


def default_solver(solver: Solver | SolveFunction | None) -> Any:
    """Return `solver` as settings, or the default where there is none."""
    return DEFAULT_SOLVER if solver is None else as_settings(solver)


def inverse_product(
    H: Any,
    b: Array,
    *,
    solver: Solver | SolveFunction | None = None,
    ridge: Scalar = None,
    rng: RNG = 0,
    state: HypergradientState | Solution | None = None,
) -> Continued:
    """Solve ``(H + ridge + damping * I) x = b``; the ridge stays out of what is approximated.

    A ridge is a number or a vector of shape (n,). `num_products` of the solution counts the
    preparation too.
    """
    settings, A = default_solver(solver), aslinearoperator(H)
    if ridge is not None:
        _check_ridge(ridge, b)
        A = ShiftedOperator(A, ridge)
    return solve_from(state, settings, A, b, rng=rng)


def smallest_shift(settings: Any, ridge: Scalar, b: Array) -> Any:
    """Return what at least is added to the eigenvalues of the Hessian."""
    damping = scalar_like(getattr(settings, "damping", 0.0), b)
    if getattr(ridge, "ndim", 0) > 0:
        ridge = reduced(array_namespace(b).min(ridge))
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
    negative = reduced(xp.any(ridge < 0))
    if not is_traced(negative) and bool(negative):
        raise ValueError("`ridge` must be >= 0 everywhere; it holds negative entries.")
