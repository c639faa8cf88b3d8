"""The recursion of block conjugate gradients: one Krylov space for all columns."""

from __future__ import annotations

from array_api_compat import array_namespace

from lowrank_inverse._typing import Array
from lowrank_inverse.arrays.control_flow import while_loop
from lowrank_inverse.arrays.conversion import astype, eps, is_traced
from lowrank_inverse.arrays.decompositions import eigh
from lowrank_inverse.arrays.linalg import (
    add_product,
    column_norm,
    copy_where,
    dot,
    gram_whitening,
    symmetric_part,
    tall_dot,
    tall_times,
)
from lowrank_inverse.arrays.spread import flipped
from lowrank_inverse.iterative.preconditioning import apply_preconditioner
from lowrank_inverse.iterative.recursion import (
    RUNNING,
    Progress,
    Sweep,
    System,
    with_pairs,
    work_test,
)
from lowrank_inverse.results.solution import Reason, code


def block_sweep(system: System, start: Progress, scale: Array, target: Array) -> Sweep:
    """Run the block recursion for ``start.r / scale`` until every column claims to meet `target`.

    The directions P of a step are orthonormal. With ``K = P.T (A + damping I) P``, ``alpha = K^{-1}
    P.T R`` is the step for all columns, and the next directions are an orthonormal basis of ``Z -
    P K^{-1} (A P).T Z``, Z the preconditioned residuals of the columns still at work.
    """
    A, damping, preconditioner, _, check_every, callback, num_kept = system
    xp = array_namespace(start.x)
    R = start.r / scale
    norm, unit, running = column_norm(R), eps(R), start.reason == RUNNING
    target, going = work_test(start, target, unit * norm)
    damped = is_traced(damping) or damping != 0  # read once: it may lie on an accelerator

    def preconditioned(R: Array, flag: Array, active: Array) -> tuple[Array, Array]:
        if preconditioner is None:
            return R, flag
        Z = apply_preconditioner(preconditioner, R)
        rz = dot(R, Z)
        bad = active & (rz <= 0) & (column_norm(R) > target)
        flag = xp.where(bad, code(flag, Reason.INDEFINITE_PRECONDITIONER), flag)
        return Z, xp.where(active & ~xp.isfinite(rz), code(flag, Reason.NONFINITE), flag)

    def step(state: Sweep) -> Sweep:
        active, P = going(state), state.p
        AP = A @ P
        kept = state.kept
        finite = xp.isfinite(dot(P, AP))
        if kept is not None and (is_traced(kept.count) or kept.count < num_kept):
            kept = with_pairs(kept, P, AP, finite)
        Q = AP + damping * P if damped else AP
        del AP  # a block that nothing below needs
        K = symmetric_part(tall_dot(P, Q))
        sound = xp.all(xp.isfinite(K))
        K = xp.where(sound, K, xp.zeros_like(K))
        w, V = eigh(K)
        largest = astype(xp.max(xp.abs(w)), P.dtype)
        top = xp.where(largest > state.top, largest, state.top)
        noise = astype(unit * w.shape[0] * top, w.dtype)
        usable = w > noise
        inverse = (V * xp.where(usable, 1 / xp.where(usable, w, xp.ones_like(w)), 0 * w)) @ V.T
        PR = tall_dot(P, state.r)
        along = V.T @ PR

        def met(directions: Array) -> Array:
            """Whether a residual has a part along such directions."""
            part = along * astype(directions, V.dtype)[:, None]
            return column_norm(part) > astype(target, part.dtype)

        # Of what rounding alone may have left there is nothing to divide by.
        stuck, negative = met(~usable & (w >= -noise)), met(w < -noise)
        ok = active & sound & ~negative & ~stuck
        flag = xp.where(active & stuck, code(state.flag, Reason.SINGULAR), state.flag)
        flag = xp.where(active & negative, code(flag, Reason.NEGATIVE_CURVATURE), flag)
        flag = xp.where(active & ~sound, code(flag, Reason.NONFINITE), flag)
        alpha = xp.where(ok, inverse @ PR, xp.zeros_like(PR))
        # `d` and `r` are written over: their former values are not used below.
        D = add_product(state.d, P, alpha)
        R = add_product(state.r, Q, -alpha)
        norm = xp.sqrt(dot(R, R))
        num_steps = state.num_steps + astype(ok, xp.int32)
        if callback is not None:
            callback(num_steps, norm * scale)
        smaller = ok & (norm < state.smallest)
        smallest = xp.where(smaller, norm, state.smallest)
        Z, flag = preconditioned(R, flag, ok)
        beta = inverse @ tall_dot(Q, Z)
        wanted = running & (flag == RUNNING) & (smallest > target)
        conjugate = tall_times(P, -beta, P.dtype)
        conjugate += Z
        Z = xp.where(wanted, conjugate, xp.zeros_like(norm))
        del conjugate
        return Sweep(
            D,
            R,
            _orthonormal(Z),
            None,
            None,
            top,
            copy_where(smaller, D, state.best_d),
            None,
            smallest,
            num_steps,
            flag,
            state.num_products + P.shape[1],
            kept,
        )

    flag = code(start.reason, RUNNING)
    Z, flag = preconditioned(R, flag, running)
    Z = xp.where(running, Z, xp.zeros_like(Z))
    first = Sweep(
        xp.zeros_like(R),
        R,
        _orthonormal(Z),
        None,
        None,
        0 * norm[0],
        xp.zeros_like(R),
        None,
        norm,  # of no step: where all made it worse, the start is returned
        start.num_steps,
        flag,
        start.num_products,
        start.kept,
    )
    return while_loop(lambda state: xp.any(going(state)), step, first, check_every=check_every)


def _orthonormal(X: Array) -> Array:
    """Return an orthonormal basis of the columns of `X`, each as important as the others.

    Directions that are left of a column after the others, but for rounding, are left out; while
    jax traces they are columns of zeros.
    """
    xp = array_namespace(X)
    norm = column_norm(X)
    X = X / xp.where((norm > 0) & xp.isfinite(norm), norm, xp.ones_like(norm))
    for _ in range(2):  # once leaves the square of the condition number
        G = symmetric_part(tall_dot(X, X))
        T = gram_whitening(xp.where(xp.isfinite(G), G, xp.zeros_like(G)), eps(X))
        T = flipped(T, axis=1)  # what is left out comes last
        if not is_traced(T):
            T = T[:, : max(1, int(xp.sum(astype(xp.any(T != 0, axis=0), xp.int32))))]
        X = tall_times(X, T, X.dtype)
    return X
