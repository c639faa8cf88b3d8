"""MNIST from the folder of `--data-dir`; nothing is downloaded."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import numpy as np

FILES = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
"""The four files as LeCun, Cortes and Burges published them, with their MD5 sums."""


def load_mnist(data_dir: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return training images (60000, 784) in [0, 1] and labels, then those for tests, float32."""
    folder = data_dir / "mnist"
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise SystemExit(
            f"MNIST is not in {folder}: put the four files {', '.join(FILES)} there, as they were "
            f"published. Missing: {', '.join(missing)}."
        )
    arrays = []
    for name, expected in FILES.items():
        content = (folder / name).read_bytes()
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != expected:
            raise SystemExit(
                f"{folder / name} is not the published file: its MD5 sum is {found}, not "
                f"{expected}. Get it again."
            )
        arrays.append(parse_idx(gzip.decompress(content)))
    train_x, train_y, test_x, test_y = arrays
    return (
        *(train_x.reshape(len(train_x), -1).astype(np.float32) / 255, train_y.astype(np.int64)),
        *(test_x.reshape(len(test_x), -1).astype(np.float32) / 255, test_y.astype(np.int64)),
    )


def parse_idx(content: bytes) -> np.ndarray:
    """Return the unsigned bytes of an idx file as an array."""
    if content[:3] != b"\0\0\x08":
        raise ValueError("an idx file of unsigned bytes must begin with 0, 0, 8.")
    shape = np.frombuffer(content, ">u4", count=content[3], offset=4).astype(int)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)
