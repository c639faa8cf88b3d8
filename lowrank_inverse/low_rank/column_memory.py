"""What the columns of a Nyström approximation take to hold, and how they are held in less."""

from __future__ import annotations

from typing import Any, NamedTuple

from array_api_compat import array_namespace

from lowrank_inverse._typing import Array
from lowrank_inverse.arrays.checks import describe
from lowrank_inverse.arrays.conversion import astype, is_narrow, on_host
from lowrank_inverse.arrays.linalg import column_scale, power_of_two
from lowrank_inverse.operators.columns import finite_columns, index_chunks, join_columns

STORAGES = ("stored", "chunked", "streamed", "auto")


ITEMSIZES: dict[str | None, int] = {"float16": 2, "bfloat16": 2, "float32": 4}


"""Bytes of a number in the dtypes that columns may be kept in."""


DEFAULT_CHUNK = 8


STREAMED_DAMPING = 1e-3


"""Of the largest eigenvalue: below it, the streamed form in less than float64 loses digits."""


class StoragePlan(NamedTuple):
    """How a Nyström inverse holds its columns.

    Attributes
    ----------
    storage : {"stored", "chunked", "streamed"}
    chunk_size : int or None
        Columns computed at a time; None for all.
    num_bytes : int
        For columns held, chunks at work and what is k×k; beside them stand the right-hand side,
        the answer and whatever a product with the operator takes.
    """

    storage: str
    chunk_size: int | None
    num_bytes: int


class HeldColumns(NamedTuple):
    """Columns divided by `scales`, a power of two each, or by 1 where that is None."""

    columns: Array
    scales: Array | None = None


def plan_storage(
    n: int,
    rank: int,
    itemsize: int,
    *,
    storage: str = "auto",
    chunk_size: int | None = None,
    memory_budget: float | None = None,
    column_itemsize: int | None = None,
) -> StoragePlan:
    """Say what a way to hold `rank` columns takes, or choose the fastest that a budget allows.

    Parameters
    ----------
    n, rank : int
    itemsize : int
        Bytes of a number of the operator.
    storage : {"auto", "stored", "chunked", "streamed"}
        ``"auto"``: stored if that fits, else streamed, in the largest chunks that fit.
    chunk_size : int, optional
        Columns computed at a time. With ``"auto"`` an upper limit.
    memory_budget : float, optional
        Bytes; needed for ``"auto"``.
    column_itemsize : int, optional
        Bytes of a number of the columns held, where they are converted.

    Returns
    -------
    StoragePlan

    Raises
    ------
    ValueError
        If not even one column at a time fits.

    Notes
    -----
    With κ the chunk and s the bytes of a number: stored ``k n s``, and ``κ n s`` more where
    columns are converted; chunked and streamed ``2 κ n s``; all of them ``32 k²`` for what is
    k×k. Products: stored k; chunked ``k (k / κ + 1) / 2`` and ``k + 1`` for a right-hand side;
    streamed 2k and 2. Streamed is therefore the choice wherever not all columns fit.

    Examples
    --------
    >>> from lowrank_inverse.low_rank.column_memory import plan_storage
    >>> print(plan_storage(10**7, 20, 4, memory_budget=300e6))
    StoragePlan(storage='streamed', chunk_size=3, num_bytes=240012800)
    """
    small = 4 * 8 * rank * rank
    converts = column_itemsize is not None and column_itemsize != itemsize

    def taken(storage: str, chunk: int | None) -> int:
        if storage == "stored":
            work = min(rank, chunk or DEFAULT_CHUNK) * n * itemsize if converts else 0
            return rank * n * (column_itemsize or itemsize) + work + small
        return 2 * min(rank, chunk or 1) * n * itemsize + small

    if storage != "auto":
        return StoragePlan(storage, chunk_size, taken(storage, chunk_size))
    if memory_budget is None:
        raise ValueError(
            "storage='auto' needs a `memory_budget` in bytes, for example memory_budget=2e9."
        )
    if taken("stored", chunk_size) <= memory_budget:
        return StoragePlan("stored", chunk_size, taken("stored", chunk_size))
    most = min(rank, chunk_size or rank)
    fitting = int((memory_budget - small) // (2 * n * itemsize))
    if fitting < 1:
        raise ValueError(
            f"`memory_budget` must be at least {taken('streamed', 1):.3g} bytes, two vectors of "
            f"{n} numbers and what is {rank}×{rank}; got {memory_budget:.3g}. Raise it, or use "
            "CG(), which holds no columns."
        )
    chunk = min(most, fitting)
    return StoragePlan("streamed", chunk, taken("streamed", chunk))


def read_columns(
    A: Any,
    indices: Any,
    *,
    chunk_size: int | None = None,
    dtype: str | None = None,
    offload: bool = False,
) -> HeldColumns:
    """Read the columns of `A` at `indices`, a chunk at a time into the form they are kept in.

    Parameters
    ----------
    A : linear operator, shape (n, n)
    indices : distinct ints, shape (k,)
    chunk_size : int, optional
        Columns read at a time. Default: all, or 8 where they are converted.
    dtype : {"float16", "bfloat16", "float32"}, optional
        To keep them in. Each column is divided by a power of two near its largest entry, so that
        none over- or underflows.
    offload : bool
        Keep them in the host's memory.

    Returns
    -------
    HeldColumns

    Raises
    ------
    ValueError
        If a column holds NaN or Inf, or the library has no such dtype, or no float64 for what is
        k×k.
    """
    if dtype is None and not offload:
        return HeldColumns(finite_columns(A, indices, chunk_size=chunk_size))
    scales: list[Array] = []

    def held(chunk: Any) -> Array:
        C = finite_columns(A, chunk)
        if is_narrow(C):
            raise ValueError(
                "`column_dtype` and `offload` need float64 for what is k×k, which this library or "
                "device has not. In JAX, set jax_enable_x64."
            )
        if dtype is not None:
            scale = power_of_two(column_scale(C))
            scales.append(scale)
            C = astype(C / scale, narrow_dtype(dtype, C))
        return on_host(C) if offload else C

    chunks = index_chunks(indices, DEFAULT_CHUNK if chunk_size is None else chunk_size)
    C = join_columns((held(chunk) for chunk in chunks), len(indices))
    return HeldColumns(C, array_namespace(scales[0]).concat(scales) if scales else None)


def check_column_dtype(dtype: Any) -> None:
    """Raise unless `dtype` is None or the name of a dtype that columns may be kept in."""
    if dtype is not None and dtype not in ITEMSIZES:
        raise ValueError(
            f"`column_dtype` must be {', '.join(map(repr, ITEMSIZES))} or None; got {dtype!r}."
        )


def narrow_dtype(name: str, x: Array) -> Any:
    """Return the dtype called `name` in the library of `x`."""
    xp = array_namespace(x)
    found = getattr(xp, name, None)
    if found is None:
        raise ValueError(
            f"`column_dtype`={name!r} is not to be had in the library of the operator, "
            f"{describe(x)}. Use 'float16'."
        )
    return found
