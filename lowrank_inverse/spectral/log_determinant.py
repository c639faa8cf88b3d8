"""Estimates of the log determinant of a large matrix, and of traces with its inverse."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import RNG, Array, OperatorLike, Scalar
from lowrank_inverse.arrays.checks import check_count, check_rng, check_scalar
from lowrank_inverse.arrays.control_flow import quietly
from lowrank_inverse.arrays.conversion import (
    algebra,
    astype,
    concrete,
    is_traced,
    like,
    scalar_like,
    wide_dtype,
)
from lowrank_inverse.arrays.graph import (
    constant,
    first_only,
    is_recorded,
    plain,
    substituted,
    with_derivatives_of,
)
from lowrank_inverse.arrays.linalg import cholesky, cholesky_solve, dot, symmetric_part
from lowrank_inverse.estimators.trace import TraceEstimate, mean_of
from lowrank_inverse.operators.columns import finite_columns
from lowrank_inverse.operators.composition import scaled_by_diagonal, split_diagonal
from lowrank_inverse.operators.function import aslinearoperator
from lowrank_inverse.spectral.quadrature import log_quadrature
from lowrank_inverse.spectral.shifted_nystrom import FixedOperator, shifted_nystrom

EXACT_ROWS = 1000
"""Up to which a matrix whose entries can be read is factored: a tenth of a second, about."""


class LogDeterminant(NamedTuple):
    """An estimate of ``log det(A + damping * I)``.

    Attributes
    ----------
    value : float or 0-d array
        The estimate. An array in JAX, and in PyTorch if it has a graph. NaN if the probes prove
        that ``A + damping * I`` is not positive definite.
    standard_error : float or 0-d array
        Standard error of the mean over the probes; 0 if the matrix was factored. It does not
        include the error of the quadrature; see `converged`.
    converged : bool
        Whether the quadrature error of each probe is small compared with the standard error.
    num_steps : int
        Number of Lanczos steps, each with a product per probe; 0 if the matrix was factored.
    num_products : int
        Number of products with `A`, or of columns of it.
    inverse : NamedTuple
        What :meth:`inverse_trace` needs.
    """

    value: Any
    standard_error: Any
    converged: Any
    num_steps: Any
    num_products: Any
    inverse: Any

    def inverse_trace(self, B: OperatorLike) -> TraceEstimate:
        """Estimate the trace of ``(A + damping * I)^{-1} B``.

        If B is the derivative of A with respect to a parameter, this is the derivative of `value`,
        with the same probes. It takes products with B, but no further solve.

        Parameters
        ----------
        B : linear operator, shape (n, n)
            Symmetric.

        Returns
        -------
        TraceEstimate
        """
        return self.inverse.trace(aslinearoperator(B))


class _Factored(NamedTuple):
    """The Cholesky factor of ``A + damping * I``, or None where it has none."""

    L: Array | None

    def trace(self, B: OperatorLike) -> TraceEstimate:
        """Return the trace of the inverse times B."""
        n = int(B.shape[0])
        columns = B.columns(np.arange(n))
        xp = array_namespace(columns)
        if self.L is None:
            return TraceEstimate(math.nan, 0.0, n)
        value = xp.linalg.trace(cholesky_solve(self.L, astype(columns, self.L.dtype)))
        return TraceEstimate(plain(value), 0.0, n)


class _Probed(NamedTuple):
    """What shows ``(A + damping * I)^{-1}``: it is the mean of ``solution @ probe.T``.

    That of ``probe @ probe.T`` is the inverse of the approximation, whose traces are known.
    """

    probes: Array
    solutions: Array
    approximation: Any
    scale: Array | None

    def trace(self, B: OperatorLike) -> TraceEstimate:
        """Estimate the trace of the inverse times B."""
        known, samples, beside = self.samples(B, 0.0)
        xp = array_namespace(samples)
        mean, error = mean_of(samples - beside)
        plain_mean, plain_error = mean_of(samples)
        # What P would have of a B unlike a derivative of A may be far larger than what is sought.
        use = error < 2 * plain_error
        value = xp.where(use, known + mean, plain_mean)
        spent = self.approximation.num_columns + samples.shape[0]
        return TraceEstimate(plain(value), concrete(xp.where(use, error, plain_error)), spent)

    def samples(
        self, B: OperatorLike, shift: Scalar, *, slope: bool = False
    ) -> tuple[Array, Array, Array]:
        """Return what P tells of the trace, and samples with the inverse and with P^{-1}.

        As a `slope` it does not tell how the inverse depends on what B is made of.
        """
        if self.scale is not None:
            B = scaled_by_diagonal(B, self.scale)
        u = self.probes
        move = B @ u + scalar_like(shift, u) * u
        move = first_only(move, "an estimated log determinant") if slope else move
        known, beside = self.approximation.traces(B, scalar_like(shift, u), u)
        return known, dot(self.solutions, move), beside


@quietly
def logdet(
    A: OperatorLike,
    *,
    damping: Scalar = 0.0,
    rank: int = 50,
    num_probes: int = 16,
    max_steps: int = 100,
    rtol: float = 1e-3,
    exact: bool | None = None,
    rng: RNG = 0,
) -> LogDeterminant:
    """Estimate ``log det(A + damping * I)`` by preconditioned Lanczos quadrature [1]_, [2]_.

    Parameters
    ----------
    A : linear operator, shape (n, n)
        Symmetric; ``A + damping * I`` must be positive definite.
    damping : float or 0-d array
        Added to the diagonal; 0 or more.
    rank : int
        Number of columns of the Nyström approximation H_k, at most n. The error falls with it.
    num_probes : int
        Number of random vectors, at least 2. The error falls with its square root.
    max_steps : int
        Maximum number of Lanczos steps. Memory: up to ``max_steps * num_probes * n`` numbers.
    rtol : float
        Relative residual at which the steps of a probe end. The quadrature error is of the order
        of its square.
    exact : bool, optional
        Whether to factor the matrix. Default: if its entries can be read and n is at most 1000.
    rng : int or numpy.random.Generator, optional
        Seed of columns and probes, which are drawn on the host and are the same for every library.

    Returns
    -------
    LogDeterminant

    Raises
    ------
    ValueError
        If a number is out of range, or the columns hold NaN or Inf.

    Notes
    -----
    Let ``P = H_k + damping * I``, plus the mean of the missed eigenvalues on the complement of H_k.
    Then ``log det(A + damping * I) = log det P + trace(log B)`` with ``B = P^{-1/2} (A + damping *
    I) P^{-1/2}``. The first term is computed exactly. The second is the mean of ``w.T log(B) w``
    over vectors w of random signs. Its variance is twice the sum of the squared off-diagonal
    entries of log(B), which vanishes with ``A - H_k``. :meth:`NystromApproximation.logdet` is a
    lower bound; this estimate is unbiased up to the quadrature error.

    In PyTorch and JAX, `value` is differentiable with respect to `damping` and the arrays that
    define A. The derivative is the estimate of ``trace((A + damping * I)^{-1} dA)`` with the same
    probes, at one more product per probe (in NumPy: :meth:`LogDeterminant.inverse_trace`). Second
    derivatives and forward mode need a matrix that is factored; otherwise they raise.

    References
    ----------
    .. [1] S. Ubaru, J. Chen, Y. Saad. Fast Estimation of tr(f(A)) via Stochastic Lanczos
       Quadrature. SIAM J. Matrix Anal. Appl. 38, 2017.
    .. [2] J. Wenger, G. Pleiss, P. Hennig, J. P. Cunningham, J. R. Gardner. Preconditioning for
       Scalable Gaussian Process Hyperparameter Optimization. ICML 2022.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank_inverse as li
    >>> X = np.random.default_rng(0).standard_normal((2000, 2))
    >>> A = li.KernelOperator(X, lengthscale=2.0)
    >>> found = li.logdet(A, damping=0.1, rng=0)
    >>> exact = np.linalg.slogdet(A.columns(np.arange(2000)) + 0.1 * np.eye(2000))[1]
    >>> print(bool(abs(found.value - exact) < 1e-4 * abs(exact)), found.converged)
    True True
    """
    A = aslinearoperator(A)
    n = int(A.shape[0])
    check_scalar("damping", damping)
    check_scalar("rtol", rtol, positive=True)
    rank, max_steps = check_count("rank", rank), check_count("max_steps", max_steps)
    if check_count("num_probes", num_probes) < 2:
        raise ValueError("`num_probes` must be at least 2, to estimate the error; got 1.")
    if exact is None:
        exact = hasattr(A, "submatrix") and n <= EXACT_ROWS
    if exact:
        return _factor(A, damping)
    H, shift, scale = split_diagonal(A, damping)
    fixed, generator = FixedOperator(H), check_rng(rng)
    rho = constant(scalar_like(shift, fixed.like))
    P = shifted_nystrom(fixed, min(rank, n), rho, generator)

    def product(block: Array) -> Array:
        half = P.power(block, -0.5)
        return P.power(fixed @ half + rho * half, -0.5)

    signs = like(generator.integers(0, 2, (n, num_probes)) * 2.0 - 1.0, fixed.like)
    traced = is_traced(P.inside)
    found = log_quadrature(product, signs, max_steps=max_steps, rtol=rtol, traced=traced)
    mean, error = mean_of(found.forms)
    xp = array_namespace(mean)
    inside, tail = (xp.log(astype(x, mean.dtype)) for x in (P.inside, P.tail))
    value = mean + P.function_trace(inside, tail)
    probes, solutions = (P.power(block, -0.5) for block in (signs, found.solutions))
    inverse = _Probed(probes, solutions, P, None)

    if fixed.recorded or is_recorded(shift):
        # Linear in what is differentiated: its derivative is the trace of that of A.
        known, samples, beside = inverse.samples(H, shift, slope=True)
        slope = known + xp.mean(samples - beside)
        value = substituted(value, astype(slope, value.dtype))
    if scale is not None:
        value = value - 2 * xp.sum(xp.log(astype(scale, mean.dtype)))
        inverse = inverse._replace(scale=constant(scale))
    converged = xp.all(found.residual_norm <= rtol) & xp.isfinite(mean)
    num_products = P.num_columns + found.num_steps * num_probes
    return LogDeterminant(
        plain(value), concrete(error), concrete(converged), found.num_steps, num_products, inverse
    )


def _factor(A: OperatorLike, damping: Scalar) -> LogDeterminant:
    n = int(A.shape[0])
    H = finite_columns(A, np.arange(n))
    M = symmetric_part(astype(H, wide_dtype(H)))
    xp = array_namespace(M)
    M = M + scalar_like(damping, M) * like(np.eye(n), M)
    traced = is_traced(M)
    L = algebra(M).cholesky(constant(M)) if traced else cholesky(constant(M))
    if L is None:
        return LogDeterminant(math.nan, 0.0, False, 0, n, _Factored(None))
    value = 2 * xp.sum(xp.log(xp.linalg.diagonal(L)))
    converged = concrete(xp.isfinite(value))
    value = with_derivatives_of(value, lambda: algebra(M).slogdet(M)[1], M)
    return LogDeterminant(plain(value), 0.0, converged, 0, n, _Factored(L))
