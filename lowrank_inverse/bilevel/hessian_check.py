"""A test of Hessian-vector products against differences of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

UNCERTAIN = 0.1


class HessianCheck(NamedTuple):
    """The result of `check_hessian`.

    Attributes
    ----------
    relative_error : float
        Norm of ``H v - (g(θ + t v) - g(θ - t v)) / (2 t)`` divided by the larger norm of the two
        terms, where g is the gradient that training follows.
    uncertainty : float
        The same ratio for ``(g(θ + t v) - 2 g(θ) + g(θ - t v)) / (2 t)``. It is 0 except for
        rounding, kinks, and losses that change from call to call.
    tolerance : float
        Tolerance of `relative_error` for a reliable difference: the fourth root of the rounding.
    blocks : dict of str to float
        Contribution of each parameter to `relative_error`.
    """

    relative_error: float
    uncertainty: float
    tolerance: float
    blocks: dict[str, float]

    @property
    def ok(self) -> bool:
        """Whether the two agree within the uncertainty, and the uncertainty is small enough."""
        bound = max(self.tolerance, 2 * self.uncertainty)
        return self.uncertainty <= UNCERTAIN and self.relative_error <= bound

    @property
    def worst(self) -> str:
        """Name of the parameter with the largest error."""
        return max(self.blocks, key=self.blocks.__getitem__)

    def explain(self) -> str:
        """Say whether the Hessian is that of the loss, and if not, what to do."""
        if self.ok:
            return (
                f"products with the Hessian agree with differences of gradients, to "
                f"{self.relative_error:.1e}"
            )
        if self.uncertainty > UNCERTAIN or not np.isfinite(self.uncertainty):
            return (
                f"unclear: the difference of gradients is uncertain by {self.uncertainty:.0%}. Use "
                "float64 parameters and data and a loss that returns the same value at each call, "
                "and look for kinks and overflows."
            )
        return f"{self.difference} {self.remedy}"

    @property
    def difference(self) -> str:
        """One sentence on what differs."""
        return (
            f"Products with the Hessian differ by {self.relative_error:.0%} from differences of "
            f"gradients, most in {self.worst!r}: they are not the derivative of the gradient that "
            "training follows."
        )

    @property
    def remedy(self) -> str:
        """Advice on where to look for the cause."""
        return (
            "Look there for a weight that depends on a detached (stopped) value, a custom "
            "derivative that saves one, spectral normalisation in training mode, and hooks on "
            "activations."
        )


def directions(theta: np.ndarray, sizes: Sequence[int], seed: int) -> np.ndarray:
    """Return a random direction, each part of it about as large as that of `theta`."""
    whole = np.sqrt(np.mean(theta**2)) or 1.0
    scales = [
        np.sqrt(np.mean(part**2)) or whole
        for part in np.split(theta, np.cumsum(sizes)[:-1])
        if part.size
    ]
    kept = [size for size in sizes if size]
    return np.random.default_rng(seed).standard_normal(theta.size) * np.repeat(scales, kept)


def compare(
    product: np.ndarray,
    gradients: tuple[np.ndarray, np.ndarray, np.ndarray],
    step: float,
    names: Sequence[str],
    sizes: Sequence[int],
    unit: float,
) -> HessianCheck:
    """Compare a product, shape (n,), with gradients at ``θ - t v``, θ and ``θ + t v``."""
    below, at, above = gradients
    difference = (above - below) / (2 * step)
    rounding = unit / step * np.linalg.norm(at)
    scale = max(np.linalg.norm(difference), np.linalg.norm(product), rounding) or 1.0
    parts = np.split((product - difference) / scale, np.cumsum(sizes)[:-1])
    errors = [float(np.linalg.norm(part)) for part in parts]
    return HessianCheck(
        relative_error=float(np.linalg.norm(errors)),
        uncertainty=float(np.linalg.norm((above - at) - (at - below)) / (2 * step) / scale),
        tolerance=unit**0.25,
        blocks=dict(zip(names, errors, strict=True)),
    )
