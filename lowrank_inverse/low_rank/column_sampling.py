"""Rules that choose columns."""

from __future__ import annotations

from typing import Any

import numpy as np

from lowrank_inverse._typing import RNG, Array, OperatorLike, Sampling
from lowrank_inverse.arrays.checks import check_block, check_count, check_finite, check_rng
from lowrank_inverse.arrays.control_flow import quietly
from lowrank_inverse.arrays.conversion import is_traced, to_host
from lowrank_inverse.low_rank.pivoting.factorization import Pivoting
from lowrank_inverse.operators.columns import known_diagonal, known_or_none
from lowrank_inverse.operators.function import aslinearoperator

DRAWN = ("uniform", "diagonal", "diagonal_squared")
SAMPLINGS = (*DRAWN, "greedy", "rpcholesky", "gaussian", "krylov")


def check_sampling(sampling: Sampling) -> None:
    """Raise unless `sampling` is one of the known rules."""
    if sampling not in ("auto", *SAMPLINGS):
        raise ValueError(
            f"`sampling` must be one of {', '.join(map(repr, ('auto', *SAMPLINGS)))}; got "
            f"{sampling!r}. "
            "To choose the columns yourself, pass `indices`."
        )


def resolve_sampling(A: OperatorLike, sampling: Sampling, b: Array | None = None) -> Sampling:
    """Return the rule that ``"auto"`` stands for; return any other rule unchanged.

    ``"auto"`` is randomly pivoted Cholesky if columns and diagonal can be read, and a Krylov
    sketch if each column costs a product and a right-hand side `b` is given. Otherwise, and while
    JAX traces a matrix, it is uniform sampling.
    """
    if sampling != "auto":
        return sampling
    if not hasattr(A, "submatrix"):
        return "uniform" if b is None else "krylov"
    d = known_or_none(A)
    return "uniform" if d is None or is_traced(d) else "rpcholesky"


def sample_columns(
    A: OperatorLike,
    rank: int,
    *,
    sampling: Sampling = "uniform",
    rng: RNG = 0,
    diagonal: Any = None,
) -> np.ndarray:
    """Draw distinct column indices of `A`.

    Parameters
    ----------
    A : linear operator, shape (n, n)
        Symmetric.
    rank : int
        Number of columns, from 1 to n.
    sampling : {"uniform", "diagonal", "diagonal_squared", "greedy", "rpcholesky"}
        ``"uniform"`` draws with equal probability, ``"diagonal"`` in proportion to ``|A[i, i]|``,
        and ``"diagonal_squared"`` to ``A[i, i] ** 2`` (Remark 1 of [1]_, after [2]_), all without
        replacement. Columns of zero weight are drawn uniformly once the others are used up.
        ``"greedy"`` and ``"rpcholesky"`` read columns and return the pivots of
        :func:`lowrank_inverse.pivoted_cholesky`, possibly fewer than `rank`; if the diagonal is
        zero, they return the first column.
    rng : int or numpy.random.Generator, optional
        Seed. The same seed gives the same columns in every library.
    diagonal : array of shape (n,), or DiagonalEstimate, optional
        Weights to use if `A` has no diagonal; see :func:`lowrank_inverse.estimate_diagonal`.

    Returns
    -------
    numpy.ndarray of int64, shape (rank,)

    References
    ----------
    .. [1] R. Hataya, M. Yamada. Nyström Method for Accurate and Scalable Implicit
       Differentiation. AISTATS 2023.
    .. [2] P. Drineas, M. W. Mahoney. On the Nyström Method for Approximating a Gram Matrix for
       Improved Kernel-Based Learning. JMLR 6, 2005.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank_inverse.low_rank.column_sampling import sample_columns
    >>> print(
    ...     sample_columns(np.diag([0.0, 1.0, 0.0, 2.0]), 2, sampling="diagonal", rng=0)
    ... )
    [3 1]
    """
    check_sampling(sampling)
    n = int(A.shape[0])
    rank = check_count("rank", rank, most=n)
    generator = check_rng(rng)
    if sampling in ("gaussian", "krylov"):
        raise ValueError(
            f"sampling={sampling!r} draws no columns. Use nystrom(A, rank, sampling={sampling!r})."
        )
    sampling = resolve_sampling(aslinearoperator(A), sampling)
    if sampling == "uniform":
        return generator.choice(n, rank, replace=False).astype(np.int64)
    if sampling not in DRAWN:
        pivoting = Pivoting(aslinearoperator(A), sampling, rng=generator)
        quietly(pivoting.grow)(rank)
        return pivoting.pivots if pivoting.pivots.size else np.zeros(1, np.int64)
    if diagonal is None:
        d = known_diagonal(aslinearoperator(A), f"sampling={sampling!r}")
    else:
        d = getattr(diagonal, "value", diagonal)
        check_block("diagonal", d, n)
        check_finite("diagonal", d)
    host = to_host(d).astype(np.float64)
    with np.errstate(divide="ignore"):
        log_weights = np.log(np.abs(host))  # squares would over- or underflow
    return _weighted(log_weights * (1 if sampling == "diagonal" else 2), rank, generator)


def _weighted(log_weights: np.ndarray, rank: int, generator: np.random.Generator) -> np.ndarray:
    """Draw without replacement: the first arrivals of Poisson processes with these rates."""
    positive, zero = np.flatnonzero(log_weights > -np.inf), np.flatnonzero(log_weights == -np.inf)
    log_times = np.log(generator.exponential(size=positive.size)) - log_weights[positive]
    chosen = positive[np.argsort(log_times)[:rank]]
    return np.concatenate([chosen, generator.permutation(zero)[: rank - chosen.size]])
