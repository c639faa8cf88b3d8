"""Directions of earlier solves and their products, kept for later ones."""

from __future__ import annotations

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import Array
from lowrank_inverse.arrays.control_flow import quietly
from lowrank_inverse.arrays.conversion import astype, eps, like
from lowrank_inverse.arrays.decompositions import eigh
from lowrank_inverse.arrays.linalg import gram_whitening, symmetric_part, tall_dot, tall_times
from lowrank_inverse.arrays.spread import reduced
from lowrank_inverse.results.solution import Pairs

DRIFT = 0.5
"""Part of a product that may have changed before its pair is dropped."""


@quietly
def joined_pairs(old: Pairs | None, new: Pairs, size: int) -> Pairs:
    """Return the `size` Ritz pairs of largest magnitude of old and new pairs together.

    Parameters
    ----------
    old : Pairs, optional
        With orthonormal vectors, as this function returns them, of an operator close to that of
        `new`.
    new : Pairs
        With vectors that have unit length or are zero.
    size : int
        Number of columns to return, at most n; zeros if there are fewer pairs.

    Returns
    -------
    Pairs
        With orthonormal vectors, sorted by decreasing magnitude of the Ritz values.

    Notes
    -----
    The new products give the entries ``S_old.T H S_new``. The old products give the same entries of
    the earlier operator, so ``E = S_old.T Y_new - Y_old.T S_new`` is the change of H on the space
    of `new`. An old pair is dropped if ``|E T|^2 > |Y_old|^2 / 4`` by rows, with T T.T = (S_new.T
    S_new)^+: its product has then changed by more than half. Nothing is known beyond that space.

    Cost: ``2 n (r + k)^2`` operations for the inner products of k new and r old pairs, and ``4 n
    (r + k) r`` for the sums of vectors.
    """
    S, Y = new
    xp = array_namespace(S)
    G, W = tall_dot(S, S), symmetric_part(tall_dot(S, Y))
    if old is not None:
        cross, G_old = tall_dot(old.vectors, S), tall_dot(old.vectors, old.vectors)
        W_old, W_cross = tall_dot(old.vectors, old.products), tall_dot(old.vectors, Y)
        change = (W_cross - tall_dot(old.products, S)) @ gram_whitening(G, eps(S))
        lengths = reduced(xp.sum(astype(old.products, G.dtype) ** 2, axis=0))
        kept = astype(xp.sum(change**2, axis=1) <= DRIFT**2 * lengths, G.dtype)
        cross, W_cross = kept[:, None] * cross, kept[:, None] * W_cross
        both = kept[:, None] * kept[None, :]
        G = _square(both * G_old, cross, G)
        W = _square(both * symmetric_part(W_old), W_cross, W)
    T = gram_whitening(G, eps(S))
    theta, Z = eigh(symmetric_part(T.T @ W @ T))
    order = xp.argsort(-xp.abs(theta))[: min(size, theta.shape[0])]
    M = T @ xp.take(Z, order, axis=1)
    if M.shape[1] < size:
        rows = (M.shape[0], size - M.shape[1])
        M = xp.concat([M, like(np.zeros(rows), M)], axis=1)
    if old is None:
        return Pairs(tall_times(S, M), tall_times(Y, M))
    r = old.vectors.shape[1]
    upper, lower = kept[:, None] * M[:r, :], M[r:, :]
    return Pairs(
        tall_times(old.vectors, upper) + tall_times(S, lower),
        tall_times(old.products, upper) + tall_times(Y, lower),
    )


def scaled_pairs(pairs: Pairs, s: Array) -> Pairs:
    """Return the pairs of ``S H S`` with ``S = diag(s)`` from those of H, orthonormal again."""
    scaled = Pairs(pairs.vectors / s[:, None], s[:, None] * pairs.products)
    return joined_pairs(None, scaled, pairs.vectors.shape[1])


def _square(A: Array, B: Array, C: Array) -> Array:
    """Return ``[[A, B], [B.T, C]]``."""
    xp = array_namespace(A)
    return xp.concat([xp.concat([A, B], axis=1), xp.concat([B.T, C], axis=1)], axis=0)
