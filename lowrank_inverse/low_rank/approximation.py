"""The column-sampled Nyström approximation, without damping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import Array, Indices, Scalar
from lowrank_inverse.arrays.checks import no_entries
from lowrank_inverse.arrays.conversion import (
    astype,
    concrete,
    eps,
    is_narrow,
    is_traced,
    like,
    scalar_like,
    take,
    wide_dtype,
)
from lowrank_inverse.arrays.decompositions import eigh, thin_svd
from lowrank_inverse.arrays.graph import (
    constant,
    is_recorded,
    with_derivatives_of,
)
from lowrank_inverse.arrays.linalg import relative_asymmetry, symmetric_part, tall_dot, tall_times
from lowrank_inverse.arrays.spread import flipped
from lowrank_inverse.low_rank.core import (
    INDEFINITE_PIVOT_RTOL,
    differentiable_whitening,
    spectrum,
    whiten,
    whitened_gram,
)
from lowrank_inverse.low_rank.spectral_functions import SpectralFunctions
from lowrank_inverse.low_rank.woodbury import over, rows_times, woodbury_inverse


class NystromApproximation(SpectralFunctions):
    """The approximation ``H_k = C W^+ C.T`` of a symmetric `H` by k of its columns (Eq. 4 of [1]_).

    Returned by :func:`nystrom`. It is an operator (``approx @ v``) and does not include a damping:
    :meth:`inverse` reuses the same approximation for every damping.

    Attributes
    ----------
    columns : array, shape (n, k)
        C, the sampled columns.
    core : array, shape (k, k)
        W, the rows of C at `indices`.
    indices : numpy.ndarray of int, shape (k,), or None
        Indices of the columns. None for a sketch, where C is ``A @ S`` and W is ``S.T @ A @ S``
        for an S with k orthonormal columns.
    vectors : array, shape (n, k), or None
        S of a Krylov sketch.
    keeps_negative : bool
        Whether H_k has negative eigenvalues; see Notes.
    eigenvalues : array, shape (k,)
        Eigenvalues of H_k, largest first, with 0 for dropped columns; the other n - k are 0.
        In float64 if the library has it.
    num_dropped, num_negative : int
        Number of dropped columns (zero, repeated or below the tolerance), and how many of them
        are directions of clearly negative curvature. 0-d arrays while JAX traces.
    asymmetry : float or None
        Largest absolute entry of ``W - W.T``, before W was symmetrised, divided by that of W.
    core_eigenvalues : array, shape (k,)
        Eigenvalues of W, smallest first. If pivoted Cholesky met a negative residual diagonal
        entry, W includes its row. A value below -damping proves ``H + damping * I`` indefinite.
    num_products : int
        Number of products with `H` for the columns; columns read from an array count as well.
    trace, residual_trace : float or None
        Traces of H and of ``H - H_k``, if the diagonal of H was read: by pivoted Cholesky, by
        ``rank="auto"``, and by a Gaussian sketch of an H that has one.
    stopped : str or None
        Why ``rank="auto"`` stopped: ``"residual_trace"``, ``"effective_dimension"``, ``"steps"``
        (doubling the columns would cost more than it could save in steps), ``"certificate"``,
        ``"exhausted"`` (the remainder is rounding) or ``"max_rank"``.

    Notes
    -----
    If a Krylov sketch shows negative curvature, H_k is ``S W S.T`` instead of ``C W^+ C.T``. Its
    eigenvalues are those of W and interlace with those of H (Rayleigh-Ritz), so that ``H_k +
    damping * I`` is positive definite whenever ``H + damping * I`` is. The form ``C W^+ C.T``
    would divide by eigenvalues of W near zero, which may mix positive and negative ones of H.

    Let ``W = V diag(w) V.T`` and ``T = V diag(w)^(-1/2)`` on the eigenvalues kept. The whitened
    columns ``F = C T`` satisfy ``H_k = F F.T``, and ``F.T F = Z diag(g) Z.T`` has the nonzero
    eigenvalues g of H_k. All k×k computations use float64 if the library has it. Otherwise (JAX
    without x64) the left singular vectors of F are stored as well, since they lose the least
    accuracy.

    In PyTorch and JAX, products, inverses, :meth:`logdet`, :meth:`trace_inverse` and
    :meth:`effective_dimension` are differentiable for fixed `indices` and fixed rank, even if
    eigenvalues are equal or zero. Only derivatives of single eigenvectors, and second derivatives
    of single eigenvalues, require distinct eigenvalues.

    References
    ----------
    .. [1] R. Hataya, M. Yamada. Nyström Method for Accurate and Scalable Implicit
       Differentiation. AISTATS 2023.
    """

    asymmetry: Any = None  # of one read from an older file

    def __init__(
        self,
        C: Array,
        indices: Indices,
        indefinite_pivot_rtol: float = INDEFINITE_PIVOT_RTOL,
        *,
        core: Array | None = None,
        trace: float | None = None,
        vectors: Array | None = None,
        indefinite: bool = False,
    ) -> None:
        n = C.shape[0]
        self.columns, self.indices, self.num_products = C, indices, C.shape[1]
        self.vectors = vectors
        self.num_columns, self.trace, self.stopped = C.shape[1], trace, None
        self.like = no_entries(C)
        self.shape, self.dtype = (n, n), self.like.dtype
        core = take(C, indices) if core is None else core
        self.asymmetry = concrete(relative_asymmetry(constant(core)))
        self.core = symmetric_part(core)
        wide = astype(self.core, wide_dtype(core))
        # Entries of a sketch are sums over n rows, whose rounding grows with the root of n.
        unit = eps(C) if indices is not None else max(eps(C), n**0.5 * eps(wide))
        whitening = whiten(constant(wide), unit, indefinite_pivot_rtol, indefinite=indefinite)
        self.whitening = differentiable_whitening(whitening.matrix, wide)
        self.num_negative = whitening.num_negative
        self.num_dropped = whitening.num_dropped
        self.core_eigenvalues = whitening.core_eigenvalues
        self._basis: tuple[Array, Array] | None = None
        if is_narrow(C):
            F = astype(C, wide.dtype) @ self.whitening
            U, s, rotation = thin_svd(constant(F))
            self._basis = U, s
            self.eigenvalues = with_derivatives_of(s * s, lambda: spectrum(F.T @ F)[0], F)
            gram = F.T @ F if is_recorded(F) else None
        else:
            gram = whitened_gram(C, self.whitening)
            self.eigenvalues, rotation = spectrum(gram)
        rotation = constant(rotation)
        self._map = self.whitening @ rotation
        if is_recorded(gram):
            self._gram = rotation.T @ gram @ rotation
        self.keeps_negative = False if vectors is None else self.num_negative > 0
        if is_traced(self.keeps_negative) or self.keeps_negative:
            self._keep_negative(vectors)

    def _keep_negative(self, S: Array) -> None:
        """Take ``S W S.T`` for H_k."""
        w, V = self._core_spectrum()
        V = constant(V)
        xp = array_namespace(w)
        root = constant(xp.sqrt(xp.abs(w)))
        taken = self._taken
        self.num_dropped = taken(0 * self.num_dropped, self.num_dropped)
        self.eigenvalues = taken(w, self.eigenvalues)
        if self._basis is not None:
            U, s = self._basis
            self._basis = taken(constant(S) @ V, U), taken(root, s)
        self._map = taken(V * root[None, :], self._map)
        if self._gram is not None:
            # In units of the root, as the coefficients are.
            safe = xp.where(root > 0, root, xp.ones_like(root))[:, None]
            self._gram = taken(V.T @ astype(self.core, V.dtype) @ V / safe * root, self._gram)

    def _taken(self, kept: Any, dropped: Any) -> Any:
        """Return `kept` if negative eigenvalues are kept, else `dropped`."""
        if is_traced(self.keeps_negative):
            return array_namespace(self.eigenvalues).where(self.keeps_negative, kept, dropped)
        return kept if self.keeps_negative else dropped

    def eigenvectors(self) -> tuple[Array, Array]:
        """Return the eigenvectors of H_k, shape (n, k), and its eigenvalues.

        A QR decomposition of F makes the eigenvectors orthonormal to rounding, even if the columns
        are ill-conditioned. Cost: O(n k²) operations.
        """
        if self._basis is not None:
            return self._basis[0], self.eigenvalues
        never, U, g = self.keeps_negative is False, None, None
        if never or is_traced(self.keeps_negative):
            U, s, _ = thin_svd(tall_times(self.columns, self.whitening, self.dtype))
            g = s * s
        if never:
            return U, g
        kept = tall_times(self.vectors, self._core_spectrum()[1], self.dtype)
        return self._taken(kept, U), self._taken(astype(self.eigenvalues, self.dtype), g)

    def _core_spectrum(self) -> tuple[Array, Array]:
        """Return eigenvalues and eigenvectors of W, largest first."""
        w, V = eigh(astype(self.core, wide_dtype(self.core)))
        return flipped(w), flipped(V, axis=1)

    def project(self, block: Array) -> Array:
        """Return ``(F Z).T @ block``, shape (k,) or (k, m), in the wide dtype.

        The rows of negative eigenvalues change their sign.
        """
        projected = self._by_basis(
            lambda U, s: rows_times(s, U.T @ astype(block, U.dtype)),
            lambda: self._map.T @ tall_dot(self._taken(self.vectors, self.columns), block),
        )
        if self.vectors is None:
            return projected
        g, G, xp = constant(self.eigenvalues), self._gram, array_namespace(projected)
        safe = xp.where(g == 0, xp.ones_like(g), xp.abs(g))
        value = rows_times(g / safe, projected)
        if G is None:
            return value
        return with_derivatives_of(value, lambda: self._taken(G / safe @ projected, value), G)

    def expand(self, coefficients: Array) -> Array:
        """Return ``(F Z) @ coefficients``, shape (n,) or (n, m), in the dtype of the columns."""
        base = self._taken(self.vectors, self.columns)
        return self._by_basis(
            lambda U, s: astype(U @ rows_times(s, coefficients), self.dtype),
            lambda: tall_times(base, self._map @ coefficients, self.dtype),
        )

    def _by_basis(
        self, kept: Callable[[Array, Array], Array], mapped: Callable[[], Array]
    ) -> Array:
        """Return a product by the singular vectors if they are kept, differentiated as by C."""
        if self._basis is None:
            return mapped()
        value = kept(*self._basis)
        return value if self._gram is None else with_derivatives_of(value, mapped, self._gram)

    def _multiply(self, block: Array) -> Array:
        return self.expand(self.project(block))

    def over(self, projected: Array, damping: Array) -> Array:
        """Divide each row of the result of :meth:`project` by its eigenvalue plus `damping`."""
        G = self._gram
        if G is not None:
            G = G + damping * like(np.eye(self.num_columns), G)
        return over(projected, self.eigenvalues + damping, G)

    def inverse(self, damping: Scalar, *, chunk_size: int | None = None) -> Any:
        """Return ``(H_k + damping * I)^{-1}`` as an operator; see :func:`woodbury_inverse`."""
        return woodbury_inverse(self, damping=damping, chunk_size=chunk_size)

    def galerkin(self, b: Array, damping: Scalar) -> tuple[Array, Array]:
        """Return ``x = S (W + damping * I)^+ S.T b``, for a Krylov sketch, and its residual.

        In the norm of ``A + damping * I``, x is the best solution in the span of S. For the `b`
        that generated the space, it is the iterate of conjugate gradients. With x = ``S z``, the
        product ``A x`` is ``C z``.
        """
        w, V = self._core_spectrum()
        z = V @ over(V.T @ tall_dot(self.vectors, b), w + scalar_like(damping, w))
        x = tall_times(self.vectors, z, self.dtype)
        return x, b - tall_times(self.columns, z, self.dtype) - scalar_like(damping, x) * x

    def __repr__(self) -> str:
        return (
            f"NystromApproximation(n={self.shape[0]}, columns={self.num_columns}, "
            f"rank={self.rank}, dropped={self.num_dropped}, negative={self.num_negative}"
            f"{'' if self.stopped is None else f', stopped={self.stopped!r}'})"
        )
