"""What the paper's experiments compare: the baselines as its code had them, and as they should be.

Every inverse is a solver for ``lowrank_inverse_torch.hypergradient``. The forms "of the paper" are
those of its reference package, hypergrad 0.0.1 (https://github.com/moskomule/hypergrad), written
anew from their formulas.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from scipy.sparse.linalg import minres as scipy_minres
from torch import Tensor

import lowrank_inverse as li
from benchmarks.systems.accuracy import equation_6
from lowrank_inverse.low_rank.column_sampling import sample_columns
from lowrank_inverse.operators.composition import split_shift
from lowrank_inverse.solvers.base import PreparedInverse, direct_solution

PAPER_CG = "CG of the paper's code"
PAPER_NEUMANN = "Neumann, α of the paper"
PAPER_NYSTROM = "Nyström, Eq. (6)"
CG, NEUMANN, NYSTROM, NYSTROM_CG = "CG", "Neumann, safe step", "Nyström", "Nyström-CG"
IDENTITY = "identity"
METHODS = [
    *(PAPER_CG, CG, PAPER_NEUMANN, NEUMANN, PAPER_NYSTROM, NYSTROM, NYSTROM_CG, IDENTITY),
]
PAPER_METHODS = [PAPER_CG, PAPER_NEUMANN, PAPER_NYSTROM]
"""What stands in the paper's tables, and here."""


@dataclass(frozen=True)
class PaperCG:
    """The recurrence that hypergrad 0.0.1 and betty-ml 0.1.1 call conjugate gradients.

    With q = A p: ``s = r·r / (α q·p)``, ``x += s p``, ``r' = r - s q``,
    ``p' = r + (r'·r' / r·r) p`` and ``x`` times α in the end. The new direction takes the residual
    from before the step, where conjugate gradients take r'; there is no damping.
    """

    num_steps: int
    alpha: float = 1.0

    def prepare(self, A: Any, *, rng: Any = 0, b: Any = None) -> PreparedInverse:
        """Return the inverse of `A`."""

        def run(b: Tensor, x0: Tensor | None) -> Any:
            x, r, p = torch.zeros_like(b), b, b
            for _ in range(self.num_steps):
                q = A @ p
                s = (r @ r) / (self.alpha * (q @ p))
                x, after = x + s * p, r - s * q
                p, r = r + (after @ after) / (r @ r) * p, after
            return direct_solution(A, 0.0, b, self.alpha * x, self.num_steps)

        return PreparedInverse(A, run)


@dataclass(frozen=True)
class PaperNystrom:
    """Equation (6) of the paper, term by term in the numbers of the model."""

    rank: int
    damping: float

    def prepare(self, A: Any, *, rng: Any = 0, b: Any = None) -> PreparedInverse:
        """Return the inverse of ``A + damping * I``."""
        A, damping = split_shift(A, self.damping)  # a ridge joins the damping
        indices = sample_columns(A, self.rank, rng=rng)
        C = li.aslinearoperator(A).columns(indices)
        W = C[torch.as_tensor(indices, device=C.device)]

        def run(b: Tensor, x0: Tensor | None) -> Any:
            return direct_solution(A, damping, b, equation_6(C, W, damping, b), 0)

        return PreparedInverse(A, run, num_products=self.rank, rank=self.rank)


@dataclass(frozen=True)
class Minres:
    """MINRES (Paige and Saunders, 1975) in float64: a longer solve, for Hessians of any sign."""

    damping: float
    num_steps: int
    rtol: float = 1e-4

    def prepare(self, A: Any, *, rng: Any = 0, b: Any = None) -> PreparedInverse:
        """Return the inverse of ``A + damping * I``."""

        def run(b: Tensor, x0: Tensor | None) -> Any:
            def product(v: np.ndarray) -> np.ndarray:
                u = torch.as_tensor(v.reshape(-1), dtype=b.dtype, device=b.device)
                return (A @ u).double().cpu().numpy() + self.damping * v.reshape(-1)

            shifted = LinearOperator(A.shape, product, dtype=np.float64)
            right = b.double().cpu().numpy()
            x, _ = scipy_minres(shifted, right, rtol=self.rtol, maxiter=self.num_steps)
            value = torch.as_tensor(x, dtype=b.dtype, device=b.device)
            return direct_solution(A, self.damping, b, value, self.num_steps)

        return PreparedInverse(A, run)


def solvers(k: int, alpha: float = 0.01, damping: float = 0.01) -> dict[str, Any]:
    """Return a solver for each of `METHODS`.

    Parameters
    ----------
    k : int
        The paper's l = k: steps, terms or columns. Nyström-CG has half as many columns and takes
        the other half as steps, so that it has as many products as the others.
    alpha : float
        The paper's α: the step of its Neumann series and the "learning rate" of its CG.
    damping : float
        The paper's ρ, which all but its own CG and Neumann series add.
    """
    return {
        PAPER_CG: PaperCG(k, alpha),
        CG: li.CG(damping=damping, rtol=0.0, max_steps=k),
        # That code's series has l + 1 terms.
        PAPER_NEUMANN: li.Neumann(num_terms=k + 1, step_size=alpha),
        NEUMANN: li.Neumann(damping=damping, num_terms=k),
        PAPER_NYSTROM: PaperNystrom(k, damping),
        NYSTROM: li.Nystrom(rank=k, damping=damping, sampling="uniform"),
        NYSTROM_CG: li.NystromCG(
            rank=k // 2, damping=damping, sampling="uniform", rtol=0.0, max_steps=k - k // 2
        ),
        IDENTITY: li.Identity(),
    }
