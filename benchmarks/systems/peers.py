"""The same damped system, solved by other libraries: each takes what it needs and no more.

A function takes a dense float64 matrix, a right-hand side, the damping, the tolerance and a rank,
and returns a solution and the number of steps. One that cannot be imported is named as absent.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

MAX_STEPS = 3000
Result = tuple[np.ndarray, int]


def scipy_cg(A: Any, b: Any, damping: float, rtol: float, rank: int) -> Result:
    """Run SciPy's conjugate gradients."""
    from scipy.sparse.linalg import LinearOperator, cg

    count = []
    operator = LinearOperator(A.shape, matvec=lambda v: A @ v + damping * v, dtype=A.dtype)
    x, _ = cg(operator, b, rtol=rtol, maxiter=MAX_STEPS, callback=lambda x: count.append(1))
    return x, len(count)


def by_lineax(product: Any, b: Any, rtol: float, max_steps: int) -> Any:
    """Return the solution of lineax's conjugate gradients, for a product in JAX."""
    import jax
    import lineax

    tag = lineax.positive_semidefinite_tag
    operator = lineax.FunctionLinearOperator(product, jax.eval_shape(lambda: b), tag)
    solver = lineax.CG(rtol=rtol, atol=0.0, max_steps=max_steps)
    return lineax.linear_solve(operator, b, solver, throw=False)


def lineax_cg(A: Any, b: Any, damping: float, rtol: float, rank: int) -> Result:
    """Run lineax's conjugate gradients, compiled; the compilation is not timed."""
    import jax
    import jax.numpy as jnp

    def solve(A: Any, b: Any) -> Any:
        found = by_lineax(lambda v: A @ v + damping * v, b, rtol, MAX_STEPS)
        return found.value, found.stats["num_steps"]

    key = ("lineax", A.shape, damping, rtol)
    if key not in _COMPILED:
        _COMPILED[key] = jax.jit(solve).lower(jnp.asarray(A), jnp.asarray(b)).compile()
    x, steps = _COMPILED[key](jnp.asarray(A), jnp.asarray(b))
    return np.asarray(x), int(steps)


def linear_operator_cg(A: Any, b: Any, damping: float, rtol: float, rank: int) -> Result:
    """Run linear_operator's conjugate gradients with its pivoted Cholesky preconditioner."""
    import torch
    from linear_operator import settings, to_linear_operator
    from linear_operator.utils.linear_cg import linear_cg

    count = []
    matrix, right = torch.from_numpy(A), torch.from_numpy(b)
    with settings.max_preconditioner_size(rank), settings.min_preconditioning_size(1):
        operator = to_linear_operator(matrix).add_jitter(damping)
        preconditioner, _, _ = operator._preconditioner()

    def product(block: Any) -> Any:
        count.append(1)
        return matrix @ block + damping * block

    x = linear_cg(product, right, tolerance=rtol, max_iter=MAX_STEPS, preconditioner=preconditioner)
    return x.numpy(), len(count) - 1


def rlaopt_pcg(A: Any, b: Any, damping: float, rtol: float, rank: int) -> Result:
    """Run rlaopt's conjugate gradients with its Gaussian Nyström preconditioner."""
    import torch
    from rlaopt.linalg import LinSys, NystromConfig
    from rlaopt.solvers import PCG, PCGConfig, PCGStoppingCriteria

    default = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)  # with the default, its preconditioner mixes dtypes
    try:
        system = LinSys(torch.from_numpy(A), torch.from_numpy(b), reg=damping)
        nystrom = NystromConfig(rank_init=rank, base_damping=damping)
        config = PCGConfig(preconditioner_config=nystrom)
        stop = PCGStoppingCriteria(max_iters=MAX_STEPS, tol=rtol)
        result = PCG(system, config).solve(stopping_criteria=stop)
    finally:
        torch.set_default_dtype(default)
    return result.solution.detach().numpy().reshape(-1), int(result.num_iters)


_COMPILED: dict[Any, Any] = {}

PEERS: dict[str, tuple[str, bool, Callable[..., Result]]] = {
    "scipy cg": ("scipy", False, scipy_cg),
    "lineax CG": ("lineax", False, lineax_cg),
    "linear_operator, pivoted Cholesky": ("linear_operator", True, linear_operator_cg),
    "rlaopt, Gaussian Nyström": ("rlaopt", True, rlaopt_pcg),
}
"""Module to import, whether it has a rank, and what to call."""


def is_there(module: str) -> bool:
    """Whether `module` can be imported; nothing is installed for it."""
    try:
        importlib.import_module(module)
    except ImportError:
        return False
    return True
