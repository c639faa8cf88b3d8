"""The front door: solve a system with any solver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lowrank_inverse._typing import RNG, Array
from lowrank_inverse.arrays.checks import check_scalar
from lowrank_inverse.estimators.norm import certificate_cost
from lowrank_inverse.operators.base import apply_cost, block_width
from lowrank_inverse.operators.function import FunctionOperator, aslinearoperator
from lowrank_inverse.results.certificate import certify as certify_solution
from lowrank_inverse.results.errors import raise_on_failure
from lowrank_inverse.results.solution import Solution, check_system
from lowrank_inverse.solvers.base import (
    as_settings,
)


def solve(
    A: Any,
    b: Array,
    *,
    solver: Any,
    rng: RNG = None,
    state: Solution | None = None,
    certify: bool = False,
    throw: bool = False,
) -> Solution:
    """Solve ``(A + damping * I) x = b``, with the damping of `solver`.

    Parameters
    ----------
    A : linear operator, shape (n, n)
        Symmetric; see :func:`lowrank_inverse.aslinearoperator` for what qualifies.
    b : array, shape (n,) or (n, m)
        Right-hand sides, one per column.
    solver : settings, or callable ``solve(matvec, b)``
        Nystrom, NystromCG, CG, Neumann, Exact or Identity.
    rng : int or numpy.random.Generator, optional
        Seed of the columns sampled.
    state : Solution, optional
        Of a similar system: where CG and NystromCG start.
    certify : bool
        Fill `error_bound`, at one more product a column and, where `A` does not tell its norm,
        two to estimate it. `A` must be positive semidefinite
        and the damping positive.
    throw : bool
        Raise an error unless every column converged. A direct method converged where its
        residual is at most 1e-5 of the right-hand side.

    Returns
    -------
    Solution
        With the products of preparation, solve, residual and certificate in `num_products`.

    Raises
    ------
    SolveError
        With `throw`: it has the solution, and says what to try for each reason to fail.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank_inverse as li
    >>> A = np.diag([4.0, 1.0, 0.0])
    >>> solver = li.Nystrom(rank=2, damping=1.0, indices=[0, 1])
    >>> solution = li.solve(A, np.ones(3), solver=solver, certify=True)
    >>> print(solution.value, solution.message, bool(solution.error_bound < 1e-12))
    [0.2 0.5 1. ] converged True
    """
    A = aslinearoperator(A)
    settings = as_settings(solver)
    check_system(A, b, 0.0)
    if certify:
        check_scalar("damping", getattr(settings, "damping", 0.0), positive=True)
    inverse = settings.prepare(A, rng=rng, state=state)
    solution = inverse.solve(b)
    solution = solution._replace(num_products=inverse.num_products + solution.num_products)
    if certify:
        bounds = certify_solution(
            A, solution.value, b, settings.damping, inverse=inverse.nystrom_inverse
        )
        width = block_width(b)
        extra = width + certificate_cost(A) + apply_cost(inverse.nystrom_inverse, width)
        solution = solution._replace(
            num_products=solution.num_products + extra, error_bound=bounds.error_bound
        )
    if throw:
        raise_on_failure(solution, settings)
    return solution


def as_solve(solver: Any, *, rng: RNG = None) -> Callable[[Callable[[Array], Array], Array], Array]:
    """Return ``solve(matvec, b) -> x`` for libraries that take such a function.

    Parameters
    ----------
    solver : settings
    rng : int or numpy.random.Generator, optional
        Seed of the columns sampled.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank_inverse as li
    >>> print(li.as_solve(li.CG())(lambda v: 2.0 * v, np.ones(2)))
    [0.5 0.5]
    """
    settings = as_settings(solver)

    def solve_function(matvec: Callable[[Array], Array], b: Array) -> Array:
        A = FunctionOperator(matvec, b.shape[0], like=b)
        return settings.prepare(A, rng=rng).solve(b).value

    return solve_function
