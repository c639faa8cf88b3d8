"""The solution of a linear system, and why the solve ended."""

from __future__ import annotations

import enum
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import Array, OperatorLike, Scalar
from lowrank_inverse.arrays.checks import (
    check_block,
    check_finite,
    check_scalar,
    describe,
    namespace,
)
from lowrank_inverse.arrays.conversion import is_array, is_traced, to_host
from lowrank_inverse.arrays.linalg import column_norm


class Reason(enum.IntEnum):
    """Why a solve ended."""

    CONVERGED = 0
    """The true residual met the tolerance."""
    MAX_STEPS = 1
    """All steps or terms were used."""
    NEGATIVE_CURVATURE = 2
    """A direction p with ``p.T (A + damping I) p <= 0``: the matrix is not positive definite."""
    STAGNATED = 3
    """The true residual stopped decreasing: the tolerance is out of reach in this precision."""
    DIVERGED = 4
    """The step size of a Neumann series is too large to converge."""
    NONFINITE = 5
    """A product returned NaN or Inf."""
    INDEFINITE_PRECONDITIONER = 6
    """A residual r with ``r.T M r <= 0``: the preconditioner M is not positive definite."""
    DIRECT = 7
    """The residual of a direct method is above the tolerance."""
    SINGULAR = 8
    """A direction p with ``p.T (A + damping I) p = 0`` to rounding: the matrix is singular, and b
    has a component outside its range."""


class Pairs(NamedTuple):
    """Vectors S and the products Y = H S, both of shape (n, k); columns of zeros are no pairs."""

    vectors: Array
    products: Array


class Solution(NamedTuple):
    """The result of a solve.

    For a block of m right-hand sides, `residual_norm`, `num_steps`, `converged`, `reason` and
    `error_bound` have one entry per column.

    Attributes
    ----------
    value : array, shape (n,) or (n, m)
        The solution x.
    residual_norm : array, shape () or (m,)
        Euclidean norm of ``b - (A + damping I) value``, computed from `value` itself.
    num_steps : array of int, shape () or (m,)
        Number of iterations; 0 for a direct method.
    num_products : int
        Total number of products of A with a vector. A product with m columns counts as m.
    converged : array of bool, shape () or (m,)
        Whether the residual met the tolerance.
    reason : array of int, shape () or (m,)
        Codes of :class:`Reason`.
    error_bound : array or None, shape () or (m,)
        Upper bound on the Euclidean error, if requested; see :func:`lowrank_inverse.certify`.
    initial_residual_norm : array or None, shape () or (m,)
        Euclidean norm of the residual at the starting point of conjugate gradients.
    method : str or None
        The solver that :func:`lowrank_inverse.solve` used, and the reason if it chose it. None
        from other functions, and while JAX traces.
    directions : Pairs or None
        Directions of conjugate gradients and their products, if requested by `keep`.
    state : HypergradientState or None
        The state to pass to the next solve, if this one was given a `state`.
    """

    value: Array
    residual_norm: Array
    num_steps: Array
    num_products: Any
    converged: Array
    reason: Array
    error_bound: Array | None = None
    initial_residual_norm: Array | None = None
    method: str | None = None
    directions: Pairs | None = None
    state: Any = None

    @property
    def message(self) -> str:
        """The reasons as text, for example ``"converged"`` or ``"2 converged, 1 max_steps"``."""
        if is_traced(self.reason):
            return "unknown while tracing"
        codes = to_host(self.reason)
        names = [Reason(int(code)).name.lower() for code in codes.reshape(-1)]
        if codes.ndim == 0:
            return names[0]
        return ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))

    def __repr__(self) -> str:
        if not is_array(self.value) or not is_array(self.reason):
            return f"Solution{tuple(self)!r}"  # jax fills its trees with other things, too
        lines = [f"Solution of shape {tuple(self.value.shape)}: {self.message}"]
        lines += [f"  residual norm  {span(self.residual_norm)}"]
        if self.error_bound is not None:
            lines += [f"  error bound    {span(self.error_bound)}"]
        lines += [f"  steps          {span(self.num_steps)}"]
        lines += [f"  products       {span(self.num_products)}"]
        if self.method is not None:
            lines += [f"  method         {self.method}"]
        return "\n".join(lines)


def span(x: Any) -> str:
    """Return a number, or the least and the largest of an array, as text."""
    if is_traced(x):
        return "unknown while tracing"
    host = to_host(x)
    if not np.issubdtype(host.dtype, np.number) or host.size == 0:
        return str(x)
    form = "{:.2e}" if np.issubdtype(host.dtype, np.floating) else "{}"
    least, largest = form.format(host.min()), form.format(host.max())
    return least if least == largest else f"{least} to {largest}"


def check_system(
    A: OperatorLike, b: Array, damping: Scalar, x0: Array | None = None, *, name: str = "x0"
) -> None:
    """Raise unless `b` and `x0` are finite blocks that fit `A`, and `damping` is >= 0."""
    n = int(A.shape[0])
    check_block("b", b, n)
    check_finite("b", b)
    check_scalar("damping", damping)
    dtype, empty = getattr(A, "dtype", None), getattr(A, "like", None)
    if empty is not None and array_namespace(empty) is not array_namespace(b):
        kinds = (type(x).__module__.split(".")[0] for x in (empty, b))
        raise TypeError(
            "`A` and `b` must come from one library; A multiplies arrays of {} and b is one of {}. "
            "Convert one of them.".format(*kinds)
        )
    if dtype is not None and b.dtype != dtype:
        raise TypeError(
            f"`b` has dtype {b.dtype} and `A` has {dtype}. Convert one of them: nothing is "
            "promoted silently."
        )
    if x0 is None:
        return
    namespace(**{"b": b, name: x0})
    if tuple(x0.shape) != tuple(b.shape) or x0.dtype != b.dtype:
        raise ValueError(
            f"`{name}` must match `b` of dtype {b.dtype} and shape {tuple(b.shape)}; "
            f"got {describe(x0)}."
        )
    check_finite(name, x0)


def tolerance(b: Array, rtol: float, atol: float = 0.0) -> Array:
    """Return ``max(rtol * norm(b), atol)`` for each column."""
    check_scalar("rtol", rtol)
    check_scalar("atol", atol)
    relative = rtol * column_norm(b)
    absolute = atol + 0 * relative
    return array_namespace(b).where(relative > absolute, relative, absolute)


def ended(reason: Array, *reasons: Reason) -> Array:
    """Whether each column ended for one of `reasons`."""
    result = reason == int(reasons[0])
    for other in reasons[1:]:
        result = result | (reason == int(other))
    return result


def code(template: Array, reason: int) -> Array:
    """Return `reason` for every column, in the shape and dtype of `template`."""
    return array_namespace(template).full_like(template, int(reason))
