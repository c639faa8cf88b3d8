"""Arithmetic on vectors, blocks and tall matrices: few passes, few copies, no overflow."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
from array_api_compat import (
    array_namespace,
    device,
    is_jax_array,
    is_numpy_array,
    is_torch_array,
)

from lowrank_inverse._typing import Array, Scalar
from lowrank_inverse.arrays.conversion import (
    algebra,
    astype,
    carries_gradient,
    concrete,
    eps,
    is_traced,
    on_cpu,
    scalar_like,
    take,
    wide_dtype,
)
from lowrank_inverse.arrays.decompositions import eigh
from lowrank_inverse.arrays.devices import num_devices
from lowrank_inverse.arrays.scale import column_scale
from lowrank_inverse.arrays.spread import everywhere, is_spread, local, reduced, spread_rows, summed

BLOCK_NUMBERS = 2**18
MAX_BLOCKS = 32


def row_blocks(x: Array, width: int) -> list[slice]:
    """Slices of the rows of `x`, so that blocks of `width` columns fit a CPU's cache.

    Elsewhere, and in a compiled program, there are few blocks: each costs a launch or code. Rows
    that are spread over devices are one block: cut, they would be sent around.
    """
    n = x.shape[0]
    if num_devices(x) > 1:
        return [slice(0, n)]
    rows = max(1024, BLOCK_NUMBERS // width)
    if is_traced(x) or not on_cpu(x):
        rows = max(rows, -(-n // MAX_BLOCKS))
    return [slice(start, min(start + rows, n)) for start in range(0, n, rows)]


def dot(u: Array, v: Array) -> Array:
    """Inner products of vectors, or of matching columns of blocks."""
    # xp.vecdot is several times slower than this in torch.
    return reduced(u @ v if u.ndim == 1 else array_namespace(u).sum(u * v, axis=0))


def add_scaled(x: Array, factor: Scalar, y: Array) -> Array:
    """Return ``x + factor * y``, one factor or one a column, in as few passes as the library has.

    `factor` is a Python float or an array of the dtype of `x`.
    """
    if is_torch_array(x):
        return x.add(y, alpha=factor) if isinstance(factor, float) else x.addcmul(factor, y)
    total = factor * y
    total += x  # in place, but for jax
    return total


def add_to(x: Array, factor: Array, y: Array) -> Array:
    """Return ``x + factor * y``, written over `x` where that can be done.

    For a long vector, memory taken anew costs far more than the arithmetic: the system hands it
    out page by page.
    """
    if not _can_write(x, factor, y):
        return add_scaled(x, factor, y)
    if is_torch_array(x):
        return x.addcmul_(factor, y)
    for rows in row_blocks(x, math.prod(x.shape[1:])):
        x[rows, ...] += factor * y[rows, ...]
    return x


def add_product(X: Array, Y: Array, small: Array) -> Array:
    """Return ``X + Y @ small`` for tall `Y`, written over `X` where that can be done."""
    if is_spread(Y) or not _can_write(X, Y, small):
        return X + tall_times(Y, small, X.dtype)
    for rows in row_blocks(X, X.shape[1]):
        X[rows, ...] += tall_times(Y[rows, ...], small, X.dtype)
    return X


def scale_and_add(x: Array, factor: Array, y: Array) -> Array:
    """Return ``factor * x + y``, written over `x` where that can be done."""
    if not _can_write(x, factor, y):
        return add_scaled(y, factor, x)
    x *= factor
    x += y
    return x


def set_rows(X: Array, start: Any, block: Array) -> Array:
    """Return `X` with the rows from `start` on replaced, written over `X` but for jax.

    Rows beyond the last are left out.
    """
    if is_jax_array(X):
        return X.at[start + array_namespace(X).arange(block.shape[0])].set(block)
    stop = min(start + block.shape[0], X.shape[0])
    X[start:stop, ...] = block[: max(stop - start, 0), ...]
    return X


def copy_where(condition: Array, x: Array, kept: Array) -> Array:
    """Return ``choose(condition, x, kept)``, written over `kept` where that can be done."""
    if _can_write(kept, x) and on_cpu(condition) and not is_spread(kept):
        if bool(array_namespace(condition).all(condition)):
            kept[...] = x
            return kept
        if condition.ndim == 0:
            return kept
    return array_namespace(x).where(condition, x, kept)


def _can_write(*operands: Any) -> bool:
    """Whether arrays of this kind can be written over, with no graph recording what they were."""
    if is_jax_array(operands[0]):
        return False
    return not any(getattr(x, "requires_grad", False) for x in operands)


def with_columns(x: Array, columns: np.ndarray, part: Array) -> Array:
    """Return a copy of `x`, of shape (n, m), with the columns in `part` in place of its own."""
    rest = np.setdiff1d(np.arange(x.shape[1]), columns)
    joined = array_namespace(x).concat([part, take(x, rest, axis=1)], axis=1)
    return take(joined, np.argsort(np.concatenate([columns, rest])), axis=1)


def choose(condition: Array, x: Array, y: Array) -> Array:
    """Return `x` where `condition` holds (one, or one a column), else `y`.

    A single condition on a CPU is read, which costs nothing there, and spares a copy.
    """
    if condition.ndim == 0 and not is_traced(condition) and on_cpu(condition):
        return x if bool(condition) else y
    return array_namespace(x).where(condition, x, y)


def column_norm(x: Array) -> Array:
    """Euclidean norm of each column, safe from overflow and underflow."""
    scale = column_scale(x)
    x = x / scale[None, ...]
    return scale * array_namespace(x).sqrt(dot(x, x))


def tall_dot(X: Array, Y: Array) -> Array:
    """Return ``X.T @ Y`` for tall `X` and `Y`, summed in the widest dtype at hand.

    `X` may lie in the memory of the host; the result lies where `Y` does.
    """
    if is_spread(Y):
        return summed(tall_dot(local(X), local(Y)), Y)
    wide = wide_dtype(Y)
    if X.dtype == wide and Y.dtype == wide:
        return X.T @ Y
    total: Any = 0.0
    for rows in row_blocks(Y, X.shape[1]):
        # Transposed before it is cut: columns that lie one after the other in memory stay so.
        part = astype(X.T[:, rows], wide)
        total = total + part @ astype(Y[rows, ...], wide)
    return total


def tall_times(X: Array, small: Array, dtype: Any = None) -> Array:
    """Return ``X @ small`` for tall `X` and a small wide matrix, by default in the dtype of `X`.

    `X` may lie in the memory of the host; the result lies where `small` does.
    """
    dtype = X.dtype if dtype is None else dtype
    if is_spread(X):
        return spread_rows(tall_times(local(X), local(reduced(small)), dtype), X, X.shape[0])
    if X.dtype == small.dtype:
        return astype(X @ small, dtype)

    def block(rows: slice) -> Array:
        part = astype(X.T[:, rows], small.dtype)
        return astype(part.T @ small, dtype)

    xp = array_namespace(small)
    slices = row_blocks(X, X.shape[1])
    if is_jax_array(small):
        return xp.concat([block(rows) for rows in slices], axis=0)
    # Written where it stays: parts kept between large temporaries break up the heap.
    shape = (X.shape[0], *small.shape[1:])
    result = xp.empty(shape, dtype=dtype, device=device(small))
    for rows in slices:
        result[rows, ...] = block(rows)
    return result


def cholesky(A: Array) -> Array | None:
    """Return the lower Cholesky factor of `A`, or None if it is not positive definite.

    Libraries differ in how they say so; and while jax traces, nobody knows. Where `A` lies whole
    on each process, so does the factor.
    """
    if is_traced(A):
        return None
    if is_spread(A):
        part = cholesky(local(A))
        return None if part is None else everywhere(part, A)
    if is_torch_array(A):
        L, failed = sys.modules["torch"].linalg.cholesky_ex(A)
        return None if bool(failed) else L
    xp = array_namespace(A)
    try:
        L = algebra(A).cholesky(A)
    except np.linalg.LinAlgError:
        return None
    return L if bool(xp.all(xp.isfinite(xp.linalg.diagonal(L)))) else None


def cholesky_solve(L: Array, b: Array) -> Array:
    """Return ``(L L.T)^{-1} b`` for `b` of shape (n,) or (n, m), by triangular solves."""
    if is_numpy_array(L):
        from scipy.linalg import cho_solve

        return cho_solve((L, True), b, check_finite=False)
    if is_spread(L):
        return everywhere(cholesky_solve(local(L), local(b)), L)
    if is_torch_array(L):
        block = b if b.ndim == 2 else b[:, None]
        return sys.modules["torch"].cholesky_solve(block, L).reshape(b.shape)
    if is_jax_array(L):
        return sys.modules["jax"].scipy.linalg.cho_solve((L, True), b)
    solve = algebra(L).solve  # the standard has no triangular one
    return solve(L.T, solve(L, b))


def gram_whitening(G: Array, unit: float) -> Array:
    """Return T with ``T T.T = G^+`` for the Gram matrix of vectors known to a precision `unit`.

    Columns of zeros, which come first, stand for what of the vectors is rounding; the tolerance is
    the square of that of the vectors.
    """
    xp = array_namespace(G)
    g, V = eigh(G)
    kept = g > max(1e-12, unit, 16 * eps(G)) * g[-1]
    root = xp.sqrt(xp.where(kept, g, xp.ones_like(g)))
    return V * xp.where(kept, 1 / root, 0 * g)[None, :]


def symmetric_part(x: Array) -> Array:
    """Return ``(x + x.T) / 2``."""
    return (x + x.T) / 2


def relative_asymmetry(x: Array) -> Array:
    """Return the largest entry of ``x - x.T`` over that of `x`; 0 for zeros."""
    xp = array_namespace(x)
    largest = xp.max(xp.abs(x))
    return xp.max(xp.abs(x - x.T)) / xp.where(largest > 0, largest, xp.ones_like(largest))


def times_diagonal(d: Any, block: Array) -> Array:
    """Return ``diag(d) @ block`` for a number or a vector d."""
    if getattr(d, "ndim", 0) == 0:
        return scalar_like(d, block) * block
    return d * block if block.ndim == 1 else d[:, None] * block


def _number(x: Scalar) -> Scalar:
    return x if carries_gradient(x) else concrete(x)


def scaled_diagonal(factor: Scalar, d: Any) -> Any:
    """Return ``factor * d`` for a number or a vector d, in the dtype of a vector."""
    if getattr(d, "ndim", 0) == 0:
        return _number(factor) * _number(d)
    return scalar_like(factor, d) * d


def added_diagonals(d: Any, e: Any) -> Any:
    """Return ``d + e`` for numbers or vectors, in the dtype of a vector."""
    if getattr(d, "ndim", 0) == 0:
        d, e = e, d
    if getattr(d, "ndim", 0) == 0:
        return _number(d) + _number(e)
    return d + e if getattr(e, "ndim", 0) == 1 else d + scalar_like(e, d)
