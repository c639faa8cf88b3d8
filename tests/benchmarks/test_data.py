"""The loaders refuse what is missing or wrong, and read what was published."""

from __future__ import annotations

import gzip
import hashlib

import numpy as np
import pytest

from benchmarks.data import mnist


def idx(array):
    shape = b"".join(int(size).to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()


def test_missing_mnist_files_are_named_with_where_to_put_them(tmp_path):
    with pytest.raises(SystemExit, match=r"put the four files train-images.*Missing: train-im"):
        mnist.load_mnist(tmp_path)


def test_mnist_is_read_from_its_idx_files_and_checked(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (5, 4, 3), np.uint8), np.arange(5, dtype=np.uint8)
    (tmp_path / "mnist").mkdir()
    sums = {}
    for name, array in zip(mnist.FILES, (images, labels, images[:2], labels[:2]), strict=True):
        content = gzip.compress(idx(array))
        (tmp_path / "mnist" / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
    with pytest.raises(SystemExit, match="is not the published file: its MD5 sum is"):
        mnist.load_mnist(tmp_path)
    monkeypatch.setattr(mnist, "FILES", sums)
    x, y, test_x, test_y = mnist.load_mnist(tmp_path)
    assert x.shape == (5, 12) and x.dtype == np.float32
    np.testing.assert_allclose(x, images.reshape(5, 12) / 255.0, rtol=1e-6)
    np.testing.assert_array_equal(y, labels)
    assert len(test_x) == len(test_y) == 2
    with pytest.raises(ValueError, match="must begin with 0, 0, 8"):
        mnist.parse_idx(b"abc\0")
