"""The hyperparameters of a Gaussian process, and their logarithms in one vector."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize

from lowrank_inverse.arrays.checks import check_scalar
from lowrank_inverse.operators.kernel import KernelOperator
from lowrank_inverse.sklearn.regressor import spread

NAMES = ("signal_variance", "lengthscale", "noise")


class Hyperparameters(NamedTuple):
    """The covariance is ``signal_variance * kernel((x - y) / lengthscale) + noise * (x is y)``."""

    signal_variance: float
    lengthscale: Any
    """A float, or an array of shape (d,)."""
    noise: float

    def free(self, fixed: tuple[str, ...]) -> np.ndarray:
        """Return the logarithms of those that are not fixed, in the order of `NAMES`."""
        return np.log(self.of_free(self, fixed))

    def with_free(self, theta: Any, fixed: tuple[str, ...]) -> Hyperparameters:
        """Return a copy with those that are not fixed at ``exp(theta)``."""
        theta = np.asarray(theta, dtype=np.float64)
        expected = self.free(fixed).shape
        if theta.shape != expected or not np.isfinite(theta).all():
            raise ValueError(
                f"`theta` must hold {expected[0]} finite logarithms, of "
                f"{', '.join(name for name in NAMES if name not in fixed)}; got {theta}."
            )
        changed, start = {}, 0
        for name in NAMES:
            if name in fixed:
                continue
            count = np.size(getattr(self, name))
            values = np.exp(theta[start : start + count])
            one = np.ndim(getattr(self, name)) == 0
            changed[name] = float(values[0]) if one else values
            start += count
        return self._replace(**changed)

    def of_free(self, parts: tuple[Any, ...], fixed: tuple[str, ...]) -> np.ndarray:
        """Return those of three `parts`, one of each, that belong to the free ones."""
        kept = [np.atleast_1d(x) for name, x in zip(NAMES, parts, strict=True) if name not in fixed]
        return np.concatenate([np.zeros(0), *kept])


def checked_fixed(fixed: Any) -> tuple[str, ...]:
    """Return the names of the fixed ones, if they are some."""
    fixed = (fixed,) if isinstance(fixed, str) else tuple(fixed)
    if not set(fixed) <= set(NAMES):
        raise ValueError(f"`fixed` must hold some of {', '.join(map(repr, NAMES))}; got {fixed!r}.")
    return fixed


def checked_bounds(bounds: Any) -> tuple[float, float]:
    """Return the logarithms of the two factors."""
    low, high = bounds
    check_scalar("bounds", low, positive=True)
    check_scalar("bounds", high, positive=True)
    if not low <= 1 <= high:
        raise ValueError(f"`bounds` must be two factors, one on each side of 1; got {bounds!r}.")
    return math.log(low), math.log(high)


def checked_start(
    signal_variance: Any, lengthscale: Any, noise: Any, X: np.ndarray
) -> Hyperparameters:
    """Return what the settings stand for."""
    check_scalar("signal_variance", signal_variance, positive=True)
    check_scalar("noise", noise, positive=True)
    if isinstance(lengthscale, str):
        if lengthscale == "scale":
            lengthscale = spread(X, np.ones(len(X)))
        elif lengthscale == "features":
            each = X.std(axis=0) * X.shape[1] ** 0.5
            lengthscale = np.where(each > 0, each, 1.0)
        else:
            raise ValueError(
                f"`lengthscale` must be positive, 'scale' or 'features'; got {lengthscale!r}."
            )
    elif np.ndim(lengthscale):
        lengthscale = np.asarray(lengthscale, dtype=np.float64)
    lengthscale = KernelOperator(X, lengthscale=lengthscale).lengthscale  # which checks it
    return Hyperparameters(float(signal_variance), lengthscale, float(noise))


def maximiser(
    function: Callable[[np.ndarray], tuple[float, np.ndarray]],
    start: np.ndarray,
    bounds: tuple[float, float],
    num_restarts: int,
    rng: Any,
) -> tuple[np.ndarray, str]:
    """Return where a function with a gradient is largest, near `start`, and what went wrong.

    By L-BFGS-B from `start` and from points drawn between its bounds, ``start + bounds``. The
    function is taken for ``-inf`` where it raises a LinAlgError.
    """

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        try:
            value, gradient = function(theta)
        except np.linalg.LinAlgError:
            return math.inf, np.zeros_like(theta)
        return -value, -gradient

    low, high = start + bounds[0], start + bounds[1]
    starts = [start, *(rng.uniform(low, high) for _ in range(num_restarts))]
    limits = list(zip(low, high, strict=True))
    found = [minimize(loss, x, jac=True, method="L-BFGS-B", bounds=limits) for x in starts]
    best = min(found, key=lambda result: result.fun)
    if best.success:
        return best.x, ""
    return best.x, (
        f"the optimiser ended early: {best.message}. Raise `noise`, narrow `bounds`, or scale "
        "the data."
    )
