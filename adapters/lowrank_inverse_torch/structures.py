"""Structures of tensors: the few walks that params.py needs, the same in every torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils import _pytree as pytree  # only what it has had under these names since torch 2.2

from lowrank_inverse._typing import PyTree

tree_map = pytree.tree_map


def is_leaf(tree: PyTree) -> bool:
    """Tell whether `tree` is no container that torch knows; None is a leaf."""
    leaves = pytree.tree_flatten(tree)[0]
    return len(leaves) == 1 and leaves[0] is tree


def expand_modules(tree: PyTree) -> tuple[Any, list[nn.Module]]:
    """Put the dict of its named parameters in the place of each module."""
    modules: list[nn.Module] = []

    def expand(leaf: Any) -> Any:
        if not isinstance(leaf, nn.Module):
            return leaf
        modules.append(leaf)
        return dict(leaf.named_parameters())

    return tree_map(expand, tree), modules


def walk(tree: PyTree, like: Any, *, name: str, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield place and value of `tree` for each leaf of `like`, such as ``("layers.0", value)``.

    Keys of a dict may come in another order, and a tuple for a list.

    Raises
    ------
    ValueError
        `tree`, which messages call `name`, has another structure.
    """
    if is_leaf(like):
        yield place, tree
        return
    children: list[tuple[Any, Any, Any]] | None = None
    if isinstance(like, dict):
        wanted = f"a dict with the keys {list(like)}"
        if isinstance(tree, dict) and tree.keys() == like.keys():
            children = [(key, tree[key], like[key]) for key in like]
    elif isinstance(like, (list, tuple)):
        wanted = f"a list or tuple of {len(like)}"
        if isinstance(tree, (list, tuple)) and len(tree) == len(like):
            children = list(zip(range(len(like)), tree, like, strict=True))
    else:
        wanted = f"a {type(like).__name__} of the same structure"
        (leaves, structure), (like_leaves, like_structure) = map(pytree.tree_flatten, (tree, like))
        if structure == like_structure:
            children = list(zip(range(len(leaves)), leaves, like_leaves, strict=True))
    if children is None:
        where = f" at {place!r}" if place else ""
        got = f"{type(tree).__name__} of {len(tree)}" if hasattr(tree, "__len__") else repr(tree)
        raise ValueError(
            f"`{name}` must have the structure of the parameters: {wanted}{where}; got {got}."
        )
    for key, child, like_child in children:
        below = f"{place}.{key}" if place else str(key)
        yield from walk(child, like_child, name=name, place=below)
