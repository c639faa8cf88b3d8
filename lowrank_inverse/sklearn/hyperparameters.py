"""The hyperparameters of a Gaussian process, and their logarithms in one vector."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from lowrank_inverse.arrays.checks import check_scalar

NAMES = ("signal_variance", "lengthscale", "noise")


class Hyperparameters(NamedTuple):
    """The covariance is ``signal_variance * kernel((x - y) / lengthscale) + noise * (x is y)``."""

    signal_variance: float
    lengthscale: Any
    """A float, or an array of shape (d,)."""
    noise: float

    def free(self, fixed: tuple[str, ...]) -> np.ndarray:
        """Return the logarithms of those that are not fixed, in the order of `NAMES`."""
        values = [np.atleast_1d(getattr(self, name)) for name in NAMES if name not in fixed]
        return np.log(np.concatenate([np.zeros(0), *values]).astype(np.float64))

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
