"""Approximate inverses of large symmetric operators, on any array library."""

from lowrank_inverse.certificate import Certificate, certify
from lowrank_inverse.cg import cg
from lowrank_inverse.estimates import DiagonalEstimate, estimate_diagonal
from lowrank_inverse.failure import SolveError
from lowrank_inverse.kernels import KernelOperator
from lowrank_inverse.neumann import neumann
from lowrank_inverse.nystrom import NystromApproximation, nystrom
from lowrank_inverse.operators import (
    FunctionOperator,
    aslinearoperator,
    columns,
    diagonal,
    shifted,
)
from lowrank_inverse.pivoted import PivotedCholesky, pivoted_cholesky
from lowrank_inverse.solution import Reason, Solution
from lowrank_inverse.solve import as_solve, solve
from lowrank_inverse.solvers import CG, Exact, Identity, Neumann, Nystrom, NystromCG
from lowrank_inverse.state import HypergradientState
from lowrank_inverse.storage import load, save
from lowrank_inverse.woodbury import chunked_inverse, streamed_inverse, woodbury_inverse

__version__ = "0.1.0"

__all__ = [
    "CG",
    "Certificate",
    "DiagonalEstimate",
    "Exact",
    "FunctionOperator",
    "HypergradientState",
    "Identity",
    "KernelOperator",
    "Neumann",
    "Nystrom",
    "NystromApproximation",
    "NystromCG",
    "PivotedCholesky",
    "Reason",
    "Solution",
    "SolveError",
    "as_solve",
    "aslinearoperator",
    "certify",
    "cg",
    "chunked_inverse",
    "columns",
    "diagonal",
    "estimate_diagonal",
    "load",
    "neumann",
    "nystrom",
    "pivoted_cholesky",
    "save",
    "shifted",
    "solve",
    "streamed_inverse",
    "woodbury_inverse",
]
