"""How flat vectors lie on the devices of a mesh."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lowrank_inverse._typing import PyTree
from lowrank_inverse.arrays.checks import describe
from lowrank_inverse.arrays.conversion import is_traced
from lowrank_inverse.arrays.devices import constrained

__all__ = ["Layout"]


class Layout:
    """Rows cut along all axes of a mesh; without a mesh, all is left to jax.

    Parameters
    ----------
    mesh : jax.sharding.Mesh, optional
    """

    def __init__(self, mesh: Mesh | None = None) -> None:
        if mesh is not None:
            _check_mesh(mesh)
        self.mesh = mesh

    def sharding(self, *spec: Any) -> NamedSharding:
        """Return a sharding on the mesh; of no axes, a copy on each device."""
        assert self.mesh is not None
        return NamedSharding(self.mesh, PartitionSpec(*spec))

    def rows(self, x: Any, axis: int = 0) -> Any:
        """Lay an array with its rows, or another axis, cut over all devices.

        What the devices do not divide lies so inside ``jax.jit`` alone, and comes out whole on
        each device; fewer rows than devices are whole everywhere.
        """
        if self.mesh is None:
            return x
        whole = jnp.shape(x)[axis] % self.mesh.size != 0
        where = self._cut(x, axis)
        return _laid(self.put(x, "v", self.sharding() if whole else where), where)

    def put(self, x: Any, name: str, where: NamedSharding | None = None) -> Any:
        """Put an array that is bound to no device on the mesh, by default on each device.

        Raises
        ------
        ValueError
            If processes give arrays that differ.
        """
        if self.mesh is None or is_traced(x) or _is_bound(x):
            return x
        try:
            return jax.device_put(np.asarray(x), self.sharding() if where is None else where)
        except AssertionError as error:  # what jax says holds the whole arrays
            raise ValueError(
                f"`{name}` must be the same in each process; it differs between them. Compute it "
                "from the same data and the same `rng` everywhere, or make it one array with "
                "jax.make_array_from_process_local_data."
            ) from error

    def examples(self, x: Any) -> Any:
        """Cut an array with a row for each example over the devices; what is no array stays."""
        if self.mesh is None or not hasattr(x, "shape") or len(x.shape) == 0:
            return x
        if is_traced(x) or _is_bound(x):
            return self.rows(x)
        host = np.asarray(x)  # of each process: no look at those of the others, which takes time
        whole = host.shape[0] % self.mesh.size != 0
        where = self.sharding() if whole else self._cut(host, 0)
        return jax.make_array_from_callback(host.shape, where, host.__getitem__)

    def _cut(self, x: Any, axis: int) -> NamedSharding:
        assert self.mesh is not None
        if jnp.shape(x)[axis] < self.mesh.size:
            return self.sharding()
        return self.sharding(*[None] * axis, self.mesh.axis_names)

    def split(self, vector: jax.Array, shapes: Sequence[Any], leaves: Sequence[Any]) -> Any:
        """Cut a vector into arrays that lie as the user's leaves, where these are known.

        In one program: there may be no sharding for a part of a vector that is cut by itself.
        """
        if self.mesh is None:
            return _split(vector, shapes)
        where = tuple(
            None if is_traced(x) else x.sharding if _is_bound(x) else self.sharding()
            for x in leaves
        )
        return _split_on(vector, tuple(shapes), where)

    def join(self, arrays: Sequence[jax.Array]) -> jax.Array:
        """Return arrays as one vector."""
        if self.mesh is None:
            return _joined(arrays)
        vector: jax.Array = _joined_on(list(arrays), self.sharding(self.mesh.axis_names))
        return vector

    def alike(self, array: jax.Array, leaf: Any) -> jax.Array:
        """Lay a part of a vector as the leaf of the user's that is traced.

        XLA lays the operands of an elementwise operation alike: here one that it cannot see
        through, to choose between them.
        """
        if self.mesh is None or not is_traced(leaf):
            return array
        return jnp.where(jax.lax.optimization_barrier(jnp.asarray(False)), leaf, array)

    def folder(self, folder: str | PathLike[str] | None) -> str | PathLike[str] | None:
        """Return a folder for what this process writes, in `folder` if there are several."""
        if folder is None or self.mesh is None or jax.process_count() == 1:
            return folder
        return Path(folder) / f"{jax.process_index()}-of-{jax.process_count()}"

    def check(self, tree: PyTree, name: str, *, axes: bool = False) -> None:
        """Raise unless arrays that are bound to devices are bound to those of the mesh.

        With `axes`, in the mesh itself and no other one of these devices.
        """
        if self.mesh is None:
            return
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if is_traced(leaf) or not _is_bound(leaf):
                continue
            other = getattr(leaf.sharding, "mesh", self.mesh)
            if leaf.sharding.device_set == set(self.mesh.devices.flat) and not (
                axes and other != self.mesh
            ):
                continue
            raise ValueError(
                f"`{name}` must lie on the devices and axes of `mesh`, {_shown(self.mesh)}; "
                f"{jax.tree_util.keystr(path) or name!r} lies on {_place(leaf)}. Move it with "
                "jax.device_put(x, jax.sharding.NamedSharding(mesh, spec)), or pass the mesh that "
                "it lies on."
            )


_laid = jax.jit(constrained, static_argnums=1)


def _split(vector: jax.Array, shapes: Sequence[Any]) -> list[jax.Array]:
    sizes = [int(np.prod(shape, dtype=int)) for shape in shapes]
    parts = jnp.split(vector, np.cumsum(sizes)[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


@partial(jax.jit, static_argnums=(1, 2))
def _split_on(vector: Any, shapes: Any, where: Any) -> Any:
    arrays = zip(_split(vector, shapes), where, strict=True)
    return [x if s is None else constrained(x, s) for x, s in arrays]


def _joined(arrays: Sequence[jax.Array]) -> jax.Array:
    return jnp.concatenate([x.reshape(-1) for x in arrays])


@partial(jax.jit, static_argnums=1)
def _joined_on(arrays: Any, sharding: NamedSharding) -> Any:
    return constrained(_joined(arrays), sharding)


def _is_bound(leaf: Any) -> bool:
    """Whether it is an array of jax that may be on its devices alone."""
    return isinstance(leaf, jax.Array) and bool(getattr(leaf, "committed", True))


def _place(leaf: jax.Array) -> str:
    mesh = getattr(leaf.sharding, "mesh", None)
    return _shown(mesh) if mesh is not None else ", ".join(map(str, leaf.sharding.device_set))


def _shown(mesh: Mesh) -> str:
    ids = [device.id for device in mesh.devices.flat]
    devices = f"{ids[0]} … {ids[-1]}" if len(ids) > 1 else f"{ids[0]}"
    axes = ", ".join(f"{name}={size}" for name, size in mesh.shape.items())
    return f"Mesh({axes}{', explicit' if _is_explicit(mesh) else ''}) of devices {devices}"


def _is_explicit(mesh: Mesh) -> bool:
    explicit = getattr(getattr(jax.sharding, "AxisType", None), "Explicit", None)
    kinds = np.ravel(getattr(mesh, "axis_types", None) or ())
    return explicit is not None and any(kind == explicit for kind in kinds)


def _check_mesh(mesh: Any) -> None:
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"`mesh` must be a jax.sharding.Mesh; got {describe(mesh)}. Make it with "
            'jax.make_mesh((jax.device_count(),), ("devices",)).'
        )
    if _is_explicit(mesh):
        raise TypeError(
            f"`mesh` must have automatic axes; got {_shown(mesh)}. Make it with "
            "axis_types=(jax.sharding.AxisType.Auto,) * the number of its axes."
        )
