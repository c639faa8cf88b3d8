"""One table of symmetric matrices with known spectra and fixed seeds."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

N = 24
"""Rows of the small problems: one size, so that jax compiles each function once."""
RANK = 8
WIDTH = 3
"""Right-hand sides in a block."""

Spectrum = Callable[[int], np.ndarray]

PSD: dict[str, Spectrum] = {
    "identity": np.ones,
    "linear": lambda n: np.arange(1, n + 1) / n,
    "polynomial": lambda n: 1.0 / np.arange(1, n + 1) ** 2,
    "exponential": lambda n: np.exp(-np.arange(n) / 2),
    "geometric": lambda n: np.logspace(0, -12, n),
    "step": lambda n: np.where(np.arange(n) < n // 6, 1.0, 1e-3),
    "clusters": lambda n: np.array([1.0, 0.3, 0.1, 0.01])[np.arange(n) % 4],
    "network": lambda n: np.concatenate(
        [10 * np.exp(-np.arange(n // 4)), 1e-3 * np.random.default_rng(7).random(n - n // 4) ** 3]
    ),
    "low rank": lambda n: np.where(np.arange(n) < n // 3, np.exp(-np.arange(n) / 4), 0.0),
    "rank one": lambda n: np.where(np.arange(n) < 1, 1.0, 0.0),
}
"""Positive semidefinite, the largest eigenvalue 1 (network: 10)."""

INDEFINITE: dict[str, Spectrum] = {
    "slightly": lambda n: np.where(
        np.arange(n) < n - 3, 1.0 / np.arange(1, n + 1), -0.02 * np.arange(1, n + 1) / n
    ),
    "half": lambda n: np.where(np.arange(n) % 2 == 0, 1.0, -1.0) * np.arange(1, n + 1) / n,
}

ACCURACY: dict[str, tuple[Spectrum, dict[float, tuple[float, float]]]] = {
    "network-like": (
        lambda n: np.concatenate(
            [10 * np.exp(-np.arange(40) / 8), 1e-3 * np.random.default_rng(0).random(n - 40) ** 3]
        ),
        {1e-1: (8e-6, 4e-5), 1e-2: (7e-5, 2e-4), 1e-3: (2e-4, 5e-4)},
    ),
    "polynomial": (lambda n: 1.0 / np.arange(1, n + 1) ** 2, {1e-4: (2e-5, 1e-4)}),
    "exponential": (lambda n: np.exp(-np.arange(n) / 5), {1e-4: (5e-4, 3e-2)}),
}
"""For n = 1500 and 50 columns in float32: each damping with the relative error that is to be met
with k×k algebra in float64, and in float32 throughout. The exponential has cond(W) = 4e5."""


@functools.cache
def orthogonal(n: int, seed: int = 0) -> np.ndarray:
    """Return an orthogonal matrix of order n; not to be written to."""
    Q = np.linalg.qr(np.random.default_rng([seed, n]).standard_normal((n, n)))[0]
    Q.flags.writeable = False
    return Q


def symmetric(eigenvalues: Any, seed: int = 0) -> np.ndarray:
    """Return a symmetric matrix with these eigenvalues, in float64."""
    eigenvalues = np.asarray(eigenvalues, dtype=np.float64)
    Q = orthogonal(eigenvalues.size, seed)
    A = (Q * eigenvalues) @ Q.T
    return (A + A.T) / 2


def matrix(name: str, n: int = N, seed: int = 0) -> np.ndarray:
    """Return the matrix of a spectrum in the tables."""
    return symmetric((PSD | INDEFINITE)[name](n), seed)


def largest(name: str, n: int = N) -> float:
    """Return the largest absolute eigenvalue of a spectrum in the tables."""
    return float(np.max(np.abs((PSD | INDEFINITE)[name](n))))


def conditioned(condition: float, n: int = N, seed: int = 0) -> np.ndarray:
    """Return a positive definite matrix, eigenvalues from 1 to 1 / condition by equal factors."""
    return symmetric(np.logspace(0, -np.log10(condition), n), seed)


def rhs(n: int = N, width: int | None = None, seed: int = 1) -> np.ndarray:
    """Return normally distributed right-hand sides, shape (n,) or (n, width)."""
    shape = (n,) if width is None else (n, width)
    return np.random.default_rng([seed, n]).standard_normal(shape)


def indices(n: int = N, rank: int = RANK, seed: int = 2) -> np.ndarray:
    """Return distinct column indices."""
    return np.random.default_rng([seed, n]).choice(n, rank, replace=False)


def exactly_psd(rng: np.random.Generator, n: int, rank: int) -> np.ndarray:
    """Return a positive semidefinite matrix that float32 holds without rounding (n <= 40).

    ``X X.T`` for X of small whole numbers, its columns scaled by powers of 2 down to 1/16.
    """
    X = rng.integers(-8, 9, (n, rank)) * 2.0 ** -rng.integers(0, 5, rank)
    A = X @ X.T
    assert np.array_equal(A, A.astype(np.float32))
    return A


class CountingOperator:
    """Nothing but ``.shape``, ``.dtype`` and ``@``, which counts the vectors it multiplies."""

    def __init__(self, A: Any) -> None:
        self.A, self.shape, self.dtype, self.like = A, tuple(A.shape), A.dtype, A[:0, 0]
        self.num_products = 0
        self.widths: list[int] = []

    def __matmul__(self, block: Any) -> Any:
        self.widths.append(1 if block.ndim == 1 else block.shape[1])
        self.num_products += self.widths[-1]
        return self.A @ block
