"""Omniglot from the folder of `--data-dir`, nothing is downloaded; and tasks of few images."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from benchmarks.data.kept import kept

DRAWERS = 20
CHARACTERS = {"images_background": 964, "images_evaluation": 659}
"""Of each archive as published by Lake, Salakhutdinov and Tenenbaum (MIT)."""


class Omniglot(NamedTuple):
    """Images of shape (characters, 20, side, side), uint8, where 255 is ink."""

    background: np.ndarray
    evaluation: np.ndarray


class Task(NamedTuple):
    """Images of shape (count, 1, side, side) in [0, 1], and which of the classes they are."""

    support_x: np.ndarray
    support_y: np.ndarray
    query_x: np.ndarray
    query_y: np.ndarray


def load_omniglot(data_dir: Path, cache: Path, side: int) -> Omniglot:
    """Return both sets in small, decoded once and then read from an npz file in `cache`."""
    archives = [data_dir / "omniglot" / f"{name}.zip" for name in CHARACTERS]
    missing = [path.name for path in archives if not path.is_file()]
    if missing:
        raise SystemExit(
            f"Omniglot is not in {archives[0].parent}: put "
            f"{' and '.join(path.name for path in archives)} there, as they were published. "
            f"Missing: {', '.join(missing)}."
        )
    arrays = kept(
        cache / f"omniglot-{side}.npz",
        archives,
        lambda: dict(zip(Omniglot._fields, (decode(each, side) for each in archives), strict=True)),
    )
    return Omniglot(*(arrays[name] for name in Omniglot._fields))


def decode(archive: Path, side: int) -> np.ndarray:
    """Read the images of an archive, in the order of their names."""
    from matplotlib import image  # which needs no more than the extra `plot`

    expected = CHARACTERS[archive.stem]
    with zipfile.ZipFile(archive) as file:
        names = sorted(name for name in file.namelist() if name.endswith(".png"))
        characters = {name.rsplit("/", 1)[0] for name in names}
        if len(characters) != expected or len(names) != expected * DRAWERS:
            raise SystemExit(
                f"{archive} must hold {expected} characters by {DRAWERS} drawers; it has "
                f"{len(names)} images of {len(characters)} characters. Get it again."
            )
        small = [
            shrink(1.0 - image.imread(io.BytesIO(file.read(name))), side)
            for name in tqdm(names, desc=archive.name, unit="image", mininterval=1)
        ]
    pixels = np.round(255 * np.stack(small)).astype(np.uint8)
    return pixels.reshape(expected, DRAWERS, side, side)


def shrink(image: np.ndarray, side: int) -> np.ndarray:
    """Return the means of the pixels over `side` by `side` equal squares, fractions counted."""
    return averaging(image.shape[0], side) @ image @ averaging(image.shape[1], side).T


def averaging(before: int, after: int) -> np.ndarray:
    """Return the matrix (after, before) that averages over equal parts of a line of pixels."""
    edges = np.linspace(0, before, after + 1)
    pixels = np.arange(before)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return np.maximum(covered, 0) * after / before


def draw_task(
    images: np.ndarray,
    rng: np.random.Generator,
    *,
    ways: int,
    shots: int,
    queries: int,
    turned: bool = False,
) -> Task:
    """Draw classes, and of each of them `shots` images to learn from and `queries` to be asked.

    With `turned`, a character turned by a quarter, a half or three quarters is another class.
    """
    classes = rng.choice(len(images) * (4 if turned else 1), ways, replace=False)
    sets = []
    for chosen in classes:
        quarters, character = divmod(int(chosen), len(images))
        drawers = rng.choice(images.shape[1], shots + queries, replace=False)
        sets.append(np.rot90(images[character, drawers], quarters, axes=(1, 2)))
    x = np.stack(sets)[:, :, None].astype(np.float32) / 255
    labels = np.repeat(np.arange(ways), shots), np.repeat(np.arange(ways), queries)
    parts = [part.reshape(-1, *x.shape[2:]) for part in (x[:, :shots], x[:, shots:])]
    return Task(parts[0], labels[0], parts[1], labels[1])
