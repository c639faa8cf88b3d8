"""Arrays that are decoded once and then read from a file, by all the processes to come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np


def kept(
    path: Path, origins: Sequence[Path], make: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Return the arrays in the file `path`, made anew if the files they come from have changed."""
    origin = np.array([f"{each.name} {each.stat().st_size}" for each in origins])
    if path.is_file():
        with np.load(path) as file:
            if np.array_equal(file["origin"], origin):
                return dict(file)
    arrays = {**make(), "origin": origin}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.npz")
    np.savez(part, **arrays)
    part.replace(path)  # whole or not at all
    return arrays
