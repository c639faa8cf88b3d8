"""Conjugate gradients on abstract operators, one status a column."""

from __future__ import annotations

from typing import Any, NamedTuple

from array_api_compat import array_namespace

from lowrank_inverse._array import (
    astype,
    check_count,
    column_norm,
    column_scale,
    describe,
    dot,
    eps,
    is_array,
    quietly,
    scalar_like,
)
from lowrank_inverse._loop import while_loop
from lowrank_inverse._typing import Array
from lowrank_inverse.operators import aslinearoperator
from lowrank_inverse.solution import Reason, Solution, check_system, code, ended, tolerance

RUNNING = -1
STAGNATION_FACTOR = 0.9


class _Progress(NamedTuple):
    """State between sweeps; `r` is always the true residual of `x`."""

    x: Array
    r: Array
    norm: Array
    best_x: Array
    best_norm: Array
    num_steps: Array
    reason: Array
    num_blocks: Any


class _Sweep(NamedTuple):
    """State of the recursion for the correction d of x, from one true residual to the next."""

    d: Array
    r: Array
    p: Array
    rz: Array
    best_d: Array
    smallest: Array
    num_steps: Array
    flag: Array
    num_blocks: Any


@quietly
def cg(
    A: Any,
    b: Array,
    *,
    damping: Any = 0.0,
    x0: Array | None = None,
    preconditioner: Any = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_steps: int | None = None,
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

    Returns
    -------
    Solution
        With the residual computed anew from the solution, not carried along. A column that
        ends before the tolerance says why in `reason`. `value` is the last iterate; at negative
        curvature, at a product that is not finite and at an indefinite preconditioner, that with
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
    preconditioner = _checked_preconditioner(preconditioner, n)
    xp = array_namespace(b)
    damping = scalar_like(damping, b)
    target = tolerance(b, rtol, atol)

    def residual(x: Array) -> Array:
        return b - (A @ x + damping * x)

    x = xp.zeros_like(b)
    if x0 is not None:  # a zero right-hand side has the solution zero, wherever x0 lies
        x = xp.where(xp.any(b != 0, axis=0), x0, x)
    r = b if x0 is None else residual(x)
    norm = column_norm(r)

    def sweep(state: _Progress) -> _Progress:
        scale = column_scale(state.r)
        swept = _sweep(A, damping, preconditioner, state, scale, target / scale, max_steps)
        d = xp.where(swept.flag == RUNNING, swept.d, swept.best_d)
        x = state.x + scale * d
        r = residual(x)
        norm = column_norm(r)
        active = state.reason == RUNNING
        fell = norm < STAGNATION_FACTOR * state.norm
        reason = xp.where(fell, code(swept.flag, RUNNING), code(swept.flag, Reason.STAGNATED))
        reason = xp.where(swept.num_steps >= max_steps, code(reason, Reason.MAX_STEPS), reason)
        reason = xp.where(swept.flag != RUNNING, swept.flag, reason)
        reason = xp.where(norm <= target, code(reason, Reason.CONVERGED), reason)
        reason = xp.where(xp.isfinite(norm), reason, code(reason, Reason.NONFINITE))
        # Zero is no answer, though its residual may be smaller than that of an ill-conditioned one.
        from_zero = state.num_blocks == 0
        better = active & xp.isfinite(norm) & ((norm < state.best_norm) | from_zero)
        return _Progress(
            xp.where(active, x, state.x),
            xp.where(active, r, state.r),
            xp.where(active, norm, state.norm),
            xp.where(better, x, state.best_x),
            xp.where(better, norm, state.best_norm),
            swept.num_steps,
            xp.where(active, reason, state.reason),
            swept.num_blocks + 1,
        )

    steps = astype(xp.zeros_like(norm), xp.int32)
    # b = 0 and an exact start are done at once.
    reason = xp.where(norm <= target, code(steps, Reason.CONVERGED), code(steps, RUNNING))
    reason = xp.where(xp.isfinite(norm), reason, code(steps, Reason.NONFINITE))
    start = _Progress(x, r, norm, x, norm, steps, reason, 0 if x0 is None else 1)
    end = while_loop(lambda state: xp.any(state.reason == RUNNING), sweep, start)

    last = ~ended(end.reason, Reason.STAGNATED) & xp.isfinite(end.norm)
    return Solution(
        value=xp.where(last, end.x, end.best_x),
        residual_norm=xp.where(last, end.norm, end.best_norm),
        num_steps=end.num_steps,
        num_products=end.num_blocks * (b.shape[1] if b.ndim == 2 else 1),
        converged=ended(end.reason, Reason.CONVERGED),
        reason=end.reason,
    )


def _sweep(
    A: Any,
    damping: Any,
    preconditioner: Any,
    start: _Progress,
    scale: Array,
    target: Array,
    max_steps: int,
) -> _Sweep:
    """Run the recursion for ``start.r / scale`` until every column claims to meet `target`."""
    xp = array_namespace(start.x)
    r = start.r / scale
    norm = column_norm(r)
    # Below eps times its start the recursion says nothing about the true residual.
    target = xp.where(target > eps(r) * norm, target, eps(r) * norm)
    running = start.reason == RUNNING

    def going(state: _Sweep) -> Array:
        more = (state.smallest > target) & (state.num_steps < max_steps)
        return running & (state.flag == RUNNING) & more

    def step(state: _Sweep) -> _Sweep:
        active = going(state)
        Ap = A @ state.p + damping * state.p
        curvature = dot(state.p, Ap)
        ok = active & xp.isfinite(curvature) & (curvature > 0)
        one, zero = xp.ones_like(curvature), xp.zeros_like(curvature)
        alpha = xp.where(ok, state.rz / xp.where(ok, curvature, one), zero)
        d = xp.where(ok, state.d + alpha * state.p, state.d)
        r = xp.where(ok, state.r - alpha * Ap, state.r)
        rr = dot(r, r)
        norm = xp.sqrt(rr)
        z = r if preconditioner is None else (preconditioner @ r) / z_scale
        rz = rr if preconditioner is None else dot(r, z)
        useful = ok & (rz > 0)
        beta = xp.where(useful, rz / xp.where(useful, state.rz, one), zero)
        flag = xp.where(
            active & (curvature <= 0), code(state.flag, Reason.NEGATIVE_CURVATURE), state.flag
        )
        flag = xp.where(
            ok & (norm > target) & (rz <= 0), code(flag, Reason.INDEFINITE_PRECONDITIONER), flag
        )
        finite = xp.isfinite(curvature) & xp.isfinite(rz)
        flag = xp.where(active & ~finite, code(flag, Reason.NONFINITE), flag)
        smaller = ok & (norm < state.smallest)
        return _Sweep(
            d,
            r,
            xp.where(useful, z + beta * state.p, state.p),
            xp.where(ok, rz, state.rz),
            xp.where(smaller, d, state.best_d),
            xp.where(smaller, norm, state.smallest),
            state.num_steps + astype(ok, xp.int32),
            flag,
            state.num_blocks + 1,
        )

    z, z_scale = r, 1.0
    if preconditioner is not None:
        z = _applied(preconditioner, r)
        z_scale = column_scale(z)  # its own scale must not under- or overflow in the recursion
        z = z / z_scale
    rz = dot(r, z)
    flag = code(start.reason, RUNNING)
    flag = xp.where(running & (rz <= 0), code(flag, Reason.INDEFINITE_PRECONDITIONER), flag)
    flag = xp.where(running & ~xp.isfinite(rz), code(flag, Reason.NONFINITE), flag)
    zeros = xp.zeros_like(r)
    first = _Sweep(
        zeros,
        r,
        z,
        rz,
        zeros,
        xp.full_like(norm, float("inf")),  # any step is better than none
        start.num_steps,
        flag,
        start.num_blocks,
    )
    return while_loop(lambda state: xp.any(going(state)), step, first)


def _checked_preconditioner(preconditioner: Any, n: int) -> Any:
    if preconditioner is None:
        return None
    if not hasattr(preconditioner, "shape") or not hasattr(type(preconditioner), "__matmul__"):
        raise TypeError(
            f"`preconditioner` must be an operator with .shape and @; got "
            f"{describe(preconditioner)}. Wrap a function in FunctionOperator(matvec, n)."
        )
    if tuple(preconditioner.shape) != (n, n):
        raise ValueError(
            f"`preconditioner` must have shape {(n, n)} to match `A`; got "
            f"{tuple(preconditioner.shape)}."
        )
    return aslinearoperator(preconditioner) if is_array(preconditioner) else preconditioner


def _applied(preconditioner: Any, r: Array) -> Array:
    z = preconditioner @ r
    if not is_array(z) or array_namespace(z) is not array_namespace(r) or z.dtype != r.dtype:
        raise TypeError(
            f"`preconditioner` must return what it is given, {describe(r)}; it returned "
            f"{describe(z)}. All must come from one library; nothing is promoted silently."
        )
    return z
