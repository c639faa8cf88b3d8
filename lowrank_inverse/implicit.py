"""The hypergradient of implicit differentiation, the same for every framework."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from array_api_compat import array_namespace

from lowrank_inverse._array import check_finite, check_scalar, column_norm, is_traced, take
from lowrank_inverse._typing import RNG, Array
from lowrank_inverse.cg import cg
from lowrank_inverse.operators import FunctionOperator, aslinearoperator, shifted
from lowrank_inverse.prepared import (
    DEFAULT_RTOL,
    PreparedInverse,
    apply_cost,
    block_width,
    direct_solution,
    with_apply_cost,
)
from lowrank_inverse.solution import Reason, Solution, start
from lowrank_inverse.solve import as_settings
from lowrank_inverse.solvers import Nystrom, NystromCG


class HypergradientInfo(NamedTuple):
    """What a hypergradient cost, and how far it is to be trusted.

    Attributes
    ----------
    num_products : int
        Products with the inner Hessian.
    relative_residual : float
        Residual norm of the linear system over the norm of the outer gradient.
    inner_grad_norm : float
        Of the inner problem, ridge included: the formula assumes 0.
    negative_curvature : bool
        Whether the solver met negative curvature of Hessian plus ridge plus damping: the inner
        problem is not at a minimum.
    hparams_without_path : tuple of str
        Hyperparameters on which neither loss depends; their gradient is zero.
    rank : int or None
        Columns or eigenvalues that the solver kept, where it has any.
    """

    num_products: Any
    relative_residual: Any
    inner_grad_norm: Any
    negative_curvature: Any
    hparams_without_path: tuple[str, ...]
    rank: Any


class ImplicitGradient(NamedTuple):
    """The parts of a hypergradient; None where a hyperparameter has no path."""

    grads: list[Array | None]
    implicit: list[Array | None]
    solution: Solution
    inverse: PreparedInverse


def implicit_gradient(
    H: Any,
    outer_grad: Array,
    mixed_vjp: Callable[[Array], Sequence[Array | None]],
    direct: Sequence[Array | None],
    *,
    solver: Any,
    ridge: Any = None,
    rng: RNG = None,
    state: Solution | None = None,
) -> ImplicitGradient:
    """Evaluate ``direct - mixed_vjp((H + ridge + damping)^{-1} outer_grad)`` (Eq. 3 of [1]_).

    Parameters
    ----------
    H : linear operator, shape (n, n)
        Hessian of the inner loss, without the ridge.
    outer_grad : array, shape (n,)
        Gradient of the outer loss by the parameters.
    mixed_vjp : callable
        Takes q of shape (n,) and returns the gradients of ``<q, inner gradient>`` by the
        hyperparameters, with the inner gradient that of loss and ridge.
    direct : sequence of arrays or None
        Gradients of the outer loss by the hyperparameters.
    solver, rng, state
        As in :func:`lowrank_inverse.solve`.
    ridge : float, 0-d array or array of shape (n,), optional
        Known exactly, and so kept out of what the solver approximates.

    References
    ----------
    .. [1] R. Hataya, M. Yamada. Nyström Method for Accurate and Scalable Implicit
       Differentiation. AISTATS 2023.
    """
    check_finite("gradient of the outer loss", outer_grad)
    solution, inverse = inverse_product(
        H, outer_grad, solver=solver, ridge=ridge, rng=rng, state=state
    )
    implicit = [None if part is None else -part for part in mixed_vjp(solution.value)]
    grads = [_sum(d, i) for d, i in zip(direct, implicit, strict=True)]
    return ImplicitGradient(grads, implicit, solution, inverse)


def inverse_product(
    H: Any,
    b: Array,
    *,
    solver: Any,
    ridge: Any = None,
    rng: RNG = None,
    state: Solution | None = None,
) -> tuple[Solution, PreparedInverse]:
    """Solve ``(H + ridge + damping * I) x = b``, the ridge in closed form.

    A scalar ridge joins the damping. With a ridge for each parameter and ``D = ridge +
    damping``, Nyström approximates ``D^{-1/2} H D^{-1/2}`` at damping 1. `num_products` of the
    solution counts the preparation too.
    """
    settings = as_settings(solver)
    if ridge is None:
        return _run(settings, H, b, rng, state)
    if getattr(ridge, "ndim", 0) == 0:
        check_scalar("ridge", ridge)
        if not _has_damping(settings):
            return _run(settings, shifted(H, ridge), b, rng, state)
        damped = dataclasses.replace(settings, damping=settings.damping + ridge)
        return _run(damped, H, b, rng, state)
    _check_ridge(ridge, b)
    if not isinstance(settings, (Nystrom, NystromCG)):
        return _run(settings, _add_diagonal(H, ridge), b, rng, state)
    return _solve_scaled(settings, H, b, ridge + settings.damping, rng, state)


def hypergradient_info(
    result: ImplicitGradient, outer_grad: Array, inner_grad: Array, without_path: tuple[str, ...]
) -> HypergradientInfo:
    """Collect the record of a hypergradient; entries are arrays."""
    negative = result.solution.reason == int(Reason.NEGATIVE_CURVATURE)
    if result.inverse.negative_curvature is not None:
        negative = negative | result.inverse.negative_curvature
    norm = column_norm(outer_grad)
    xp = array_namespace(norm)
    return HypergradientInfo(
        num_products=result.solution.num_products,
        relative_residual=result.solution.residual_norm
        / xp.where(norm > 0, norm, xp.ones_like(norm)),
        inner_grad_norm=column_norm(inner_grad),
        negative_curvature=negative,
        hparams_without_path=without_path,
        rank=result.inverse.rank,
    )


def _run(
    settings: Any, H: Any, b: Array, rng: RNG, state: Solution | None
) -> tuple[Solution, PreparedInverse]:
    inverse = settings.prepare(H, rng=rng, state=state)
    solution = inverse.solve(b)
    total = inverse.num_products + solution.num_products
    return solution._replace(num_products=total), inverse


def _solve_scaled(
    settings: Nystrom | NystromCG,
    H: Any,
    b: Array,
    D: Array,
    rng: RNG,
    state: Solution | None,
) -> tuple[Solution, PreparedInverse]:
    """Solve ``(H + diag(D)) x = b`` with columns of ``D^{-1/2} H D^{-1/2}`` at damping 1."""
    _check_positive(D)
    s = D**-0.5
    inverse = dataclasses.replace(settings, damping=1.0).prepare(_scale(H, s), rng=rng)
    system, approximate = _add_diagonal(H, D), _scale(inverse.preconditioner, s)
    if isinstance(settings, Nystrom) and settings.refine == 0:
        cost = apply_cost(inverse.preconditioner, block_width(b))
        solution = direct_solution(system, 0.0, b, approximate @ b, cost)
    else:
        x0 = start(state, b) if isinstance(settings, NystromCG) else None
        rtol = settings.rtol if isinstance(settings, NystromCG) else DEFAULT_RTOL
        steps = settings.max_steps if isinstance(settings, NystromCG) else settings.refine + 1
        solution = cg(system, b, x0=x0, preconditioner=approximate, rtol=rtol, max_steps=steps)
        solution = with_apply_cost(solution, inverse.preconditioner, b)
    return solution._replace(num_products=inverse.num_products + solution.num_products), inverse


def _has_damping(settings: Any) -> bool:
    return dataclasses.is_dataclass(settings) and any(
        field.name == "damping" for field in dataclasses.fields(settings)
    )


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


def _sum(a: Array | None, b: Array | None) -> Array | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
