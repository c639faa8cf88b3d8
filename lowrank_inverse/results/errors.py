"""Errors and warnings for failed solves: the reason of each column, and what to try."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

from lowrank_inverse._typing import Array, SolveFunction, Solver
from lowrank_inverse.arrays.conversion import is_traced, to_host
from lowrank_inverse.arrays.linalg import column_norm
from lowrank_inverse.results.solution import Reason, Solution

NO_BETTER = 1 - 1e-6
ADVICE = {
    Reason.MAX_STEPS: "all steps were used. Raise `max_steps`, loosen `rtol`, or use "
    "NystromCG with a larger `rank`. `x0=solution.value` continues from this solution.",
    Reason.NEGATIVE_CURVATURE: "A + damping * I is not positive definite. Raise `damping` above "
    "the most negative eigenvalue of A; for a Hessian, Gauss-Newton products are semidefinite.",
    Reason.STAGNATED: "the residual stopped decreasing: the tolerance is out of reach in this "
    "precision. Use float64, raise `damping`, or loosen `rtol`.",
    Reason.DIVERGED: "the step size is too large. Omit `step_size` to have it estimated, or use "
    "CG.",
    Reason.NONFINITE: "a product returned NaN or Inf. Look for an overflow in A @ v. Use float64 "
    "or rescale A.",
    Reason.INDEFINITE_PRECONDITIONER: "the preconditioner is not positive definite to rounding. "
    "Compute it in float64 or with a larger `damping`, or use CG.",
    Reason.SINGULAR: "A + damping * I is singular to rounding, and b is not in its range, so "
    "there is no solution. Raise `damping`, or project b onto the range of A.",
    Reason.DIRECT: "the residual of the direct method is above the tolerance.",
}


"""For each reason to fail."""
ADVICE_ON = {
    (
        Reason.MAX_STEPS,
        "Neumann",
    ): "all terms were used. Raise `num_terms`, or use CG, which needs far fewer products.",
    (Reason.DIRECT, "Nystrom"): "the low-rank solution is not that accurate. Raise `rank` or "
    "`damping`, add `refine` steps, or use NystromCG, which iterates to the tolerance.",
    (
        Reason.DIRECT,
        "Exact",
    ): "the matrix is singular to rounding, and b is not in its range. Raise `damping`.",
    (Reason.DIRECT, "Identity"): "a multiple of b is not a solution. Use another solver.",
    (
        Reason.DIRECT,
        "CallableSolver",
    ): "the function given as `solver` did not reach the tolerance.",
}


"""Where the solver makes a difference."""


class SolveError(RuntimeError):
    """A solve failed, and the caller passed ``throw=True``.

    Attributes
    ----------
    solution : Solution
        The solution as far as it was computed.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank_inverse as li
    >>> A, b = np.diag([1.0, 2.0, 4.0]), np.ones(3)
    >>> try:
    ...     li.solve(A, b, solver=li.CG(max_steps=2), throw=True)
    ... except li.SolveError as error:
    ...     print(error.solution.message, float(error.solution.residual_norm.round(2)))
    max_steps 0.32
    """

    def __init__(self, message: str, solution: Solution) -> None:
        super().__init__(message)
        self.solution = solution

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.args[0], self.solution)


def warn_of_nothing(solution: Solution, solver: Solver | SolveFunction, b: Array) -> None:
    """Warn if a column did not converge and its solution is no more accurate than zero."""
    if is_traced(solution.reason) or is_traced(solution.residual_norm):
        return
    norms, sizes = to_host(solution.residual_norm), to_host(column_norm(b))
    useless = ~to_host(solution.converged) & ~(norms < NO_BETTER * sizes)
    if np.any(useless):
        failed = sorted({int(code) for code in to_host(solution.reason)[useless]})
        advice = " ".join(_advice(Reason(code), solver) for code in failed)
        warnings.warn(
            f"{np.sum(useless)} of {useless.size} solutions are no better than zero "
            f"({solution.message}): {advice}",
            RuntimeWarning,
            stacklevel=4,
        )


def _advice(reason: Reason, solver: Solver | SolveFunction) -> str:
    return ADVICE_ON.get((reason, type(solver).__name__), ADVICE[reason])


def raise_on_failure(solution: Solution, solver: Solver | SolveFunction) -> None:
    """Raise a :class:`SolveError` unless every column of `solution` converged."""
    if is_traced(solution.reason):
        raise TypeError(
            "`throw=True` needs to know how the solve ended, which is unknown while jax traces. "
            "Omit it and check `solution.converged`."
        )
    codes = to_host(solution.reason).reshape(-1)
    failed = sorted({int(code) for code in codes} - {int(Reason.CONVERGED)})
    if not failed:
        return
    count = int((codes != int(Reason.CONVERGED)).sum())
    worst = float(to_host(solution.residual_norm).max())
    lines = [
        f"{count} of {codes.size} right-hand sides did not converge (residual norms up to "
        f"{worst:.2g}). `error.solution` holds the result."
    ]
    for code in failed:
        reason = Reason(code)
        lines.append(f"  {reason.name.lower()}: {_advice(reason, solver)}")
    raise SolveError("\n".join(lines), solution)
