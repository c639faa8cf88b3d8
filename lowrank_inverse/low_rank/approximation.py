"""The column-sampled Nyström approximation, free of damping."""

from __future__ import annotations

from typing import Any

from lowrank_inverse._typing import Array
from lowrank_inverse.arrays.conversion import astype, eps, is_narrow, take, wide_dtype
from lowrank_inverse.arrays.linalg import symmetric_part, tall_dot, tall_times
from lowrank_inverse.low_rank.core import (
    INDEFINITE_PIVOT_RTOL,
    left_singular,
    spectrum,
    whiten,
    whitened_gram,
)
from lowrank_inverse.low_rank.spectral import SpectralFunctions
from lowrank_inverse.low_rank.woodbury import woodbury_inverse


class NystromApproximation(SpectralFunctions):
    """``H_k = C W^+ C.T``, a symmetric `H` approximated from k of its columns (Eq. 4 of [1]_).

    Made by :func:`nystrom`. It is an operator (``approx @ v``) and knows nothing of a damping:
    one approximation serves every damping through :meth:`inverse`.

    Attributes
    ----------
    columns : array, shape (n, k)
        C, the sampled columns.
    core : array, shape (k, k)
        W, the rows of C at `indices`.
    indices : numpy.ndarray of int, shape (k,), or None
        None for a Gaussian sketch: then C is ``A @ S`` and W is ``S.T @ A @ S``, for S with k
        orthonormal columns.
    eigenvalues : array, shape (k,)
        Of H_k, largest first, 0 for the columns that were dropped; the other n - k are 0.
        In float64 where the library has it.
    num_dropped, num_negative : int
        Columns without a use (zero, repeated or below the tolerance), and among them the
        directions of clearly negative curvature. 0-d arrays while jax traces.
    core_eigenvalues : array, shape (k,)
        Of W, smallest first; where pivoted Cholesky met a negative residual diagonal entry, of W
        bordered by its row. One below -damping proves ``H + damping * I`` indefinite.
    num_products : int
        Products with `H` that the columns cost; those read from an array count too.
    trace, residual_trace : float or None
        Of H and of ``H - H_k``, where the diagonal of H was looked at: after pivoted Cholesky,
        with a Gaussian sketch if H has one, and for ``rank="auto"``.
    stopped : str or None
        Why ``rank="auto"`` took no more columns: ``"residual_trace"``, ``"effective_dimension"``,
        ``"certificate"``, ``"exhausted"`` (what is left is rounding) or ``"max_rank"``.

    Notes
    -----
    ``W = V diag(w) V.T`` gives ``T = V diag(w)^(-1/2)`` on the eigenvalues kept; the whitened
    columns ``F = C T`` satisfy ``H_k = F F.T``; and ``F.T F = Z diag(g) Z.T`` has the nonzero
    eigenvalues g of H_k. All k×k work is done in float64 where there is one. Where there is
    none (jax without x64), the left singular vectors of F are kept beside C: orthogonal to
    rounding, they lose the least.

    References
    ----------
    .. [1] R. Hataya, M. Yamada. Nyström Method for Accurate and Scalable Implicit
       Differentiation. AISTATS 2023.
    """

    def __init__(
        self,
        C: Array,
        indices: Any,
        pivot_rtol: float | None = None,
        indefinite_pivot_rtol: float = INDEFINITE_PIVOT_RTOL,
        *,
        core: Array | None = None,
        trace: float | None = None,
    ) -> None:
        n = C.shape[0]
        self.columns, self.indices, self.num_products = C, indices, C.shape[1]
        self.num_columns, self.trace, self.stopped = C.shape[1], trace, None
        self.like = C[:0, 0]
        self.shape, self.dtype = (n, n), self.like.dtype
        core = take(C, indices) if core is None else core
        self.core = symmetric_part(core)
        wide = astype(self.core, wide_dtype(core))
        # Entries of a sketch are sums over n rows, whose rounding grows with the root of n.
        unit = eps(C) if indices is not None else max(eps(C), n**0.5 * eps(wide))
        whitening = whiten(wide, unit, pivot_rtol, indefinite_pivot_rtol)
        self.whitening = whitening.matrix
        self.num_negative = whitening.num_negative
        self.num_dropped = whitening.num_dropped
        self.core_eigenvalues = whitening.core_eigenvalues
        self._basis: tuple[Array, Array] | None = None
        if is_narrow(C):
            self._basis = left_singular(C @ self.whitening)
            self.eigenvalues = self._basis[1] ** 2
        else:
            self.eigenvalues, rotation = spectrum(whitened_gram(C, self.whitening))
            self._map = self.whitening @ rotation

    @property
    def rank(self) -> Any:
        """Columns kept: the rank of H_k."""
        return self.num_columns - self.num_dropped

    def project(self, block: Array) -> Array:
        """Return ``(F Z).T @ block``, shape (k,) or (k, m), in the wide dtype."""
        if self._basis is not None:
            U, s = self._basis
            return _rows_times(s, U.T @ block)
        return self._map.T @ tall_dot(self.columns, block)

    def expand(self, coefficients: Array) -> Array:
        """Return ``(F Z) @ coefficients``, shape (n,) or (n, m), in the dtype of the columns."""
        if self._basis is not None:
            U, s = self._basis
            return U @ _rows_times(s, coefficients)
        return tall_times(self.columns, self._map @ coefficients, self.dtype)

    def _multiply(self, block: Array) -> Array:
        return self.expand(self.project(block))

    def inverse(self, damping: Any, *, chunk_size: int | None = None) -> Any:
        """Return ``(H_k + damping * I)^{-1}`` as an operator; see :func:`woodbury_inverse`."""
        return woodbury_inverse(self, damping=damping, chunk_size=chunk_size)

    def __repr__(self) -> str:
        return (
            f"NystromApproximation(n={self.shape[0]}, columns={self.num_columns}, "
            f"rank={self.rank}, dropped={self.num_dropped}, negative={self.num_negative}"
            f"{'' if self.stopped is None else f', stopped={self.stopped!r}'})"
        )


def _rows_times(s: Array, block: Array) -> Array:
    """Multiply row i of `block` by ``s[i]``."""
    return block * (s if block.ndim == 1 else s[:, None])
