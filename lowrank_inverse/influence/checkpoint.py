"""Partial results in a folder, and records without pickle."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_inverse._io import replace_file
from lowrank_inverse._typing import Array
from lowrank_inverse.arrays.conversion import like, to_host


class Store:
    """Arrays by name in a folder that belongs to one computation.

    Parameters
    ----------
    folder : path or None
        Made if it is not there. With None nothing is kept.
    key : dict of str
        What the arrays depend on. A folder written under another key is refused.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, key: dict[str, str]) -> None:
        self.folder = None if folder is None else Path(folder)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        about = self.folder / "about.json"
        if about.exists():
            found = json.loads(about.read_text(encoding="utf-8"))
            other = [name for name in key if found.get(name) != key[name]]
            if other:
                raise ValueError(
                    f"`checkpoint` {str(self.folder)!r} holds the results of another computation: "
                    f"{', '.join(other)} differ. Give an empty folder, or remove this one."
                )
            return
        text = json.dumps(key, indent=1).encode("utf-8")
        replace_file(about, lambda file: file.write(text))

    def get(self, name: str, compute: Callable[[], Array], template: Array) -> Array:
        """Return the array `name` from the folder, or compute and keep it."""
        if self.folder is None:
            return compute()
        path = self.folder / f"{name}.npy"
        if path.exists():
            return like(np.load(path, allow_pickle=False), template)
        value = compute()
        replace_file(path, lambda file: np.save(file, to_host(value), allow_pickle=False))
        return value


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
    if not progress:
        yield from items
        return
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError(
            'progress=True needs tqdm. Install it with: pip install "lowrank-inverse[plot]"'
        ) from error
    yield from tqdm(items, total=total, desc=label, mininterval=0.5)
