"""Solve a linear system with any solver."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

from array_api_compat import array_namespace

from lowrank_inverse._progress import progress_bar
from lowrank_inverse._typing import (
    RNG,
    Array,
    LinearOperator,
    OperatorLike,
    Scalar,
    SolveFunction,
    Solver,
)
from lowrank_inverse.arrays.checks import check_scalar
from lowrank_inverse.arrays.control_flow import quietly
from lowrank_inverse.arrays.conversion import (
    carries_gradient,
    concrete,
    is_known,
    is_traced,
    to_host,
)
from lowrank_inverse.estimators.asymmetry import warn_of_asymmetry
from lowrank_inverse.estimators.norm import certificate_cost
from lowrank_inverse.operators.composition import shifted, split_shift
from lowrank_inverse.operators.differentiation import constant
from lowrank_inverse.operators.function import FunctionOperator, aslinearoperator
from lowrank_inverse.operators.product import apply_cost, block_width
from lowrank_inverse.results.certificate import certify as certify_solution
from lowrank_inverse.results.errors import raise_on_failure, warn_of_nothing
from lowrank_inverse.results.solution import Solution, check_system
from lowrank_inverse.solvers.auto import Auto
from lowrank_inverse.solvers.base import as_settings
from lowrank_inverse.solvers.iterative import CG
from lowrank_inverse.solvers.state import HypergradientState, solve_from


@quietly
def solve(
    A: OperatorLike,
    b: Array,
    *,
    damping: Scalar = 0.0,
    solver: Solver | SolveFunction | None = None,
    rtol: float | None = None,
    x0: Array | None = None,
    preconditioner: LinearOperator | None = None,
    callback: Callable[[Array, Array], object] | None = None,
    progress: bool = False,
    state: HypergradientState | Solution | None = None,
    rng: RNG = 0,
    certify: bool = False,
    throw: bool = False,
) -> Solution:
    """Solve ``(A + damping * I) x = b``.

    Parameters
    ----------
    A : linear operator, shape (n, n)
        Symmetric. :func:`lowrank_inverse.aslinearoperator` lists the types it accepts.
    b : array, shape (n,) or (n, m)
        Right-hand sides, one per column.
    damping : float or 0-d array
        Added to the diagonal; 0 or more. The damping of `solver` is added as well.
    solver : settings, or callable ``solve(matvec, b)``, optional
        Nystrom, NystromCG, CG, Neumann, Exact or Identity. Default: Exact if the entries of A can
        be read and n is at most 1000; NystromCG with randomly pivoted columns if entries and
        diagonal can be read; otherwise CG. `method` of the result names the choice and its reason.
    rtol : float, optional
        A column converges when its residual norm is at most ``rtol * norm(b)``. Default: the
        `rtol` of the solver, 1e-5.
    x0 : array, shape of `b`, optional
        Starting point of conjugate gradients. Direct methods do not use it.
    preconditioner : linear operator, shape (n, n), optional
        Preconditioner of CG. Given without a `solver`, it selects CG.
    callback : callable (num_steps, residual_norm), optional
        Called after each step of conjugate gradients; see :func:`lowrank_inverse.cg`.
    progress : bool
        Show a progress bar of the steps of conjugate gradients (needs tqdm).
    state : HypergradientState or Solution, optional
        For a sequence of similar systems: ``HypergradientState()`` in the first call, then the
        `state` of the previous solution. Conjugate gradients start from it and recycle its pairs.
    rng : int or numpy.random.Generator, optional
        Seed of the sampled columns: the same seed gives the same result. None draws a new one.
    certify : bool
        Compute `error_bound`. It takes one more product per column, and two more if the norm of
        `A` has to be estimated. `A` must be positive semidefinite and the damping positive.
    throw : bool
        Raise an error unless every column converged. A direct method has converged if its
        relative residual is at most 1e-5.

    Returns
    -------
    Solution
        `num_products` includes preparation, solve, residual and certificate.

    Warns
    -----
    RuntimeWarning
        Without a `solver`, if a column did not converge and is no more accurate than zero.

    Raises
    ------
    SolveError
        With `throw`. It holds the solution, and says what to try for each reason of failure.
    TypeError, ValueError
        If the operands do not fit together, or the solver does not have an option.

    Notes
    -----
    In PyTorch and JAX, `value` is differentiable to any order with respect to `b`, the dampings and
    the arrays that define `A`. By the implicit function theorem [1]_, ``dx = S (db - (dA + d
    damping I) x)``, where S applies the same solver with the same tolerance, which therefore also
    bounds the error of the gradients. For approximate solvers (Nystrom, Neumann, a function), S is
    the approximate inverse. Identity has the derivative of ``scale * b``. No other field of the
    solution has derivatives.

    References
    ----------
    .. [1] M. Blondel et al. Efficient and Modular Implicit Differentiation. NeurIPS 2022.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank_inverse as li
    >>> A = np.diag([4.0, 1.0, 0.0])
    >>> solution = li.solve(A, np.ones(3), damping=1.0, certify=True)
    >>> print(solution.value, solution.message, bool(solution.error_bound < 1e-12))
    [0.2 0.5 1. ] converged True
    >>> print(solution.method)
    Exact: n = 3 is small and the entries can be read
    """
    check_scalar("damping", damping)
    A = aslinearoperator(A)
    check_system(A, b, 0.0)
    plain = not carries_gradient(damping) and concrete(damping) == 0
    system = A if plain else shifted(A, damping)
    settings, why = _settings(solver, constant(system), preconditioner)
    steps = _progress_bar(callback) if progress else None
    options = {
        "rtol": rtol,
        "preconditioner": preconditioner,
        "callback": callback if steps is None else steps,
    }
    settings = _with_options(settings, {k: v for k, v in options.items() if v is not None})
    base, total = split_shift(constant(system), constant(getattr(settings, "damping", 0.0)))
    if certify:
        check_scalar("damping", total, positive=True)
    solution, inverse, following, _ = solve_from(state, settings, system, b, x0=x0, rng=rng)
    if state is not None:
        solution = solution._replace(state=following)
    if steps is not None:
        steps.close()
    if certify:
        x, below = constant(solution.value), inverse.nystrom_inverse
        bounds = certify_solution(base, constant(b), x, damping=total, inverse=below)
        width = block_width(b)
        extra = width + certificate_cost(base) + apply_cost(inverse.nystrom_inverse, width)
        solution = solution._replace(
            num_products=solution.num_products + extra, error_bound=bounds.error_bound
        )
    if not is_traced(solution.reason):
        name = type(settings).__name__
        solution = solution._replace(method=f"{name}: {why}" if why else name)
    if throw:
        raise_on_failure(solution, settings)
    elif why and is_known(solution.converged) and not solution.converged.all():
        warn_of_nothing(solution, settings, b)
    return solution


def _settings(
    solver: Solver | SolveFunction | None, A: OperatorLike, preconditioner: Any
) -> tuple[Any, str]:
    """Return settings and, where they were not given, the reason for them."""
    if solver is None and preconditioner is not None:
        return CG(), "a preconditioner was given"
    settings = Auto() if solver is None else as_settings(solver)
    return settings.choose(A) if isinstance(settings, Auto) else (settings, "")


def _with_options(settings: Any, options: dict[str, Any]) -> Any:
    """Return the settings with the options that were given."""
    if not options:
        return settings
    known = {field.name for field in fields(settings)} if is_dataclass(settings) else set()
    name = type(settings).__name__
    if "preconditioner" in options and "preconditioner" not in known:
        raise TypeError(f"`preconditioner` is for CG; got solver={name}. Use solver=li.CG().")
    if "rtol" in options:
        check_scalar("rtol", options["rtol"])
    # A direct method has no steps: it meets any tolerance that its precision allows.
    return replace(settings, **{key: value for key, value in options.items() if key in known})


def _progress_bar(callback: Callable[[Array, Array], object] | None) -> Any:
    """Return a callback that shows the steps, and calls the other one."""
    bar = progress_bar(desc="steps")

    def step(num_steps: Array, residual_norm: Array) -> None:
        bar.set_postfix(residual=f"{to_host(residual_norm).max():.1e}", refresh=False)
        bar.update()
        if callback is not None:
            callback(num_steps, residual_norm)

    step.close = bar.close  # type: ignore[attr-defined]
    return step


def as_solve(
    solver: Solver | SolveFunction | None = None, *, rng: RNG = 0, sign: int | None = 1
) -> Callable[[Callable[[Array], Array], Array], Array]:
    """Return a function ``solve(matvec, b) -> x``, as other libraries expect it.

    Parameters
    ----------
    solver : settings, optional
        Default: CG.
    rng : int or numpy.random.Generator, optional
        Seed of the sampled columns.
    sign : {1, -1}, optional
        Sign of the matrix. With -1, for a negative definite matrix, the damping of the solver is
        added to the matrix with its sign changed. Default: the sign of ``b.T A b``.

    Warns
    -----
    RuntimeWarning
        If two products show that the matrix is not symmetric. Not checked while JAX traces.

    Examples
    --------
    >>> import numpy as np
    >>> import lowrank_inverse as li
    >>> print(li.as_solve(li.CG())(lambda v: 2.0 * v, np.ones(2)))
    [0.5 0.5]
    """
    settings = CG() if solver is None else as_settings(solver)
    if sign not in (None, 1, -1):
        raise ValueError(f"`sign` must be 1, -1 or None; got {sign!r}.")

    def solve_function(matvec: Callable[[Array], Array], b: Array) -> Array:
        xp, factor = array_namespace(b), sign
        product = matvec(b)
        warn_of_asymmetry(matvec, b, product)
        if factor is None:
            curvature = b @ product
            factor = xp.where(curvature < 0, -xp.ones_like(curvature), xp.ones_like(curvature))
        A = FunctionOperator(lambda v: factor * matvec(v), b.shape[0], like=b)
        return settings.prepare(A, rng=rng, b=factor * b).solve(factor * b).value

    return solve_function
