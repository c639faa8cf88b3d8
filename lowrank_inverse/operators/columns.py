"""Columns and diagonals of operators."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from array_api_compat import array_namespace, is_jax_array

from lowrank_inverse._typing import Array, Indices, OperatorLike
from lowrank_inverse.arrays.checks import (
    check_block,
    check_count,
    check_finite,
    check_indices,
    prototype,
)
from lowrank_inverse.arrays.conversion import is_traced, like_device, to_host
from lowrank_inverse.arrays.spread import is_spread
from lowrank_inverse.operators.function import aslinearoperator


def columns(A: OperatorLike, indices: Indices, *, chunk_size: int | None = None) -> Array:
    """Return the columns ``A[:, indices]``.

    Parameters
    ----------
    A : linear operator, shape (n, n)
        Symmetric.
    indices : sequence of k distinct ints
        Columns to return, in this order.
    chunk_size : int, optional
        Columns computed at a time. Default: all at once.

    Returns
    -------
    array, shape (n, k)

    Notes
    -----
    ``k`` products with `A` if its columns cannot be read.
    """
    A = aslinearoperator(A)
    indices = check_indices(indices, int(A.shape[0]))
    chunks = list(index_chunks(indices, chunk_size))
    if len(chunks) == 1:
        return A.columns(indices)
    return join_columns((A.columns(chunk) for chunk in chunks), indices.size)


def finite_columns(A: OperatorLike, indices: Indices, *, chunk_size: int | None = None) -> Array:
    """Return the columns ``A[:, indices]``; raise if they hold NaN or Inf."""
    C = columns(A, indices, chunk_size=chunk_size)
    check_finite("columns of A", C)
    return C


def join_columns(parts: Iterable[Array], count: int) -> Array:
    """Join blocks of columns, `count` in all, without holding any of them twice.

    JAX, whose arrays cannot be filled in place, and distributed rows need a second copy.
    """
    held: list[Array] = []
    rows: Any = None
    start = 0
    for part in parts:
        if is_jax_array(part) or is_spread(part):
            held.append(part)
            continue
        if rows is None:
            xp = array_namespace(part)
            shape = (count, part.shape[0])
            rows = xp.empty(shape, dtype=part.dtype, device=like_device(part))
        rows[start : start + part.shape[1], :] = part.T
        start += part.shape[1]
    return array_namespace(held[0]).concat(held, axis=1) if rows is None else rows.T


def diagonal(A: OperatorLike) -> Array:
    """Return the diagonal of `A`, shape (n,).

    Raises
    ------
    TypeError
        If `A` does not supply it. It is never computed from n products.
    """
    return aslinearoperator(A).diagonal()


def index_chunks(indices: np.ndarray, chunk_size: int | None) -> list[np.ndarray]:
    """Split `indices` into chunks of at most `chunk_size`."""
    size = indices.size if chunk_size is None else check_count("chunk_size", chunk_size)
    return [indices[start : start + size] for start in range(0, indices.size, size)]


def empty_like(A: OperatorLike) -> Array:
    """Return an empty array of the library, dtype and device of the products of `A`."""
    empty = getattr(A, "like", None)
    if empty is None:
        empty = prototype(getattr(A, "dtype", None), None, getattr(A, "device", None))
    return empty


def known_trace(A: OperatorLike) -> float | None:
    """Return the trace of `A`, or None if it has no diagonal."""
    d = known_or_none(A)
    if d is None or is_traced(d):
        return None
    check_finite("diagonal of A", d)
    return float(np.sum(to_host(d).astype(np.float64)))


def known_or_none(A: OperatorLike) -> Array | None:
    """Return the diagonal of `A`, or None if it has none."""
    try:
        return diagonal(A)
    except TypeError:
        return None


def known_diagonal(A: OperatorLike, what: str) -> Array:
    """Return the diagonal of `A`, finite and concrete, for a rule that needs its values."""
    d = A.diagonal()
    check_block("diagonal of A", d, int(A.shape[0]))
    if is_traced(d):
        raise TypeError(
            f"{what} needs the values of the diagonal, which are unknown while jax "
            "traces. Choose the columns outside and pass `indices`."
        )
    check_finite("diagonal of A", d)
    return d


def joined(parts: list[Array]) -> Array:
    """Join blocks of columns."""
    return parts[0] if len(parts) == 1 else array_namespace(parts[0]).concat(parts, axis=1)
