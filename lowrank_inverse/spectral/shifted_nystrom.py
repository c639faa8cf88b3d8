"""A shifted Nyström approximation: powers, log determinant and traces of derivatives."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import Array, Indices, OperatorLike, Scalar
from lowrank_inverse.arrays.conversion import astype, carries_gradient, eps, like, take
from lowrank_inverse.arrays.graph import constant
from lowrank_inverse.arrays.linalg import dot, tall_dot, tall_times
from lowrank_inverse.low_rank.approximation import NystromApproximation
from lowrank_inverse.low_rank.nystrom_columns import nystrom
from lowrank_inverse.operators.base import Operator
from lowrank_inverse.operators.columns import known_or_none


class FixedOperator(Operator):
    """An operator whose products are constants to derivatives."""

    def __init__(self, A: OperatorLike) -> None:
        self.A, self.recorded = A, False
        self.shape, self.dtype, self.like = A.shape, A.dtype, constant(A.like)
        if hasattr(A, "submatrix"):
            self.submatrix = lambda indices: self._fixed(A.submatrix(indices))

    def _fixed(self, product: Array) -> Array:
        self.recorded = self.recorded or carries_gradient(product)
        return constant(product)

    def _multiply(self, block: Array) -> Array:
        return self._fixed(self.A @ block)

    def columns(self, indices: Indices) -> Array:
        """Return the columns at `indices`, shape (n, k)."""
        return self._fixed(self.A.columns(indices))

    def diagonal(self) -> Array:
        """Return the diagonal, shape (n,)."""
        return self._fixed(self.A.diagonal())


class ShiftedNystrom(NamedTuple):
    """``P = U diag(inside) U.T + tail (I - U U.T)``, for ``H_k + damping * I``.

    With C and W the columns and the core of H_k, ``R = C W^+`` and ``Y = P^{-1} R``, the derivative
    of H_k is ``dC R.T + R dC.T - R dW R.T``.
    """

    U: Array
    inside: Array
    tail: Array
    R: Array
    Y: Array
    indices: Indices | None
    S: Array | None
    """What A was multiplied with in the place of columns at `indices`."""

    @property
    def num_columns(self) -> int:
        """Columns of H_k."""
        return int(self.R.shape[1])

    def power(self, block: Array, exponent: float) -> Array:
        """Return ``P**exponent @ block``, for a block of shape (n, m)."""
        inside, outside = self.inside**exponent, self.tail**exponent
        inner = (inside - outside)[:, None] * (self.U.T @ block)
        return outside * block + self.U @ inner

    def function_trace(self, inside: Array, outside: Array) -> Array:
        """Return the trace of the matrix with these eigenvalues in the place of its own."""
        n, k = self.U.shape
        return array_namespace(inside).sum(inside) + (n - k) * outside

    def traces(self, B: OperatorLike, shift: Scalar, u: Array) -> tuple[Array, Array]:
        """Return ``trace(P^{-1} D)`` and ``u.T D u`` for each column u, with D derived from B.

        D is the derivative of ``H_k + damping * I`` where B and `shift` are those of A and the
        damping.
        """
        xp = array_namespace(u)
        if self.S is None:
            C = B.columns(self.indices)
            W = take(C, self.indices)
        else:
            C = B @ self.S
            W = self.S.T @ C
        p = self.R.T @ u
        forms = 2 * dot(C.T @ u, p) - dot(p, W @ p) + shift * dot(u, u)
        trace = 2 * xp.sum(self.Y * C) - xp.sum((self.Y.T @ self.R) * W)
        return trace + shift * self.function_trace(1 / self.inside, 1 / self.tail), forms


def shifted_nystrom(
    A: OperatorLike, rank: int, damping: Scalar, generator: np.random.Generator
) -> ShiftedNystrom:
    """Return P for constants `A` and `damping`, with `rank` columns, or fewer if A has fewer.

    What H_k left out has the mean of its eigenvalues where the diagonal of A is known, else the
    least of H_k; nothing of P is below that.
    """
    n = int(A.shape[0])
    S = None
    if hasattr(A, "submatrix"):
        approx = nystrom(A, rank, rng=generator)
    else:
        S = like(np.linalg.qr(generator.standard_normal((n, rank)))[0], A.like)
        C = A @ S
        approx = NystromApproximation(C, None, core=tall_dot(S, C), vectors=S)
    U, g = approx.eigenvectors()
    xp = array_namespace(g)
    g, k = astype(g, approx.dtype), g.shape[0]
    positive = xp.where(g > 0, g, xp.zeros_like(g))
    d = known_or_none(A)
    if d is None:
        mean = xp.min(xp.where(g > 16 * eps(g) * g[0], g, g[0] + 0 * g))
    else:
        mean = (xp.sum(d) - xp.sum(positive)) / max(1, n - k)
    least = n * eps(g) * g[0]
    mean = xp.where(mean > least, mean, 0 * mean)
    mean = xp.where(mean + damping > 0, mean + damping, xp.where(g[0] > 0, least, least + 1))
    inside = xp.maximum(positive + damping, mean)
    T = approx.whitening
    P = ShiftedNystrom(U, inside, mean, tall_times(approx.columns, T @ T.T), U, approx.indices, S)
    return P._replace(Y=P.power(P.R, -1.0))
