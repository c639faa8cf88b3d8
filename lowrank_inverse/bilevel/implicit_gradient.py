"""Hypergradients by implicit differentiation, for every framework."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lowrank_inverse._typing import RNG, Array, Scalar, SolveFunction, Solver
from lowrank_inverse.arrays.checks import check_finite
from lowrank_inverse.bilevel.ridge import default_solver, inverse_product, smallest_shift
from lowrank_inverse.results.solution import Solution
from lowrank_inverse.solvers.base import PreparedInverse
from lowrank_inverse.solvers.state import HypergradientState


class ImplicitGradient(NamedTuple):
    """The parts of a hypergradient; None where a hyperparameter has no path."""

    grads: list[Array | None]
    implicit: list[Array | None]
    solution: Solution
    inverse: PreparedInverse
    state: HypergradientState
    recycled: Any
    shift: Scalar


def implicit_gradient(
    H: Any,
    outer_grad: Array,
    mixed_vjp: Callable[[Array], Sequence[Array | None]],
    direct: Sequence[Array | None],
    *,
    solver: Solver | SolveFunction | None = None,
    ridge: Scalar = None,
    rng: RNG = 0,
    state: HypergradientState | Solution | None = None,
) -> ImplicitGradient:
    """Evaluate ``direct - mixed_vjp((H + ridge + damping)^{-1} outer_grad)`` (Eq. 3 of [1]_).

    Parameters
    ----------
    H : linear operator, shape (n, n)
        Hessian of the inner loss, without the ridge.
    outer_grad : array, shape (n,)
        Gradient of the outer loss with respect to the parameters.
    mixed_vjp : callable
        Maps q of shape (n,) to the gradients of ``<q, inner gradient>`` with respect to the
        hyperparameters, where the inner gradient includes the ridge.
    direct : sequence of arrays or None
        Gradients of the outer loss with respect to the hyperparameters.
    solver, rng
        See :func:`lowrank_inverse.solve`.
    state : HypergradientState, optional
        ``HypergradientState()`` in the first call, then the state of the previous result. CG and
        NystromCG also accept the Solution of a similar system as a start. None keeps no pairs.
    ridge : float, 0-d array or array of shape (n,), optional
        Part of the Hessian that is known exactly; the solver does not approximate it.

    References
    ----------
    .. [1] R. Hataya, M. Yamada. Nyström Method for Accurate and Scalable Implicit
       Differentiation. AISTATS 2023.
    """
    check_finite("gradient of the outer loss", outer_grad)
    product = inverse_product(H, outer_grad, solver=solver, ridge=ridge, rng=rng, state=state)
    implicit = [None if part is None else -part for part in mixed_vjp(product.solution.value)]
    grads = [_sum(d, i) for d, i in zip(direct, implicit, strict=True)]
    shift = smallest_shift(default_solver(solver), ridge, outer_grad)
    return ImplicitGradient(grads, implicit, *product, shift)


def _sum(a: Array | None, b: Array | None) -> Array | None:
    if a is None or b is None:
        return b if a is None else a
    return a + b
