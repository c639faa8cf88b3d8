"""Parameters of a module, tensor or pytree as one flat vector, and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_inverse._typing import PyTree
from lowrank_inverse.arrays.spread import everywhere, is_spread, laid_as
from lowrank_inverse_torch.mesh.sharded import with_whole_modules
from lowrank_inverse_torch.structures import expand_modules, is_leaf, tree_map, walk
from lowrank_inverse_torch.tensor_checks import check_alike, check_one_kind

__all__ = ["Parameters", "as_parameters"]


@dataclass(frozen=True, eq=False)
class Parameters:
    """The distinct tensors that require grad in a structure, and conversions to a flat vector.

    Created by `as_parameters`. The flat vector of length ``n`` holds `tensors` one after the other,
    each in row-major order.

    Attributes
    ----------
    tensors : tuple of Tensor
        The user's own tensors that require grad, in order; a tied tensor appears once.
    names : tuple of str
        Where each of them was first found, such as ``"0.weight"``; for messages.
    modules : tuple of Module
        The modules in the structure, whose buffers and mode are to be restored.
    offsets : tuple of int
        Tensor ``i`` occupies ``offsets[i]:offsets[i + 1]`` of the vector; the last offset is ``n``.
    sharded : tuple of Tensor
        The user's own DTensors, in which case `tensors` hold their full values.
    """

    tensors: tuple[Tensor, ...]
    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    offsets: tuple[int, ...]
    _positions: Any  # the user's structure, with positions in `tensors`, and None where frozen
    sharded: tuple[Tensor, ...] = ()

    @property
    def n(self) -> int:
        """Length of the flat vector."""
        return self.offsets[-1]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of elements of each tensor."""
        return tuple(tensor.numel() for tensor in self.tensors)

    @property
    def dtype(self) -> torch.dtype:
        """The common dtype of all tensors."""
        return self.tensors[0].dtype

    @property
    def device(self) -> torch.device:
        """The common device of all tensors."""
        return self.tensors[0].device

    def flatten(
        self, tensors: Sequence[Tensor | None], *, num_columns: int | None = None
    ) -> Tensor:
        """Copy tensors into one vector, or stacks of tensors into a block.

        Parameters
        ----------
        tensors : sequence of Tensor or None
            One for each of `self.tensors`, of the same shape; None means zeros.
        num_columns : int, optional
            If given, each tensor has this many slices along a new first axis.

        Returns
        -------
        Tensor, shape (n,), or (n, num_columns)
            A detached copy.
        """
        rows = torch.zeros(num_columns or 1, self.n, dtype=self.dtype, device=self.device)
        if num_columns is None:
            self.add_to(rows[0], tensors)
            return rows[0]
        for j, row in enumerate(rows[:num_columns]):
            self.add_to(row, [None if t is None else t[j] for t in tensors])
        return rows[:num_columns].mT

    def add_to(self, row: Tensor, tensors: Sequence[Tensor | None]) -> None:
        """Add tensors to a flat vector of shape (n,), in place; None adds nothing."""
        places = zip(tensors, self.offsets[:-1], self.offsets[1:], strict=True)
        for tensor, start, stop in places:
            if tensor is not None:
                row[start:stop] += tensor.detach().reshape(stop - start)

    def copy_to(self, row: Tensor, tensors: Sequence[Tensor | None]) -> None:
        """Write tensors to a flat vector of shape (n,); None writes zeros."""
        places = zip(tensors, self.offsets[:-1], self.offsets[1:], strict=True)
        for tensor, start, stop in places:
            if tensor is None:
                row[start:stop] = 0
            else:
                row[start:stop] = tensor.detach().reshape(stop - start)

    def unflatten(self, vector: Tensor) -> list[Tensor]:
        """Split a vector, shape (n,), or a block, shape (n, m), into tensors.

        Returns
        -------
        list of Tensor
            Shaped like `self.tensors`, as views if possible. For a block, each has its m columns
            stacked along a new first axis.
        """
        shapes = [tensor.shape for tensor in self.tensors]
        places = zip(shapes, self.offsets[:-1], self.offsets[1:], strict=True)
        if vector.ndim == 1:
            return [vector[start:stop].reshape(shape) for shape, start, stop in places]
        m = vector.shape[1]
        return [vector[start:stop].mT.reshape(m, *shape) for shape, start, stop in places]

    def restore(self, values: Tensor | Sequence[Tensor | None]) -> Any:
        """Put values into the structure of `params`.

        Parameters
        ----------
        values : Tensor, shape (n,), or sequence of Tensor or None
            A flat vector, or one value for each of `self.tensors`.

        Returns
        -------
        structure
            The structure given to `as_parameters`. A module becomes a dict with the keys of its
            ``named_parameters()``, and an iterator a list. Frozen tensors become None, and tied
            ones share a value.
        """
        wanted = (self.n,) if isinstance(values, Tensor) else (len(self.tensors),)
        got = tuple(values.shape) if isinstance(values, Tensor) else (len(values),)
        if got != wanted:
            raise ValueError(f"`values` must have shape {wanted} as the parameters; got {got}.")
        tensors = self.unflatten(values) if isinstance(values, Tensor) else values
        if self.sharded:
            pairs = zip(tensors, self.sharded, strict=True)
            tensors = [None if x is None else laid_as(everywhere(x, y), y) for x, y in pairs]
        return tree_map(lambda i: None if i is None else tensors[i], self._positions)

    def collect(
        self, tree: PyTree, *, name: str = "v", expand: bool = False
    ) -> list[Tensor | None]:
        """Invert `restore`: return a value for each of `self.tensors` from a structure.

        With `expand`, a number or a tensor of shape () stands for all entries of a tensor.

        Raises
        ------
        ValueError
            If the structure or a shape differs, a frozen tensor has a value, or tied tensors have
            different ones.
        TypeError
            If a value is not a tensor, or has another dtype.
        """
        tree = expand_modules(tree)[0]
        values: list[Tensor | None] = [None] * len(self.tensors)
        positions = walk(self._positions, self._positions, name=name)
        for (place, i), (_, leaf) in zip(
            positions, walk(tree, self._positions, name=name), strict=True
        ):
            where = f"`{name}` at {place!r}" if place else f"`{name}`"
            if leaf is None:
                continue
            if i is None:
                raise ValueError(f"{where} must be None: the parameter there is frozen.")
            if expand and (isinstance(leaf, Real) or getattr(leaf, "shape", None) == ()):
                at = self.tensors[i]
                leaf = torch.as_tensor(leaf, dtype=at.dtype, device=at.device).expand(at.shape)
            check_alike(leaf, self.tensors[i], where)
            if leaf.shape != self.tensors[i].shape:
                wanted = tuple(self.tensors[i].shape)
                raise ValueError(f"{where} must have shape {wanted}; got {tuple(leaf.shape)}.")
            first = values[i]
            if first is not None and first is not leaf and not torch.equal(first, leaf):
                raise ValueError(f"{where} must equal that at {self.names[i]!r}: they are tied.")
            values[i] = leaf
        return values

    def check_vector(self, v: Any, *, name: str = "v", block: bool = True) -> Tensor:
        """Return `v` detached if it is a vector (n,) or a block (n, m); raise otherwise."""
        check_alike(v, self.tensors[0], f"`{name}`")
        if v.ndim not in ((1, 2) if block else (1,)) or v.shape[0] != self.n:
            wanted = f"({self.n},) or ({self.n}, m)" if block else f"({self.n},)"
            raise ValueError(
                f"`{name}` must have shape {wanted}, one row for each parameter; "
                f"got {tuple(v.shape)}."
            )
        return v.detach()


