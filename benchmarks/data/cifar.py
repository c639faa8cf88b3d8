"""CIFAR-10 from the folder of `--data-dir`, long-tailed; nothing is downloaded."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.data.kept import kept

CLASSES, SIDE, PER_CLASS = 10, 32, 5000
PER_CLASS_VALIDATION = 100
"""Images of each class for the outer problem: 2 % of the 50 000 of the training set."""
IMBALANCES = (200, 100, 50)

CUT = ("train_head.npz", "test.npz")
PUBLISHED = (*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin")
RECORD = 1 + 3 * SIDE * SIDE


class Cifar(NamedTuple):
    """Images as bytes, (n, 32, 32, 3), with their labels, (n,).

    The training images are the first ``head_count(c)`` of every class c, in the published order.
    """

    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


def tail_count(c: int, imbalance: float, largest: int = PER_CLASS) -> int:
    """Count the images of class c in a long-tailed set (Cui et al., 2019)."""
    return int(largest * imbalance ** (-c / (CLASSES - 1)))


def head_count(c: int) -> int:
    """Count the images of class c that any set here is made of."""
    return min(PER_CLASS, tail_count(c, min(IMBALANCES)) + 200)


def source(data_dir: Path) -> list[Path]:
    """Return the files that CIFAR-10 is read from, or say what to put where."""
    folder = data_dir / "cifar10"
    for names in (CUT, PUBLISHED):
        if all((folder / name).is_file() for name in names):
            return [folder / name for name in names]
    raise SystemExit(
        f"CIFAR-10 is not in {folder}. Put there either the binary version as it was published, "
        f"{', '.join(PUBLISHED)}; or two files that numpy.load reads: {CUT[0]} with `images` "
        f"uint8 (n, 32, 32, 3) and `labels` (n,), of each class c in the published order the first "
        f"min(5000, floor(5000 * 50 ** (-c / 9)) + 200) images, and {CUT[1]} with `images` "
        "(m, 32, 32, 3) and `labels` (m,) of the test set."
    )


def load_cifar(data_dir: Path) -> Cifar:
    """Read the images that the long-tailed sets are made of, and the test set."""
    paths = source(data_dir)
    if paths[0].suffix == ".npz":
        data = Cifar(*_read_cut(paths[0]), *_read_cut(paths[1]))
    else:
        parts = [_read_published(path) for path in paths]
        images = np.concatenate([images for images, _ in parts[:-1]])
        labels = np.concatenate([labels for _, labels in parts[:-1]])
        kept = np.sort(np.concatenate([_first(labels, c, head_count(c)) for c in range(CLASSES)]))
        data = Cifar(images[kept], labels[kept], *parts[-1])
    for c in range(CLASSES):
        count, needed = int((data.labels == c).sum()), head_count(c)
        if count != needed:
            raise SystemExit(
                f"{paths[0].parent}: the training images must hold {needed} of class {c}; found "
                f"{count}. Get the files again."
            )
    return data


def _read_cut(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as content:
            images, labels = content["images"], content["labels"]
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
        raise SystemExit(
            f"{path} must be an .npz file with arrays `images` and `labels`: {error}"
        ) from None
    if images.dtype != np.uint8 or images.shape[1:] != (SIDE, SIDE, 3) or images.ndim != 4:
        raise SystemExit(
            f"{path}: `images` must be uint8 of shape (n, 32, 32, 3); got {images.dtype} of shape "
            f"{images.shape}."
        )
    return images, _labels(path, labels, len(images))


def _read_published(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read records of a label and the 3072 bytes of an image, channel by channel."""
    content = np.fromfile(path, np.uint8)
    if content.size == 0 or content.size % RECORD:
        raise SystemExit(
            f"{path} must consist of records of {RECORD} bytes; it has {content.size} bytes. "
            "Get it again."
        )
    records = content.reshape(-1, RECORD)
    images = records[:, 1:].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    return images, _labels(path, records[:, 0], len(records))


def _labels(path: Path, labels: np.ndarray, count: int) -> np.ndarray:
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise SystemExit(
            f"{path}: `labels` must be {count} integers, one an image; got {labels.dtype} of shape "
            f"{labels.shape}."
        )
    if count and not 0 <= labels.min() <= labels.max() < CLASSES:
        raise SystemExit(f"{path}: labels must lie in 0…9; found {labels.min()} to {labels.max()}.")
    return labels.astype(np.int64)


def _first(labels: np.ndarray, c: int, count: int) -> np.ndarray:
    return np.flatnonzero(labels == c)[:count]


def long_tailed(labels: np.ndarray, imbalance: float, largest: int = PER_CLASS) -> np.ndarray:
    """Return the indices of a long-tailed training set: the first images of every class.

    Those of `balanced` are never among them: of 5000, class 0 has 4900 for that reason.
    """
    left = [int((labels == c).sum()) - PER_CLASS_VALIDATION for c in range(CLASSES)]
    counts = [min(tail_count(c, imbalance, largest), left[c]) for c in range(CLASSES)]
    return np.concatenate([_first(labels, c, count) for c, count in enumerate(counts)])


def balanced(labels: np.ndarray) -> np.ndarray:
    """Return the indices of the outer problem's images: the last 100 of every class."""
    return np.concatenate(
        [np.flatnonzero(labels == c)[-PER_CLASS_VALIDATION:] for c in range(CLASSES)]
    )


def shrink(images: np.ndarray, side: int) -> np.ndarray:
    """Average images over squares, to `side` pixels a side; rounded to bytes."""
    factor, rest = divmod(images.shape[1], side)
    if rest:
        raise ValueError(f"`side` must divide {images.shape[1]}; got {side}.")
    if factor == 1:
        return images
    blocks = images.reshape(len(images), side, factor, side, factor, 3)
    return np.rint(blocks.mean(axis=(2, 4), dtype=np.float32)).astype(np.uint8)


def load_small(data_dir: Path, cache: Path, side: int) -> Cifar:
    """Return the images averaged to `side` pixels a side, from an npz file in `cache`.

    The published files are compressed, and every process would spend seconds on them.
    """

    def make() -> dict[str, np.ndarray]:
        data = load_cifar(data_dir)
        small = {name: shrink(getattr(data, name), side) for name in ("images", "test_images")}
        return small | {"labels": data.labels, "test_labels": data.test_labels}

    arrays = kept(cache / f"cifar10-{side}.npz", source(data_dir), make)
    return Cifar(*(arrays[name] for name in Cifar._fields))
