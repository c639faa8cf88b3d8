"""The record of a hypergradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from array_api_compat import array_namespace

from lowrank_inverse._typing import Array
from lowrank_inverse.arrays.conversion import astype, is_traced
from lowrank_inverse.arrays.linalg import column_norm, dot
from lowrank_inverse.arrays.spread import reduced
from lowrank_inverse.bilevel import diagnostics
from lowrank_inverse.bilevel.hessian_check import HessianCheck
from lowrank_inverse.bilevel.implicit_gradient import ImplicitGradient
from lowrank_inverse.results.solution import Reason
from lowrank_inverse.solvers.column_memory import MemoryPlan


@dataclass(frozen=True)
class HypergradientInfo:
    """What a hypergradient cost, and how far it is to be trusted.

    Python numbers from torch; arrays of shape () from jax, where it is a pytree.

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
    recycled : int or None
        Pairs of the state that served as the preconditioner; None without a state, or for solvers
        that keep none.
    inner_step : float
        Estimated length of a Newton step to the inner minimum, over the norm of the parameters,
        with the curvature along the inverse product. NaN where that is not positive.
    error_bound : float
        At least the error of the inverse product over its norm, for a Hessian that is positive
        semidefinite: the residual norm over that of the product and over the smallest of ridge
        plus damping. NaN without ridge and damping, and where negative curvature was met.
    asymmetry : float or None
        Of the entries of the Hessian that the solver looked at, relative to the largest; 0 but for
        rounding, unless the second derivative is not that of the loss.
    num_zeros : int
        Parameters that are exactly 0.
    support_grad_norm : float
        The norm of the inner gradient with respect to the others. At the minimum of a loss with an
        L1 term only this one vanishes.
    memory : MemoryPlan or None
        How the columns of a Nystrom solver were held.
    hessian_check : HessianCheck or None
        The product along the answer against a difference of gradients; from torch alone, where
        the inner loss detaches what it depends on.
    """

    num_products: Any
    relative_residual: Any
    inner_grad_norm: Any
    negative_curvature: Any
    hparams_without_path: tuple[str, ...]
    rank: Any
    num_steps: Any = None
    reason: Any = None
    recycled: Any = None
    inner_step: Any = None
    error_bound: Any = None
    asymmetry: Any = None
    num_zeros: Any = None
    support_grad_norm: Any = None
    memory: MemoryPlan | None = None
    hessian_check: HessianCheck | None = None

    def findings(self) -> tuple[diagnostics.Finding, ...]:
        """Return what is wrong; see :func:`lowrank_inverse.bilevel.diagnostics.findings`."""
        return diagnostics.findings(self)

    def explain(self) -> str:
        """Say in a few lines how it went, what is wrong, and what to do about it."""
        return diagnostics.explain(self)

    def warn(self) -> None:
        """Issue a warning for each finding."""
        diagnostics.warn(self)


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
    scale = xp.where(length > 0, length, xp.ones_like(length))
    step: Any = math.nan
    num_zeros = on_support = None
    if params is not None:
        num_zeros = reduced(xp.sum(astype(params == 0, xp.int32), dtype=xp.int32))
        on_support = column_norm(xp.where(params == 0, xp.zeros_like(params), inner_grad))
        # The curvature along q is <q, M q> / <q, q>, and M q = b but for the residual.
        along = dot(solution.value / scale, outer_grad) * column_norm(params)
        known = (along > 0) & (length > 0)
        step = inner * length / xp.where(known, along, xp.ones_like(along))
        step = _where_known(known | (inner == 0), xp.where(inner > 0, step, xp.zeros_like(inner)))
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
        recycled=result.recycled,
        inner_step=step,
        error_bound=_where_known(bounded, solution.residual_norm / safe / scale),
        asymmetry=inverse.asymmetry,
        num_zeros=num_zeros,
        support_grad_norm=on_support,
        memory=inverse.memory,
    )


def _where_known(known: Array, value: Array) -> Any:
    """Return `value`, NaN where it is not known; jax_debug_nans would stop at one made in vain."""
    if not is_traced(known):
        return value if bool(known) else math.nan
    xp = array_namespace(value)
    return xp.where(known, value, xp.full_like(value, math.nan))
