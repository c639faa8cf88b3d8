"""Solvers in the form that jaxopt and lineax expect."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from lowrank_inverse._typing import RNG, SolveFunction, Solver
from lowrank_inverse.solvers.base import as_settings
from lowrank_inverse.solvers.solve import as_solve as core_as_solve
from lowrank_inverse_jax.curvature.derivatives import full_precision
from lowrank_inverse_jax.parameters import as_parameters

__all__ = ["as_lineax", "as_solve"]


def as_solve(
    solver: Solver | SolveFunction | None = None, *, rng: RNG = 0, sign: int | None = None
) -> Callable[[Callable[[Any], Any], Any], Any]:
    """Return a function ``solve(matvec, b) -> x`` on pytrees, as jaxopt expects it.

    Parameters
    ----------
    solver : settings such as ``lowrank_inverse.NystromCG(...)``, optional
        Default: CG.
    rng : int or numpy.random.Generator, optional
        Host seed of the sampled columns.
    sign : 1 or -1, optional
        Sign of the matrix. ``jaxopt.implicit_diff.custom_root`` of a gradient passes the Hessian:
        1. ``custom_fixed_point`` of a gradient step passes the negative Hessian times the step
        size: -1; the damping of the solver is then added to the matrix with its sign changed.
        Default: the sign of ``b.T A b``.

    Returns
    -------
    callable (matvec, b, **ignored) -> x
        Two extra products test the symmetry of the matrix (not while JAX traces); it warns if they
        differ.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import lowrank_inverse as li
    >>> solve = as_solve(li.CG())
    >>> print(solve(lambda x: {"a": -2.0 * x["a"]}, {"a": jnp.ones(2)}))
    {'a': Array([-0.5, -0.5], dtype=float32)}
    """
    solve_flat = core_as_solve(solver, rng=rng, sign=sign)

    def solve(matvec: Callable[[Any], Any], b: Any, **ignored: Any) -> Any:
        rhs = as_parameters(b, name="b")

        def multiply(vector: jax.Array) -> jax.Array:
            return as_parameters(matvec(rhs.replace(vector)), name="matvec(x)").vector

        with full_precision():
            return rhs.replace(solve_flat(multiply, rhs.vector))

    return solve


def as_lineax(solver: Solver | SolveFunction, *, rng: RNG = 0) -> Any:
    """Return a lineax solver, for ``lineax.linear_solve`` and ``optimistix.ImplicitAdjoint``.

    Parameters
    ----------
    solver : settings such as ``lowrank_inverse.NystromCG(...)``
        Its damping is added to the operator.
    rng : int or numpy.random.Generator, optional
        Host seed of the sampled columns.

    Returns
    -------
    lineax.AbstractLinearSolver
        For operators tagged symmetric, positive or negative semidefinite.

    Raises
    ------
    ImportError
        If lineax is not installed.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> import lineax
    >>> import lowrank_inverse as li
    >>> A = lineax.MatrixLinearOperator(
    ...     2.0 * jnp.eye(2), lineax.positive_semidefinite_tag
    ... )
    >>> print(lineax.linear_solve(A, jnp.ones(2), as_lineax(li.CG())).value)
    [0.5 0.5]
    """
    from lowrank_inverse_jax.interop_lineax import LineaxSolver

    return LineaxSolver(as_settings(solver), rng)
