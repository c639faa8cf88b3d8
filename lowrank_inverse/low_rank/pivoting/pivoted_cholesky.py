"""Partial Cholesky factorization with greedy or random pivots."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from lowrank_inverse._typing import RNG, Array, OperatorLike
from lowrank_inverse.arrays.checks import check_count
from lowrank_inverse.arrays.control_flow import quietly
from lowrank_inverse.arrays.conversion import algebra, take
from lowrank_inverse.arrays.graph import is_recorded, substituted
from lowrank_inverse.low_rank.core import differentiable_whitening
from lowrank_inverse.low_rank.pivoting.factorization import Pivoting
from lowrank_inverse.operators.function import aslinearoperator


class PivotedCholesky(NamedTuple):
    """A factorization ``A ≈ factor @ factor.T`` from the columns of `A` at `pivots`.

    Attributes
    ----------
    pivots : numpy.ndarray of int64, shape (k,)
        Distinct indices, in the order of their choice.
    columns : array, shape (n, k)
        Columns of `A` at the pivots.
    factor : array, shape (n, k)
        F; its rows at the pivots are lower triangular.
    residual_diagonal : numpy.ndarray of float64, shape (n,)
        Diagonal of ``A - F F.T``; 0 at the pivots.
    residual_trace : float
        Sum of `residual_diagonal` without negative rounding. It bounds the norm of ``A - F F.T``.
    exhausted : bool
        Whether the remainder is rounding, so that `A` has numerical rank k.
    indefinite : bool
        Whether a residual diagonal entry is clearly negative, so that `A` is indefinite.
    num_products : int
        Number of columns of `A` read.
    """

    pivots: np.ndarray
    columns: Array
    factor: Array
    residual_diagonal: np.ndarray
    residual_trace: float
    exhausted: bool
    indefinite: bool
    num_products: int


@quietly
def pivoted_cholesky(
    A: OperatorLike,
    rank: int,
    *,
    method: str = "rpcholesky",
    rng: RNG = 0,
    rtol: float | None = None,
) -> PivotedCholesky:
    """Choose up to `rank` columns of `A`, each by the residual diagonal of the previous ones.

    Parameters
    ----------
    A : linear operator, shape (n, n)
        Symmetric positive semidefinite, with a diagonal.
    rank : int
        Number of columns, from 1 to n; fewer are chosen if `A` has a lower numerical rank.
    method : {"rpcholesky", "greedy"}
        Draw the next pivot in proportion to the residual diagonal [1]_, or take its largest entry
        (the first, if several are equal). Outliers mislead greedy pivots but not random ones.
    rng : int or numpy.random.Generator, optional
        Seed of ``"rpcholesky"``. The same seed gives the same pivots in every library.
    rtol : float, optional
        Entries of the residual diagonal up to this fraction of the largest diagonal entry of `A`
        are not chosen. Default, and lower limit for each row: rounding, ``(8 + 4 k) * eps``.

    Returns
    -------
    PivotedCholesky

    Raises
    ------
    TypeError
        If `A` has no diagonal, or its values are unknown because JAX traces.
    ValueError
        If the diagonal or a column holds NaN or Inf, or diagonal and columns disagree.

    Notes
    -----
    Cost: k columns and ``n k²`` operations; memory: 2 n k numbers. If the entries of `A` can be
    read (``A.submatrix(indices)``; arrays can), pivots are proposed in blocks of 64, and those are
    kept that the sequential method could have chosen. Random pivots are kept by rejection sampling,
    which preserves their distribution [2]_; greedy ones while they exceed all entries outside the
    block.

    The expected residual trace is within a factor ``1 + ε`` of the best rank-r approximation after
    ``r / ε + r log(...)`` random pivots (Theorem 5.1 of [1]_). Residual diagonals are kept on the
    host in float64. Arrays in host memory are factored there, so that every library finds exactly
    the same pivots.

    References
    ----------
    .. [1] Y. Chen, E. N. Epperly, J. A. Tropp, R. J. Webber. Randomly Pivoted Cholesky: Practical
       Approximation of a Kernel Matrix with Few Entry Evaluations. Commun. Pure Appl. Math., 2024
       (arXiv:2207.06503).
    .. [2] E. N. Epperly, J. A. Tropp, R. J. Webber. Embrace Rejection: Kernel Matrix
       Approximation by Accelerated Randomly Pivoted Cholesky. arXiv:2410.03969, 2024.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank_inverse as li
    >>> X = np.random.default_rng(0).standard_normal((200, 5))
    >>> found = li.pivoted_cholesky(X @ X.T, 20, rng=0)
    >>> print(found.pivots.size, found.exhausted, found.residual_trace < 1e-10)
    5 True True
    """
    A = aslinearoperator(A)
    rank = check_count("rank", rank, most=int(A.shape[0]))
    pivoting = Pivoting(A, method, rng=rng, rtol=rtol)
    pivoting.grow(rank)
    columns, F = pivoting.columns, pivoting.factor
    if is_recorded(columns) and columns.shape[1] > 0:
        pivots = pivoting.pivots
        T = algebra(F).inv(take(F, pivots)).T
        F = substituted(F, columns @ differentiable_whitening(T, take(columns, pivots)))
    return PivotedCholesky(
        pivoting.pivots,
        columns,
        F,
        pivoting.residual.copy(),
        pivoting.residual_trace,
        pivoting.exhausted,
        pivoting.witness is not None,
        pivoting.num_products,
    )
