"""The front door: solve a system with any solver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lowrank_inverse._array import check_scalar, describe
from lowrank_inverse._typing import RNG, Array
from lowrank_inverse.certificate import certificate_cost
from lowrank_inverse.certificate import certify as certify_solution
from lowrank_inverse.operators import FunctionOperator, aslinearoperator
from lowrank_inverse.prepared import PreparedInverse, apply_cost, block_width, direct_solution
from lowrank_inverse.solution import Solution, check_system


class CallableSolver:
    """A function ``solve(matvec, b) -> x`` in the place of solver settings."""

    damping = 0.0

    def __init__(self, function: Callable[[Callable[[Array], Array], Array], Array]) -> None:
        self.function = function

    def prepare(self, A: Any, *, rng: RNG = None, state: Solution | None = None) -> PreparedInverse:
        """Return what calls the function with the product of `A`, and counts its calls."""
        A = aslinearoperator(A)

        def run(b: Array) -> Solution:
            check_system(A, b, 0.0)
            calls = 0

            def matvec(v: Array) -> Array:
                nonlocal calls
                calls += block_width(v)
                return A @ v

            x = self.function(matvec, b)
            if not hasattr(x, "shape") or tuple(x.shape) != tuple(b.shape):
                raise ValueError(
                    f"`solver` must return an array of the shape of b, {tuple(b.shape)}; "
                    f"got {describe(x)}."
                )
            solution = direct_solution(A, 0.0, b, x, 0)
            return solution._replace(num_products=solution.num_products + calls)

        return PreparedInverse(A, run)


def as_settings(solver: Any) -> Any:
    """Return `solver` as something with ``.prepare(A, rng=, state=)``."""
    if not isinstance(solver, type):
        if callable(getattr(solver, "prepare", None)):
            return solver
        if callable(solver):
            return CallableSolver(solver)
    raise TypeError(
        "`solver` must be settings such as Nystrom(rank=20, damping=1e-2) or a function "
        f"solve(matvec, b); got {describe(solver)}."
    )


def solve(
    A: Any,
    b: Array,
    *,
    solver: Any,
    rng: RNG = None,
    state: Solution | None = None,
    certify: bool = False,
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

    Returns
    -------
    Solution
        With the products of preparation, solve, residual and certificate in `num_products`.

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
    num_products = inverse.num_products + solution.num_products
    if not certify:
        return solution._replace(num_products=num_products)
    bounds = certify_solution(
        A, solution.value, b, settings.damping, inverse=inverse.nystrom_inverse
    )
    width = block_width(b)
    cost = width + certificate_cost(A) + apply_cost(inverse.nystrom_inverse, width)
    return solution._replace(
        num_products=num_products + cost,
        error_bound=bounds.error_bound,
    )


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
