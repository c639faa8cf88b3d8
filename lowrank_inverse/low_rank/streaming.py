"""The Woodbury identity with columns that are computed again when they are needed."""

from __future__ import annotations

from typing import Any

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import Array, Indices, OperatorLike, Scalar
from lowrank_inverse.arrays.checks import check_damping, check_indices, no_entries
from lowrank_inverse.arrays.control_flow import quietly
from lowrank_inverse.arrays.conversion import (
    astype,
    eps,
    like,
    scalar_like,
    scatter,
    take,
    wide_dtype,
)
from lowrank_inverse.arrays.graph import constant, is_recorded
from lowrank_inverse.arrays.linalg import symmetric_part, tall_dot
from lowrank_inverse.arrays.scale import matrix_scale
from lowrank_inverse.low_rank.core import differentiable_whitening, spectrum, whiten
from lowrank_inverse.low_rank.woodbury import over
from lowrank_inverse.operators.base import Operator
from lowrank_inverse.operators.columns import finite_columns, index_chunks
from lowrank_inverse.operators.function import aslinearoperator


class RecomputedInverse(Operator):
    """``(H_k + damping * I)^{-1}`` that stores the operator instead of its columns."""

    def __init__(
        self,
        A: OperatorLike,
        indices: np.ndarray,
        damping: Scalar,
        core: Array,
        gram: Array,
        scale: Array,
        *,
        chunk_size: int | None,
        num_products: int,
    ) -> None:
        """Take W and C.T C of the operator divided by `scale`, so that nothing overflows."""
        self.A, self.indices, self.damping = A, indices, scalar_like(damping, core)
        self.shape, self.dtype, self.like = (A.shape[0], A.shape[0]), core.dtype, no_entries(core)
        self.num_products, self.chunk_size = num_products, chunk_size
        wide = wide_dtype(core)
        W = symmetric_part(astype(core, wide))
        whitening = whiten(constant(W), eps(core))
        self.num_dropped, self.num_negative = whitening.num_dropped, whitening.num_negative
        scale = astype(scale, wide)
        self.core_eigenvalues = scale * whitening.core_eigenvalues
        T = differentiable_whitening(whitening.matrix, W)
        gram = T.T @ astype(gram, wide) @ T
        eigenvalues, rotation = spectrum(gram)
        rotation = constant(rotation)
        self.eigenvalues = scale * eigenvalues
        self._gram = scale * (rotation.T @ gram @ rotation) if is_recorded(gram) else None
        self._map = T @ rotation / scale**0.5

    @property
    def rank(self) -> Any:
        """Columns kept."""
        return self.indices.size - self.num_dropped

    def apply_cost(self, width: int) -> int:
        """Count the products with the operator that a block of `width` vectors costs."""
        return 2 * width if self.chunk_size is None else self.indices.size + width

    def _about(self) -> dict[str, Any]:
        return {"rank": self.rank, "num_products": self.num_products}

    def _multiply(self, block: Array) -> Array:
        projected = self._map.T @ self._columns_dot(block)
        G = self._gram
        if G is not None:
            G = G + self.damping * like(np.eye(self.indices.size), G)
        coefficients = self._map @ over(projected, self.eigenvalues + self.damping, G)
        spread = scatter(astype(coefficients, self.dtype), self.indices, self.shape[0])
        rest = block - self.A @ spread
        rest /= self.damping
        return rest

    def _columns_dot(self, block: Array) -> Array:
        """Return ``C.T @ block``, wide."""
        if self.chunk_size is None:  # C.T v = (A v)[K], for A is symmetric
            return astype(take(self.A @ block, self.indices), self._map.dtype)
        parts = [
            tall_dot(self.A.columns(chunk), block)
            for chunk in index_chunks(self.indices, self.chunk_size)
        ]
        return array_namespace(block).concat(parts, axis=0)


