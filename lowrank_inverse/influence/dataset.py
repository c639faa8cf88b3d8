"""A data set as batches that can be read repeatedly, in memory if they fit."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import Array, Batch
from lowrank_inverse.arrays.conversion import is_array, to_host

Flatten = Callable[[Any], tuple[list[Any], Callable[[list[Any]], Any]]]


DEFAULT_BATCH_SIZE = 512
MOST_ROWS, SMALL_BATCH = 4096, 2**20
"""Up to so many examples make a batch of the default size where they hold no more bytes."""
"""Activations of so many examples stay in a processor's cache; larger is no faster on a CPU."""


class Examples:
    """Batches of examples in a fixed order.

    The first pass counts them, and keeps them while they fit. Kept batches are cut anew, so that a
    loader of many small batches costs no more than one of large ones; others are read again, in
    the order of the first pass, and checked to have the same sizes.

    Parameters
    ----------
    source : iterable of batches
        Read from its start each time.
    name : str
        What messages call it.
    flatten : callable (batch) -> (leaves, rebuild)
        Of the framework's structures. Arrays among the leaves have one row for each example.
    batch_size : int, optional
        Default: where batches can be cut anew, 512, or up to 4096 small ones that hold a MiB
        together; else as they come.
    memory_budget : int
        Bytes to keep at most.

    Attributes
    ----------
    sizes : list of int
        Examples in each batch.
    num_bytes : int
        Of the batches that are kept.
    num : int
        Examples, all told.
    losses : numpy.ndarray, shape (num,), or None
        Of each example, once they were measured.
    """

    def __init__(
        self,
        source: Iterable[Any],
        *,
        name: str,
        flatten: Flatten,
        batch_size: int | None,
        memory_budget: int,
    ) -> None:
        self.name, self._flatten, self._source = name, flatten, source
        self._kept: list[Any] | None = []
        self._reader: Iterator[Any] | None = None
        self._next = 0
        self.sizes: list[int] = []
        self.losses: np.ndarray | None = None
        num_bytes = 0
        for batch in self._read():
            leaves, _ = flatten(batch)
            self.sizes.append(self._size(leaves, len(self.sizes)))
            num_bytes += sum(_num_bytes(leaf) for leaf in leaves if is_array(leaf))
            if self._kept is not None:
                self._kept.append(batch)
                if num_bytes > memory_budget:
                    self._kept = None
        self.num = sum(self.sizes)
        if self.num == 0:
            raise ValueError(
                f"`{name}` must hold at least one example; got none. If it reads from an "
                "iterator, that may be exhausted: pass a list of its batches."
            )
        if self._kept is not None:
            self._cut(batch_size or default_size(self.num, num_bytes))
        self.num_bytes = num_bytes if self.is_kept else 0

    @property
    def is_kept(self) -> bool:
        """Whether the batches are held, and not read again in each pass."""
        return self._kept is not None

    def __len__(self) -> int:
        """Count the batches."""
        return len(self.sizes)

    def get(self, i: int) -> Any:
        """Return batch `i`; cheap where batches are kept, or asked for one after the other."""
        if self._kept is not None:
            return self._kept[i]
        if self._reader is None or i != self._next:
            self._reader, self._next = self._read(), 0
        while True:
            try:
                batch = next(self._reader)
            except StopIteration:
                batch = None
            size = 0 if batch is None else self._size(self._flatten(batch)[0], self._next)
            if batch is None or size != self.sizes[self._next]:
                self._reader = None
                raise RuntimeError(
                    f"`{self.name}` had {self.sizes[self._next]} examples in batch {self._next} at "
                    f"first and has {size} now. It must yield the same batches each time it is "
                    "iterated: pass a Dataset, or a list of batches."
                )
            self._next += 1
            if self._next == i + 1:
                return batch

    def parts(self, limit: int | None = None) -> Iterator[tuple[int, Any]]:
        """Yield batches of at most `limit` examples, where they can be cut, and their starts."""
        start = 0
        for i, size in enumerate(self.sizes):
            batch = self.get(i)
            pieces = [(0, batch)] if limit is None or size <= limit else self._pieces(batch, limit)
            for offset, piece in pieces:
                yield start + offset, piece
            start += size

    def read_first(self, limit: int) -> Any:
        """Read at most `limit` examples of the first batch again, kept or not; None without any."""
        batch = next((batch for batch in self._read() if self.size(batch) > 0), None)
        return None if batch is None else self.rows(batch, 0, min(limit, self.size(batch)))

    def rows(self, batch: Batch, start: int, stop: int) -> Any:
        """Return the examples `start` to `stop` of a batch."""
        leaves, rebuild = self._flatten(batch)
        return rebuild([leaf[start:stop, ...] if _has_rows(leaf) else leaf for leaf in leaves])

    def size(self, batch: Batch) -> int:
        """Count the examples of a batch."""
        return next(int(x.shape[0]) for x in self._flatten(batch)[0] if _has_rows(x))

    def digest(self) -> str:
        """Hash the contents, whatever the batches."""
        sums: list[Any] = []
        for _, batch in self.parts():
            leaves = self._flatten(batch)[0]
            sums = sums or [hashlib.blake2b() for _ in leaves]
            for leaf, one in zip(leaves, sums, strict=True):
                data = to_host(leaf) if is_array(leaf) else repr(leaf).encode()
                one.update(np.ascontiguousarray(data).tobytes() if is_array(leaf) else data)
        return hashlib.blake2b("".join(one.hexdigest() for one in sums).encode()).hexdigest()

    def _read(self) -> Iterator[Any]:
        if isinstance(self._source, Iterator):
            raise TypeError(
                f"`{self.name}` can be iterated only once: it is a {type(self._source).__name__}. "
                f"Pass a DataLoader, or list({self.name})."
            )
        return iter(self._source)

    def _size(self, leaves: list[Any], i: int) -> int:
        sizes = {int(leaf.shape[0]) for leaf in leaves if _has_rows(leaf)}
        if len(sizes) != 1:
            found = [tuple(leaf.shape) for leaf in leaves if is_array(leaf)]
            raise ValueError(
                f"`{self.name}` must have batches of arrays with one row for each example; batch "
                f"{i} holds arrays of shapes {found}. Stack single examples, or make a data set of "
                "them."
            )
        return sizes.pop()

    def _pieces(self, batch: Batch, limit: int) -> Iterator[tuple[int, Any]]:
        leaves, _ = self._flatten(batch)
        if not all(map(_has_rows, leaves)):
            yield 0, batch
            return
        size = self.size(batch)
        for start in range(0, size, limit):
            yield start, self.rows(batch, start, min(start + limit, size))

    def _cut(self, batch_size: int) -> None:
        """Cut what is kept into batches of one size, if it can be joined."""
        assert self._kept is not None
        kept = [batch for batch in self._kept if self.size(batch) > 0]
        rebuild = self._flatten(kept[0])[1]
        leaves = [self._flatten(batch)[0] for batch in kept]
        if _can_be_joined(leaves):
            self._kept, kept = [], []  # so that each is gone when its rows are copied
            self._kept = [rebuild(piece) for piece in _recut(leaves, batch_size)]
        else:
            self._kept = kept
        self.sizes = [self.size(batch) for batch in self._kept]


