"""Handwritten digits of scikit-learn: 1 797 images of 8×8 pixels."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import load_digits


def shuffled(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return images (1797, 64) in [0, 1] and labels in an order that is drawn."""
    images, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(labels))
    return images[order] / 16.0, labels[order].astype(np.int64)


def with_ones(x: np.ndarray) -> np.ndarray:
    """Add a column of ones, for the biases."""
    return np.hstack([x, np.ones((len(x), 1))])
