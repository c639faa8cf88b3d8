"""The lineax solver; imported only where lineax is wanted."""

from __future__ import annotations

from typing import Any

import jax

try:
    import equinox as eqx
    import lineax
except ImportError as error:
    raise ImportError(
        'as_lineax needs lineax. Install it with: pip install "lowrank-inverse[lineax]"'
    ) from error
from lowrank_inverse._typing import RNG
from lowrank_inverse.operators.function import FunctionOperator
from lowrank_inverse.results.solution import Reason
from lowrank_inverse_jax.curvature.derivatives import full_precision
from lowrank_inverse_jax.parameters import as_parameters

FAILURES = (
    (Reason.NEGATIVE_CURVATURE, lineax.RESULTS.breakdown),
    (Reason.SINGULAR, lineax.RESULTS.singular),
    (Reason.INDEFINITE_PRECONDITIONER, lineax.RESULTS.breakdown),
    (Reason.NONFINITE, lineax.RESULTS.breakdown),
    (Reason.DIVERGED, lineax.RESULTS.breakdown),
    (Reason.STAGNATED, lineax.RESULTS.stagnation),
)


class LineaxSolver(lineax.AbstractLinearSolver):
    """Settings as a lineax solver for semidefinite operators.

    A solver that runs to a fixed amount of work (`max_steps`, `num_terms`, `rank`) counts as
    successful. The statistics include `reason` and `residual_norm`.
    """

    settings: Any = eqx.field(static=True)
    rng: RNG = eqx.field(static=True, default=None)

    def init(self, operator: Any, options: dict[str, Any]) -> Any:
        """Take the operator, with the sign that makes it positive."""
        del options
        negative = lineax.is_negative_semidefinite(operator)
        if not (negative or lineax.is_positive_semidefinite(operator)):
            raise ValueError(
                "`operator` must be tagged lineax.positive_semidefinite_tag or "
                "lineax.negative_semidefinite_tag."
            )
        return lineax.linearise(-operator if negative else operator), -1 if negative else 1

    def compute(
        self, state: Any, vector: Any, options: dict[str, Any]
    ) -> tuple[Any, Any, dict[str, Any]]:
        """Solve for one right-hand side."""
        del options
        operator, sign = state
        rhs = as_parameters(vector, name="vector")

        def multiply(flat: jax.Array) -> jax.Array:
            return as_parameters(operator.mv(rhs.replace(flat)), name="A x").vector

        with full_precision():
            A = FunctionOperator(multiply, rhs.n, like=rhs.vector)
            inverse = self.settings.prepare(A, rng=self.rng)
            solution = inverse.solve(sign * rhs.vector)
        result = lineax.RESULTS.successful
        for reason, failure in FAILURES:
            result = lineax.RESULTS.where(solution.reason == int(reason), failure, result)
        statistics = {
            "num_steps": solution.num_steps,
            "num_products": inverse.num_products + solution.num_products,
            "residual_norm": solution.residual_norm,
            "reason": solution.reason,
        }
        return rhs.replace(solution.value), result, statistics

    def transpose(self, state: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return the state of the transposed, hence the same, operator."""
        return state, options

    def conj(self, state: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return the state of the conjugated, hence the same, operator."""
        return state, options

    def assume_full_rank(self) -> bool:
        """Say that the operator, with the damping, has an inverse."""
        return True
