"""Arrays whose rows are spread over the processes of a mesh: torch's DTensor.

What has n rows is laid out as ``Shard(0)``, or ``Shard(1)`` where it is transposed: each process
holds its own. What is of the size of k lies whole on each. Few operations then need to send
anything: sums over rows, and the gathering of rows. They are here.

An array of jax knows its own layout, and jax sends what is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import Array


def is_spread(x: Any) -> bool:
    """Whether `x` is a DTensor."""
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and isinstance(x, tensor.DTensor)


def _placed(part: Array, x: Array, placement: str, *options: Any, **shape: Any) -> Array:
    """Return a DTensor on the mesh of `x`, of which this process has `part`."""
    tensor = sys.modules["torch.distributed.tensor"]
    placements = [getattr(tensor, placement)(*options)]
    return tensor.DTensor.from_local(part, x.device_mesh, placements, run_check=False, **shape)


def local(x: Array) -> Array:
    """Return what this process has of `x`; all of it where it is not spread."""
    return x.to_local() if is_spread(x) else x


def gathered(x: Array) -> Array:
    """Return all of `x` as a plain array."""
    return x.full_tensor() if is_spread(x) else x


def reduced(x: Array) -> Array:
    """Return `x` with sums over the processes taken; it then lies whole on each."""
    if not is_spread(x):
        return x
    return x.redistribute(x.device_mesh, [sys.modules["torch.distributed.tensor"].Replicate()])


def laid_as(x: Array, other: Array) -> Array:
    """Return `x` in the layout of `other`, of the same shape or with as many rows."""
    return x.redistribute(other.device_mesh, other.placements) if is_spread(other) else x


def summed(part: Array, x: Array) -> Array:
    """Return the sum of the parts of all processes, whole on each, on the mesh of `x`."""
    return reduced(_placed(part, x, "Partial"))


def everywhere(values: Array, x: Array) -> Array:
    """Return plain `values`, equal on all processes, as an array on the mesh of `x`."""
    return _placed(values, x, "Replicate")


def flipped(x: Array, axis: int = 0) -> Array:
    """Return `x`, which lies whole on each process, in reverse order along an axis.

    A DTensor of torch 2.11 cannot do so itself.
    """
    if not is_spread(x):
        return array_namespace(x).flip(x, axis=axis)
    return everywhere(local(reduced(x)).flip(axis), x)


def from_first(values: Array) -> Array:
    """Return `values`, which lie whole on each process, as the first process has them.

    Decompositions are unique up to signs, and machines may differ in them.
    """
    if not is_spread(values):
        return values
    part = values.to_local()
    first = values.device_mesh.get_local_rank() == 0
    return summed(part if first else 0 * part, values)


def owned_rows(x: Array, n: int) -> range:
    """Return the numbers of the rows that this process has of n rows spread as those of `x`."""
    return _rows_of(x.device_mesh.get_local_rank(), x, n)


def _rows_of(rank: int, x: Array, n: int) -> range:
    size = -(-n // x.device_mesh.size())
    start = min(n, rank * size)
    return range(start, min(n, start + size))


def spread_rows(part: Array, x: Array, n: int) -> Array:
    """Return the array of `n` rows of which this process has the rows `part`."""
    shape = (n, *part.shape[1:])
    strides = np.cumprod([1, *shape[:0:-1]])[::-1].tolist()
    return _placed(part, x, "Shard", 0, shape=shape, stride=tuple(strides))


def rows_beside(rows: Array, x: Array) -> Array:
    """Return plain rows, which each process has, spread as those of `x` if it is."""
    if not is_spread(x) or is_spread(rows):
        return rows
    mine = owned_rows(x, rows.shape[0])
    return spread_rows(rows[mine.start : mine.stop, ...], x, rows.shape[0])


def rows_in_turn(x: Array) -> Iterator[Array]:
    """Yield the rows of each process that has some, one after the other, whole on each."""
    mesh, part = x.device_mesh, local(x)
    for rank in range(mesh.size()):
        if count := len(_rows_of(rank, x, x.shape[0])):
            own = rank == mesh.get_local_rank()
            yield gathered(summed(part if own else part.new_zeros((count, *part.shape[1:])), x))


def taken_rows(x: Array, indices: np.ndarray) -> Array:
    """Return the rows of a spread `x` at host `indices`, whole on each process."""
    mine, part = owned_rows(x, x.shape[0]), local(x)
    rows = part.new_zeros((len(indices), *part.shape[1:]))
    here = np.flatnonzero((indices >= mine.start) & (indices < mine.stop))
    if here.size:
        rows[here.tolist()] = part[(indices[here] - mine.start).tolist()]
    return summed(rows, x)


def scattered_rows(values: Array, indices: np.ndarray, n: int) -> Array:
    """Return zeros with `n` spread rows, and in the rows `indices` those of `values`."""
    mine, part = owned_rows(values, n), local(values)
    rows = part.new_zeros((len(mine), *part.shape[1:]))
    here = np.flatnonzero((indices >= mine.start) & (indices < mine.stop))
    if here.size:
        rows[(indices[here] - mine.start).tolist()] = part[here.tolist()]
    return spread_rows(rows, values, n)


def zeros_across(count: int, x: Array) -> Array:
    """Return zeros, shape (count, n), spread along n as the rows of `x`, shape (n,) or (n, m)."""
    rows = local(x)
    return spread_rows(rows.new_zeros((rows.shape[0], count)), x, x.shape[0]).T


def stacked_rows(R: Array, x: Array) -> Array:
    """Return the rows `R`, as many on each process, one after the other, whole on each process."""
    mesh, k = x.device_mesh, R.shape[0]
    all_rows = R.new_zeros((mesh.size() * k, *R.shape[1:]))
    start = mesh.get_local_rank() * k
    all_rows[start : start + k] = R
    return summed(all_rows, x)
