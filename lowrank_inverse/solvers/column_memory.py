"""How the columns of a Nyström inverse are held, and what that takes."""

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
    """How a Nyström inverse holds its columns.

    Attributes
    ----------
    memory : {"stored", "chunked", "streamed"}
    chunk_size : int or None
        Columns computed at a time; None for all.
    num_bytes : int
        For columns held, chunks at work and what is k×k; beside them stand the right-hand side,
        the answer and whatever a product with the operator takes.
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
    """Say what a way to hold `rank` columns takes, or choose the fastest that the bytes allow.

    Parameters
    ----------
    n, rank : int
    itemsize : int
        Bytes of a number of the operator.
    memory : {"stored", "chunked", "streamed"} or float
        Bytes: stored if that fits, else streamed, in the largest chunks that fit.
    chunk_size : int, optional
        Columns computed at a time. For a number of bytes an upper limit.
    num_held : int, optional
        Vectors that are held where the columns are stored: twice the rank for a Krylov sketch.
        Default: the rank.

    Returns
    -------
    MemoryPlan

    Raises
    ------
    ValueError
        If not even one column at a time fits.

    Notes
    -----
    With κ the chunk and s the bytes of a number: stored ``k n s``; chunked and streamed ``2 κ n
    s``; all of them ``32 k²`` for what is k×k. Products: stored k; chunked ``k (k / κ + 1) / 2``
    and ``k + 1`` for a right-hand side; streamed 2k and 2. Streamed is therefore the choice
    wherever not all columns fit.

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
            f"`memory` must be at least {taken('streamed', 1):.3g} bytes, two vectors of {n} "
            f"numbers and what is {rank}×{rank}; got {memory:.3g}. Raise it, or use CG(), which "
            "holds no columns."
        )
    chunk = min(rank, chunk_size or rank, fitting)
    return MemoryPlan("streamed", chunk, taken("streamed", chunk))
