"""Cost and accuracy of a hypergradient."""

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
    """Cost and accuracy of a hypergradient.

    Entries are Python numbers from PyTorch, and arrays of shape () from JAX, where it is a pytree.

    Attributes
    ----------
    num_products : int
        Number of products with the inner Hessian.
    relative_residual : float
        Residual norm of the linear system divided by the norm of the outer gradient.
    inner_grad_norm : float
        Norm of the gradient of the inner problem, ridge included. The formula assumes 0.
    negative_curvature : bool
        Whether the solver found that Hessian plus ridge plus damping has negative curvature, so
        that the parameters are not at a minimum of the inner problem.
    hparams_without_path : tuple of str
        Hyperparameters on which neither loss depends; their gradient is zero.
    rank : int or None
        Number of columns or eigenvalues that the solver kept; None if it keeps none.
    num_steps : int
        Number of steps of the solver.
    reason : Reason
        Why the solver ended.
    recycled : int or None
        Number of pairs of the state in the preconditioner; None without a state, or if the solver
        does not keep pairs.
    inner_step : float
        Estimated length of a Newton step to the inner minimum, divided by the norm of the
        parameters. It uses the curvature along the inverse product, and is NaN unless that is
        positive.
    error_bound : float
        Upper bound on the relative error of the inverse product, for a positive semidefinite
        Hessian: the residual norm divided by the norm of the product and by the smallest entry of
        ridge plus damping. NaN without ridge and damping, and if there is negative curvature.
    asymmetry : float or None
        Largest difference between entries of the Hessian across the diagonal, relative to the
        largest entry read. More than rounding means that it is not the Hessian of a loss.
    num_zeros : int
        Number of parameters that are exactly 0.
    support_grad_norm : float
        Norm of the inner gradient with respect to the other parameters. At the minimum of a loss
        with an L1 term, only this part of the gradient vanishes.
    memory : MemoryPlan or None
        How a Nystrom solver stored its columns.
    hessian_check : HessianCheck or None
        Test of the product along the solution against a difference of gradients. Only in PyTorch,
        if the inner loss detaches a tensor that depends on the parameters.
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
        """Return the problems found; see :func:`lowrank_inverse.bilevel.diagnostics.findings`."""
        return diagnostics.findings(self)

    def explain(self) -> str:
        """Describe cost and accuracy, the problems found, and what to do about them."""
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
    """Collect cost and accuracy of a hypergradient; entries are arrays.

    `params`, shape (n,), are the parameters. Without them, `inner_step` is NaN.
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
