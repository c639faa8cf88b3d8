"""The float leaves of a pytree as one flat vector, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lowrank_inverse._typing import PyTree
from lowrank_inverse_jax.layout import Layout

__all__ = ["Parameters", "as_parameters"]


class Parameters:
    """The float arrays among the leaves of a pytree as one vector, and conversions back.

    Created by `as_parameters`. Other leaves (integers, functions, None) are kept but never
    differentiated.

    Attributes
    ----------
    vector : jax.Array, shape (n,)
        The float leaves one after the other, each in row-major order.
    names : tuple of str
        Path of each float leaf, such as ``"['w']"``.
    n : int
        Length of the vector.
    layout : Layout
        Sharding of the vector and of others of its length.
    """

    def __init__(self, tree: PyTree, *, name: str = "params", mesh: Mesh | None = None) -> None:
        self.layout = Layout(mesh)
        self.layout.check(tree, name, axes=True)
        if isinstance(tree, float):  # as jax.grad takes it
            tree = jnp.asarray(tree)
        _refuse_collections(tree, name)
        places, structure = jax.tree_util.tree_flatten_with_path(tree)
        self._structure: Any = structure
        self._leaves = [leaf for _, leaf in places]
        self._floats = [i for i, leaf in enumerate(self._leaves) if _is_float(leaf)]
        self.names = tuple(
            jax.tree_util.keystr(path) or name
            for i, (path, _) in enumerate(places)
            if i in set(self._floats)
        )
        arrays = [jnp.asarray(self.layout.put(self._leaves[i], name)) for i in self._floats]
        if sum(array.size for array in arrays) == 0:
            raise ValueError(
                f"`{name}` must hold a floating-point array to differentiate; none of its "
                f"{len(places)} leaves is one. Pass arrays such as jax.numpy.asarray(0.1)."
            )
        for array, place in zip(arrays, self.names, strict=True):
            if jnp.issubdtype(array.dtype, jnp.complexfloating):
                raise TypeError(
                    f"`{name}` must be real; {place!r} is {array.dtype}. Store its real and "
                    "imaginary parts as two arrays."
                )
            if hasattr(jax, "typeof") and any(jax.typeof(array).sharding.spec):
                raise TypeError(
                    f"`{name}` must not have explicit axes of a mesh; {place!r} is sharded by "
                    f"{jax.typeof(array).sharding.spec}. Make the mesh with "
                    "jax.sharding.AxisType.Auto."
                )
            if array.dtype != arrays[0].dtype:
                raise TypeError(
                    f"`{name}` must have one dtype; {self.names[0]!r} is {arrays[0].dtype} and "
                    f"{place!r} is {array.dtype}. Convert one of them."
                )
        self._shapes = [array.shape for array in arrays]
        self.dtype = arrays[0].dtype
        self.vector = self.layout.join(arrays)
        self.n = int(self.vector.size)

    @property
    def sizes(self) -> dict[str, int]:
        """Number of entries of each float leaf by its path, in the order of the vector."""
        return dict(zip(self.names, map(math.prod, self._shapes), strict=True))

    def arrays(self, vector: jax.Array) -> list[jax.Array]:
        """Split a vector, shape (n,), into arrays of the shapes of the float leaves."""
        leaves = [self._leaves[i] for i in self._floats]
        arrays: list[jax.Array] = self.layout.split(vector, self._shapes, leaves)
        return arrays

    def joined(self, arrays: Sequence[jax.Array]) -> jax.Array:
        """Invert `arrays`.

        Each array is written to its place: on a CPU, a compiled concatenation of matrix products
        takes up to four times as long as the products.
        """
        if self.layout.mesh is not None:  # where such writes would gather the vector
            return self.layout.join(arrays)
        vector, start = jnp.zeros(self.n, self.dtype), 0
        for array in arrays:
            vector = jax.lax.dynamic_update_slice(vector, array.reshape(-1), (start,))
            start += array.size
        return vector

    def gradient(self, function: Callable[[Any], jax.Array]) -> Callable[[jax.Array], jax.Array]:
        """Return the gradient of a function of the user's structure, as a function of vectors."""
        by_arrays = jax.grad(lambda arrays: function(self.build(arrays)))
        return lambda vector: self.joined(by_arrays(self.arrays(vector)))

    def replace(self, vector: jax.Array) -> Any:
        """Return the user's structure with its float leaves taken from `vector`."""
        return self.build(self.arrays(vector))

    def build(self, arrays: Sequence[jax.Array]) -> Any:
        """Return the user's structure with `arrays` as its float leaves."""
        leaves = list(self._leaves)
        for i, array in zip(self._floats, arrays, strict=True):
            leaves[i] = array
        return jax.tree_util.tree_unflatten(self._structure, leaves)

    def restore(self, vector: jax.Array) -> Any:
        """Return values in the user's structure, with None for leaves that are not float arrays."""
        leaves: list[Any] = [None] * len(self._leaves)
        for i, array in zip(self._floats, self.arrays(vector), strict=True):
            leaves[i] = self.layout.alike(array, self._leaves[i])
        return jax.tree_util.tree_unflatten(self._structure, leaves)

    def collect(self, tree: PyTree, *, name: str = "v", expand: bool = False) -> jax.Array:
        """Invert `restore`: return the vector, shape (n,), of a structure like the user's.

        With `expand`, a number stands for all entries of an array.

        Raises
        ------
        ValueError
            If the structure or a shape differs.
        """
        leaves = jax.tree_util.tree_leaves(tree)
        structure: Any = jax.tree_util.tree_structure(tree)
        if structure == self._structure:
            leaves = [leaves[i] for i in self._floats]
        elif structure != jax.tree_util.tree_structure(self.restore(self.vector)):
            raise ValueError(
                f"`{name}` must have the structure of the parameters, {self._structure}; "
                f"got {structure}."
            )
        if expand:
            leaves = [
                jnp.broadcast_to(leaf, shape) if jnp.ndim(leaf) == 0 else leaf
                for leaf, shape in zip(leaves, self._shapes, strict=True)
            ]
        for leaf, shape, place in zip(leaves, self._shapes, self.names, strict=True):
            if jnp.shape(leaf) != shape:
                raise ValueError(
                    f"`{name}` at {place!r} must have shape {shape}; got {jnp.shape(leaf)}."
                )
        return self.layout.join([jnp.asarray(leaf, self.dtype) for leaf in leaves])


