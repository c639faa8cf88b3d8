"""Approximate inverses of large symmetric operators, on any array library."""

from lowrank_inverse.estimators.diagonal import DiagonalEstimate, estimate_diagonal
from lowrank_inverse.estimators.trace import TraceEstimate, trace
from lowrank_inverse.iterative.conjugate_gradients import cg
from lowrank_inverse.iterative.neumann_series import neumann
from lowrank_inverse.low_rank.approximation import NystromApproximation
from lowrank_inverse.low_rank.files import load, save
from lowrank_inverse.low_rank.nystrom_columns import nystrom
from lowrank_inverse.low_rank.pivoting.pivoted_cholesky import PivotedCholesky, pivoted_cholesky
from lowrank_inverse.low_rank.streaming import chunked_inverse, streamed_inverse
from lowrank_inverse.low_rank.woodbury import woodbury_inverse
from lowrank_inverse.operators.columns import columns, diagonal
from lowrank_inverse.operators.composition import shifted
from lowrank_inverse.operators.diagonal import DiagonalOperator
from lowrank_inverse.operators.function import FunctionOperator, aslinearoperator
from lowrank_inverse.operators.hadamard import hadamard
from lowrank_inverse.operators.kernel import KernelOperator
from lowrank_inverse.operators.structured import block_diag, kron
from lowrank_inverse.results.certificate import Certificate, certify
from lowrank_inverse.results.errors import SolveError
from lowrank_inverse.results.solution import Reason, Solution
from lowrank_inverse.solvers.direct import Exact, Identity
from lowrank_inverse.solvers.iterative import CG, Neumann
from lowrank_inverse.solvers.low_rank import Nystrom
from lowrank_inverse.solvers.preconditioned import NystromCG
from lowrank_inverse.solvers.solve import as_solve, solve
from lowrank_inverse.solvers.state import HypergradientState
from lowrank_inverse.spectral.log_determinant import LogDeterminant, logdet

__version__ = "0.1.0"

__all__ = [
    "CG",
    "Certificate",
    "DiagonalEstimate",
    "DiagonalOperator",
    "Exact",
    "FunctionOperator",
    "HypergradientState",
    "Identity",
    "KernelOperator",
    "LogDeterminant",
    "Neumann",
    "Nystrom",
    "NystromApproximation",
    "NystromCG",
    "PivotedCholesky",
    "Reason",
    "Solution",
    "SolveError",
    "TraceEstimate",
    "as_solve",
    "aslinearoperator",
    "block_diag",
    "certify",
    "cg",
    "chunked_inverse",
    "columns",
    "diagonal",
    "estimate_diagonal",
    "hadamard",
    "kron",
    "load",
    "logdet",
    "neumann",
    "nystrom",
    "pivoted_cholesky",
    "save",
    "shifted",
    "solve",
    "streamed_inverse",
    "trace",
    "woodbury_inverse",
]
