"""The hypergradient of implicit differentiation, the same for every framework."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from array_api_compat import array_namespace

from lowrank_inverse import diagnostics
from lowrank_inverse._array import (
    check_finite,
    check_scalar,
    column_norm,
    dot,
    is_traced,
    scalar_like,
    take,
)
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
from lowrank_inverse.solution import Reason, Solution
from lowrank_inverse.solve import as_settings
from lowrank_inverse.solvers import Nystrom, NystromCG
from lowrank_inverse.state import (
    Factor,
    HypergradientState,
    adopt,
    next_state,
    start,
    warm_cg,
)


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
    num_steps : int
        Steps of the solver.
    reason : Reason
        Why it ended.
    refreshed : bool or None
        Whether NystromCG computed its columns in this call, rather than keep those of the state.
    inner_step : float
        Estimated length of a Newton step to the inner minimum, over the norm of the parameters,
        with the curvature along the inverse product. NaN where that is not positive.
    error_bound : float
        At least the error of the inverse product over its norm, for a Hessian that is positive
        semidefinite: the residual norm over that of the product and over the smallest of ridge
        plus damping. NaN without ridge and damping, and where negative curvature was met.
    """

    num_products: Any
    relative_residual: Any
    inner_grad_norm: Any
    negative_curvature: Any
    hparams_without_path: tuple[str, ...]
    rank: Any
    num_steps: Any = None
    reason: Any = None
    refreshed: Any = None
    inner_step: Any = None
    error_bound: Any = None

    def findings(self) -> tuple[diagnostics.Finding, ...]:
        """Return what is wrong; see :func:`lowrank_inverse.diagnostics.findings`."""
        return diagnostics.findings(self)

    def explain(self) -> str:
        """Say in a few lines how it went, what is wrong, and what to do about it."""
        return diagnostics.explain(self)

    def warn(self) -> None:
        """Issue a warning for each finding."""
        diagnostics.warn(self)


class ImplicitGradient(NamedTuple):
    """The parts of a hypergradient; None where a hyperparameter has no path."""

    grads: list[Array | None]
    implicit: list[Array | None]
    solution: Solution
    inverse: PreparedInverse
    state: HypergradientState
    shift: Any


def implicit_gradient(
    H: Any,
    outer_grad: Array,
    mixed_vjp: Callable[[Array], Sequence[Array | None]],
    direct: Sequence[Array | None],
    *,
    solver: Any,
    ridge: Any = None,
    rng: RNG = None,
    state: HypergradientState | Solution | None = None,
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
    solver, rng
        As in :func:`lowrank_inverse.solve`.
    state : HypergradientState, optional
        That of the result of an earlier call. The Solution of a similar system will do: CG and
        NystromCG start from it.
    ridge : float, 0-d array or array of shape (n,), optional
        Known exactly, and so kept out of what the solver approximates.

    References
    ----------
    .. [1] R. Hataya, M. Yamada. Nyström Method for Accurate and Scalable Implicit
       Differentiation. AISTATS 2023.
    """
    check_finite("gradient of the outer loss", outer_grad)
    solution, inverse, following = _inverse_product(
        as_settings(solver), H, outer_grad, ridge, rng, adopt(state, outer_grad)
    )
    implicit = [None if part is None else -part for part in mixed_vjp(solution.value)]
    grads = [_sum(d, i) for d, i in zip(direct, implicit, strict=True)]
    shift = _smallest_shift(as_settings(solver), ridge, outer_grad)
    return ImplicitGradient(grads, implicit, solution, inverse, following, shift)


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
    return _inverse_product(as_settings(solver), H, b, ridge, rng, adopt(state, b))[:2]


def _inverse_product(
    settings: Any, H: Any, b: Array, ridge: Any, rng: RNG, state: Any
) -> tuple[Solution, PreparedInverse, HypergradientState]:
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
    result: ImplicitGradient,
    outer_grad: Array,
    inner_grad: Array,
    without_path: tuple[str, ...],
    params: Array | None = None,
) -> HypergradientInfo:
    """Collect the record of a hypergradient; entries are arrays.

    `params`, shape (n,), are where it was taken; without them there is no `inner_step`.
    """
    solution, inverse = result.solution, result.inverse
    negative = solution.reason == int(Reason.NEGATIVE_CURVATURE)
    if inverse.negative_curvature is not None:
        negative = negative | inverse.negative_curvature
    norm, inner, length = map(column_norm, (outer_grad, inner_grad, solution.value))
    xp = array_namespace(norm)
    nan = xp.full_like(norm, float("nan"))
    scale = xp.where(length > 0, length, xp.ones_like(length))
    step = nan
    if params is not None:
        # The curvature along q is <q, M q> / <q, q>, and M q = b but for the residual.
        along = dot(solution.value / scale, outer_grad) * column_norm(params)
        known = (along > 0) & (length > 0)
        step = xp.where(known, inner * length / xp.where(known, along, xp.ones_like(along)), nan)
        step = xp.where(inner > 0, step, xp.zeros_like(inner))
    shift = xp.zeros_like(norm) + result.shift
    bounded = (shift > 0) & (length > 0) & ~(negative | (norm < 0))
    safe = xp.where(bounded, shift, xp.ones_like(shift))
    return HypergradientInfo(
        num_products=solution.num_products,
        relative_residual=solution.residual_norm / xp.where(norm > 0, norm, xp.ones_like(norm)),
        inner_grad_norm=inner,
        negative_curvature=negative,
        hparams_without_path=without_path,
        rank=inverse.rank,
        num_steps=solution.num_steps,
        reason=solution.reason,
        refreshed=None if inverse.factor is None else inverse.factor.refreshed,
        inner_step=step,
        error_bound=xp.where(bounded, solution.residual_norm / safe / scale, nan),
    )


def _smallest_shift(settings: Any, ridge: Any, b: Array) -> Any:
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
