"""Estimate the diagonal of an operator from its products."""

from __future__ import annotations

from typing import Any, NamedTuple

from array_api_compat import array_namespace

from lowrank_inverse._typing import RNG, Array, OperatorLike
from lowrank_inverse.arrays.checks import check_count, check_finite, check_rng
from lowrank_inverse.arrays.control_flow import quietly
from lowrank_inverse.arrays.conversion import rows_like
from lowrank_inverse.arrays.decompositions import thin_qr
from lowrank_inverse.arrays.spread import reduced
from lowrank_inverse.operators.columns import empty_like
from lowrank_inverse.operators.function import aslinearoperator


class DiagonalEstimate(NamedTuple):
    """An estimate of a diagonal: accurate enough for sampling weights, but not exact.

    Attributes
    ----------
    value : array, shape (n,)
        Unbiased. Entries may be negative even if the matrix is positive semidefinite.
    standard_error : array, shape (n,)
        Standard error of each entry, estimated from the samples.
    num_products : int
        Number of products used.
    """

    value: Array
    standard_error: Array
    num_products: int


@quietly
def estimate_diagonal(A: OperatorLike, num_products: int, *, rng: RNG = 0) -> DiagonalEstimate:
    """Estimate the diagonal of `A` from products with random vectors.

    Parameters
    ----------
    A : linear operator, shape (n, n)
        Symmetric.
    num_products : int
        At least 2. From 4 on, two thirds of them deflate the dominant part of `A`.
    rng : int or numpy.random.Generator, optional
        Seed. Random numbers are drawn on the host and are the same for every library.

    Returns
    -------
    DiagonalEstimate
        Pass it to ``nystrom(..., sampling="diagonal", diagonal=estimate)``.

    Raises
    ------
    ValueError
        If `num_products` is less than 2, or a product holds NaN or Inf.

    Notes
    -----
    The method is Diag++ [2]_. Let Q be an orthonormal basis of the product of `A` with a few
    Gaussian vectors. The diagonal of ``Q Q.T A`` is computed exactly. That of the remainder
    ``R = (I - Q Q.T) A`` is estimated by the mean of ``z * R z`` over random signs z [1]_, with
    variance ``sum_{j != i} R[i, j]^2`` per sample. Q and z are independent, so the estimate is
    unbiased for indefinite matrices too.

    References
    ----------
    .. [1] C. Bekas, E. Kokiopoulou, Y. Saad. An Estimator for the Diagonal of a Matrix. Appl.
       Numer. Math. 57, 2007.
    .. [2] R. A. Baston, Y. Nakatsukasa. Stochastic Diagonal Estimation: Probabilistic Bounds and
       an Improved Algorithm. arXiv:2201.10684, 2022.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank_inverse as li
    >>> A = li.FunctionOperator(lambda v: np.array([4.0, 1.0, 0.0]) * v, 3)
    >>> print(li.estimate_diagonal(A, 2, rng=0).value)
    [4. 1. 0.]
    """
    A = aslinearoperator(A)
    n = int(A.shape[0])
    num_products = check_count("num_products", num_products)
    if num_products < 2:
        raise ValueError(
            f"`num_products` must be at least 2, to estimate the error; got {num_products}."
        )
    generator = check_rng(rng)
    rank = min(num_products // 3, n) if num_products >= 4 else 0
    samples = num_products - 2 * rank
    empty = empty_like(A)

    def product(vectors: Array) -> Array:
        result = A @ vectors
        check_finite("products of A", result)
        return result

    known: Any = 0.0
    if rank:
        start = rows_like(generator.standard_normal((n, rank)), empty)
        Q = thin_qr(product(start))[0]
        known = array_namespace(Q).sum(Q * product(Q), axis=1)
    signs = rows_like(generator.choice([-1.0, 1.0], (n, samples)), empty)
    products = product(signs)
    xp = array_namespace(products)
    if rank:
        products = products - Q @ reduced(Q.T @ products)
    values = signs * products
    rest = xp.mean(values, axis=1)
    spread = xp.sum((values - rest[:, None]) ** 2, axis=1) / (samples - 1)
    return DiagonalEstimate(known + rest, xp.sqrt(spread / samples), num_products)
