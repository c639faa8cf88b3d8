"""The hyperparameters of a Gaussian process, and their logarithms in one vector."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize

from lowrank_inverse.arrays.checks import check_count, check_scalar
from lowrank_inverse.operators.kernel import KernelOperator
from lowrank_inverse.sklearn.regressor import spread

SLOPE, GAIN = 0.1, 1e-3
"""Of an estimated likelihood, by the logarithm of a hyperparameter and by a step."""
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


def check_settings(model: Any) -> None:
    """Raise if a setting of a Gaussian process that is no hyperparameter is out of range."""
    for name in ("rank", "num_probes", "max_iter"):
        check_count(name, getattr(model, name))
    check_scalar("tol", model.tol, positive=True)
    if model.kernel not in ("rbf", "matern"):
        raise ValueError(f"`kernel` must be 'rbf' or 'matern'; got {model.kernel!r}.")
    if model.optimizer not in (how := "fmin_l_bfgs_b", None):
        raise ValueError(f"`optimizer` must be {how!r} or None; got {model.optimizer!r}.")


def checked_alpha(alpha: Any, n: int) -> np.ndarray:
    """Return the known variances of the noise of n observations, shape () or (n,)."""
    if np.ndim(alpha) == 0:
        check_scalar("alpha", alpha)
        return np.asarray(float(alpha))
    alpha = np.asarray(alpha, dtype=np.float64)
    if alpha.shape != (n,) or not np.isfinite(alpha).all() or alpha.min() < 0:
        raise ValueError(
            f"`alpha` must be a number or hold one for each of the {n} observations, finite and >= "
            f"0; got shape {alpha.shape}, least {alpha.min():g}."
        )
    return alpha


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
        raise ValueError(
            f"`bounds` must be two factors, one below and one above 1; got {bounds!r}."
        )
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


class _Seen(NamedTuple):
    value: float
    theta: np.ndarray
    gradient: np.ndarray
    error: float


def maximiser(
    function: Callable[[np.ndarray], tuple[float, np.ndarray, float]],
    start: np.ndarray,
    bounds: tuple[float, float],
    num_restarts: int,
    rng: Any,
) -> tuple[np.ndarray, str]:
    """Return where a function is largest, near `start`, and what went wrong.

    By L-BFGS-B from `start` and from points drawn between its bounds, ``start + bounds``. The
    function returns its value, its gradient and the standard error of an estimated value; it is
    taken for ``-inf`` where it raises a LinAlgError. What is estimated is not climbed beyond slopes
    of `SLOPE` and gains of `GAIN`, and slopes up to 1 or the standard error are an end.
    """
    low, high = start + bounds[0], start + bounds[1]
    seen = [_Seen(math.inf, start, np.zeros_like(start), 0.0)]
    ends: list[_Seen] = []

    def loss(theta: np.ndarray) -> tuple[float, np.ndarray]:
        try:
            value, gradient, error = function(theta)
        except np.linalg.LinAlgError:
            return math.inf, np.zeros_like(theta)
        seen.append(_Seen(-value, theta.copy(), -gradient, error))
        return -value, -gradient

    def slope(at: _Seen) -> float:
        """Return the largest part of the gradient that does not point out of the bounds."""
        return float(np.max(np.abs(at.theta - np.clip(at.theta - at.gradient, low, high))))

    def stop(_: np.ndarray) -> None:
        """End where an estimate is flat, or an iteration has gained no more than its noise."""
        ends.append(seen[-1])
        gain = ends[-2].value - ends[-1].value if len(ends) > 1 else math.inf
        if seen[-1].error > 0 and (slope(seen[-1]) <= SLOPE or gain <= GAIN):
            raise StopIteration

    success, message = False, "the likelihood is nowhere finite"
    for begin in (start, *(rng.uniform(low, high) for _ in range(num_restarts))):
        before, ends = min(at.value for at in seen), []
        limits = list(zip(low, high, strict=True))
        found = minimize(loss, begin, jac=True, method="L-BFGS-B", bounds=limits, callback=stop)
        if found.fun < before:
            success, message = found.success, found.message
    best = min(seen, key=lambda at: at.value)
    if success or (best.error > 0 and slope(best) <= max(1.0, best.error)):
        return best.theta, ""
    return best.theta, (
        f"the optimiser ended early: {message}. Raise `noise`, narrow `bounds`, or scale the data."
    )
