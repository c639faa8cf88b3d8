"""Estimates of the trace, and a damping in proportion to it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import RNG, Array, OperatorLike
from lowrank_inverse.arrays.checks import check_count, check_finite, check_rng
from lowrank_inverse.arrays.control_flow import quietly
from lowrank_inverse.arrays.conversion import astype, concrete, rows_like, to_host, wide_dtype
from lowrank_inverse.arrays.decompositions import thin_qr
from lowrank_inverse.arrays.graph import constant, plain
from lowrank_inverse.arrays.linalg import dot
from lowrank_inverse.arrays.spread import reduced
from lowrank_inverse.operators.columns import empty_like, known_or_none
from lowrank_inverse.operators.function import aslinearoperator


class TraceEstimate(NamedTuple):
    """An estimate of a trace.

    Attributes
    ----------
    value : float or 0-d array
        Unbiased. An array in JAX, and in PyTorch if it has a graph.
    standard_error : float or 0-d array
        Estimated from the samples; 0 if the value is exact.
    num_products : int
        Number of products used.
    """

    value: Any
    standard_error: Any
    num_products: Any


def mean_of(samples: Array) -> tuple[Array, Array]:
    """Return the mean of at least 2 samples, and its standard error as a constant."""
    xp, m = array_namespace(samples), samples.shape[0]
    samples = astype(samples, wide_dtype(samples))
    mean = xp.mean(samples)
    squares = constant((samples - mean) ** 2)
    return mean, xp.sqrt(xp.sum(squares) / ((m - 1) * m))


@quietly
def trace(A: OperatorLike, num_products: int = 60, *, rng: RNG = 0) -> TraceEstimate:
    """Return the trace of `A` from its diagonal, or estimate it from products [1]_.

    Parameters
    ----------
    A : linear operator, shape (n, n)
        Symmetric.
    num_products : int
        At least 2. With n or more the trace is exact. From 4 on, two thirds of them deflate the
        dominant part of `A`.
    rng : int or numpy.random.Generator, optional
        Seed. Random numbers are drawn on the host and are the same for every library.

    Returns
    -------
    TraceEstimate

    Raises
    ------
    ValueError
        If `num_products` is less than 2, or a product holds NaN or Inf.

    Notes
    -----
    Let Q be an orthonormal basis of the product of `A` with a few Gaussian vectors. The trace of
    ``Q.T A Q`` is computed exactly. That of the remainder ``R = (I - Q Q.T) A (I - Q Q.T)`` is
    estimated by the mean of ``z.T R z`` over random signs z, with variance ``2 sum_{i != j} R[i,
    j]^2`` per sample. For a positive semidefinite A and m products, the error is of the order
    ``trace(A) / m`` or less.

    In PyTorch and JAX the value is differentiable with respect to the arrays that define A. Its
    derivative is the estimate of the trace of dA with the same Q and z.

    References
    ----------
    .. [1] R. A. Meyer, C. Musco, C. Musco, D. P. Woodruff. Hutch++: Optimal Stochastic Trace
       Estimation. SOSA 2021.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank_inverse as li
    >>> A = li.FunctionOperator(lambda v: np.array([4.0, 1.0, 0.0]) * v, 3)
    >>> print(li.trace(A, 2, rng=0).value, li.trace(np.eye(3)).value)
    5.0 3.0
    """
    A = aslinearoperator(A)
    n, num_products = int(A.shape[0]), check_count("num_products", num_products)
    if num_products < 2:
        raise ValueError(
            f"`num_products` must be at least 2, to estimate the error; got {num_products}."
        )
    d = known_or_none(A)
    if d is not None:
        check_finite("diagonal of A", d)
        xp = array_namespace(d)
        return TraceEstimate(plain(xp.sum(astype(d, wide_dtype(d)))), 0.0, 0)
    empty, generator = empty_like(A), check_rng(rng)
    exact = num_products >= n
    rank = n if exact else num_products // 3 if num_products >= 4 else 0
    known: Any = 0.0
    if exact:
        Q = rows_like(np.eye(n), empty)
    elif rank:
        sketch = constant(A @ rows_like(generator.standard_normal((n, rank)), empty))
        check_finite("products of A", sketch)
        Q = thin_qr(sketch)[0]
    if rank:
        products = A @ Q
        check_finite("products of A", products)
        xp = array_namespace(products)
        known = xp.sum(astype(dot(Q, products), wide_dtype(products)))
    if exact:
        return TraceEstimate(plain(known), 0.0, n)
    z = rows_like(generator.choice([-1.0, 1.0], (n, num_products - 2 * rank)), empty)
    if rank:
        z = z - Q @ reduced(Q.T @ z)
    products = A @ z
    check_finite("products of A", products)
    mean, error = mean_of(dot(z, products))
    return TraceEstimate(plain(known + mean), concrete(error), num_products)


TRACE_PROBES = 16
AUTO_FRACTION = 0.1


def auto_damping(A: OperatorLike, seed: int) -> float:
    """Return a tenth of the mean eigenvalue, by Hutchinson's estimate of the trace."""
    A = aslinearoperator(A)
    n = int(A.shape[0])
    num = min(TRACE_PROBES, n)
    signs = np.random.default_rng(seed).integers(0, 2, (n, num)) * 2.0 - 1.0
    probes = rows_like(signs, A.like)
    mean = float(to_host(dot(probes, A @ probes)).astype(np.float64).mean()) / n
    if not mean > 0:
        raise ValueError(
            f"damping='auto' needs a curvature with a positive mean eigenvalue; it is about "
            f"{mean:.3g}. Pass a number."
        )
    return AUTO_FRACTION * mean
