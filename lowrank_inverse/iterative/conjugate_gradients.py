"""Conjugate gradients on abstract operators, one status a column."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from array_api_compat import array_namespace

from lowrank_inverse._typing import Array, LinearOperator, Scalar
from lowrank_inverse.arrays.checks import check_count, describe
from lowrank_inverse.arrays.control_flow import quietly, while_loop
from lowrank_inverse.arrays.conversion import astype, eps, is_traced, like_device, scalar_like
from lowrank_inverse.arrays.linalg import (
    add_scaled,
    add_to,
    choose,
    column_norm,
    column_scale,
    copy_where,
    dot,
    scale_and_add,
    set_rows,
)
from lowrank_inverse.iterative.preconditioning import apply_preconditioner, checked_preconditioner
from lowrank_inverse.operators.function import aslinearoperator
from lowrank_inverse.results.solution import (
    Pairs,
    Reason,
    Solution,
    check_system,
    code,
    ended,
    tolerance,
)

RUNNING = -1
STAGNATION_FACTOR = 0.9


class _System(NamedTuple):
    """What does not change during a solve."""

    A: Any
    damping: Scalar
    preconditioner: Any
    max_steps: int
    check_every: int
    callback: Callable[[Array, Array], object] | None
    num_kept: int


class _Kept(NamedTuple):
    """Directions of unit length and their products, both of shape (k, n), and how many so far."""

    S: Array
    Y: Array
    count: Any


class _Progress(NamedTuple):
    """State between sweeps; `r` is the true residual of `x` in the columns still at work."""

    x: Array
    r: Array
    norm: Array
    num_steps: Array
    reason: Array
    num_blocks: Any
    kept: _Kept | None


class _Sweep(NamedTuple):
    """State of the recursion for the correction d of x, from one true residual to the next."""

    d: Array
    r: Array
    p: Array
    rz: Array
    pp: Array
    """The square of the norm of p that the preconditioner defines."""
    top: Array
    """The largest curvature met, over pp."""
    best_d: Array
    smallest: Array
    num_steps: Array
    flag: Array
    num_blocks: Any
    kept: _Kept | None


@quietly
def cg(
    A: Any,
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
    keep: int = 0,
) -> Solution:
    """Solve ``(A + damping * I) x = b`` by preconditioned conjugate gradients [1]_.

    Parameters
    ----------
    A : linear operator, shape (n, n)
        Symmetric; ``A + damping * I`` positive definite.
    b : array, shape (n,) or (n, m)
        Right-hand sides, one per column; each has its own step lengths and its own status.
    damping : float or 0-d array
        Added to the diagonal; 0 or more.
    x0 : array, shape of `b`, optional
        Where to start. Default: zero.
    preconditioner : linear operator, shape (n, n), optional
        Approximates the inverse of ``A + damping * I``; positive definite. Its scale is free.
    rtol, atol : float
        A column is done when its residual norm is at most ``max(rtol * norm(b), atol)``.
    max_steps : int, optional
        Default: ``10 * n``.
    check_every : int
        Steps between two looks at the stopping test, outside ``jax.jit``. A look makes the host
        wait for an accelerator; without it up to ``check_every - 1`` products are taken in vain,
        and counted.
    callback : callable (num_steps, residual_norm), optional
        Called after each step with the steps and the norms of the carried residuals so far, of
        shape () or (m,). Under ``jax.jit`` both are traced: use ``jax.debug.callback`` inside.
    keep : int
        Of how many directions, the first ones, to return the products with `A`, as `directions`
        of the result: ``2 keep n`` numbers. For `b` of shape (n,).

    Returns
    -------
    Solution
        With the residual computed anew from the solution, not carried along. A column that
        ends before the tolerance says why in `reason`. `value` is the last iterate; at negative or
        no curvature, at a product that is not finite and at an indefinite preconditioner, that with
        the smallest residual after the first step; and where the column stagnated, that with the
        smallest true residual among those confirmed (and `x0`, if given).

    Raises
    ------
    ValueError, TypeError
        For operands that do not fit, or are not finite.

    Notes
    -----
    One product a step and column, one more to confirm, and one to start from `x0`; the
    preconditioner is applied as often, the start from `x0` apart. When the
    recursion claims a tolerance that the true residual does not confirm, it starts again from
    the true residual, for the correction, until that ceases to fall. Residuals are scaled to a
    largest entry of 1, so the scales of `A` and `b` change nothing but the scale of the answer.
    Memory: 9 blocks of the size of `b`.

    References
    ----------
    .. [1] M. R. Hestenes, E. Stiefel. Methods of Conjugate Gradients for Solving Linear
       Systems. J. Res. Nat. Bur. Standards 49, 1952.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank_inverse as li
    >>> solution = li.cg(np.diag([1.0, 2.0, 4.0]), np.ones(3))
    >>> print(solution.value, solution.num_steps, solution.message)
    [1.   0.5  0.25] 3 converged
    """
    A = aslinearoperator(A)
    n = int(A.shape[0])
    check_system(A, b, damping, x0)
    max_steps = 10 * n if max_steps is None else check_count("max_steps", max_steps)
    check_every = check_count("check_every", check_every)
    preconditioner = checked_preconditioner(preconditioner, n)
    if keep:
        keep = min(check_count("keep", keep), max_steps)
        if b.ndim != 1:
            raise ValueError(f"`keep` is for one right-hand side; got `b` {describe(b)}.")
    xp = array_namespace(b)
    damping = scalar_like(damping, b)
    system = _System(A, damping, preconditioner, max_steps, check_every, callback, keep)
    target = tolerance(b, rtol, atol)

    def residual(x: Array) -> Array:
        return b - add_scaled(A @ x, damping, x)

    x = xp.zeros_like(b)
    if x0 is not None:  # a zero right-hand side has the solution zero, wherever x0 lies
        x = xp.where(xp.any(b != 0, axis=0), x0, x)
    r = b if x0 is None else residual(x)
    norm = column_norm(r)
    if x0 is not None:  # a start whose residual overflows is none
        finite = xp.isfinite(norm)
        x, r = choose(finite, x, xp.zeros_like(x)), choose(finite, r, b)
        norm = xp.where(finite, norm, column_norm(b))

    def sweep(state: _Progress) -> _Progress:
        scale = column_scale(state.r)
        swept = _sweep(system, state, scale, target / scale)
        x = add_scaled(state.x, scale, choose(swept.flag == RUNNING, swept.d, swept.best_d))
        r = residual(x)
        norm = column_norm(r)
        fell = norm < STAGNATION_FACTOR * state.norm
        reason = xp.where(fell, code(swept.flag, RUNNING), code(swept.flag, Reason.STAGNATED))
        reason = xp.where(swept.num_steps >= max_steps, code(reason, Reason.MAX_STEPS), reason)
        reason = xp.where(swept.flag != RUNNING, swept.flag, reason)
        reason = xp.where(norm <= target, code(reason, Reason.CONVERGED), reason)
        finite = xp.isfinite(norm)
        reason = xp.where(finite, reason, code(reason, Reason.NONFINITE))
        # A correction that made it worse is left out, where the recursion claimed the contrary.
        # Zero is no answer, though its residual may be smaller than that of an ill-conditioned one.
        sound = (norm < state.norm) | (state.num_blocks == 0) | ~ended(reason, Reason.STAGNATED)
        active = state.reason == RUNNING
        accepted = active & finite & sound
        return _Progress(
            choose(accepted, x, state.x),
            r,
            xp.where(accepted, norm, state.norm),
            swept.num_steps,
            xp.where(active, reason, state.reason),
            swept.num_blocks + 1,
            swept.kept,
        )

    steps = astype(xp.zeros_like(norm), xp.int32)
    # b = 0 and an exact start are done at once.
    reason = xp.where(norm <= target, code(steps, Reason.CONVERGED), code(steps, RUNNING))
    reason = xp.where(xp.isfinite(norm), reason, code(steps, Reason.NONFINITE))
    kept = None
    if keep:
        S, Y = (xp.zeros((keep, n), dtype=b.dtype, device=like_device(b)) for _ in range(2))
        kept = _Kept(S, Y, 0)
    start = _Progress(x, r, norm, steps, reason, 0 if x0 is None else 1, kept)
    end = while_loop(lambda state: xp.any(state.reason == RUNNING), sweep, start)
    return Solution(
        value=end.x,
        residual_norm=end.norm,
        num_steps=end.num_steps,
        num_products=end.num_blocks * (b.shape[1] if b.ndim == 2 else 1),
        converged=ended(end.reason, Reason.CONVERGED),
        reason=end.reason,
        initial_residual_norm=norm,
        directions=None if end.kept is None else Pairs(end.kept.S.T, end.kept.Y.T),
    )


def _sweep(system: _System, start: _Progress, scale: Array, target: Array) -> _Sweep:
    """Run the recursion for ``start.r / scale`` until every column claims to meet `target`."""
    A, damping, preconditioner, max_steps, check_every, callback, num_kept = system
    xp = array_namespace(start.x)
    r = start.r / scale
    norm, unit = column_norm(r), eps(r)
    # Below eps times its start the recursion says nothing about the true residual.
    target = xp.where(target > unit * norm, target, unit * norm)
    running = start.reason == RUNNING
    damped = is_traced(damping) or damping != 0

    def going(state: _Sweep) -> Array:
        more = (state.smallest > target) & (state.num_steps < max_steps)
        return running & (state.flag == RUNNING) & more

    def step(state: _Sweep) -> _Sweep:
        active = going(state)
        product = A @ state.p  # of A alone: perhaps an array of the operator's own
        curvature = dot(state.p, product)
        if damped:
            curvature = curvature + damping * dot(state.p, state.p)
        top = xp.where(curvature > state.top * state.pp, curvature / state.pp, state.top)
        # Less than this is the rounding of a product, whose sign says nothing.
        flat = xp.abs(curvature) <= unit * top * state.pp
        ok = active & xp.isfinite(curvature) & (curvature > 0) & ~flat
        kept = state.kept
        if kept is not None and (is_traced(kept.count) or kept.count < num_kept):
            kept = _with_pair(kept, state.p, product, xp.isfinite(curvature))
        one, zero = xp.ones_like(curvature), xp.zeros_like(curvature)
        # A column that is done takes steps of length 0.
        alpha = xp.where(ok, state.rz / xp.where(ok, curvature, one), zero)
        # `d`, `r` and `p` are written over: their former values are not used below.
        d = add_to(state.d, alpha, state.p)
        r = add_to(state.r, -alpha, product)
        if damped:
            r = add_to(r, -alpha * damping, state.p)
        rr = dot(r, r)
        norm = xp.sqrt(rr)
        z = r if preconditioner is None else (preconditioner @ r) / z_scale
        rz = rr if preconditioner is None else dot(r, z)
        useful = ok & (rz > 0)
        beta = xp.where(useful, rz / xp.where(useful, state.rz, one), zero)
        flag = xp.where(
            active & (curvature <= 0), code(state.flag, Reason.NEGATIVE_CURVATURE), state.flag
        )
        flag = xp.where(active & flat, code(flag, Reason.SINGULAR), flag)
        flag = xp.where(
            ok & (norm > target) & (rz <= 0), code(flag, Reason.INDEFINITE_PRECONDITIONER), flag
        )
        finite = xp.isfinite(curvature) & xp.isfinite(rz)
        flag = xp.where(active & ~finite, code(flag, Reason.NONFINITE), flag)
        smaller = ok & (norm < state.smallest)
        num_steps = state.num_steps + astype(ok, xp.int32)
        if callback is not None:
            callback(num_steps, xp.where(active, norm, column_norm(r)) * scale)
        return _Sweep(
            d,
            r,
            scale_and_add(state.p, beta, z),
            xp.where(ok, rz, state.rz),
            xp.where(ok, rz + beta * beta * state.pp, state.pp),
            top,
            copy_where(smaller, d, state.best_d),
            xp.where(smaller, norm, state.smallest),
            num_steps,
            flag,
            state.num_blocks + 1,
            kept,
        )

    z_scale = 1.0
    if preconditioner is None:
        z = start.r / scale  # not r itself: the first direction is written over
    else:
        z = apply_preconditioner(preconditioner, r)
        z_scale = column_scale(z)  # its own scale must not under- or overflow in the recursion
        z = z / z_scale
    rz = dot(r, z)
    flag = code(start.reason, RUNNING)
    flag = xp.where(running & (rz <= 0), code(flag, Reason.INDEFINITE_PRECONDITIONER), flag)
    flag = xp.where(running & ~xp.isfinite(rz), code(flag, Reason.NONFINITE), flag)
    first = _Sweep(
        xp.zeros_like(r),
        r,
        z,
        rz,
        rz,
        xp.zeros_like(rz),
        xp.zeros_like(r),
        xp.full_like(norm, float("inf")),  # any step is better than none
        start.num_steps,
        flag,
        start.num_blocks,
        start.kept,
    )
    return while_loop(lambda state: xp.any(going(state)), step, first, check_every=check_every)


def _with_pair(kept: _Kept, p: Array, product: Array, sound: Array) -> _Kept:
    """Keep a direction and its product, or zeros where the product is not finite."""
    xp = array_namespace(p)
    squared = dot(p, p)
    sound = sound & (squared > 0)
    scale = xp.where(sound, 1 / xp.sqrt(xp.where(sound, squared, xp.ones_like(squared))), 0.0)
    pair = (choose(sound, scale * x, xp.zeros_like(x)) for x in (p, product))
    S, Y = (set_rows(rows, kept.count, x[None, :]) for rows, x in zip(kept[:2], pair, strict=True))
    return _Kept(S, Y, kept.count + 1)
