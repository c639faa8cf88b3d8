"""Functions of the spectrum of a Nyström approximation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import Array, Scalar
from lowrank_inverse.arrays.checks import check_damping, check_finite
from lowrank_inverse.arrays.control_flow import quietly
from lowrank_inverse.arrays.conversion import (
    algebra,
    astype,
    concrete,
    eps,
    is_array,
    is_traced,
    like,
    scalar_like,
)
from lowrank_inverse.arrays.graph import constant, plain, with_derivatives_of
from lowrank_inverse.operators.product import ProductOnly


class SpectralFunctions(ProductOnly):
    """Functions of the eigenvalues of H_k, all but k of which are zero.

    Derivatives are those of functions of `_gram`, a diagonal matrix that holds the k eigenvalues.
    They include derivatives with respect to its off-diagonal entries.
    """

    eigenvalues: Array
    num_columns: int
    num_dropped: Any
    num_negative: Any
    trace: float | None
    project: Callable[[Array], Array]
    expand: Callable[[Array], Array]
    over: Callable[[Array, Array], Array]
    _gram: Array | None = None

    @property
    def rank(self) -> Any:
        """Number of columns kept: the rank of H_k."""
        return self.num_columns - self.num_dropped

    @property
    def residual_trace(self) -> Any:
        """Trace of ``A - H_k``, up to rounding; None if the diagonal of A was not read.

        For a positive semidefinite A it bounds the norm of ``A - H_k``.
        """
        if self.trace is None:
            return None
        xp = array_namespace(self.eigenvalues)
        rest = self.trace - xp.sum(constant(self.eigenvalues))
        return concrete(xp.where(rest > 0, rest, xp.zeros_like(rest)))

    def logdet(self, damping: Scalar) -> Any:
        """Return ``log det(H_k + damping * I)``; `damping` must be positive.

        For a positive semidefinite A this is a lower bound on ``log det(A + damping * I)``;
        :func:`lowrank_inverse.logdet` estimates the latter.
        """
        g, damping = self._at(damping)
        xp = array_namespace(g)
        rest = self.shape[0] - self.num_columns
        value = self._function(
            xp.sum(xp.log(g + damping)), lambda G, M: algebra(M).slogdet(M)[1], damping
        )
        return plain(value + rest * xp.log(damping))

    def trace_inverse(self, damping: Scalar) -> Any:
        """Return the trace of ``(H_k + damping * I)^{-1}``; `damping` must be positive."""
        g, damping = self._at(damping)
        xp = array_namespace(g)
        rest = self.shape[0] - self.num_columns
        value = self._function(
            xp.sum(1 / (g + damping)), lambda G, M: xp.linalg.trace(algebra(M).inv(M)), damping
        )
        return plain(value + rest / damping)

    def effective_dimension(self, damping: Scalar) -> Any:
        """Return ``trace(H_k (H_k + damping * I)^{-1})``, which counts eigenvalues above `damping`.

        Eigenvalues near `damping` count in part. The value grows with the columns, up to the
        effective dimension of A if A is positive semidefinite.
        """
        g, damping = self._at(damping)
        xp = array_namespace(g)
        value = self._function(
            xp.sum(g / (g + damping)),
            lambda G, M: xp.linalg.trace(algebra(M).solve(M, G)),
            damping,
        )
        return plain(value)

    def sufficient_rank(self, damping: Scalar) -> Any:
        """Return ``2 * ceil(1.5 * d) + 1``, at most n, for the effective dimension d at `damping`.

        With that many columns of a Gaussian sketch, Nyström preconditioning gives an expected
        condition number of at most 28 (Theorem 1.1 of Frangella, Tropp, Udell. Randomized Nyström
        Preconditioning. SIAM J. Matrix Anal. Appl. 44, 2023). Too few columns underestimate d, so
        the value is reliable only if it is below the number of columns.
        """
        g, damping = (constant(x) for x in self._at(damping))
        xp = array_namespace(g)
        enough = 2 * xp.ceil(1.5 * xp.sum(g / (g + damping))) + 1
        rank = xp.where(enough < self.shape[0], enough, self.shape[0] + 0 * enough)
        return concrete(astype(rank, xp.int32))

    @quietly
    def solve_path(self, b: Array, dampings: Any) -> Array:
        """Return ``(H_k + damping * I)^{-1} b`` for each of `dampings`.

        Parameters
        ----------
        b : array, shape (n,) or (n, m)
            Right-hand sides, one per column.
        dampings : sequence or array of q positive numbers
            One for each solution.

        Returns
        -------
        array, shape (q, n) or (q, n, m)

        Notes
        -----
        ``C.T b`` is computed once. Cost: 2 n k operations per right-hand side, and 2 n k more for
        each damping.

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
        if len(dampings) == 0:
            raise ValueError("`dampings` must hold at least one positive number; it is empty.")
        projected = self.project(b)
        path = []
        for damping in dampings:
            y = self.expand(self.over(projected, self._at(damping)[1]))
            path.append((b - y) / scalar_like(damping, b))
        return array_namespace(b).stack(path)

    def summary(self, damping: Scalar = None) -> str:
        """Describe the spectrum in words, and whether there are enough columns for `damping`."""
        lines = [repr(self)]
        if is_traced(self.eigenvalues):
            return f"{lines[0]}, values unknown while tracing"
        xp = array_namespace(self.eigenvalues)
        g = self.eigenvalues[: int(self.rank)]  # what lies beyond is the rounding of zeros
        count = int(xp.sum(astype(g > 0, xp.int32)))
        if count:
            first, last = float(g[0]), float(g[count - 1])
            lines.append(f"eigenvalues: {count}, from {first:.3g} to {last:.3g}")
        if self.trace:
            share = self.residual_trace / self.trace
            lines.append(f"residual trace: {self.residual_trace:.3g}, {share:.1e} of the trace")
        if damping is not None:
            above = int(xp.sum(astype(g > damping, xp.int32)))
            enough = self.sufficient_rank(damping)
            verdict = "enough" if enough <= self.num_columns else "more columns would help"
            if verdict != "enough" and (little := self._little_missed(damping)):
                verdict = f"enough, for the residual trace is {little}"
            lines.append(
                f"damping {float(damping):.3g}: {above} eigenvalues above it, effective dimension "
                f"{self.effective_dimension(damping):.1f}, enough for it: {enough} columns; there "
                f"are {self.num_columns}: {verdict}"
            )
        return "\n".join(lines)

    def _little_missed(self, damping: Scalar) -> str:
        """Say what the residual trace, which bounds what was missed, is no larger than; or ""."""
        if self.trace is None or self.num_negative > 0:
            return ""
        if self.residual_trace <= damping:
            return "below the damping"
        rounding = self.num_columns * eps(self.like) * self.trace
        return "rounding" if self.residual_trace <= rounding else ""

    def _at(self, damping: Scalar) -> tuple[Array, Array]:
        """Return the eigenvalues, and `damping` as a 0-d array that goes with them."""
        check_damping(damping)
        g = self.eigenvalues
        return g, scalar_like(damping, g) + 0 * constant(g[0])

    def _function(
        self, value: Array, smooth: Callable[[Array, Array], Array], damping: Array
    ) -> Array:
        """Return `value`, with the derivatives of ``smooth(G, G + damping * I)``."""
        G = self._gram
        if G is None:
            return value
        identity = like(np.eye(self.num_columns), G)
        return with_derivatives_of(value, lambda: smooth(G, G + damping * identity), G, damping)