def as_parameters(params: PyTree, *, name: str = "params", mesh: Mesh | None = None) -> Parameters:
    """Find the float arrays in `params`.

    Parameters
    ----------
    params : pytree
        Arrays of floats are differentiated; other leaves are left alone. A Python float counts as
        an array.
    name : str
        Name of the argument in messages.
    mesh : jax.sharding.Mesh, optional
        Devices over which to shard the vector.

    Returns
    -------
    parameters : Parameters
        Their values as a vector, and conversions to the structure of `params`.

    Raises
    ------
    ValueError
        If no leaf is an array of floats, or an array is not on the devices and axes of `mesh`.
    TypeError
        If arrays are complex, their dtypes differ, or a mesh has explicit axes.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> params = as_parameters({"w": jnp.ones((2, 3)), "steps": 5})
    >>> print(params.n, params.names)
    6 ("['w']",)
    """
    if isinstance(params, Parameters):
        return params
    return Parameters(params, name=name, mesh=mesh)


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, (jax.Array, np.ndarray, np.generic)) and jnp.issubdtype(
        leaf.dtype, jnp.inexact
    )


def _refuse_collections(tree: PyTree, name: str) -> None:
    """Raise for the variables of a flax module: running statistics are no parameters."""
    if not isinstance(tree, Mapping) or "params" not in tree:
        return
    others = [key for key in tree if key in ("batch_stats", "cache", "intermediates")]
    if others:
        raise ValueError(
            f"`{name}` must hold only what is differentiated; it has flax's collections "
            f"{', '.join(map(repr, others))} beside 'params'. Pass variables['params'], and put "
            "the others back inside the loss."
        )
