"""What the minimisation of a bilevel problem found, and why it ended there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

REMEDIES = {
    "converged": ("the gradient met the tolerance", ""),
    "precision": (
        "no step lowers the outer loss further in this precision",
        "That is the end of what can be reached. For more, take float64 parameters and data.",
    ),
    "max_evaluations": (
        "all evaluations were used",
        "Raise `max_evaluations`; with the same `checkpoint` it goes on from here.",
    ),
    "callback": ("the callback asked for it", ""),
    "flat": (
        "the outer loss does not change with the hyperparameters: its gradient is zero",
        "Start elsewhere: look for weights that are saturated, such as a sigmoid of -100, for a "
        "relu that is dead, and for hyperparameters that reach neither loss.",
    ),
    "nonfinite": (
        "a loss or its gradient is NaN or Inf at the start, or wherever a step leads",
        "Look for NaN in the data; for the root, the logarithm or the division of a 0; and for "
        "overflow. `bounds` keep hyperparameters where the losses are defined.",
    ),
    "indefinite": (
        "the inner problem has negative curvature where its minimisation ended: it is at a saddle, "
        "and has no hypergradient",
        "Start `params` elsewhere than at a point of symmetry, train further by a function given "
        "as `inner`, or add a `ridge` above the size of the negative curvature.",
    ),
    "inner_unsolved": (
        "the inner problem could not be minimised",
        "Where its loss falls for ever, as that of separable classes does, add a `ridge`. Where it "
        "is hard, raise `inner_steps`, scale the data, or train by a function given as `inner`.",
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
        The outer loss at the inner minimum, to first order in the error of the inner solve.
    gradient_norm : float
        Of the hypergradient, without the part that points out of the bounds.
    correction : float
        What was added to the outer loss for the error of the inner solve; NaN, and nothing added,
        where an optimizer or a function of yours solves the inner problem.
    inner_step : float
        Estimated length of a Newton step to the inner minimum, over the norm of the parameters.
    relative_residual : float
        Of the linear system.
    products, gradients : int
        Products with the inner Hessian, and gradients of the inner loss.
    rejected : str
        Why it is of no use, a key of `REMEDIES`; empty where it is.
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
        The hyperparameters with the lowest outer loss, and the inner minimum there.
    value : float
        The outer loss there.
    history : tuple of Evaluation
        One for each evaluation of the outer loss, in order.
    products, gradients : int
        Products with the inner Hessian, and gradients of the inner loss, all told.
    reason : str
        ``"converged"``, ``"precision"``, ``"max_evaluations"``, ``"callback"``, ``"flat"``,
        ``"nonfinite"``, ``"indefinite"`` or ``"inner_unsolved"``.
    num_at_bounds : int
        Hyperparameters at a bound.
    state : HypergradientState
        Of the latest hypergradient.
    info : HypergradientInfo or None
        Of the latest hypergradient; None where all were read from a checkpoint.
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
        """Whether a minimum was reached, to the tolerance or to the precision at hand."""
        return self.reason in ("converged", "precision")

    def explain(self) -> str:
        """Say in a few lines how it went, why it ended, and what to do about it."""
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
