"""SciPy's L-BFGS-B for functions that may be NaN, in variables that are scaled beforehand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
from scipy.optimize import minimize

MEMORY = 20
"""Pairs that L-BFGS keeps."""

Function = Callable[[np.ndarray], tuple[float, np.ndarray]]


class Change(Protocol):
    """Variables z of ``x = x0 + T z``."""

    @property
    def unit(self) -> float:
        """Length of T z over that of z, where T is a multiple of the identity."""
        ...

    def __call__(self, z: np.ndarray) -> np.ndarray:
        """Return ``T z``."""
        ...

    def adjoint(self, x: np.ndarray) -> np.ndarray:
        """Return ``T.T x``."""
        ...


class Scaling(NamedTuple):
    """Variables z of ``x = x0 + T z``, with T symmetric.

    ``T = unit (I + U diag(factors) U.T)``.
    """

    unit: float
    vectors: np.ndarray | None = None
    factors: np.ndarray | None = None

    def __call__(self, z: np.ndarray) -> np.ndarray:
        """Return ``T z``."""
        if self.vectors is None:
            return self.unit * z
        return self.unit * (z + self.vectors @ (self.factors * (self.vectors.T @ z)))

    def adjoint(self, x: np.ndarray) -> np.ndarray:
        """Return ``T.T x``."""
        return self(x)


def lbfgs(
    function: Function,
    x0: np.ndarray,
    start: tuple[float, np.ndarray],
    *,
    scaling: Change,
    rounding: float,
    value_unit: float = 1.0,
    bounds: tuple[np.ndarray, np.ndarray] | None = None,
    max_steps: int = 10_000,
) -> Any:
    """Minimise by L-BFGS-B [1]_; return SciPy's result.

    Parameters
    ----------
    function : callable (x) -> (value, gradient)
        A value that is not finite is shown to the line search as a rise, so that it takes a
        shorter step.
    x0 : array, shape (n,)
    start : value, gradient
        At x0, where both are finite.
    scaling : Change
        The first step has unit length in the scaled variables.
    rounding : float
        Relative error of the values. A difference of values that is below is taken from the
        gradients, by the trapezoidal rule, whose error is of third order in the step.
    value_unit : float
        By which values and gradients are divided.
    bounds : pair of arrays, shape (n,), optional
        Least and largest values of x, infinite where there are none. A scaling by a number only.

    References
    ----------
    .. [1] R. H. Byrd, P. Lu, J. Nocedal, C. Zhu. A Limited Memory Algorithm for Bound
       Constrained Optimization. SIAM J. Sci. Comput. 16, 1995.
    """
    value, gradient = start[0] / value_unit, scaling.adjoint(start[1]) / value_unit
    first = 0.0, gradient  # SciPy is shown what is above the start, with all its digits
    base = latest = np.zeros_like(x0), value, *first  # where a line search begins

    def scaled(z: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal latest
        if not z.any():
            return first
        at, before, shown, slope = base
        value, gradient = function(x0 + scaling(z))
        if not (np.isfinite(value) and np.all(np.isfinite(gradient))):
            return shown + abs(slope @ (z - at)), -slope
        value, gradient = value / value_unit, scaling.adjoint(gradient) / value_unit
        change = value - before
        if abs(change) <= rounding * max(abs(value), abs(before)):
            change = float((slope + gradient) @ (z - at)) / 2
        latest = z.copy(), value, shown + change, gradient
        return latest[2:]

    def accepted(z: np.ndarray) -> None:
        nonlocal base
        if np.array_equal(z, latest[0]):
            base = latest

    limits = None
    if bounds is not None:
        limits = [tuple((side - x0) / scaling.unit) for side in bounds]
        limits = list(zip(*limits, strict=True))
    options = {"maxcor": MEMORY, "ftol": 0.0, "gtol": 0.0, "maxiter": max_steps}
    return minimize(
        scaled,
        base[0],
        jac=True,
        method="L-BFGS-B",
        bounds=limits,
        callback=accepted,
        options=options | {"maxfun": 10**9},
    )
