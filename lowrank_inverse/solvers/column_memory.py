"""How a Nyström inverse stores its columns, and the memory this takes."""

from __future__ import annotations

import math
import numbers
from typing import Literal, NamedTuple

from lowrank_inverse.arrays.checks import describe

MEMORY = ("stored", "chunked", "streamed")
STREAMED_DAMPING = 1e-3
"""Of the largest eigenvalue: below it, the streamed form in less than float64 loses digits."""

Memory = Literal["stored", "chunked", "streamed"] | float
"""A way to hold columns, or bytes: then the fastest way that they allow."""


class MemoryPlan(NamedTuple):
    """How a Nyström inverse stores its columns.

    Attributes
    ----------
    memory : {"stored", "chunked", "streamed"}
        How the columns are stored.
    chunk_size : int or None
        Number of columns computed at a time; None for all.
    num_bytes : int
        Bytes for stored columns, chunks in use and k×k matrices. The right-hand side, the solution
        and the memory of a product with the operator come on top.
    """

    memory: str
    chunk_size: int | None
    num_bytes: int


def check_memory(memory: Memory) -> None:
    """Raise unless `memory` is a way to hold columns, or a positive number of bytes."""
    if isinstance(memory, str):
        known = memory in MEMORY
    else:
        number = isinstance(memory, numbers.Real) and not isinstance(memory, bool)
        known = number and math.isfinite(memory) and memory > 0
    if not known:
        raise ValueError(
            f"`memory` must be {', '.join(map(repr, MEMORY))}, or a positive number of bytes such "
            f"as 2e9; got {memory if isinstance(memory, (str, float, int)) else describe(memory)}."
        )


def plan_memory(
    n: int,
    rank: int,
    itemsize: int,
    *,
    memory: Memory,
    chunk_size: int | None = None,
    num_held: int | None = None,
) -> MemoryPlan:
    """Compute the memory of `rank` columns, or choose the fastest storage that fits a budget.

    Parameters
    ----------
    n, rank : int
        Size of the operator, and number of columns.
    itemsize : int
        Bytes per number of the operator.
    memory : {"stored", "chunked", "streamed"} or float
        A number is a budget in bytes: the columns are stored if they fit. Otherwise they are
        streamed, in the largest chunks that fit.
    chunk_size : int, optional
        Columns computed at a time. With a budget in bytes, an upper limit.
    num_held : int, optional
        Number of vectors kept when the columns are stored: twice the rank for a Krylov sketch.
        Default: the rank.

    Returns
    -------
    MemoryPlan

    Raises
    ------
    ValueError
        If the budget is too small for even one column at a time.

    Notes
    -----
    Let κ be the chunk size and s the bytes per number. Storing all columns takes ``k n s`` bytes;
    chunked and streamed storage take ``2 κ n s``; k×k matrices take ``32 k²`` in each case.
    Stored columns take k products; chunked ones ``k (k / κ + 1) / 2``, and ``k + 1`` per
    right-hand side; streamed ones 2k, and 2 per right-hand side. Streaming is therefore the best
    choice whenever the columns do not fit.

    Examples
    --------
    >>> from lowrank_inverse.solvers.column_memory import plan_memory
    >>> print(plan_memory(10**7, 20, 4, memory=300e6))
    MemoryPlan(memory='streamed', chunk_size=3, num_bytes=240012800)
    """
    small = 4 * 8 * rank * rank

    def taken(way: str, chunk: int | None) -> int:
        columns = (num_held or rank) if way == "stored" else 2 * min(rank, chunk or 1)
        return columns * n * itemsize + small

    if isinstance(memory, str):
        return MemoryPlan(memory, chunk_size, taken(memory, chunk_size))
    if taken("stored", chunk_size) <= memory:
        return MemoryPlan("stored", chunk_size, taken("stored", chunk_size))
    fitting = int((memory - small) // (2 * n * itemsize))
    if fitting < 1:
        raise ValueError(
            f"`memory` must be at least {taken('streamed', 1):.3g} bytes, for two vectors of "
            f"{n} numbers and the {rank}×{rank} matrices; got {memory:.3g}. Raise it, or use CG(), "
            "which stores no columns."
        )
    chunk = min(rank, chunk_size or rank, fitting)
    return MemoryPlan("streamed", chunk, taken("streamed", chunk))
