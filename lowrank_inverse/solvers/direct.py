"""Settings of the direct solvers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import RNG, Array, Scalar
from lowrank_inverse.arrays.checks import check_scalar
from lowrank_inverse.arrays.conversion import astype, concrete, eps, wide_dtype
from lowrank_inverse.arrays.linalg import symmetric_part
from lowrank_inverse.operators.columns import finite_columns
from lowrank_inverse.operators.composition import split_shift
from lowrank_inverse.operators.function import aslinearoperator
from lowrank_inverse.results.solution import Solution, check_system
from lowrank_inverse.solvers.base import PreparedInverse, direct_solution, is_positive


@dataclass(frozen=True, kw_only=True)
class Exact:
    """The dense (pseudo-)inverse from all n columns: for small n, and to compare with.

    Eigenvalues of ``A + damping * I`` within rounding of 0 (``n * eps`` times the largest) are
    dropped.
    """

    damping: Scalar = 0.0

    def __post_init__(self) -> None:
        check_scalar("damping", self.damping)

    def prepare(self, A: Any, *, rng: RNG = 0) -> PreparedInverse:
        """Return the inverse of ``A + damping * I``."""
        A, damping = split_shift(aslinearoperator(A), self.damping)
        n = int(A.shape[0])
        H = finite_columns(A, np.arange(n))
        xp = array_namespace(H)
        w, V = xp.linalg.eigh(symmetric_part(astype(H, wide_dtype(H))))
        # Without a damping, what may be the rounding of H is taken for zero.
        unit = xp.finfo(w.dtype).eps if is_positive(damping) else eps(H)
        w = w + damping
        noise = n * float(unit) * xp.max(xp.abs(w))
        keep = xp.abs(w) > noise
        reciprocal = xp.where(keep, 1 / xp.where(keep, w, xp.ones_like(w)), xp.zeros_like(w))

        def apply(b: Array) -> Array:
            rotated = V.T @ astype(b, V.dtype)
            scaled = rotated * (reciprocal if b.ndim == 1 else reciprocal[:, None])
            return astype(V @ scaled, b.dtype)

        def run(b: Array, x0: Array | None) -> Solution:
            check_system(A, b, damping)
            return direct_solution(A, damping, b, apply(b), 0)

        return PreparedInverse(
            A,
            run,
            apply=apply,
            num_products=n,
            rank=concrete(xp.sum(astype(keep, xp.int32), dtype=xp.int32)),
            negative_curvature=concrete(xp.any(w < -n * eps(H) * xp.max(xp.abs(w)))),
        )


@dataclass(frozen=True, kw_only=True)
class Identity:
    """``scale * I`` in place of the inverse: the baseline that costs nothing."""

    scale: Scalar = 1.0

    def __post_init__(self) -> None:
        check_scalar("scale", self.scale, positive=True)

    def prepare(self, A: Any, *, rng: RNG = 0) -> PreparedInverse:
        """Return ``scale * I``."""
        A = aslinearoperator(A)

        def run(b: Array, x0: Array | None) -> Solution:
            check_system(A, b, 0.0)
            return direct_solution(A, 0.0, b, self.scale * b, 0)

        return PreparedInverse(A, run, apply=lambda b: self.scale * b)
