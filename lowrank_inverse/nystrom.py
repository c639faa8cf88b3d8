"""The column-sampled Nyström approximation, free of damping."""

from __future__ import annotations

from typing import Any

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._array import (
    astype,
    beside,
    check_count,
    check_indices,
    eps,
    is_narrow,
    like,
    quietly,
    take,
    wide_dtype,
)
from lowrank_inverse._typing import RNG, Array
from lowrank_inverse._vectors import symmetric_part, tall_dot, tall_times
from lowrank_inverse.adaptive import adaptive_approximation
from lowrank_inverse.memory import check_column_dtype, read_columns
from lowrank_inverse.operators import aslinearoperator
from lowrank_inverse.sampling import DRAWN, check_sampling, sample_columns
from lowrank_inverse.sources import Sketch, empty_like, make_source
from lowrank_inverse.spectral import SpectralFunctions
from lowrank_inverse.whitening import (
    INDEFINITE_PIVOT_RTOL,
    left_singular,
    negative_eigenvalues,
    spectrum,
    whiten,
    whitened_gram,
)


class NystromApproximation(SpectralFunctions):
    """``H_k = C W^+ C.T``, a symmetric `H` approximated from k of its columns (Eq. 4 of [1]_).

    Made by :func:`nystrom`. It is an operator (``approx @ v``) and knows nothing of a damping:
    one approximation serves every damping through :meth:`inverse`.

    Attributes
    ----------
    columns : array, shape (n, k)
        C, the sampled columns; with `column_dtype` divided by `column_scales`.
    column_scales : array or None, shape (k,)
        Powers of two, where `column_dtype` was given.
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
        scales: Array | None = None,
        like: Array | None = None,
    ) -> None:
        n = C.shape[0]
        self.columns, self.indices, self.num_products = C, indices, C.shape[1]
        self.num_columns, self.trace, self.stopped = C.shape[1], trace, None
        self.column_scales, self.like = scales, C[:0, 0] if like is None else like
        self.shape, self.dtype = (n, n), self.like.dtype
        if core is None:
            core = astype(beside(take(C, indices), self.like), self.dtype)
            core = core if scales is None else core * scales
        self.core = symmetric_part(core)
        wide = astype(self.core, wide_dtype(core))
        # Entries of a sketch are sums over n rows, whose rounding grows with the root of n.
        unit = eps(C) if indices is not None else max(eps(C), n**0.5 * eps(wide))
        whitening = whiten(wide, unit, pivot_rtol, indefinite_pivot_rtol)
        self.whitening = whitening.matrix
        if scales is not None:  # T for the columns as they are held
            self.whitening = astype(scales, self.whitening.dtype)[:, None] * self.whitening
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
        from lowrank_inverse.woodbury import woodbury_inverse

        return woodbury_inverse(self, damping, chunk_size=chunk_size)

    def __repr__(self) -> str:
        return (
            f"NystromApproximation(n={self.shape[0]}, columns={self.num_columns}, "
            f"rank={self.rank}, dropped={self.num_dropped}, negative={self.num_negative}"
            f"{'' if self.stopped is None else f', stopped={self.stopped!r}'})"
        )


@quietly
def nystrom(
    A: Any,
    rank: int | str | None = None,
    *,
    indices: Any = None,
    sampling: str = "uniform",
    rng: RNG = None,
    chunk_size: int | None = None,
    pivot_rtol: float | None = None,
    indefinite_pivot_rtol: float = INDEFINITE_PIVOT_RTOL,
    diagonal: Any = None,
    damping: Any = None,
    b: Array | None = None,
    rtol: float | None = None,
    max_rank: int | None = None,
    column_dtype: str | None = None,
    offload: bool = False,
) -> NystromApproximation:
    """Approximate `A` from `rank` of its columns: ``C W^+ C.T`` (Eq. 4 of [1]_).

    Parameters
    ----------
    A : linear operator, shape (n, n)
        Symmetric; the approximation is meant for positive semidefinite matrices. Directions of
        negative curvature are dropped and counted.
    rank : int or "auto", optional
        Columns to take, from 1 to n; ``"auto"`` takes more until they are enough. Either this or
        `indices`.
    indices : sequence of distinct ints, optional
        The columns to take. The way to go inside ``jax.jit``.
    sampling : {"uniform", "diagonal", "diagonal_squared", "greedy", "rpcholesky", "gaussian"}
        Columns drawn; or chosen one by one, by what the others left over, see :func:`lowrank_inverse.pivoted_cholesky` (fewer than `rank` if
        no more is left than rounding); or products with `rank` orthonormal Gaussian vectors in
        the place of columns [2]_, for operators whose columns are not cheaper than products.
    rng : int or numpy.random.Generator, optional
        Seed of the sampling. Random numbers are drawn on the host, the same for every library.
    chunk_size : int, optional
        Columns asked for at a time. Default: all at once; pivots one by one where a column costs
        a product.
    pivot_rtol : float, optional
        Eigenvalues of W up to this fraction of the largest are dropped. Default: the rounding of
        its entries and of its decomposition, or `indefinite_pivot_rtol` where W has a clearly
        negative eigenvalue, for then small positive ones are as little to be trusted.
    indefinite_pivot_rtol : float
        1e-2 makes the better preconditioner of a slightly indefinite matrix.
    diagonal : array of shape (n,), or DiagonalEstimate, optional
        Weights for ``"diagonal"`` and ``"diagonal_squared"`` where `A` has no diagonal.
    damping, b, rtol, max_rank : optional, with ``rank="auto"``
        The columns are doubled, from 16 up to `max_rank` (default: the lesser of n and 1000).
        With `damping`, until the residual trace is at most that, or the columns are as many as
        :meth:`NystromApproximation.sufficient_rank` asks for. With `damping` and a right-hand
        side `b`, of shape (n,) or (n, m), until :func:`lowrank_inverse.certify` proves a relative
        error of at most `rtol`, for a product or two a column each time. With neither, until the
        residual trace is at most `rtol` times the trace. Default of `rtol`: 1e-3.
    column_dtype : {"float16", "bfloat16", "float32"}, optional
        To keep drawn columns in; what is k×k stays in float64. Eigenvalues below the precision
        of that dtype are dropped.
    offload : bool
        Keep drawn columns in the host's memory; an accelerator reads them block by block.

    Returns
    -------
    NystromApproximation

    Raises
    ------
    ValueError
        If `rank` or `indices` are out of range, both or neither are given, or a column holds
        NaN or Inf.
    TypeError
        If the sampling needs a diagonal and `A` has none.

    Notes
    -----
    `rank` products with `A` (none if it can read its columns); memory ``n * rank`` numbers, and
    twice that while pivots or Gaussian vectors are chosen. For the Gaussian sketch the shift of
    [2]_ is not needed: eigenvalues of W that rounding may have made are dropped instead, so that
    ``H_k <= A`` holds, which :func:`lowrank_inverse.certify` builds on.

    References
    ----------
    .. [1] R. Hataya, M. Yamada. Nyström Method for Accurate and Scalable Implicit
       Differentiation. AISTATS 2023.
    .. [2] J. A. Tropp, A. Yurtsever, M. Udell, V. Cevher. Fixed-Rank Approximation of a
       Positive-Semidefinite Matrix from Streaming Data. NeurIPS 2017.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank_inverse as li
    >>> X = np.random.default_rng(0).standard_normal((200, 5))
    >>> A = X @ X.T  # rank 5
    >>> approx = li.nystrom(A, 8, rng=0)
    >>> print(approx.rank, bool(np.allclose(approx @ np.ones(200), A @ np.ones(200))))
    5 True
    >>> print(li.nystrom(A, "auto", sampling="rpcholesky", rng=0).stopped)
    residual_trace
    """
    A = aslinearoperator(A)
    n = int(A.shape[0])

    def build(sketch: Sketch) -> NystromApproximation:
        return _approximation(sketch, pivot_rtol, indefinite_pivot_rtol)

    if (rank is None) == (indices is None):
        raise ValueError("give exactly one of `rank` (columns to sample) and `indices`.")
    adaptive = isinstance(rank, str)
    check_rank(rank, most=n)
    check_sampling(sampling)
    unused = {"damping": damping, "b": b, "rtol": rtol, "max_rank": max_rank}
    if not adaptive and any(value is not None for value in unused.values()):
        names = ", ".join(f"`{name}`" for name, value in unused.items() if value is not None)
        raise ValueError(f"{names} have a meaning only with rank='auto'; got rank={rank!r}.")
    check_column_dtype(column_dtype)
    compact = column_dtype is not None or offload
    if indices is None and compact:
        if isinstance(rank, str) or rank is None or sampling not in DRAWN:
            raise ValueError(
                "`column_dtype` and `offload` need columns drawn before any is read; got "
                f"rank={rank!r}, sampling={sampling!r}. Use one of {', '.join(map(repr, DRAWN))} "
                "and a number as `rank`, or pass `indices`."
            )
        indices = sample_columns(A, rank, sampling=sampling, rng=rng, diagonal=diagonal)
    if indices is not None:
        indices = check_indices(indices, n)
        C, scales = read_columns(
            A, indices, chunk_size=chunk_size, dtype=column_dtype, offload=offload
        )
        where = empty_like(A) if compact else None
        return build(Sketch(C, indices, num_products=indices.size, scales=scales, like=where))
    if adaptive:
        return adaptive_approximation(
            A,
            build,
            sampling=sampling,
            rng=rng,
            chunk_size=chunk_size,
            weights=diagonal,
            damping=damping,
            b=b,
            rtol=rtol,
            max_rank=max_rank,
        )
    rank = check_count("rank", rank, most=n)
    source = make_source(
        A,
        rank,
        sampling=sampling,
        rng=rng,
        chunk_size=chunk_size,
        weights=diagonal,
        want_trace=sampling == "gaussian",
    )
    source.grow(rank)
    return build(source.sketch())


def _approximation(
    sketch: Sketch, pivot_rtol: float | None, indefinite_pivot_rtol: float
) -> NystromApproximation:
    C, indices = sketch.columns, sketch.indices
    core_eigenvalues = None
    if sketch.witness is not None:
        core_eigenvalues = _bordered_eigenvalues(C, indices, *sketch.witness)
        pivot_rtol = indefinite_pivot_rtol if pivot_rtol is None else pivot_rtol
    approx = NystromApproximation(
        C,
        indices,
        pivot_rtol,
        indefinite_pivot_rtol,
        core=sketch.core,
        trace=sketch.trace,
        scales=sketch.scales,
        like=sketch.like,
    )
    approx.num_products = sketch.num_products
    if core_eigenvalues is not None:
        approx.core_eigenvalues = core_eigenvalues
        xp = array_namespace(core_eigenvalues)
        negative = xp.sum(astype(negative_eigenvalues(core_eigenvalues, eps(C)), xp.int32))
        approx.num_negative = max(approx.num_negative, int(negative))
    return approx


def _bordered_eigenvalues(C: Array, indices: Any, row: int, entry: float) -> Array:
    """Return the eigenvalues of A at `indices` and `row`, with ``A[row, row] = entry``."""
    xp = array_namespace(C)
    wide = wide_dtype(C)
    W = astype(symmetric_part(take(C, indices)), wide)
    border = astype(take(C, np.array([row])), wide)
    corner = like(np.array([[entry]]), C, wide)
    top, bottom = xp.concat([W, border.T], axis=1), xp.concat([border, corner], axis=1)
    return xp.linalg.eigvalsh(xp.concat([top, bottom], axis=0))


def check_rank(rank: Any, most: int | None = None) -> None:
    """Raise unless `rank` is None, ``"auto"`` or a count."""
    if isinstance(rank, str):
        if rank != "auto":
            raise ValueError(f"`rank` must be a whole number or 'auto'; got {rank!r}.")
    elif rank is not None:
        check_count("rank", rank, most=most)


def _rows_times(s: Array, block: Array) -> Array:
    """Multiply row i of `block` by ``s[i]``."""
    return block * (s if block.ndim == 1 else s[:, None])
