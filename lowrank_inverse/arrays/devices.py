"""Arrays of jax whose rows are spread over the devices of a mesh."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from array_api_compat import array_namespace, is_jax_array

from lowrank_inverse._typing import Array
from lowrank_inverse.arrays.control_flow import map_traced
from lowrank_inverse.arrays.conversion import algebra, is_traced


def num_devices(x: Any) -> int:
    """Count the devices of the mesh on which a jax array lies, traced or not; 1 for any other."""
    if not is_jax_array(x):
        return 1
    if not is_traced(x):
        return len(x.sharding.device_set)
    typeof = getattr(sys.modules["jax"], "typeof", None)  # older versions of jax do not tell
    return 1 if typeof is None else max(1, int(typeof(x).sharding.mesh.size))


def tall_qr(X: Array) -> tuple[Array, Array]:
    """Return Q, shape (n, k), and R of a tall `X`, by blocks of rows where it is spread [1]_.

    Each device decomposes its own rows, and only the k×k factors are sent.

    References
    ----------
    .. [1] J. Demmel, L. Grigori, M. Hoemmen, J. Langou. Communication-optimal Parallel and
       Sequential QR and LU Factorizations. SIAM J. Sci. Comput. 34, 2012.
    """
    xp = array_namespace(X)
    (n, k), parts = X.shape, num_devices(X)
    rows = -(-n // parts)
    if parts == 1 or rows < k:
        return algebra(X).qr(X)
    # XLA pads each device's rows where they are; to concatenate, it would gather all of them.
    blocks = xp.pad(X, ((0, parts * rows - n), (0, 0)))
    Q, R = algebra(X).qr(xp.reshape(blocks, (parts, rows, k)))
    top, R = algebra(X).qr(xp.reshape(R, (parts * k, k)))
    Q = Q @ xp.reshape(top, (parts, k, k))
    return xp.reshape(Q, (parts * rows, k))[:n, :], R


def cut(y: Array, axis: int, x: Array) -> Array:
    """Return `y` with an axis cut over the devices that `x` is spread over; as it is for one."""
    if num_devices(x) == 1:
        return y
    jax = sys.modules["jax"]
    mesh = jax.typeof(x).sharding.mesh if is_traced(x) else x.sharding.mesh
    spec = jax.sharding.PartitionSpec(*[None] * axis, mesh.axis_names)
    return constrained(y, jax.sharding.NamedSharding(mesh, spec))


def constrained(x: Array, sharding: Any) -> Array:
    """Lay an array so within a compiled program.

    Where the devices do not divide it, it could neither enter nor leave the program so: there XLA
    chooses how it does.
    """
    jax = sys.modules["jax"]
    lay, spec = jax.lax.with_sharding_constraint, jax.sharding.PartitionSpec
    try:
        sharding.shard_shape(x.shape)
    except ValueError:
        free = jax.sharding.NamedSharding(sharding.mesh, spec(*[spec.UNCONSTRAINED] * x.ndim))
        return lay(lay(lay(x, free), sharding), free)
    return lay(x, sharding)


def map_rows(step: Callable[[Array], Array], n: int, size: int, x: Array) -> Array:
    """Return ``step(rows)`` for all rows 0 … n - 1, about `size` at a time, while jax traces.

    Where `x` is spread, each step takes rows of all devices, and leaves to each its own.
    """
    xp, parts = array_namespace(x), num_devices(x)
    own = -(-n // parts)
    size = min(own, max(1, size // parts))
    steps = -(-own // size)
    local = xp.arange(steps * size) % own  # the last step wraps round
    rows = own * xp.arange(parts)[:, None] + local
    rows = xp.reshape(rows, (parts, steps, size)).transpose(1, 0, 2) % n
    rows = xp.reshape(rows, (steps, parts * size))

    def kept(rows: Array) -> Array:
        return cut(step(rows), 0, x)

    found = kept(rows[0])[None, ...] if steps == 1 else map_traced(kept, rows)
    if parts == 1:
        return xp.reshape(found, (steps * size, *found.shape[2:]))[:n, ...]
    found = xp.moveaxis(xp.reshape(found, (steps, parts, size, *found.shape[2:])), 0, 1)
    found = xp.reshape(found, (parts, steps * size, *found.shape[3:]))[:, :own, ...]
    return xp.reshape(found, (parts * own, *found.shape[2:]))[:n, ...]
