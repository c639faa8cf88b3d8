"""Partial results in a folder, and records without pickle."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_inverse._io import Format
from lowrank_inverse._progress import progress_bar
from lowrank_inverse._typing import Array
from lowrank_inverse.arrays.conversion import like, to_host
from lowrank_inverse.arrays.spread import is_spread, local, spread_rows
from lowrank_inverse.influence.backend import Alone, Together
from lowrank_inverse.influence.loss_checks import first_difference

FLOAT_RTOL = 1e-3
FILE = Format("an influence function's checkpoint")


class Store:
    """Arrays by name in a folder that belongs to one computation.

    Parameters
    ----------
    folder : path or None
        Made if it is not there. With None nothing is kept.
    key : dict
        What the arrays depend on: text, and numbers and losses, which are equal up to rounding. A
        folder written under another key is refused.
    group : optional
        Processes that each have a folder: of arrays with spread rows it holds the own ones.
    n : int
        Rows of such arrays.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None,
        key: dict[str, Any],
        group: Together | None = None,
        n: int = 0,
    ) -> None:
        self._group: Together = group or Alone()
        self._n = n
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        about = self.folder / "about.npz"
        if not about.exists():
            FILE.save(about, key)
            return
        if other := differences(FILE.load(about), key):
            raise ValueError(
                f"`checkpoint` {str(self.folder)!r} holds the results of another computation: "
                f"{', '.join(other)} differ. Pass an empty folder, or remove this one."
            )

    def get(self, name: str, compute: Callable[[], Array], template: Array) -> Array:
        """Return the array `name` from the folder, or compute and keep it."""
        if self.folder is None:
            return compute()
        path = self.folder / f"{name}.npz"
        if self._exists(path, template):
            return self._read(FILE.load(path), template)
        value = compute()
        FILE.save(path, to_host(local(value)))
        return value

    def _exists(self, path: Path, template: Array) -> bool:
        """Whether a file is there; of what all processes compute together, in all folders."""
        return all(self._group.everyone(path.exists())) if is_spread(template) else path.exists()

    def _read(self, array: np.ndarray, template: Array) -> Array:
        own = like(array, local(template))
        return spread_rows(own, template, self._n) if is_spread(template) else own

    def write(self, name: str, arrays: tuple[Array, ...] | None) -> None:
        """Keep arrays under a name, in the place of earlier ones."""
        if self.folder is not None and arrays is not None:
            FILE.save(self.folder / f"{name}.npz", tuple(to_host(local(x)) for x in arrays))

    def read(self, name: str, template: Array) -> tuple[Array, ...] | None:
        """Return what `write` kept, None where there is nothing."""
        path = None if self.folder is None else self.folder / f"{name}.npz"
        if path is None or not self._exists(path, template):
            return None
        return tuple(self._read(array, template) for array in FILE.load(path))


def differences(found: dict[str, Any], key: dict[str, Any]) -> list[str]:
    """Name what differs between two keys."""

    def same(a: Any, b: Any) -> bool:
        if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
            return first_difference(a, b) is None
        if isinstance(a, float) and isinstance(b, float):
            return math.isclose(a, b, rel_tol=FLOAT_RTOL)
        return type(a) is type(b) and bool(a == b)

    names = dict.fromkeys([*key, *found])
    return [name for name in names if not same(found.get(name), key.get(name))]


def digest(*parts: Any) -> str:
    """Hash arrays, text and numbers."""
    total = hashlib.blake2b()
    for part in parts:
        if hasattr(part, "shape"):
            host = np.ascontiguousarray(to_host(part))
            total.update(f"{host.dtype}{host.shape}".encode() + host.tobytes())
        else:
            total.update(repr(part).encode())
    return total.hexdigest()


def shown(items: Iterable[Any], *, progress: bool, total: int, label: str) -> Iterator[Any]:
    """Yield the items, with a progress bar if asked for."""
    yield from progress_bar(items, total=total, desc=label) if progress else items
