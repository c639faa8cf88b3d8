"""Conjugate gradients for linear operators, with a status for each column."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

from array_api_compat import array_namespace

from lowrank_inverse._typing import Array, LinearOperator, OperatorLike, Scalar
from lowrank_inverse.arrays.checks import check_count, describe
from lowrank_inverse.arrays.control_flow import quietly, while_loop
from lowrank_inverse.arrays.conversion import astype, scalar_like, zero_rows
from lowrank_inverse.arrays.linalg import add_scaled, choose, column_norm
from lowrank_inverse.arrays.scale import column_scale
from lowrank_inverse.arrays.spread import reduced
from lowrank_inverse.iterative.block_recursion import block_sweep
from lowrank_inverse.iterative.preconditioning import checked_preconditioner
from lowrank_inverse.iterative.recursion import (
    RUNNING,
    Kept,
    Progress,
    System,
    column_sweep,
    residual,
    true_residual,
)
from lowrank_inverse.operators.differentiation import constant, implicit
from lowrank_inverse.operators.function import aslinearoperator
from lowrank_inverse.operators.product import block_width
from lowrank_inverse.results.solution import (
    Pairs,
    Reason,
    Solution,
    check_system,
    code,
    ended,
    tolerance,
)

STAGNATION_FACTOR = 0.9
BLOCK_SIZE = 32


def cg(
    A: OperatorLike,
    b: Array,
    *,
    damping: Scalar = 0.0,
    x0: Array | None = None,
    preconditioner: LinearOperator | None = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_steps: int | None = None,
    check_every: int = 1,
    callback: Callable[[Array, Array], object] | None = None,
    block_size: int = BLOCK_SIZE,
    keep: int = 0,
) -> Solution:
    """Solve ``(A + damping * I) x = b`` by preconditioned conjugate gradients [1]_.

    Parameters
    ----------
    A : linear operator, shape (n, n)
        Symmetric; ``A + damping * I`` must be positive definite.
    b : array, shape (n,) or (n, m)
        Right-hand sides, one per column. Each column has its own status.
    damping : float or 0-d array
        Added to the diagonal; 0 or more.
    x0 : array, shape of `b`, optional
        Starting point. Default: zero.
    preconditioner : linear operator, shape (n, n), optional
        Positive definite approximation of the inverse of ``A + damping * I``, up to a factor.
    rtol, atol : float
        A column converges when its residual norm is at most ``max(rtol * norm(b), atol)``.
    max_steps : int, optional
        Maximum number of steps. Default: ``10 * n``.
    check_every : int
        Number of steps between two convergence tests outside ``jax.jit``. A test makes the host
        wait for the accelerator. Fewer tests may cost up to ``check_every - 1`` products after
        convergence, which are counted.
    callback : callable (num_steps, residual_norm), optional
        Called after each step with the number of steps and the norms of the recursive residuals,
        of shape () or (m,). Under ``jax.jit`` both are traced: use ``jax.debug.callback`` inside.
    block_size : int
        Number of columns of `b` that share one Krylov space [2]_, [3]_. Each column profits from
        the products of the others, so the total number of products falls. Converged columns and
        linearly dependent directions leave the block. Negative curvature ends every column of the
        block whose residual has a component along it. Further columns are solved block by block.
        1 solves each column by itself.
    keep : int
        Number of directions, the first ones, to return in `directions` with their products with
        `A`. Takes ``2 keep n`` numbers.

    Returns
    -------
    Solution
        `residual_norm` is computed from the solution, not by recursion. `reason` says why a column
        did not converge. `value` is the last iterate, with two exceptions. After a breakdown
        (nonpositive curvature, a nonfinite product, an indefinite preconditioner) it is the iterate
        of smallest residual from the first step on. After stagnation it is the iterate of smallest
        true residual among those confirmed and `x0`.

    Raises
    ------
    ValueError, TypeError
        If the operands do not fit together or are not finite.

    Notes
    -----
    Cost: one product per step and active column, one to confirm the residual, and one for a nonzero
    `x0`; the preconditioner is applied as often, except for `x0`. Memory: 9 vectors, or 12 arrays
    of the size of a block. When the true residual does not confirm the tolerance, the recursion
    restarts from it, until it no longer falls. Residuals are scaled to a largest entry of 1, so the
    scales of `A` and `b` only change the scale of the solution. Under ``jax.jit`` a single column
    that fails repeats the steps to its best iterate, which saves a copy in each step;
    `num_products` includes them. In PyTorch and JAX, `value` has the derivatives of the exact
    solution, computed by another solve to the same tolerance instead of through the steps.

    References
    ----------
    .. [1] M. R. Hestenes, E. Stiefel. Methods of Conjugate Gradients for Solving Linear
       Systems. J. Res. Nat. Bur. Standards 49, 1952.
    .. [2] D. P. O'Leary. The Block Conjugate Gradient Algorithm and Related Methods. Linear
       Algebra Appl. 29, 1980.
    .. [3] H. Ji, Y. Li. A Breakdown-Free Block Conjugate Gradient Method. BIT 57, 2017.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank_inverse as li
    >>> solution = li.cg(np.diag([1.0, 2.0, 4.0]), np.ones(3))
    >>> print(solution.value, solution.num_steps, solution.message)
    [1.   0.5  0.25] 3 converged
    """
    A = aslinearoperator(A)
    options = {
        "preconditioner": constant(preconditioner, silent=True),
        "rtol": rtol,
        "atol": atol,
        "max_steps": max_steps,
        "check_every": check_every,
        "callback": callback,
        "block_size": block_size,
    }

    def make(A: OperatorLike, damping: Scalar) -> Any:
        return partial(conjugate_gradients, A, damping=damping, **options)

    return implicit(A, damping, b, make, x0=x0, keep=keep)


@quietly
def conjugate_gradients(
    A: OperatorLike,
    b: Array,
    x0: Array | None,
    keep: int = 0,
    *,
    damping: Scalar,
    preconditioner: LinearOperator | None = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_steps: int | None = None,
    check_every: int = 1,
    callback: Callable[[Array, Array], object] | None = None,
    block_size: int = BLOCK_SIZE,
) -> Solution:
    """Run :func:`cg` for a constant operator, without derivatives."""
    n = int(A.shape[0])
    check_system(A, b, damping, x0)
    max_steps = 10 * n if max_steps is None else check_count("max_steps", max_steps)
    check_every = check_count("check_every", check_every)
    preconditioner = checked_preconditioner(preconditioner, n)
    if keep:
        keep = min(check_count("keep", keep), max_steps * block_width(b))
    block_size = check_count("block_size", block_size)
    blockwise = block_width(b) > 1 and block_size > 1
    if keep and block_width(b) > 1 and not blockwise:
        raise ValueError(f"`keep` needs `b` of shape (n,) or a block; got {describe(b)}.")
    if blockwise and b.shape[1] > block_size:
        options = {
            "damping": damping,
            "preconditioner": preconditioner,
            "rtol": rtol,
            "atol": atol,
            "max_steps": max_steps,
            "check_every": check_every,
            "callback": callback,
            "block_size": block_size,
        }
        return _one_block_after_the_other(A, b, x0, keep, options)
    sweep_over = block_sweep if blockwise else column_sweep
    xp = array_namespace(b)
    damping = scalar_like(damping, b)
    system = System(A, damping, preconditioner, max_steps, check_every, callback, keep)
    target = tolerance(b, rtol, atol)

    x = xp.zeros_like(b)
    if x0 is not None:  # a zero right-hand side has the solution zero, wherever x0 lies
        x = xp.where(reduced(xp.any(b != 0, axis=0)), x0, x)
    r = b if x0 is None else residual(system, b, x)
    norm = column_norm(r)
    if x0 is not None:  # a start whose residual overflows is none
        finite = xp.isfinite(norm)
        x, r = choose(finite, x, xp.zeros_like(x)), choose(finite, r, b)
        norm = xp.where(finite, norm, column_norm(b))

    def sweep(state: Progress) -> Progress:
        scale = column_scale(state.r)
        swept = sweep_over(system, state, scale, target / scale)
        back, d = xp.zeros_like(state.reason, dtype=xp.bool), swept.d
        if swept.best_d is not None:
            d = choose(swept.flag == RUNNING, d, swept.best_d)
        else:  # without a copy: the steps to the best iterate are taken again
            back = (swept.flag != RUNNING) & (swept.best_steps < swept.num_steps)
        x = add_scaled(state.x, scale, d)
        active = state.reason == RUNNING
        r, num_products = true_residual(system, b, x, state.r, active)
        norm = column_norm(r)
        fell = norm < STAGNATION_FACTOR * state.norm
        reason = xp.where(fell, code(swept.flag, RUNNING), code(swept.flag, Reason.STAGNATED))
        reason = xp.where(swept.num_steps >= max_steps, code(reason, Reason.MAX_STEPS), reason)
        reason = xp.where(swept.flag != RUNNING, swept.flag, reason)
        reason = xp.where(state.verdict != RUNNING, state.verdict, reason)
        reason = xp.where(norm <= target, code(reason, Reason.CONVERGED), reason)
        finite = xp.isfinite(norm)
        reason = xp.where(finite, reason, code(reason, Reason.NONFINITE))
        # A correction that made it worse is left out, where the recursion claimed the contrary.
        # Zero is no answer, though its residual may be smaller than that of an ill-conditioned one.
        sound = (norm < state.norm) | (state.num_products == 0) | ~ended(reason, Reason.STAGNATED)
        back = active & back
        accepted = active & finite & sound & ~back
        reason = xp.where(back, code(reason, RUNNING), reason)
        return Progress(
            choose(accepted, x, state.x),
            choose(back, state.r, r),
            xp.where(accepted, norm, state.norm),
            xp.where(back, state.num_steps, swept.num_steps),
            xp.where(swept.num_steps > state.taken, swept.num_steps, state.taken),
            state.limit
            if swept.best_d is not None
            else xp.where(back, swept.best_steps, state.limit),
            xp.where(back, swept.flag, state.verdict),
            xp.where(active, reason, state.reason),
            swept.num_products + num_products,
            swept.kept,
        )

    steps = astype(xp.zeros_like(norm), xp.int32)
    # b = 0 and an exact start are done at once.
    reason = xp.where(norm <= target, code(steps, Reason.CONVERGED), code(steps, RUNNING))
    reason = xp.where(xp.isfinite(norm), reason, code(steps, Reason.NONFINITE))
    kept = None
    if keep:
        S, Y = (zero_rows(keep, b) for _ in range(2))
        kept = Kept(S, Y, 0)
    limit, verdict = code(steps, max_steps), code(steps, RUNNING)
    products = 0 if x0 is None else block_width(b)
    start = Progress(x, r, norm, steps, steps, limit, verdict, reason, products, kept)
    end = while_loop(lambda state: xp.any(state.reason == RUNNING), sweep, start)
    return Solution(
        value=end.x,
        residual_norm=end.norm,
        num_steps=end.taken,
        num_products=end.num_products,
        converged=ended(end.reason, Reason.CONVERGED),
        reason=end.reason,
        initial_residual_norm=norm,
        directions=None if end.kept is None else Pairs(end.kept.S.T, end.kept.Y.T),
    )


def _one_block_after_the_other(
    A: OperatorLike, b: Array, x0: Array | None, keep: int, options: Any
) -> Solution:
    """Solve for blocks of columns of about equal widths; the first one's directions are kept."""
    xp, width = array_namespace(b), b.shape[1]
    count = -(-width // options["block_size"])
    edges = [width * i // count for i in range(count + 1)]
    solutions: list[Solution] = []
    for start, stop in itertools.pairwise(edges):
        part = None if x0 is None else x0[:, start:stop]
        solutions.append(conjugate_gradients(A, b[:, start:stop], part, keep, **options))
        keep = 0

    def joined(name: str) -> Array:
        return xp.concat([getattr(solution, name) for solution in solutions], axis=-1)

    per_column = ("value", "residual_norm", "num_steps", "converged", "reason")
    return solutions[0]._replace(
        num_products=sum(solution.num_products for solution in solutions),
        **{name: joined(name) for name in (*per_column, "initial_residual_norm")},
    )
