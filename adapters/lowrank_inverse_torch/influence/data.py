"""Data sets of torch in every usual form, as batches in the order of the data set."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler

from lowrank_inverse.influence.dataset import DEFAULT_BATCH_SIZE, Examples


class Moved:
    """Batches with their tensors on one device, and detached."""

    def __init__(self, batches: Iterable[Any], device: torch.device) -> None:
        self.batches, self.device = batches, device

    def __iter__(self) -> Iterator[Any]:
        """Read from the start."""
        for batch in self.batches:
            yield pytree.tree_map(
                lambda x: x.detach().to(self.device) if isinstance(x, Tensor) else x, batch
            )


def as_examples(
    data: Any, name: str, *, device: torch.device, batch_size: int | None, memory_budget: int
) -> Examples:
    """Return a DataLoader, a Dataset, a tuple or dict of tensors or a list of batches as examples.

    Raises
    ------
    TypeError
        What can be iterated only once, or not at all.
    ValueError
        A loader with a sampler that gives no order to number the examples by.
    """
    batches = _batches(data, name, batch_size)
    return Examples(
        batches if isinstance(batches, Iterator) else Moved(batches, device),
        name=name,
        flatten=_flatten,
        batch_size=batch_size,
        memory_budget=memory_budget,
    )


def _batches(data: Any, name: str, batch_size: int | None) -> Iterable[Any]:
    if isinstance(data, DataLoader):
        return _in_order(data, name)
    if isinstance(data, (tuple, dict)):
        return [data]
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        _check_length(data, name)
        return DataLoader(data, batch_size=batch_size or DEFAULT_BATCH_SIZE)
    if isinstance(data, list) or (isinstance(data, Iterable) and not isinstance(data, Tensor)):
        return data
    raise TypeError(
        f"`{name}` must be a DataLoader, a Dataset, a tuple of tensors (inputs, targets) or a list "
        f"of batches; got {type(data).__name__}."
    )


def _in_order(loader: DataLoader[Any], name: str) -> Iterable[Any]:
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
            f"`{name}` draws its examples by a {type(sampler).__name__}, which gives no order to "
            "number them by. Give its Dataset, or a loader with shuffle=False."
        )
    return DataLoader(
        loader.dataset,
        batch_size=loader.batch_size,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
    )


def _check_length(data: Any, name: str) -> None:
    if not hasattr(data, "__len__"):
        raise TypeError(
            f"`{name}` must have a length; {type(data).__name__} has none. Give a DataLoader."
        )


def _flatten(batch: Any) -> tuple[list[Any], Any]:
    leaves, structure = pytree.tree_flatten(batch)
    return leaves, lambda values: pytree.tree_unflatten(values, structure)
