"""Hessians, hypergradients and their inverses for JAX."""

try:
    import jax as _jax  # noqa: F401
except ImportError as error:
    raise ImportError(
        'lowrank_inverse_jax needs JAX. Install it with: pip install "lowrank-inverse[jax]"'
    ) from error

from lowrank_inverse_jax.bilevel.hypergradient import Hypergradient, hypergradient
from lowrank_inverse_jax.bilevel.minimization import minimize_bilevel
from lowrank_inverse_jax.bilevel.minimizer import implicit_minimizer
from lowrank_inverse_jax.curvature.check import check_hessian
from lowrank_inverse_jax.curvature.gauss_newton import GaussNewtonOperator
from lowrank_inverse_jax.curvature.hessian import HessianOperator, hessian_columns, hvp
from lowrank_inverse_jax.influence.function import InfluenceFunction
from lowrank_inverse_jax.interop import as_lineax, as_solve

__all__ = [
    "GaussNewtonOperator",
    "HessianOperator",
    "Hypergradient",
    "InfluenceFunction",
    "as_lineax",
    "as_solve",
    "check_hessian",
    "hessian_columns",
    "hvp",
    "hypergradient",
    "implicit_minimizer",
    "minimize_bilevel",
]
