"""A Nyström approximation as a preconditioner."""

from __future__ import annotations

from typing import Any

from array_api_compat import array_namespace

from lowrank_inverse._array import eps, scalar_like
from lowrank_inverse._operator import ProductOnly
from lowrank_inverse._typing import Array
from lowrank_inverse.nystrom import NystromApproximation


class NystromPreconditioner(ProductOnly):
    """``(g_min + damping) U (diag(g) + damping I)^{-1} U.T + (I - U U.T)`` (Eq. 1.3 of [1]_).

    With U and g the eigenvectors and nonzero eigenvalues of H_k and g_min the smallest of them.
    What the columns found is flattened to one eigenvalue, what they missed is left alone: an H of
    rank k takes two steps.

    Parameters
    ----------
    approx : NystromApproximation
    damping : float or 0-d array
        0 or more: that of the system to solve.

    References
    ----------
    .. [1] Z. Frangella, J. A. Tropp, M. Udell. Randomized Nyström Preconditioning. SIAM J.
       Matrix Anal. Appl. 44, 2023.
    """

    def __init__(self, approx: NystromApproximation, damping: Any) -> None:
        self.shape, self.dtype, self.like = approx.shape, approx.dtype, approx.like
        self.approx = approx
        g = approx.eigenvalues
        xp = array_namespace(g)
        damping = scalar_like(damping, g)
        kept = g > eps(approx.columns) * g[0]
        smallest = xp.min(xp.where(kept, g, g[0] + xp.zeros_like(g)))
        safe = xp.where(kept, g, xp.ones_like(g))
        # `project` and `expand` both carry the square root of g.
        weights = ((smallest + damping) / (safe + damping) - 1) / safe
        self._weights = xp.where(kept, weights, xp.zeros_like(g))

    def _multiply(self, block: Array) -> Array:
        weights = self._weights if block.ndim == 1 else self._weights[:, None]
        return block + self.approx.expand(weights * self.approx.project(block))
