"""The truncated Neumann series for linear operators."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from array_api_compat import array_namespace

from lowrank_inverse._typing import Array, OperatorLike, Scalar
from lowrank_inverse.arrays.checks import check_count, check_scalar
from lowrank_inverse.arrays.control_flow import quietly, while_loop
from lowrank_inverse.arrays.conversion import astype, eps, scalar_like
from lowrank_inverse.arrays.linalg import add_scaled, choose, column_norm, dot
from lowrank_inverse.arrays.scale import column_scale
from lowrank_inverse.estimators.extreme_eigenvalues import NUM_POWER_STEPS, largest_eigenvalue
from lowrank_inverse.operators.differentiation import constant, implicit
from lowrank_inverse.operators.function import aslinearoperator
from lowrank_inverse.results.solution import Reason, Solution, check_system, code, ended, tolerance

RUNNING = -1


class _State(NamedTuple):
    x: Array
    r: Array
    norm: Array
    num_steps: Array
    reason: Array
    overflowed: Array
    num_blocks: Any


def neumann(
    A: OperatorLike,
    b: Array,
    *,
    damping: Scalar = 0.0,
    num_terms: int = 10,
    step_size: Scalar = None,
    rtol: float = 1e-5,
) -> Solution:
    """Approximate ``(A + damping * I)^{-1} b`` by a truncated Neumann series [1]_.

    With ``B = A + damping * I``: ``x = step_size * sum_{j < num_terms} (I - step_size * B)^j b``.

    Parameters
    ----------
    A : linear operator, shape (n, n)
        Symmetric.
    b : array, shape (n,) or (n, m)
        Right-hand sides, one per column.
    damping : float or 0-d array
        Added to the diagonal; 0 or more.
    num_terms : int
        Number of terms. A column stops earlier if its residual meets `rtol`.
    step_size : float or 0-d array, optional
        The series converges for ``0 < step_size < 2 / lambda_max(B)``. Default: the inverse of an
        estimate of ``lambda_max(B)`` by 8 power iterations from a fixed vector. The series still
        converges if the estimate is too small by a factor of up to 2.
    rtol : float
        A column has converged if its residual norm is at most ``rtol * norm(b)``.

    Returns
    -------
    Solution
        `reason` is DIVERGED if a residual r with ``step_size * norm(B r) >= 2 * norm(r)`` shows
        that `step_size` is too large. `value` is the sum of all terms even then.

    Raises
    ------
    ValueError, TypeError
        If the operands do not fit together or are not finite.

    Notes
    -----
    Cost: one product per term and column, and 8 more for the default step size. In PyTorch and JAX,
    the derivatives are those of the exact solution, with the truncated series as the inverse.

    References
    ----------
    .. [1] J. Lorraine, P. Vicol, D. Duvenaud. Optimizing Millions of Hyperparameters by Implicit
       Differentiation. AISTATS 2020.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank_inverse as li
    >>> solution = li.neumann(np.diag([1.0, 2.0]), np.ones(2), num_terms=40)
    >>> print(solution.value.round(4), solution.message)
    [1.  0.5] converged
    """
    A = aslinearoperator(A)
    options = {"num_terms": num_terms, "step_size": constant(step_size), "rtol": rtol}

    def make(A: OperatorLike, damping: Scalar) -> Any:
        return partial(neumann_series, A, damping=damping, **options)

    return implicit(A, damping, b, make)


@quietly
def neumann_series(
    A: OperatorLike,
    b: Array,
    x0: Array | None = None,
    keep: int = 0,
    *,
    damping: Scalar,
    num_terms: int,
    step_size: Scalar,
    rtol: float,
) -> Solution:
    """Run :func:`neumann` for a constant operator, without derivatives."""
    check_system(A, b, damping)
    num_terms = check_count("num_terms", num_terms)
    xp = array_namespace(b)
    damping = scalar_like(damping, b)
    width = b.shape[1] if b.ndim == 2 else 1
    setup = 0
    if step_size is None:
        step_size, setup = 1 / largest_eigenvalue(A, damping, b), NUM_POWER_STEPS
    else:
        check_scalar("step_size", step_size, positive=True)
        step_size = scalar_like(step_size, b)
    scale = column_scale(b)
    b = b / scale
    target = tolerance(b, rtol)

    floor = eps(b) ** 0.5 * column_norm(b)  # below it rounding could be taken for divergence

    def going(state: _State) -> Array:
        done = ended(state.reason, Reason.CONVERGED, Reason.NONFINITE) | state.overflowed
        return ~done & (state.num_steps < num_terms)

    def term(state: _State) -> _State:
        active = going(state)
        x = choose(active, add_scaled(state.x, step_size, state.r), state.x)
        r = choose(active, b - add_scaled(A @ x, damping, x), state.r)
        norm, last = column_norm(r), state.norm
        change = state.r - r  # step_size * B r, of the last r
        finite = xp.isfinite(norm)
        clear = active & finite & (last > floor)
        reason = xp.where(
            clear & (dot(state.r / last, change) < 0),
            code(state.reason, Reason.NEGATIVE_CURVATURE),
            state.reason,
        )
        reason = xp.where(
            clear & (column_norm(change) >= 2 * last), code(reason, Reason.DIVERGED), reason
        )
        reason = xp.where(active & (norm <= target), code(reason, Reason.CONVERGED), reason)
        unexplained = ~finite & (reason == RUNNING)
        reason = xp.where(active & unexplained, code(reason, Reason.NONFINITE), reason)
        return _State(
            choose(finite, x, state.x),
            choose(finite, r, state.r),
            xp.where(finite, norm, state.norm),
            state.num_steps + astype(active & finite, xp.int32),
            reason,
            state.overflowed | ~finite,
            state.num_blocks + 1,
        )

    norm = column_norm(b)
    steps = astype(xp.zeros_like(norm), xp.int32)
    reason = xp.where(norm > 0, code(steps, RUNNING), code(steps, Reason.CONVERGED))
    reason = xp.where(xp.isfinite(norm), reason, code(steps, Reason.NONFINITE))
    first = _State(xp.zeros_like(b), b, norm, steps, reason, ~xp.isfinite(norm), 0)
    end = while_loop(lambda state: xp.any(going(state)), term, first)
    reason = xp.where(end.reason == RUNNING, code(steps, Reason.MAX_STEPS), end.reason)
    return Solution(
        value=end.x * scale,
        residual_norm=end.norm * scale,
        num_steps=end.num_steps,
        num_products=setup + end.num_blocks * width,
        converged=ended(reason, Reason.CONVERGED),
        reason=reason,
    )
