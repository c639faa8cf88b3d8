"""Tests of whether a hypergradient can be trusted, and advice."""

from __future__ import annotations

import math
import warnings
from typing import Any, NamedTuple

from lowrank_inverse.arrays.conversion import is_traced, to_host
from lowrank_inverse.bilevel.hessian_check import UNCERTAIN
from lowrank_inverse.results.solution import Reason

INNER_STEP = 0.1
"""Estimated distance to the inner minimum, over the norm of the parameters, to speak of."""

ASYMMETRY = 0.05
"""Of the entries of a Hessian, relative to the largest, to speak of in every precision."""
SMALLEST_STEP = 1e-4
"""The same, below which it is rounding or a tolerance, wherever it stands."""
ON_SUPPORT = 0.1
"""Share of the inner gradient by parameters that are not 0, to speak of a non-smooth loss."""
UNCONVERGED = 0.1
"""Relative residual to speak of where the solver was to converge and did not."""
CUT_SHORT = (Reason.MAX_STEPS, Reason.STAGNATED, Reason.DIVERGED, Reason.INDEFINITE_PRECONDITIONER)
SUSPICIOUS = ("asymmetric", "negative_curvature", "worse_than_identity", "unconverged")
"""Findings that a wrong Hessian may be behind."""


class HypergradientWarning(UserWarning):
    """Warns that a hypergradient may be wrong or inaccurate."""


class Finding(NamedTuple):
    """One problem found with a hypergradient.

    Attributes
    ----------
    name : str
        ``"negative_curvature"``, ``"asymmetric"``, ``"wrong_hessian"``, ``"not_smooth"``,
        ``"not_stationary"``, ``"worse_than_identity"``, ``"unconverged"``, ``"nonfinite"`` or
        ``"no_path"``.
    message, remedy : str
        What is wrong, with numbers, and what to do about it.
    """

    name: str
    message: str
    remedy: str


def findings(info: Any) -> tuple[Finding, ...]:
    """Return the problems found with a hypergradient, the most serious first.

    Parameters
    ----------
    info : HypergradientInfo
        From PyTorch or JAX, with concrete values of a single problem.

    Returns
    -------
    tuple of Finding
        Empty if nothing is wrong.

    Raises
    ------
    TypeError
        While JAX traces.
    ValueError
        If `info` is that of a batch, from ``jax.vmap``.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank_inverse.bilevel.diagnostics import findings
    >>> from lowrank_inverse.bilevel.info import HypergradientInfo
    >>> info = HypergradientInfo(9, 1e-6, 0.0, True, (), None)
    >>> print([finding.name for finding in findings(info)])
    ['negative_curvature']
    """
    found = []
    residual = _number(info, "relative_residual")
    bound, step = _number(info, "error_bound"), _number(info, "inner_step")
    reason = _number(info, "reason")
    if reason == Reason.NONFINITE or not math.isfinite(residual):
        found.append(
            Finding(
                "nonfinite",
                "A product with the Hessian returned NaN or Inf.",
                "Look for an operation whose second derivative is not finite there, such as the "
                "root or norm of 0, and for an overflow in half precision.",
            )
        )
    if _number(info, "negative_curvature"):
        found.append(
            Finding(
                "negative_curvature",
                "Hessian plus ridge plus damping has negative curvature: the parameters are not "
                "at a minimum of the inner problem, and no error bound holds.",
                "Train the inner problem further, pass its weight decay as `ridge`, or raise the "
                "damping of the solver above the size of the negative curvature.",
            )
        )
    asymmetry = _number(info, "asymmetry")
    if asymmetry > ASYMMETRY:
        found.append(
            Finding(
                "asymmetric",
                f"Entries of the Hessian differ from those across the diagonal by {asymmetry:.0%} "
                "of the largest: it is not the second derivative of a loss.",
                "Look for custom derivatives that save detached tensors. `check_hessian` names "
                "the parameter.",
            )
        )
    check = info.hessian_check
    if check is not None and not check.ok and check.uncertainty <= UNCERTAIN:
        found.append(Finding("wrong_hessian", check.difference, check.remedy))
    norm, on_support = _number(info, "inner_grad_norm"), _number(info, "support_grad_norm")
    if step > SMALLEST_STEP and on_support < ON_SUPPORT * norm:
        found.append(
            Finding(
                "not_smooth",
                f"Almost all of the inner gradient, of norm {norm:.1e}, is with respect to the "
                f"{_number(info, 'num_zeros'):.0f} parameters that are exactly 0 (the rest has "
                f"norm {on_support:.1e}). This happens at a minimum of a loss with an L1 term, "
                "where the formula holds only for the nonzero parameters.",
                "Put the nonzero parameters into a tensor of their own, pass it as `params`, and "
                "insert it among the zeros inside the losses. If the zeros are initial values, "
                "train the inner problem further.",
            )
        )
    elif step > INNER_STEP:
        found.append(
            Finding(
                "not_stationary",
                f"The gradient of the inner problem has norm {_number(info, 'inner_grad_norm'):.1e}"
                f". The minimum is about {step:.1g} times the norm of the parameters away, but the "
                "formula holds only at the minimum.",
                "Train the inner problem further. If the optimizer applies a weight decay that "
                "the inner loss does not include, pass it as `ridge`.",
            )
        )
    if bound >= 1 or residual >= 1:
        why = (
            f"The error bound is {bound:.1g} times the norm of the solution"
            if bound >= 1
            else f"The residual is {residual:.1g} times the outer gradient"
        )
        found.append(
            Finding(
                "worse_than_identity",
                f"{why}: nothing shows that the inverse product is more accurate than zero or a "
                "multiple of the outer gradient.",
                "Raise `max_steps` or the rank, pass `state=out.state` from step to step, use "
                "NystromCG instead of Nystrom, or raise the damping.",
            )
        )
    elif residual > UNCONVERGED and reason in CUT_SHORT:
        found.append(
            Finding(
                "unconverged",
                f"The solver ended at {Reason(int(reason)).name.lower()}, with a residual of "
                f"{residual:.1g} times the outer gradient.",
                "Raise `max_steps` or the rank, pass `state=out.state` from step to step, or raise "
                "the damping.",
            )
        )
    if info.hparams_without_path:
        names = ", ".join(map(repr, info.hparams_without_path))
        found.append(
            Finding(
                "no_path",
                f"Neither loss depends on {names}, so the gradient is zero.",
                "Use the tensors themselves inside the losses, without detach(), or remove them "
                "from `hparams`.",
            )
        )
    return tuple(found)


