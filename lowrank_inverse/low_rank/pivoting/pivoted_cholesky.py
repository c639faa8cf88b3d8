"""Pivoted partial Cholesky: columns chosen by what those before them left over."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import RNG, Array
from lowrank_inverse.arrays.checks import check_count
from lowrank_inverse.arrays.control_flow import quietly
from lowrank_inverse.arrays.conversion import take
from lowrank_inverse.arrays.graph import is_recorded, substituted
from lowrank_inverse.low_rank.core import differentiable_whitening
from lowrank_inverse.low_rank.pivoting.factorization import Pivoting
from lowrank_inverse.operators.function import aslinearoperator


class PivotedCholesky(NamedTuple):
    """``A ≈ factor @ factor.T`` from the columns of `A` at `pivots`.

    Attributes
    ----------
    pivots : numpy.ndarray of int64, shape (k,)
        Distinct, in the order of their choice.
    columns : array, shape (n, k)
        Of `A`, at the pivots.
    factor : array, shape (n, k)
        F; its rows at the pivots are lower triangular.
    residual_diagonal : numpy.ndarray of float64, shape (n,)
        Of ``A - F F.T``; 0 at the pivots.
    residual_trace : float
        Its sum, negative rounding left out. It bounds the norm of ``A - F F.T``.
    exhausted : bool
        Whether nothing but rounding was left over: `A` has numerical rank k.
    indefinite : bool
        Whether a residual diagonal entry is clearly negative, so that `A` is indefinite.
    num_products : int
        Columns of `A` read.
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
    A: Any,
    rank: int,
    *,
    method: str = "rpcholesky",
    rng: RNG = 0,
    rtol: float | None = None,
) -> PivotedCholesky:
    """Choose up to `rank` columns of `A`, each by the diagonal that those before it left over.

    Parameters
    ----------
    A : linear operator, shape (n, n)
        Symmetric positive semidefinite, with a diagonal.
    rank : int
        Columns to choose, from 1 to n. There are fewer where `A` has a lower numerical rank.
    method : {"rpcholesky", "greedy"}
        Draw the next pivot in proportion to the residual diagonal [1]_, or take its largest
        entry, the first of equals. Greedy pivots are thrown off by outliers; random ones are not.
    rng : int or numpy.random.Generator, optional
        Seed of ``"rpcholesky"``. One seed gives the same pivots on every backend.
    rtol : float, optional
        Entries of the residual diagonal up to this fraction of the largest of `A` are left
        alone. Default, and least value for each row: rounding, ``(8 + 4 k) * eps``.

    Returns
    -------
    PivotedCholesky

    Raises
    ------
    TypeError
        If `A` has no diagonal, or is unknown because jax traces.
    ValueError
        If its diagonal or a column holds NaN or Inf, or they contradict each other.

    Notes
    -----
    k columns, ``n k²`` operations, and 2 n k numbers. If `A` can read its entries
    (``A.submatrix(indices)``; arrays can), pivots are proposed in blocks of 64, of which those are
    kept that the sequential form could have taken: drawn ones by rejection, which leaves their
    distribution as it is [2]_, greedy ones while they exceed all that is outside of the block.

    The expected residual trace is within a factor ``1 + ε`` of the best possible for rank r after
    ``r / ε + r log(...)`` random pivots (Theorem 5.1 of [1]_). Residual diagonals are kept on the
    host in float64. Arrays in the memory of the host are factored there, so that every library
    finds the very same pivots.

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
        T = array_namespace(F).linalg.inv(take(F, pivots)).T
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
