"""The Woodbury identity with stored columns, all at once or in chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import Array, Scalar
from lowrank_inverse.arrays.checks import check_count, check_damping
from lowrank_inverse.arrays.conversion import algebra, astype, like, scalar_like, wide_dtype
from lowrank_inverse.arrays.graph import is_recorded, with_derivatives_of
from lowrank_inverse.arrays.linalg import symmetric_part, tall_dot, tall_times
from lowrank_inverse.operators.base import Operator

if TYPE_CHECKING:
    from lowrank_inverse.low_rank.approximation import NystromApproximation


class WoodburyInverse(Operator):
    """``(H_k + damping * I)^{-1}`` from stored columns, all at once (Eq. 6 of the paper)."""

    def __init__(self, approx: NystromApproximation, damping: Scalar) -> None:
        self.approx, self.damping = approx, scalar_like(damping, approx.like)
        self.shape, self.dtype, self.like = approx.shape, approx.dtype, approx.like

    def _about(self) -> dict[str, Any]:
        products = self.approx.num_products
        return {"rank": self.approx.rank, "damping": self.damping, "num_products": products}

    def _multiply(self, block: Array) -> Array:
        coefficients = self.approx.over(self.approx.project(block), self.damping)
        rest = block - self.approx.expand(coefficients)
        if is_recorded(self.damping):
            return rest / self.damping
        rest /= self.damping  # in place, but for jax
        return rest


class ChunkedWoodburyInverse(WoodburyInverse):
    """``(H_k + damping * I)^{-1}`` from stored columns, chunk by chunk (Algorithm 1).

    For the whitened columns L of a chunk and the current inverse Ĥ: ``Ĥ ← Ĥ - Ĥ L (I + L.T Ĥ
    L)^{-1} L.T Ĥ``. Whitening (``L = C U Λ^{-1/2}``) turns the J of the paper into I, and dropped
    columns into zeros.
    """

    def __init__(self, approx: NystromApproximation, damping: Scalar, chunk_size: int) -> None:
        super().__init__(approx, damping)
        self.chunk_size = chunk_size = check_count("chunk_size", chunk_size)
        self._updates: list[tuple[Array, Array]] = []
        k = approx.num_columns
        for start in range(0, k, chunk_size):
            stop = min(start + chunk_size, k)
            L = tall_times(approx.columns, approx.whitening[:, start:stop], approx.dtype)
            HL = self._multiply(L)
            inner = symmetric_part(tall_dot(L, HL)) + like(np.eye(stop - start), L, wide_dtype(L))
            self._updates.append((HL, algebra(inner).inv(inner)))

    def _about(self) -> dict[str, Any]:
        return super()._about() | {"chunk_size": self.chunk_size}

    def _multiply(self, block: Array) -> Array:
        result = block / self.damping
        for HL, inverse in self._updates:
            result = result - tall_times(HL, inverse @ tall_dot(HL, block))
        return result


def woodbury_inverse(
    approx: NystromApproximation, *, damping: Scalar, chunk_size: int | None = None
) -> WoodburyInverse | ChunkedWoodburyInverse:
    """Return ``(H_k + damping * I)^{-1}`` as an operator.

    Parameters
    ----------
    approx : NystromApproximation, of shape (n, n) with k columns
        The approximation to invert.
    damping : float or 0-d array
        Positive.
    chunk_size : int, optional
        None uses all columns at once (Eq. 6 of [1]_). κ runs Algorithm 1 with κ columns at a time;
        1 is Eq. 9. The result is the same up to rounding, and takes up to n·k numbers more.

    Returns
    -------
    operator, shape (n, n)
        ``inverse @ b`` for `b` of shape (n,) or (n, m), at 4 n k operations per column.

    Notes
    -----
    Eq. 6 as printed squares the condition number and fails in float32. With H_k = F F.T and ``F.T F
    = Z diag(g) Z.T``, this function computes ``x = (v - F Z diag(1 / (g + damping)) Z.T F.T v) /
    damping`` instead, with the k×k part in float64.

    References
    ----------
    .. [1] R. Hataya, M. Yamada. Nyström Method for Accurate and Scalable Implicit
       Differentiation. AISTATS 2023.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank_inverse as li
    >>> A = np.diag([4.0, 1.0, 0.0])
    >>> inverse = li.woodbury_inverse(li.nystrom(A, 3, rng=0), damping=1.0)
    >>> print(inverse @ np.ones(3))
    [0.2 0.5 1. ]
    """
    check_damping(damping)
    if chunk_size is None:
        return WoodburyInverse(approx, damping)
    if approx.vectors is not None:
        raise ValueError(
            f"`chunk_size` is for sampled columns; got {chunk_size!r} for a Krylov sketch. Omit it."
        )
    return ChunkedWoodburyInverse(approx, damping, chunk_size)


def over(coefficients: Array, divisors: Array, damped: Array | None = None) -> Array:
    """Divide row i of `coefficients` by ``divisors[i]``, or multiply it by 0 if that is negative.

    An eigenvalue below ``-damping`` has no place in a positive definite inverse. Derivatives are
    those of the inverse of `damped`, a matrix with the divisors on its diagonal and zeros beside.
    """
    xp = array_namespace(divisors)
    positive = divisors > 0
    inverse = xp.where(positive, 1 / xp.where(positive, divisors, xp.ones_like(divisors)), 0.0)
    value = rows_times(inverse, coefficients)
    if damped is None:
        return value
    kept = astype(positive, damped.dtype)

    def smooth() -> Array:
        rest = (1 - kept) * like(np.eye(kept.shape[0]), damped)
        solved = algebra(rest).solve(kept[:, None] * damped * kept + rest, coefficients)
        return rows_times(kept, solved)

    return with_derivatives_of(value, smooth, damped, coefficients)


def rows_times(s: Array, block: Array) -> Array:
    """Multiply row i of `block` by ``s[i]``."""
    return block * (s if block.ndim == 1 else s[:, None])
