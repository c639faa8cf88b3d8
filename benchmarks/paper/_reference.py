"""A longer solve, for Hessians of any sign, to hold the methods against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator
from scipy.sparse.linalg import minres as scipy_minres
from torch import Tensor

from lowrank_inverse.solvers.base import PreparedInverse, direct_solution


@dataclass(frozen=True)
class Minres:
    """MINRES (Paige and Saunders, 1975) in float64: it needs no definite matrix, as CG does."""

    damping: float
    num_steps: int
    rtol: float = 1e-4

    def prepare(self, A: Any, *, rng: Any = 0) -> PreparedInverse:
        """Return the inverse of `A`."""
        damping = float(self.damping)

        def run(b: Tensor, x0: Tensor | None) -> Any:
            def product(v: np.ndarray) -> np.ndarray:
                u = torch.as_tensor(v.reshape(-1), dtype=b.dtype, device=b.device)
                return (A @ u).double().cpu().numpy() + damping * v.reshape(-1)

            shifted = LinearOperator(A.shape, product, dtype=np.float64)
            right = b.double().cpu().numpy()
            x, _ = scipy_minres(shifted, right, rtol=self.rtol, maxiter=self.num_steps)
            value = torch.as_tensor(x, dtype=b.dtype, device=b.device)
            return direct_solution(A, damping, b, value, self.num_steps)

        return PreparedInverse(A, run)
