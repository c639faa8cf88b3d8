"""Hessians, hypergradients and their inverses for JAX."""

try:
    import jax as _jax  # noqa: F401
except ImportError as error:
    raise ImportError(
        'lowrank_inverse_jax needs JAX. Install it with: pip install "lowrank-inverse[jax]"'
    ) from error

from lowrank_inverse_jax.curvature import (
    GaussNewtonOperator,
    HessianOperator,
    hessian_columns,
    hvp,
)
from lowrank_inverse_jax.hypergradient import Hypergradient, HypergradientInfo, hypergradient
from lowrank_inverse_jax.implicit import implicit_minimizer
from lowrank_inverse_jax.influence import InfluenceFunction
from lowrank_inverse_jax.plugs import as_lineax, as_solve

__all__ = [
    "GaussNewtonOperator",
    "HessianOperator",
    "Hypergradient",
    "HypergradientInfo",
    "InfluenceFunction",
    "as_lineax",
    "as_solve",
    "hessian_columns",
    "hvp",
    "hypergradient",
    "implicit_minimizer",
]