@quietly
def chunked_inverse(
    A: OperatorLike, indices: Indices, *, damping: Scalar, chunk_size: int
) -> RecomputedInverse:
    """Return ``(H_k + damping * I)^{-1}`` with at most two chunks of columns in memory.

    It equals ``nystrom(A, indices=indices).inverse(damping)`` and is as accurate, but does not
    store n·k numbers. Columns are computed again when they are needed (the space-efficient form,
    Algorithm 1 of [1]_).

    Parameters
    ----------
    A : linear operator, shape (n, n)
        Symmetric.
    indices : sequence of k distinct ints
        Columns of `A` to use.
    damping : float or 0-d array
        Positive.
    chunk_size : int
        κ, the number of columns computed at a time, from 1 to k.

    Returns
    -------
    operator, shape (n, n)

    Notes
    -----
    Cost: ``k (k / κ + 1) / 2`` products for the setup; for each block of right-hand sides, k
    products and one per column. Memory: ``2 κ n + k²`` numbers. :func:`streamed_inverse` takes far
    fewer products.

    References
    ----------
    .. [1] R. Hataya, M. Yamada. Nyström Method for Accurate and Scalable Implicit
       Differentiation. AISTATS 2023.
    """
    check_damping(damping)
    A = aslinearoperator(A)
    indices = check_indices(indices, int(A.shape[0]))
    chunks = index_chunks(indices, chunk_size)
    blocks: dict[tuple[int, int], Array] = {}
    core_parts: list[Array] = []
    num_products = 0
    scale: Scalar = None
    for i in range(len(chunks)):
        first = finite_columns(A, chunks[i])
        num_products += chunks[i].size
        scale = matrix_scale(first) if scale is None else scale
        first = first / scale
        for j in range(i, len(chunks)):
            second = first
            if j > i:
                second = finite_columns(A, chunks[j]) / scale
                num_products += chunks[j].size
            blocks[i, j] = tall_dot(first, second)
            blocks[j, i] = blocks[i, j].T
            if i == 0:
                core_parts.append(take(second, indices))
    xp = array_namespace(first)
    gram = xp.concat(
        [xp.concat([blocks[i, j] for j in range(len(chunks))], axis=1) for i in range(len(chunks))],
        axis=0,
    )
    core = xp.concat(core_parts, axis=1)
    return RecomputedInverse(
        A, indices, damping, core, gram, scale, chunk_size=chunk_size, num_products=num_products
    )


@quietly
def streamed_inverse(
    A: OperatorLike, indices: Indices, *, damping: Scalar, chunk_size: int = 1
) -> RecomputedInverse:
    """Return ``(H_k + damping * I)^{-1}`` without storing columns, from 2k products.

    For a symmetric `A` with sampled columns C at the indices K: ``C.T C = (A A)[K, K]``, ``C.T v =
    (A v)[K]`` and ``C z = A (E_K z)``. The k columns and k further products therefore give all k×k
    matrices, and a right-hand side takes two products.

    Parameters
    ----------
    A : linear operator, shape (n, n)
        Symmetric and deterministic: the same vector must give the same product.
    indices : sequence of k distinct ints
        Columns of `A` to use.
    damping : float or 0-d array
        Positive.
    chunk_size : int
        κ, the number of columns computed at a time.

    Returns
    -------
    operator, shape (n, n)

    Notes
    -----
    Cost: 2k products for the setup, 2 per right-hand side. Memory: ``2 κ n + k²`` numbers. In
    float64 the result equals that of stored columns. In float32, ``(A v)[K]`` has the rounding
    error of a product, which small eigenvalues of W amplify. If `damping` is below about 1e-3 of
    the largest eigenvalue, prefer :func:`woodbury_inverse` or :func:`chunked_inverse`.
    """
    check_damping(damping)
    A = aslinearoperator(A)
    indices = check_indices(indices, int(A.shape[0]))
    core_parts, gram_parts = [], []
    scale: Scalar = None
    for chunk in index_chunks(indices, chunk_size):
        C = finite_columns(A, chunk)
        scale = matrix_scale(C) if scale is None else scale
        C = C / scale
        core_parts.append(take(C, indices))
        gram_parts.append(take(A @ C, indices) / scale)
    xp = array_namespace(core_parts[0])
    return RecomputedInverse(
        A,
        indices,
        damping,
        xp.concat(core_parts, axis=1),
        xp.concat(gram_parts, axis=1),
        scale,
        chunk_size=None,
        num_products=2 * indices.size,
    )
