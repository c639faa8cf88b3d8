"""Data sets of torch in every usual form, as batches in the order of the data set."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    default_collate,
)

from lowrank_inverse._typing import Data, PyTree
from lowrank_inverse.influence.dataset import DEFAULT_BATCH_SIZE, Examples, in_batches

LOW_PRECISION = (torch.float16, torch.bfloat16)


class Moved:
    """Batches as detached tensors on the device of `like`, NumPy's arrays too.

    Floating numbers of NumPy come in the dtype of `like`; so do, with `widen`, those in less than
    float32.
    """

    def __init__(self, batches: Iterable[Any], like: Tensor, widen: bool) -> None:
        self.batches, self.like, self.widen = batches, like, widen

    def __iter__(self) -> Iterator[Any]:
        """Read from the start."""
        for batch in self.batches:
            leaves, rebuild = flatten(batch)
            yield rebuild([self._moved(leaf) for leaf in leaves])

    def _moved(self, leaf: Any) -> Any:
        floating = False
        if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf":
            floating = leaf.dtype.kind == "f"
            leaf = torch.tensor(np.ascontiguousarray(leaf))
        if not isinstance(leaf, Tensor):
            return leaf
        floating |= self.widen and leaf.dtype in LOW_PRECISION
        # From pinned memory a copy to an accelerator runs beside the work there.
        return leaf.detach().to(
            self.like.device,
            self.like.dtype if floating else leaf.dtype,
            non_blocking=self.like.device.type != "cpu",
        )


def as_examples(
    data: Data,
    name: str,
    *,
    like: Tensor,
    widen: bool,
    batch_size: int | None,
    memory_budget: int,
) -> Examples:
    """Return a DataLoader, a Dataset, a tuple or dict of arrays or a list of batches as examples.

    A list of single examples, and what else has a length and items, is a data set too.

    Raises
    ------
    TypeError
        What can be iterated only once, or not at all.
    ValueError
        A loader with a sampler that gives no order to number the examples by.
    """
    batches = _batches(data, name, batch_size, memory_budget)
    return Examples(
        batches if isinstance(batches, Iterator) else Moved(batches, like, widen),
        name=name,
        flatten=flatten,
        batch_size=batch_size,
        memory_budget=memory_budget,
    )


def _batches(data: Data, name: str, batch_size: int | None, memory_budget: int) -> Iterable[Any]:
    if isinstance(data, DataLoader):
        return in_order(data, name)
    if isinstance(data, (tuple, Mapping)):
        return in_batches(data, flatten, batch_size, memory_budget)
    if _is_dataset(data):
        _check_length(data, name)
        return DataLoader(data, batch_size=batch_size or DEFAULT_BATCH_SIZE, collate_fn=_stacked)
    if isinstance(data, list) or (isinstance(data, Iterable) and not isinstance(data, Tensor)):
        return data
    raise TypeError(
        f"`{name}` must be a DataLoader, a Dataset, a tuple of tensors (inputs, targets) or a list "
        f"of batches or examples; got {type(data).__name__}."
    )


def in_order(loader: DataLoader[Any], name: str) -> Iterable[Any]:
    """Return a loader whose examples come in the order of its data set, none left out."""
    if isinstance(loader.dataset, IterableDataset):
        return loader
    batch_sampler = loader.batch_sampler
    sampler = getattr(batch_sampler, "sampler", batch_sampler or loader.sampler)
    drops = getattr(batch_sampler, "drop_last", False)
    if isinstance(sampler, SequentialSampler) and not drops:
        return loader
    known = isinstance(sampler, SequentialSampler)
    if isinstance(sampler, RandomSampler) and not sampler.replacement:
        known = sampler.num_samples == len(loader.dataset)  # type: ignore[arg-type]
    if not known or (batch_sampler is not None and loader.batch_size is None):
        raise ValueError(
            f"`{name}` draws its examples by a {type(sampler).__name__}, which does not define an "
            "order to number them. Pass its Dataset, or a loader with shuffle=False."
        )
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
    )


def _check_length(data: Data, name: str) -> None:
    if not hasattr(data, "__len__"):
        raise TypeError(
            f"`{name}` must have a length; {type(data).__name__} has none. Pass a DataLoader."
        )


def _is_dataset(data: Data) -> bool:
    """Whether the items of `data` are examples, as torch has it; those of a list may be batches."""
    if isinstance(data, list):
        return len(data) > 0 and _is_example(data[0])
    if isinstance(data, Dataset):
        return not isinstance(data, IterableDataset)
    has_items = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    return has_items and not isinstance(data, str) and not hasattr(data, "dtype")


def _is_example(item: Any) -> bool:
    """Whether an item is no batch: it has a number where a batch has one for each example."""
    arrays = [leaf for leaf in flatten(item)[0] if isinstance(leaf, (Tensor, np.ndarray))]
    numbers = (
        isinstance(leaf, (int, float, np.generic)) and not isinstance(leaf, bool)
        for leaf in flatten(item)[0]
    )
    return any(numbers) or len({leaf.shape[:1] for leaf in arrays}) > 1


def _stacked(examples: list[Any]) -> Any:
    """Stack examples as torch does; lists of numbers in a dict, as of a tokenizer, are arrays."""

    def plain(example: Any) -> Any:
        if not isinstance(example, Mapping):
            return example
        return {k: torch.tensor(v) if isinstance(v, list) else v for k, v in example.items()}

    try:
        return default_collate([plain(example) for example in examples])
    except RuntimeError as error:
        raise ValueError(
            f"the examples cannot be stacked: {error}. Pass a DataLoader with a `collate_fn` that "
            "pads them, such as transformers.DataCollatorWithPadding."
        ) from error


def flatten(tree: PyTree) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Return the leaves of a structure, and what puts others in their places.

    Mappings of every kind and dataclasses are structures, such as a tokenizer's batches and a
    model's outputs, beside those that torch knows.
    """
    put: Any = None
    if isinstance(tree, Mapping):
        keys: list[Any] = sorted(tree, key=str)
        children, put = [tree[key] for key in keys], operator.setitem
    elif is_dataclass(tree) and not isinstance(tree, type):
        keys, put = [field.name for field in fields(tree)], object.__setattr__
        children = [getattr(tree, key) for key in keys]
    else:
        children, structure = pytree.tree_flatten(tree)
        if len(children) == 1 and children[0] is tree:
            return children, lambda values: values[0]
        keys = []
    parts = [flatten(child) for child in children]

    def rebuild(values: list[Any]) -> Any:
        rest = iter(values)
        built = [build(list(islice(rest, len(part)))) for part, build in parts]
        if put is None:
            return pytree.tree_unflatten(built, structure)
        other = copy.copy(tree)
        for key, value in zip(keys, built, strict=True):
            put(other, key, value)
        return other

    return [leaf for part, _ in parts for leaf in part], rebuild
