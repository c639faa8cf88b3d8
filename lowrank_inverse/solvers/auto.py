"""The default choice of a solver."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowrank_inverse._typing import RNG, Array, OperatorLike, Scalar
from lowrank_inverse.arrays.checks import check_scalar
from lowrank_inverse.arrays.conversion import is_traced
from lowrank_inverse.operators.columns import known_or_none
from lowrank_inverse.operators.diagonal import ShiftedOperator
from lowrank_inverse.operators.function import aslinearoperator
from lowrank_inverse.operators.matrix import SparseOperator
from lowrank_inverse.solvers.base import PreparedInverse
from lowrank_inverse.solvers.direct import Exact
from lowrank_inverse.solvers.iterative import CG
from lowrank_inverse.solvers.preconditioned import NystromCG

MOST_ROWS = 1000
"""Up to which a matrix whose entries can be read is decomposed: a second, about."""


@dataclass(frozen=True, kw_only=True)
class Auto:
    """The settings that :func:`lowrank_inverse.solve` uses when no solver is given.

    They choose `Exact` for a small matrix whose entries can be read, `NystromCG` with randomly
    pivoted columns for a larger matrix whose entries and diagonal can be read, and `CG` for a
    sparse matrix or an operator that is known only through its products.
    """

    damping: Scalar = 0.0
    rtol: float = 1e-5

    def __post_init__(self) -> None:
        check_scalar("damping", self.damping)
        check_scalar("rtol", self.rtol)

    def choose(self, A: OperatorLike) -> tuple[Any, str]:
        """Return the settings chosen for `A`, and the reason as text."""
        A = aslinearoperator(A)
        base, n = A.base if isinstance(A, ShiftedOperator) else A, int(A.shape[0])
        readable = hasattr(base, "submatrix")
        if readable and n <= MOST_ROWS:
            return Exact(damping=self.damping), f"n = {n} is small and the entries can be read"
        shared: dict[str, Any] = {"damping": self.damping, "rtol": self.rtol}
        if isinstance(base, SparseOperator):
            return CG(**shared), "A is sparse, so that its products are cheap"
        if not readable:
            return CG(**shared), "A is known by products"
        d = known_or_none(base)
        if d is None or is_traced(d):
            return CG(**shared), "the diagonal of A is unknown"
        cheap = NystromCG(rank="auto", sampling="rpcholesky", **shared)
        return cheap, "columns and diagonal of A can be read"

    def prepare(self, A: OperatorLike, *, rng: RNG = 0, b: Array | None = None) -> PreparedInverse:
        """Return an approximate inverse of ``A + damping * I``."""
        return self.choose(A)[0].prepare(A, rng=rng, b=b)