class Slices:
    """Arrays with one row for each example, as batches of at most `size` of them."""

    def __init__(self, data: Any, flatten: Flatten, size: int) -> None:
        self._leaves, self._rebuild = flatten(data)
        self._size = size

    def __iter__(self) -> Iterator[Any]:
        """Read from the start."""
        return map(self._rebuild, _recut([self._leaves], self._size))


def in_batches(
    data: Any, flatten: Flatten, batch_size: int | None, memory_budget: int
) -> Iterable[Any]:
    """Return arrays as one batch, or slice by slice where they hold more than the budget.

    So no pass has a graph over all of them, and those in a file are read a slice at a time.
    """
    leaves, _ = flatten(data)
    if all(map(_has_rows, leaves)) and len({len(leaf) for leaf in leaves}) == 1:
        num_bytes = sum(map(_num_bytes, leaves))
        if num_bytes > memory_budget:
            return Slices(data, flatten, batch_size or default_size(len(leaves[0]), num_bytes))
    return [data]


def default_size(num: int, num_bytes: int) -> int:
    """Return the size of a batch for `num` examples of so many bytes together."""
    return max(DEFAULT_BATCH_SIZE, min(SMALL_BATCH * num // max(1, num_bytes), MOST_ROWS))


def _can_be_joined(batches: list[list[Any]]) -> bool:
    """Whether each leaf has rows, of one kind in all batches."""
    kinds = {
        tuple((x.dtype, tuple(x.shape[1:])) if _has_rows(x) else None for x in b) for b in batches
    }
    return len(kinds) == 1 and None not in next(iter(kinds))


def _recut(batches: list[list[Array]], size: int) -> Iterator[list[Array]]:
    """Yield the rows of batches, `size` at a time, and empty the list.

    They are views of a single batch, and copies of several, each of which can go when it is read.
    """
    is_single = len(batches) == 1
    held: list[list[Array]] = []
    num = 0
    batches.reverse()
    while batches:
        leaves = batches.pop()
        start, stop = 0, len(leaves[0])
        while start < stop:
            end = min(stop, start + size - num)
            held.append([leaf[start:end, ...] for leaf in leaves])
            num, start = num + end - start, end
            if num == size or (start == stop and not batches):
                yield held[0] if is_single else _joined(held)
                held, num = [], 0


def _joined(batches: list[list[Array]]) -> list[Array]:
    return [
        array_namespace(leaves[0]).concat(leaves, axis=0) for leaves in zip(*batches, strict=True)
    ]


def _has_rows(leaf: Any) -> bool:
    return is_array(leaf) and leaf.ndim > 0


def _num_bytes(leaf: Any) -> int:
    itemsize = getattr(leaf, "itemsize", None) or leaf.dtype.itemsize
    return int(itemsize) * int(np.prod(tuple(leaf.shape), dtype=np.int64))
