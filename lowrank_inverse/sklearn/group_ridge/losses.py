"""Losses of linear models: values, first derivatives, and products with second derivatives.

Derivatives are with respect to the scores, of shape (n, K, C): n examples, K fits at once, C
outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from scipy.special import expit


class Loss(Protocol):
    """The loss of each example."""

    curvature: float
    """Its second derivative by a score, about, on average."""

    def slope(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the losses, shape (n, K), and their derivatives by the scores, (n, K, C)."""
        ...

    def bend(self, scores: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """Return what multiplies by the second derivative, shape (n, K, C) to the same."""
        ...

    def second(self, scores: np.ndarray, first: int, other: int) -> np.ndarray:
        """Return the second derivative by two outputs, from (n, 1, C) to (n,)."""
        ...


class Squared:
    """Half the squared error of targets, shape (n,)."""

    curvature = 1.0

    def __init__(self, targets: np.ndarray) -> None:
        self._targets = targets[:, None, None]

    def slope(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the losses and their derivatives."""
        error = scores - self._targets
        return error[..., 0] ** 2 / 2, error

    def bend(self, scores: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """Return the identity."""
        return lambda change: change

    def second(self, scores: np.ndarray, first: int, other: int) -> np.ndarray:
        """Return 1."""
        return np.ones(len(scores))


class Logistic:
    """The log loss of two classes; labels, shape (n,), are 0 or 1, and the score is a log-odds."""

    def __init__(self, labels: np.ndarray, share: np.ndarray) -> None:
        self._labels = labels[:, None, None]
        self.curvature = float(share[0] * share[1])

    def slope(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the losses and their derivatives."""
        values = np.logaddexp(0, scores) - self._labels * scores
        return values[..., 0], expit(scores) - self._labels

    def bend(self, scores: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """Return the product with p (1 - p)."""
        second = expit(scores) * expit(-scores)
        return lambda change: second * change

    def second(self, scores: np.ndarray, first: int, other: int) -> np.ndarray:
        """Return p (1 - p)."""
        return (expit(scores) * expit(-scores))[:, 0, 0]


class Softmax:
    """The log loss of C classes; labels, shape (n,), are from 0 to C - 1."""

    def __init__(self, labels: np.ndarray, share: np.ndarray) -> None:
        self._labels = labels
        self.curvature = float(np.mean(share * (1 - share)))

    def slope(self, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the losses and their derivatives."""
        p, levels = _probabilities(scores)
        rows = np.arange(len(scores))
        values = levels - scores[rows, :, self._labels]
        p[rows, :, self._labels] -= 1
        return values, p

    def bend(self, scores: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        """Return the product with ``diag(p) - p p.T``."""
        p, _ = _probabilities(scores)

        def product(change: np.ndarray) -> np.ndarray:
            weighted = p * change
            weighted -= p * (weighted @ np.ones(scores.shape[2]))[..., None]
            return weighted

        return product

    def second(self, scores: np.ndarray, first: int, other: int) -> np.ndarray:
        """Return an entry of ``diag(p) - p p.T``."""
        p = _probabilities(scores)[0][:, 0]
        return p[:, first] * ((first == other) - p[:, other])


def _probabilities(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the probabilities, and the logarithms of what they were divided by, shape (n, K)."""
    largest = scores.max(axis=2, keepdims=True)
    p = np.exp(scores - largest)
    total = (p @ np.ones(scores.shape[2]))[..., None]
    p /= total
    return p, (np.log(total) + largest)[..., 0]