def as_parameters(
    params: PyTree, *, name: str = "params", spread: bool = False, gather: bool = False
) -> Parameters:
    """Find the distinct tensors that require grad in `params`.

    Parameters
    ----------
    params : Module, Tensor, iterable of tensors, or pytree of tensors and modules
        Nothing is copied. An iterator such as ``model.parameters()`` is accepted. Tensors that do
        not require grad are frozen and ignored; a tensor found twice (tied weights) counts once.
        Tensors need not be leaves of the graph. None is kept in its place.
    name : str
        Name of the argument in messages.
    spread, gather : bool
        Whether DTensors are accepted, and whether all processes gather them into full tensors.

    Returns
    -------
    parameters : Parameters
        The tensors, and conversions between them, a flat vector and the structure of `params`.

    Raises
    ------
    TypeError
        If something is not a tensor, is complex, or the dtypes differ.
    ValueError
        If no tensor requires grad, or the devices differ.

    Examples
    --------
    >>> import torch
    >>> model = torch.nn.Sequential(
    ...     torch.nn.Linear(3, 2), torch.nn.Linear(2, 1, bias=False)
    ... )
    >>> params = as_parameters(model)
    >>> params.names, params.n
    (('0.weight', '0.bias', '1.weight'), 10)
    """
    if isinstance(params, Parameters):
        return params
    known = isinstance(params, (Tensor, nn.Module, str))
    if isinstance(params, Iterable) and not known and is_leaf(params):  # such as an iterator
        params = list(params)
    tree, modules = expand_modules(params)
    own: dict[int, Tensor] = {}
    if gather and any(is_spread(leaf) for _, leaf in walk(tree, tree, name=name)):
        leaves = {id(leaf): leaf for _, leaf in walk(tree, tree, name=name)}
        modules, wholes = with_whole_modules(modules, leaves.values())
        own = {id(whole): leaves[place] for place, whole in wholes.items() if place in leaves}
        tree = tree_map(lambda leaf: wholes.get(id(leaf), leaf), tree)
    found: dict[int, int] = {}
    tensors: list[Tensor] = []
    names: list[str] = []
    num_leaves = 0
    for place, leaf in walk(tree, tree, name=name):
        num_leaves += 1
        if leaf is not None and not isinstance(leaf, Tensor):
            where = f" at {place!r}" if place else ""
            raise TypeError(
                f"`{name}` must be a module or hold tensors; got {type(leaf).__name__}{where}."
            )
        if leaf is not None and leaf.requires_grad and id(leaf) not in found:
            found[id(leaf)] = len(tensors)
            tensors.append(leaf)
            names.append(place or name)
    if sum(tensor.numel() for tensor in tensors) == 0:
        raise ValueError(
            f"`{name}` must hold a tensor that requires grad; got {num_leaves} leaves, none of "
            "which does. Call requires_grad_() on the tensors to differentiate."
        )
    check_one_kind(tensors, names, name, spread)
    offsets = tuple(accumulate((tensor.numel() for tensor in tensors), initial=0))
    positions = tree_map(lambda leaf: found.get(id(leaf)), tree)
    sharded = tuple(own[id(tensor)] for tensor in tensors) if own else ()
    return Parameters(tuple(tensors), tuple(names), tuple(modules), offsets, positions, sharded)