def explain(info: Any) -> str:
    """Describe the cost and accuracy of a hypergradient, and the problems found.

    Parameters and errors are those of :func:`findings`.
    """
    lines = [f"{_number(info, 'num_products'):.0f} products with the Hessian"]
    if info.recycled is not None:
        lines[0] += f"; {_number(info, 'recycled'):.0f} pairs of earlier ones recycled"
    if info.rank is not None:
        lines[0] += f"; rank {_number(info, 'rank'):.0f}"
    plan = info.memory
    if plan is not None:
        size = f"{plan.num_bytes / 2**20:.3g} MiB"
        lines.append(f"{size} for columns and chunks, columns {plan.memory}")
    reason = _number(info, "reason")
    ended = "" if math.isnan(reason) else f" ({Reason(int(reason)).name.lower()})"
    lines.append(f"relative residual {_number(info, 'relative_residual'):.1e}{ended}")
    bound = _number(info, "error_bound")
    if math.isfinite(bound):
        lines.append(f"relative error of the inverse product at most {bound:.1e}")
    found = findings(info)
    if not found:
        return "\n".join([*lines, "nothing to warn of"])
    lines += [f"{one.name}: {one.message}\n    {one.remedy}" for one in found]
    if any(one.name in SUSPICIOUS for one in found):
        lines.append("check_hessian(inner_loss, params) tells whether the Hessian is the right one")
    return "\n".join(lines)


def warn(info: Any) -> None:
    """Issue a :class:`HypergradientWarning` for each finding.

    Parameters and errors are those of :func:`findings`.
    """
    for one in findings(info):
        warnings.warn(f"{one.message} {one.remedy}", HypergradientWarning, stacklevel=3)


def _number(info: Any, name: str) -> float:
    """Return a field as a float, NaN where there is none."""
    value = getattr(info, name)
    if value is None:
        return math.nan
    if is_traced(value):
        raise TypeError(
            "the info of a hypergradient has no values while jax traces. Return it from the "
            "compiled function and call this outside."
        )
    if getattr(value, "ndim", 0) != 0:
        raise ValueError(
            "the info must be that of one problem; got that of a batch. Take the i-th entry: "
            "jax.tree.map(lambda x: x[i], info)."
        )
    return float(to_host(value)) if hasattr(value, "ndim") else float(value)
