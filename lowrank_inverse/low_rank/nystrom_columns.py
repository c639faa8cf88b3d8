"""A Nyström approximation from sampled columns."""

from __future__ import annotations

from typing import Any

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import RNG, Array, Indices, Sampling, Scalar
from lowrank_inverse.arrays.checks import check_count, check_indices, check_scalar
from lowrank_inverse.arrays.control_flow import quietly
from lowrank_inverse.arrays.conversion import astype, eps, like, take, wide_dtype
from lowrank_inverse.arrays.linalg import symmetric_part
from lowrank_inverse.low_rank.approximation import NystromApproximation
from lowrank_inverse.low_rank.column_sampling import check_sampling, resolve_sampling
from lowrank_inverse.low_rank.core import INDEFINITE_PIVOT_RTOL, negative_eigenvalues
from lowrank_inverse.low_rank.rank_selection import adaptive_approximation
from lowrank_inverse.low_rank.sketches import Sketch, make_source
from lowrank_inverse.operators.columns import finite_columns
from lowrank_inverse.operators.function import aslinearoperator
from lowrank_inverse.results.solution import check_system


@quietly
def nystrom(
    A: Any,
    rank: int | str | None = None,
    *,
    indices: Indices = None,
    sampling: Sampling = "auto",
    rng: RNG = 0,
    chunk_size: int | None = None,
    indefinite_pivot_rtol: float = INDEFINITE_PIVOT_RTOL,
    diagonal: Any = None,
    damping: Scalar = None,
    b: Array | None = None,
    rtol: float | None = None,
    max_rank: int | None = None,
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
    sampling : str
        ``"uniform"``, ``"diagonal"``, ``"diagonal_squared"``: columns drawn.
        ``"greedy"``, ``"rpcholesky"``: chosen one by one, by what the others left over, see
        :func:`lowrank_inverse.pivoted_cholesky` (fewer than `rank` if no more is left than
        rounding). ``"gaussian"``: products with orthonormal Gaussian vectors in the place of
        columns [2]_. ``"krylov"``: products along the Krylov space of `b` [3]_, the most accurate
        for that right-hand side by far (fewer than `rank` once that space is exhausted); for a
        Gaussian vector where there is no `b`. ``"auto"``: ``"rpcholesky"`` where columns and
        diagonal can be read, ``"krylov"`` where each column would cost a product and `b` is given,
        else ``"uniform"``.
    rng : int or numpy.random.Generator, optional
        Seed of the sampling. Random numbers are drawn on the host, the same for every library.
    chunk_size : int, optional
        Columns asked for at a time. Default: all at once; pivots one by one where a column costs
        a product.
    indefinite_pivot_rtol : float
        Eigenvalues of W up to this fraction of the largest are dropped where W has a clearly
        negative one, for then small positive ones are as little to be trusted; else up to the
        rounding of its entries and of its decomposition. 1e-2 makes the better preconditioner of
        a slightly indefinite matrix.
    diagonal : array of shape (n,), or DiagonalEstimate, optional
        Weights for ``"diagonal"`` and ``"diagonal_squared"`` where `A` has no diagonal.
    b : array, shape (n,) or (n, m), optional
        The right-hand sides that ``"krylov"`` starts from.
    damping, b, rtol, max_rank : optional, with ``rank="auto"``
        The columns are doubled, from 16 up to `max_rank` (default: the lesser of n and 1000).
        With `damping`, until the residual trace is at most that, or the columns are as many as
        :meth:`NystromApproximation.sufficient_rank` asks for. With `damping` and `rtol`, at most
        until twice the columns would cost more than the steps that conjugate gradients take with
        these to a relative residual of `rtol`. With `damping` and a right-hand side `b`, of shape
        (n,) or (n, m), until :func:`lowrank_inverse.certify` proves a relative error of at most
        `rtol` (default: 1e-3), for a product or two a column each time. With neither, until the
        residual trace is at most `rtol` (default: 1e-3) times the trace.

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
    .. [3] C. Musco, C. Musco. Randomized Block Krylov Methods for Stronger and Faster Approximate
       Singular Value Decomposition. NeurIPS 2015.
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
    check_scalar("indefinite_pivot_rtol", indefinite_pivot_rtol)

    def build(sketch: Sketch) -> NystromApproximation:
        return _approximation(sketch, indefinite_pivot_rtol)

    if (rank is None) == (indices is None):
        raise ValueError("give exactly one of `rank` (columns to sample) and `indices`.")
    adaptive = isinstance(rank, str)
    check_rank(rank, most=n)
    check_sampling(sampling)
    if b is not None:
        check_system(A, b, 0.0)
    unused = {"damping": damping, "rtol": rtol, "max_rank": max_rank}
    if sampling not in ("auto", "krylov"):
        unused["b"] = b
    if not adaptive and any(value is not None for value in unused.values()):
        names = ", ".join(f"`{name}`" for name, value in unused.items() if value is not None)
        raise ValueError(
            f"{names} have a meaning only with rank='auto'; got rank={rank!r}, "
            f"sampling={sampling!r}."
        )
    sampling = resolve_sampling(A, sampling, None if adaptive else b)
    if indices is not None:
        indices = check_indices(indices, n)
        C = finite_columns(A, indices, chunk_size=chunk_size)
        return build(Sketch(C, indices, num_products=indices.size))
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
        b=b,
    )
    source.grow(rank)
    return build(source.sketch())


def _approximation(sketch: Sketch, indefinite_pivot_rtol: float) -> NystromApproximation:
    C, indices = sketch.columns, sketch.indices
    core_eigenvalues = None
    if sketch.witness is not None:
        core_eigenvalues = _bordered_eigenvalues(C, indices, *sketch.witness)
    approx = NystromApproximation(
        C,
        indices,
        indefinite_pivot_rtol,
        core=sketch.core,
        trace=sketch.trace,
        vectors=sketch.vectors,
        indefinite=sketch.witness is not None,
    )
    approx.num_products = sketch.num_products
    if core_eigenvalues is not None:
        approx.core_eigenvalues = core_eigenvalues
        xp = array_namespace(core_eigenvalues)
        negative = xp.sum(astype(negative_eigenvalues(core_eigenvalues, eps(C)), xp.int32))
        approx.num_negative = max(approx.num_negative, int(negative))
    return approx


def _bordered_eigenvalues(C: Array, indices: Indices, row: int, entry: float) -> Array:
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
