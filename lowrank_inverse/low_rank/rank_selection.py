"""Adaptive choice of the rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from array_api_compat import array_namespace

from lowrank_inverse._typing import RNG, Array, OperatorLike, Sampling, Scalar
from lowrank_inverse.arrays.checks import check_count, check_scalar
from lowrank_inverse.arrays.conversion import concrete, is_traced, to_host
from lowrank_inverse.arrays.linalg import column_norm
from lowrank_inverse.estimators.extreme_eigenvalues import power_norm
from lowrank_inverse.estimators.norm import certificate_cost
from lowrank_inverse.low_rank.core import FLOAT64_EPS
from lowrank_inverse.low_rank.sketches import Source, make_source
from lowrank_inverse.operators.product import apply_cost, block_width
from lowrank_inverse.results.certificate import certify
from lowrank_inverse.results.solution import check_system

START_RANK = 16
MAX_RANK = 1000
DEFAULT_RTOL = 1e-3
POWER_STEPS = 4


def adaptive_approximation(
    A: OperatorLike,
    build: Callable[[Any], Any],
    *,
    sampling: Sampling,
    rng: RNG,
    chunk_size: int | None,
    damping: Scalar,
    b: Array | None,
    rtol: float | None,
    max_rank: int | None,
    weights: Any = None,
) -> Any:
    """Double the columns until the approximation of `build` is accurate enough; see ``nystrom``.

    No column is read twice. All intermediate approximations together cost ``4/3`` of the last.
    """
    n = int(A.shape[0])
    most = min(n, MAX_RANK if max_rank is None else check_count("max_rank", max_rank))
    by_steps = damping is not None and b is None and rtol is not None
    rtol = DEFAULT_RTOL if rtol is None else rtol
    check_scalar("rtol", rtol)
    if is_traced(damping) or is_traced(getattr(A, "like", None)) or is_traced(b):
        raise TypeError(
            "rank='auto' needs values that are unknown while jax traces. Compute the rank or "
            "the `indices` outside and pass them."
        )
    if damping is not None:
        check_scalar("damping", damping, positive=True)
    if b is not None:
        if damping is None:
            raise ValueError("`b` needs a `damping`: the certificate holds for a damped system.")
        check_system(A, b, damping)
    source = make_source(
        A,
        most,
        sampling=sampling,
        rng=rng,
        chunk_size=chunk_size,
        weights=weights,
        want_trace=True,
        b=b,
    )
    if damping is None and source.trace is None:
        raise ValueError(
            "rank='auto' needs a target: a positive `damping`, or an `A` with a diagonal for "
            "the residual trace. Pass one of them, or a number as `rank`."
        )
    goal = 0.0 if b is not None else rtol * (source.trace or 0.0) if damping is None else damping
    checks, count = 0, min(START_RANK, most)
    while True:
        source.grow(count, trace=float(goal))
        approx = build(source.sketch())
        stopped, cost = _reason(A, approx, source, goal, damping, b, rtol, by_steps)
        checks += cost
        if stopped is None and count == most:
            stopped = "max_rank"
        if stopped is not None:
            approx.stopped, approx.num_products = stopped, approx.num_products + checks
            return approx
        count = min(2 * count, most)


def least_missed(approx: Any) -> float:
    """Return an optimistic norm of ``A - H_k``: the least eigenvalue found, or the mean missed."""
    g = to_host(approx.eigenvalues)
    missed = max(0.0, float(g[max(0, int(approx.rank) - 1)]))
    if approx.trace is None:
        return missed
    return max(missed, approx.residual_trace / max(1, approx.shape[0] - approx.num_columns))


def norm_missed(A: OperatorLike, approx: Any) -> float:
    """Estimate the norm of ``A - H_k`` from below, by `POWER_STEPS` steps of the power method."""
    norm = power_norm(lambda v: A @ v - approx @ v, approx.columns, POWER_STEPS)
    return float(concrete(norm))


def steps_left(missed: float, damping: Scalar, rtol: float) -> float:
    """Return the bound ``sqrt(c) / 2 * log(2 / rtol)`` on the steps of conjugate gradients.

    The condition number is ``c = 1 + missed / damping``, for an approximation that misses a matrix
    of norm `missed` and preconditions them.
    """
    condition = 1 + missed / float(concrete(damping))
    return 0.5 * condition**0.5 * math.log(2 / max(rtol, FLOAT64_EPS))


def doubling_cost(A: OperatorLike, approx: Any) -> float:
    """Estimate the extra cost of twice the columns, in products with `A`.

    Choosing and orthonormalising k columns takes about ``8 n k**2`` operations. A product takes 2
    operations per entry of a matrix, and the cost of an entry per entry of a kernel. If entries
    cannot be read, a column costs a product.
    """
    k, n = approx.num_columns, approx.shape[0]
    algebra = 24 * k * k / (n * getattr(A, "entry_operations", 2))
    return algebra + (0 if hasattr(A, "submatrix") else k)


def _reason(
    A: OperatorLike,
    approx: Any,
    source: Source,
    goal: float,
    damping: Scalar,
    b: Array | None,
    rtol: float,
    by_steps: bool,
) -> tuple[str | None, int]:
    """Return why `approx` is enough, None if it is not, and the products that took."""
    cost = 0
    if b is not None:
        inverse = approx.inverse(damping)
        x = inverse @ b
        bound = certify(A, b, x, damping=damping, inverse=inverse).error_bound
        width = block_width(b)
        cost = width + certificate_cost(A) + apply_cost(inverse, width)
        if bool(array_namespace(b).all(bound <= rtol * column_norm(x))):
            return "certificate", cost
    else:
        traces = [t for t in (source.residual_trace, approx.residual_trace) if t is not None]
        if traces and min(traces) <= goal:
            return "residual_trace", cost
        if damping is not None and approx.sufficient_rank(damping) <= approx.num_columns:
            return "effective_dimension", cost
        if by_steps:
            price, least = doubling_cost(A, approx), least_missed(approx)
            if steps_left(least, damping, rtol) <= price:  # too few, and by the norm too many
                cost += POWER_STEPS
                between = (least * norm_missed(A, approx)) ** 0.5
                if steps_left(between, damping, rtol) <= price:
                    return "steps", cost
    if source.exhausted or source.size >= int(A.shape[0]):
        return "exhausted", cost
    return None, cost
