"""Hessians, hypergradients and their inverses for PyTorch."""

try:
    import torch as _torch
except ImportError as error:
    raise ImportError(
        'lowrank_inverse_torch needs PyTorch. Install it with: pip install "lowrank-inverse[torch]"'
    ) from error

from lowrank_inverse.solvers.state import HypergradientState as _HypergradientState
from lowrank_inverse_torch.bilevel.hypergradient import Hypergradient, hypergradient
from lowrank_inverse_torch.bilevel.minimization import minimize_bilevel
from lowrank_inverse_torch.bilevel.minimizer import implicit_minimizer
from lowrank_inverse_torch.curvature.check import check_hessian
from lowrank_inverse_torch.curvature.gauss_newton import GaussNewtonOperator
from lowrank_inverse_torch.curvature.hessian import HessianOperator, hessian_columns, hvp
from lowrank_inverse_torch.influence.function import InfluenceFunction
from lowrank_inverse_torch.interop import as_solve
from lowrank_inverse_torch.kronecker.kfac import KFAC
from lowrank_inverse_torch.kronecker.subsampled import SubsampledGaussNewton

if hasattr(_torch.serialization, "add_safe_globals"):  # for torch.load of checkpoints with a state
    _torch.serialization.add_safe_globals([_HypergradientState])

__all__ = [
    "KFAC",
    "GaussNewtonOperator",
    "HessianOperator",
    "Hypergradient",
    "InfluenceFunction",
    "SubsampledGaussNewton",
    "as_solve",
    "check_hessian",
    "hessian_columns",
    "hvp",
    "hypergradient",
    "implicit_minimizer",
    "minimize_bilevel",
]
