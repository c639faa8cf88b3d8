"""Data sets in every usual form as batches that jax compiles for, in the order of the data set."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from array_api_compat import is_torch_array

from lowrank_inverse._typing import Batch, Data
from lowrank_inverse.arrays.checks import describe
from lowrank_inverse.arrays.conversion import is_array, to_host
from lowrank_inverse.influence.dataset import DEFAULT_BATCH_SIZE, in_batches


class Converted:
    """Batches as pytrees of arrays: mappings as dicts, torch's tensors in NumPy."""

    def __init__(self, batches: Iterable[Any], name: str) -> None:
        self.batches, self.name = batches, name

    def __iter__(self) -> Iterator[Any]:
        """Read from the start."""
        for batch in self.batches:
            batch = _plain(batch)
            for leaf in jax.tree_util.tree_leaves(batch):
                if isinstance(leaf, (str, bytes)) or np.dtype("O") == getattr(leaf, "dtype", None):
                    raise TypeError(
                        f"`{self.name}` must have batches of numbers, which jax compiles for; one "
                        f"holds {leaf!r:.60}. Remove it, or encode it."
                    )
            yield jax.tree_util.tree_map(lambda x: to_host(x) if is_torch_array(x) else x, batch)


class Stacked:
    """Batches of single examples."""

    def __init__(self, examples: Sequence[Any], batch_size: int) -> None:
        self.examples, self.batch_size = examples, batch_size

    def __iter__(self) -> Iterator[Any]:
        """Read from the start."""
        for start in range(0, len(self.examples), self.batch_size):
            stop = min(start + self.batch_size, len(self.examples))
            rows = [_plain(self.examples[i]) for i in range(start, stop)]
            yield jax.tree_util.tree_map(lambda *parts: np.stack(list(map(to_host, parts))), *rows)


def as_batches(data: Data, name: str, batch_size: int | None, memory_budget: int) -> Iterable[Any]:
    """Return a pytree of arrays, a list of batches or of examples, or an iterable as batches.

    A loader or data set of torch is read in its order.

    Raises
    ------
    TypeError
        What is none of them.
    """
    if isinstance(data, Iterator):
        return data
    return Converted(_batches(data, name, batch_size, memory_budget), name)


def _batches(data: Data, name: str, batch_size: int | None, memory_budget: int) -> Iterable[Any]:
    torch_data = sys.modules.get("torch.utils.data")
    if torch_data is not None and isinstance(data, torch_data.DataLoader):
        from lowrank_inverse_torch.influence.data import in_order

        return in_order(data, name)
    data = _plain(data)
    leaves = jax.tree_util.tree_leaves(data)
    if not isinstance(data, list) and leaves and all(map(is_array, leaves)):  # one batch
        return in_batches(data, flatten, batch_size, memory_budget)
    has_items = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    if isinstance(data, (str, dict, tuple)) or not (has_items or isinstance(data, Iterable)):
        raise TypeError(
            f"`{name}` must be a pytree of arrays with one row for each example, a list of "
            f"batches or of examples, or an iterable of batches; got {describe(data)}."
        )
    if has_items and len(data) > 0 and (not isinstance(data, list) or _is_example(data[0])):
        return Stacked(data, batch_size or DEFAULT_BATCH_SIZE)
    return data


def _plain(item: Any) -> Any:
    """Return a mapping as a dict, the one kind that jax knows."""
    return dict(item) if isinstance(item, Mapping) else item


def _is_example(item: Any) -> bool:
    """Whether an item is no batch: it has a number where a batch has one for each example."""
    leaves = jax.tree_util.tree_leaves(_plain(item))
    arrays = [leaf for leaf in leaves if not isinstance(leaf, (str, bytes, bool))]
    return len({np.shape(leaf)[:1] for leaf in arrays}) > 1 or any(
        np.ndim(leaf) == 0 for leaf in arrays
    )


def flatten(batch: Batch) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Return the leaves of a batch, and what puts others in their places."""
    leaves, structure = jax.tree_util.tree_flatten(batch)
    return leaves, lambda values: jax.tree_util.tree_unflatten(structure, values)
