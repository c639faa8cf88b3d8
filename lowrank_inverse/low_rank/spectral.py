"""What the eigenvalues of a low-rank approximation say at any damping."""

from __future__ import annotations

from typing import Any

from array_api_compat import array_namespace

from lowrank_inverse._typing import Array
from lowrank_inverse.arrays.checks import check_damping, check_finite
from lowrank_inverse.arrays.conversion import (
    astype,
    concrete,
    eps,
    is_array,
    is_traced,
    scalar_like,
)
from lowrank_inverse.operators.base import ProductOnly


class SpectralFunctions(ProductOnly):
    """Functions of ``H_k = U diag(g) U.T``, shared by every damping: no further product."""

    columns: Array
    eigenvalues: Array
    trace: float | None
    num_columns: int

    def project(self, block: Array) -> Array:
        """Return ``(U diag(g)^(1/2)).T @ block``."""
        raise NotImplementedError

    def expand(self, coefficients: Array) -> Array:
        """Return ``(U diag(g)^(1/2)) @ coefficients``."""
        raise NotImplementedError

    @property
    def residual_trace(self) -> Any:
        """Trace of ``A - H_k``, up to rounding; None where the diagonal of A was not looked at.

        For a positive semidefinite A it bounds the norm of ``A - H_k``.
        """
        if self.trace is None:
            return None
        xp = array_namespace(self.eigenvalues)
        rest = self.trace - xp.sum(self.eigenvalues)
        return concrete(xp.where(rest > 0, rest, xp.zeros_like(rest)))

    def logdet(self, damping: Any) -> Any:
        """Return ``log det(H_k + damping * I)``; `damping` must be positive."""
        g, damping = self._at(damping)
        xp = array_namespace(g)
        rest = self.shape[0] - self.num_columns
        return concrete(xp.sum(xp.log(g + damping)) + rest * xp.log(damping))

    def trace_inverse(self, damping: Any) -> Any:
        """Return the trace of ``(H_k + damping * I)^{-1}``; `damping` must be positive."""
        g, damping = self._at(damping)
        rest = self.shape[0] - self.num_columns
        return concrete(array_namespace(g).sum(1 / (g + damping)) + rest / damping)

    def effective_dimension(self, damping: Any) -> Any:
        """Return ``trace(H_k (H_k + damping * I)^{-1})``: how many eigenvalues exceed `damping`.

        Eigenvalues near `damping` count in part. It is at most that of a positive semidefinite A,
        and grows with the columns.
        """
        g, damping = self._at(damping)
        return concrete(array_namespace(g).sum(g / (g + damping)))

    def sufficient_rank(self, damping: Any) -> Any:
        """Return ``2 * ceil(1.5 * d) + 1``, at most n, for the effective dimension d at `damping`.

        With that many columns of a Gaussian sketch, Nyström-preconditioned conjugate gradients
        meet a condition number of 28 or less in the mean (Theorem 1.1 of Frangella, Tropp, Udell.
        Randomized Nyström Preconditioning. SIAM J. Matrix Anal. Appl. 44, 2023). From too few
        columns d is found too small: what counts is whether this is below the columns there are.
        """
        g, damping = self._at(damping)
        xp = array_namespace(g)
        enough = 2 * xp.ceil(1.5 * xp.sum(g / (g + damping))) + 1
        rank = xp.where(enough < self.shape[0], enough, self.shape[0] + 0 * enough)
        return concrete(astype(rank, xp.int32))

    def solve_path(self, b: Array, dampings: Any) -> Array:
        """Return ``(H_k + damping * I)^{-1} b`` for each of `dampings`.

        Parameters
        ----------
        b : array, shape (n,) or (n, m)
        dampings : sequence or array of q positive numbers

        Returns
        -------
        array, shape (q, n) or (q, n, m)

        Notes
        -----
        ``C.T b`` is computed once: 2 n k operations a vector, and 2 n k for each damping.

        Examples
        --------
        >>> import numpy as np
        >>> import lowrank_inverse as li
        >>> approx = li.nystrom(np.diag([3.0, 1.0]), 2, rng=0)
        >>> print(approx.solve_path(np.ones(2), [1.0, 2.0]).round(3))
        [[0.25  0.5  ]
         [0.2   0.333]]
        """
        self._check(b, "b")
        check_finite("b", b)
        if is_array(dampings):
            dampings = [dampings[i] for i in range(dampings.shape[0])]
        projected = self.project(b)
        path = []
        for damping in dampings:
            g, wide = self._at(damping)
            weights = 1 / (g + wide)
            y = self.expand(projected * (weights if b.ndim == 1 else weights[:, None]))
            path.append((b - y) / scalar_like(damping, b))
        return array_namespace(b).stack(path)

    def summary(self, damping: Any = None) -> str:
        """Describe in words what the columns found, and at `damping` whether they are enough."""
        lines = [repr(self)]
        if is_traced(self.eigenvalues):
            return f"{lines[0]}, values unknown while tracing"
        xp = array_namespace(self.eigenvalues)
        kept = self.eigenvalues > eps(self.columns) * self.eigenvalues[0]
        count = int(xp.sum(astype(kept, xp.int32)))
        if count:
            first, last = float(self.eigenvalues[0]), float(self.eigenvalues[count - 1])
            lines.append(f"eigenvalues: {count}, from {first:.3g} to {last:.3g}")
        if self.trace:
            share = self.residual_trace / self.trace
            lines.append(f"residual trace: {self.residual_trace:.3g}, {share:.1e} of the trace")
        if damping is not None:
            above = int(xp.sum(astype(self.eigenvalues > damping, xp.int32)))
            enough = self.sufficient_rank(damping)
            verdict = "enough" if enough <= self.num_columns else "more columns would help"
            lines.append(
                f"damping {float(damping):.3g}: {above} eigenvalues above it, effective dimension "
                f"{self.effective_dimension(damping):.1f}, enough for it: {enough} columns; there "
                f"are {self.num_columns}: {verdict}"
            )
        return "\n".join(lines)

    def _at(self, damping: Any) -> tuple[Array, Array]:
        """Return the eigenvalues, and `damping` as a 0-d array that goes with them."""
        check_damping(damping)
        g = self.eigenvalues
        return g, scalar_like(damping, g) + 0 * g[0]
