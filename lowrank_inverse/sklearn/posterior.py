"""The posterior of a Gaussian process at new points, in the units of its prior."""

from __future__ import annotations

from typing import Any

import numpy as np

from lowrank_inverse.operators.kernel import KernelOperator
from lowrank_inverse.operators.kernels.points import row_slices

BLOCK_NUMBERS = 2**22


def variance(G: Any, Z: np.ndarray) -> tuple[np.ndarray, str]:
    """Return the variances of f at points `Z`, shape (p,), and what went wrong."""
    size = max(1, BLOCK_NUMBERS // G.K.shape[0])
    parts = [G.explained(Z[rows], diagonal=True) for rows in row_slices(len(Z), size)]
    explained = np.concatenate([part for part, _ in parts])
    missed = max((reason for _, reason in parts), key=len)
    return np.maximum(G.at.signal_variance - explained, 0.0), missed


def covariance(G: Any, Z: np.ndarray) -> tuple[np.ndarray, str]:
    """Return the covariance of f at points `Z`, shape (p, p), and what went wrong."""
    explained, missed = G.explained(Z, diagonal=False)
    prior = KernelOperator(Z, G.K.kernel, lengthscale=G.K.lengthscale, nu=G.K.nu)
    cov = G.at.signal_variance * prior.evaluate(Z, Z) - explained
    cov = (cov + cov.T) / 2
    cov[np.diag_indices_from(cov)] = np.maximum(np.diagonal(cov), 0.0)
    return cov, missed


def draw(mean: np.ndarray, cov: np.ndarray, count: int, rng: Any) -> np.ndarray:
    """Return `count` draws from normal distributions, shape (p, m, count).

    Parameters
    ----------
    mean : ndarray, shape (p, m)
    cov : ndarray, shape (p, p, m)
    rng : numpy.random.RandomState
    """
    draws = np.empty((*mean.shape, count))
    for target in range(mean.shape[1]):
        values, vectors = np.linalg.eigh(cov[..., target])
        root = vectors * np.sqrt(np.maximum(values, 0.0))
        normal = rng.standard_normal((len(mean), count))
        draws[:, target] = mean[:, target, None] + root @ normal
    return draws
