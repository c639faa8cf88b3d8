"""The recursion of conjugate gradients for each column, and what it shares with that of a block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import Array, Scalar
from lowrank_inverse.arrays.control_flow import while_loop
from lowrank_inverse.arrays.conversion import astype, eps, is_traced, on_cpu, take, to_host
from lowrank_inverse.arrays.linalg import (
    add_scaled,
    add_to,
    choose,
    column_norm,
    copy_where,
    dot,
    scale_and_add,
    set_rows,
    with_columns,
)
from lowrank_inverse.arrays.scale import column_scale
from lowrank_inverse.arrays.spread import is_spread
from lowrank_inverse.iterative.preconditioning import apply_preconditioner
from lowrank_inverse.operators.product import block_width
from lowrank_inverse.results.solution import Reason, code

RUNNING = -1


class System(NamedTuple):
    """What does not change during a solve."""

    A: Any
    damping: Scalar
    preconditioner: Any
    max_steps: int
    check_every: int
    callback: Callable[[Array, Array], object] | None
    num_kept: int


def residual(system: System, b: Array, x: Array) -> Array:
    """Return the true residual of `x`, by a product."""
    return b - add_scaled(system.A @ x, system.damping, x)


def true_residual(system: System, b: Array, x: Array, r: Array, active: Array) -> tuple[Array, int]:
    """Return the residual of the `active` columns of `x`, that of others from `r`, and products.

    All columns cost one where it is not known on the host which are active: while jax traces, on
    an accelerator, and where they are spread.
    """
    known = b.ndim == 2 and not is_traced(active) and not is_spread(b) and on_cpu(b)
    columns = np.flatnonzero(to_host(active)) if known else None
    if columns is None or columns.size == b.shape[1]:
        return residual(system, b, x), block_width(b)
    part = residual(system, take(b, columns, axis=1), take(x, columns, axis=1))
    return with_columns(r, columns, part), columns.size


class Kept(NamedTuple):
    """Directions of unit length and their products, both of shape (k, n), and how many so far."""

    S: Array
    Y: Array
    count: Any


class Sweep(NamedTuple):
    """State of a recursion for the correction d of x, from one true residual to the next."""

    d: Array
    r: Array
    p: Array
    rz: Array | None
    pp: Array | None
    """The square of the norm of p that the preconditioner defines."""
    top: Array
    """The largest curvature met, over pp."""
    best_d: Array | None
    """That of the smallest residual. None while jax traces, for there every step would copy it."""
    best_steps: Array | None
    """The steps that it took."""
    smallest: Array
    num_steps: Array
    flag: Array
    num_products: Any
    kept: Kept | None


class Progress(NamedTuple):
    """State between sweeps; `r` is the true residual of `x` in the columns still at work."""

    x: Array
    r: Array
    norm: Array
    num_steps: Array
    """To `x`."""
    taken: Array
    """In all."""
    limit: Array
    """Of `num_steps`."""
    verdict: Array
    """What a column ended for that goes back to its best iterate; else RUNNING."""
    reason: Array
    num_products: Any
    kept: Kept | None


def work_test(
    start: Progress, target: Array, least: Array
) -> tuple[Array, Callable[[Sweep], Array]]:
    """Return the target of a sweep, `least` or more, and the test which columns go on.

    Below eps times its start the recursion says nothing about the true residual.
    """
    target = array_namespace(least).where(target > least, target, least)
    running = start.reason == RUNNING

    def going(state: Sweep) -> Array:
        more = (state.smallest > target) & (state.num_steps < start.limit)
        return running & (state.flag == RUNNING) & more

    return target, going


def column_sweep(system: System, start: Progress, scale: Array, target: Array) -> Sweep:
    """Run the recursion for ``start.r / scale`` until every column claims to meet `target`."""
    A, damping, preconditioner, _, check_every, callback, num_kept = system
    xp = array_namespace(start.x)
    r = start.r / scale
    norm, unit, running = column_norm(r), eps(r), start.reason == RUNNING
    target, going = work_test(start, target, unit * norm)
    damped = is_traced(damping) or damping != 0
    traced = is_traced(start.x)

    def step(state: Sweep) -> Sweep:
        active = going(state)
        product = A @ state.p  # of A alone: perhaps an array of the operator's own
        image = product + damping * state.p if damped and traced else product
        curvature = dot(state.p, image)
        if damped and not traced:  # spares memory for the sum, which XLA does not need
            curvature = curvature + damping * dot(state.p, state.p)
        top = xp.where(curvature > state.top * state.pp, curvature / state.pp, state.top)
        # Less than this is the rounding of a product, whose sign says nothing.
        flat = xp.abs(curvature) <= unit * top * state.pp
        ok = active & xp.isfinite(curvature) & (curvature > 0) & ~flat
        kept = state.kept
        if kept is not None and (is_traced(kept.count) or kept.count < num_kept):
            kept = with_pairs(kept, state.p, product, xp.isfinite(curvature))
        one, zero = xp.ones_like(curvature), xp.zeros_like(curvature)
        # A column that is done takes steps of length 0.
        alpha = xp.where(ok, state.rz / xp.where(ok, curvature, one), zero)
        # `d`, `r` and `p` are written over: their former values are not used below.
        d = add_to(state.d, alpha, state.p)
        r = add_to(state.r, -alpha, image)
        if damped and not traced:
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
        return Sweep(
            d,
            r,
            scale_and_add(state.p, beta, z),
            xp.where(ok, rz, state.rz),
            xp.where(ok, rz + beta * beta * state.pp, state.pp),
            top,
            None if traced else copy_where(smaller, d, state.best_d),
            xp.where(smaller, num_steps, state.best_steps),
            xp.where(smaller, norm, state.smallest),
            num_steps,
            flag,
            state.num_products + block_width(r),
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
    first = Sweep(
        xp.zeros_like(r),
        r,
        z,
        rz,
        rz,
        xp.zeros_like(rz),
        None if traced else xp.zeros_like(r),
        start.num_steps,
        xp.full_like(norm, float("inf")),  # any step is better than none
        start.num_steps,
        flag,
        start.num_products,
        start.kept,
    )
    return while_loop(lambda state: xp.any(going(state)), step, first, check_every=check_every)


def with_pairs(kept: Kept, p: Array, product: Array, sound: Array) -> Kept:
    """Keep directions of unit length and their products, or zeros where a product is not finite."""
    xp = array_namespace(p)
    squared = dot(p, p)
    sound = sound & (squared > 0)
    scale = xp.where(sound, 1 / xp.sqrt(xp.where(sound, squared, xp.ones_like(squared))), 0.0)
    pair = [choose(sound, scale * x, xp.zeros_like(x)) for x in (p, product)]
    rows = [x[None, :] if x.ndim == 1 else x.T for x in pair]
    S, Y = (set_rows(X, kept.count, x) for X, x in zip(kept[:2], rows, strict=True))
    return Kept(S, Y, kept.count + rows[0].shape[0])
