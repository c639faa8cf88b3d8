"""Nyström approximations from sampled columns."""

from __future__ import annotations

from typing import Any

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import RNG, Array, Indices, OperatorLike, Sampling, Scalar
from lowrank_inverse.arrays.checks import check_count, check_indices, check_scalar
from lowrank_inverse.arrays.control_flow import quietly
from lowrank_inverse.arrays.conversion import algebra, astype, eps, like, take, wide_dtype
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
    A: OperatorLike,
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
        Symmetric, and positive semidefinite if possible: directions of negative curvature are
        dropped and counted.
    rank : int or "auto", optional
        Number of columns, from 1 to n. ``"auto"`` increases it until the approximation is accurate
        enough; see `damping`. Pass either `rank` or `indices`.
    indices : sequence of distinct ints, optional
        The columns to use. Inside ``jax.jit``, pass these.
    sampling : str
        ``"uniform"``, ``"diagonal"``, ``"diagonal_squared"``: draw columns with these weights.
        ``"greedy"``, ``"rpcholesky"``: choose each column by the residual of the previous ones;
        see :func:`lowrank_inverse.pivoted_cholesky`. ``"gaussian"``: use products with orthonormal
        Gaussian vectors instead of columns [2]_. ``"krylov"``: use products along the Krylov space
        of `b` [3]_ or, without a `b`, of a Gaussian vector; for this right-hand side it is the most
        accurate rule by far. Pivoting and ``"krylov"`` return fewer columns if the remainder is
        rounding. ``"auto"``: ``"rpcholesky"`` if columns and diagonal can be read, ``"krylov"`` if
        each column costs a product and `b` is given, and otherwise ``"uniform"``.
    rng : int or numpy.random.Generator, optional
        Seed of the sampling. Random numbers are drawn on the host and are the same for every
        library.
    chunk_size : int, optional
        Columns computed at a time. Default: all; one for pivoting if a column costs a product.
    indefinite_pivot_rtol : float
        If W has a clearly negative eigenvalue, small positive ones are unreliable too: those up to
        this fraction of the largest are dropped. Otherwise only those at the level of rounding are.
        1e-2 makes a better preconditioner for slightly indefinite matrices.
    diagonal : array of shape (n,), or DiagonalEstimate, optional
        Weights for ``"diagonal"`` and ``"diagonal_squared"`` if `A` has no diagonal.
    b : array, shape (n,) or (n, m), optional
        Right-hand sides, at which ``"krylov"`` starts.
    damping, b, rtol, max_rank : optional, with ``rank="auto"``
        The number of columns doubles, from 16 up to `max_rank` (default: the smaller of n and
        1000), until one of these tests holds. With `damping`: the residual trace is at most
        `damping`, or the columns are at least :meth:`NystromApproximation.sufficient_rank`. With
        `damping` and `rtol`, also: another doubling would cost more than the steps that conjugate
        gradients need to a relative residual of `rtol`. With `damping` and `b`:
        :func:`lowrank_inverse.certify` proves a relative error of at most `rtol` (default: 1e-3),
        for one or two products per column of `b` and doubling. With neither: the residual trace
        is at most `rtol` (default: 1e-3) times the trace.

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
    Cost: `rank` products with `A`, or none if its columns can be read. Memory: ``n * rank``
    numbers, and twice that for pivots, Gaussian vectors and Krylov spaces. The Gaussian sketch does
    without the shift of [2]_. It drops the eigenvalues of W that may be due to rounding instead,
    which preserves ``H_k <= A``, as :func:`lowrank_inverse.certify` requires.

    References
    ----------
    .. [1] R. Hataya, M. Yamada. Nyström Method for Accurate and Scalable Implicit
       Differentiation. AISTATS 2023.
    .. [2] J. A. Tropp, A. Yurtsever, M. Udell, V. Cevher. Fixed-Rank Approximation of a
       Positive-Semidefinite Matrix from Streaming Data. NeurIPS 2017.
    .. [3] C. Musco, C. Musco. Randomized Block Krylov Methods for Stronger and Faster Approximate
       Singular Value Decomposition. NeurIPS 2015.

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
        raise ValueError("pass exactly one of `rank` (columns to sample) and `indices`.")
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
            f"{names} are for rank='auto' only; got rank={rank!r}, sampling={sampling!r}."
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
    return algebra(top).eigvalsh(xp.concat([top, bottom], axis=0))


def check_rank(rank: Any, most: int | None = None) -> None:
    """Raise unless `rank` is None, ``"auto"`` or a count."""
    if isinstance(rank, str):
        if rank != "auto":
            raise ValueError(f"`rank` must be a whole number or 'auto'; got {rank!r}.")
    elif rank is not None:
        check_count("rank", rank, most=most)
