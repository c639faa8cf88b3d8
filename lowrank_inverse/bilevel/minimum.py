"""The result of minimising a bilevel problem, and why it ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

REMEDIES = {
    "converged": ("the gradient met the tolerance", ""),
    "precision": (
        "no step lowers the outer loss further in this precision",
        "For a lower loss, use float64 parameters and data.",
    ),
    "max_evaluations": (
        "all evaluations were used",
        "Raise `max_evaluations`. With the same `checkpoint` the call continues from here.",
    ),
    "callback": ("the callback asked for it", ""),
    "flat": (
        "the outer loss does not change with the hyperparameters: its gradient is zero",
        "Start elsewhere. Look for saturated weights, such as a sigmoid of -100, for dead relus, "
        "and for hyperparameters on which neither loss depends.",
    ),
    "nonfinite": (
        "a loss or its gradient is NaN or Inf at the start, or wherever a step leads",
        "Look for NaN in the data, for the root or logarithm of 0 or a division by 0, and for "
        "overflow. `bounds` keep hyperparameters where the losses are defined.",
    ),
    "indefinite": (
        "the inner minimisation ended at a saddle point, with negative curvature, where the "
        "hypergradient is not defined",
        "Do not start `params` at a point of symmetry, train further with your own function "
        "`inner`, or add a `ridge` above the size of the negative curvature.",
    ),
    "inner_unsolved": (
        "the inner problem could not be minimised",
        "If its loss has no minimum, as for separable classes, add a `ridge`. If it is hard to "
        "minimise, raise `inner_steps`, scale the data, or train with your own function `inner`.",
    ),
}
"""Why a minimisation ends, and what to do then."""


class Stop(Exception):
    """Raised by a function that has seen enough."""


class Evaluation(NamedTuple):
    """One evaluation of the outer loss and its gradient.

    Attributes
    ----------
    value : float
        The outer loss at the inner minimum, corrected to first order for the error of the inner
        solve.
    gradient_norm : float
        Norm of the hypergradient, without components that point out of the bounds.
    correction : float
        The correction that was added to the outer loss. NaN, and nothing added, if an optimizer
        or your own function solves the inner problem.
    inner_step : float
        Estimated length of a Newton step to the inner minimum, divided by the norm of the
        parameters.
    relative_residual : float
        Relative residual of the linear system.
    products, gradients : int
        Number of products with the inner Hessian, and of gradients of the inner loss.
    rejected : str
        Why the evaluation was rejected, a key of `REMEDIES`; empty if it was accepted.
    """

    value: float
    gradient_norm: float
    correction: float
    inner_step: float
    relative_residual: float
    products: int
    gradients: int
    rejected: str = ""


@dataclass(frozen=True, repr=False)
class BilevelMinimum:
    """The result of ``minimize_bilevel``.

    Attributes
    ----------
    params, hparams : structures as given
        The inner minimum and the hyperparameters at the lowest outer loss found.
    value : float
        The outer loss at that point.
    history : tuple of Evaluation
        One entry per evaluation of the outer loss, in order.
    products, gradients : int
        Total number of products with the inner Hessian, and of gradients of the inner loss.
    reason : str
        ``"converged"``, ``"precision"``, ``"max_evaluations"``, ``"callback"``, ``"flat"``,
        ``"nonfinite"``, ``"indefinite"`` or ``"inner_unsolved"``.
    num_at_bounds : int
        Number of hyperparameters at a bound.
    state : HypergradientState
        State of the last hypergradient.
    info : HypergradientInfo or None
        Of the last hypergradient; None if all evaluations came from a checkpoint.
    """

    params: Any
    hparams: Any
    value: float
    history: tuple[Evaluation, ...]
    products: int
    gradients: int
    reason: str
    num_at_bounds: int = 0
    state: Any = field(default=None)
    info: Any = field(default=None)

    @property
    def converged(self) -> bool:
        """Whether it reached a minimum, to the tolerance or to the available precision."""
        return self.reason in ("converged", "precision")

    def explain(self) -> str:
        """Describe progress and cost, why it ended, and what to do about it."""
        used = [one for one in self.history if not one.rejected]
        lines = [
            f"{len(self.history)} evaluations, {self.products} products with the Hessian, "
            f"{self.gradients} gradients of the inner loss"
        ]
        if used:
            lines.append(
                f"outer loss {used[0].value:.6g} at the start, {self.value:.6g} at the end"
            )
            first, least = used[0].gradient_norm, min(one.gradient_norm for one in used)
            ratio = least / first if first > 0 else 0.0
            lines.append(
                f"norm of its gradient {first:.1e} at the start, {ratio:.1e} of that at the least"
            )
        if self.num_at_bounds:
            lines.append(f"{self.num_at_bounds} hyperparameters at their bounds")
        rejected = [one.rejected for one in self.history if one.rejected]
        lines += [
            f"{rejected.count(reason)} steps rejected: {REMEDIES[reason][0]}"
            for reason in dict.fromkeys(rejected)
            if reason != self.reason
        ]
        meaning, remedy = REMEDIES[self.reason]
        lines.append(f"{self.reason}: {meaning}")
        return "\n".join([*lines, *([f"    {remedy}"] if remedy else [])])

    def __repr__(self) -> str:
        return "\n".join(
            [
                f"BilevelMinimum: {self.reason}",
                f"  outer loss     {self.value:.6g}",
                f"  evaluations    {len(self.history)}",
                f"  products       {self.products}",
                f"  gradients      {self.gradients}",
            ]
        )
