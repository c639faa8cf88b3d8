"""Minimisers with derivatives by the implicit function theorem."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import jax
import numpy as np

from lowrank_inverse._typing import RNG, PyTree, SolveFunction, Solver
from lowrank_inverse.bilevel.ridge import default_solver
from lowrank_inverse.operators.diagonal import ShiftedOperator
from lowrank_inverse_jax.bilevel.hypergradient import flat_ridge
from lowrank_inverse_jax.curvature.derivatives import full_precision
from lowrank_inverse_jax.curvature.hessian import HessianOperator
from lowrank_inverse_jax.curvature.losses import scalar
from lowrank_inverse_jax.parameters import as_parameters

__all__ = ["implicit_minimizer"]


def implicit_minimizer(
    inner_loss: Callable[..., Any],
    *,
    solver: Solver | SolveFunction | None = None,
    rng: RNG = 0,
    chunk_size: int = 8,
    ridge: Any = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a training function differentiable with respect to its hyperparameters [1]_.

    Parameters
    ----------
    inner_loss : callable (params, hparams, *args) -> scalar
        The loss that the training function minimises.
    solver : settings such as ``lowrank_inverse.NystromCG(...)``
        Inverts the Hessian of the inner loss.
    rng : int or numpy.random.Generator, optional
        Host seed of the sampled columns.
    chunk_size : int
        Hessian products computed at a time.
    ridge : float, array, structure of the parameters, or callable (hparams) -> one of these
        Weight decay that `inner_loss` does not include; see
        :func:`lowrank_inverse_jax.hypergradient`.

    Returns
    -------
    decorator
        For a function ``train(init, hparams, *args, **options) -> params``. The derivative of its
        result with respect to `hparams` and `args` becomes ``-(∂²f/∂θ² + damping I)^{-1}
        ∂²f/∂θ∂φ``, in forward and in reverse mode, whatever the function does inside. The
        derivative with respect to `init` is zero. `options` are passed to `train` only, and have
        no derivative.

    Notes
    -----
    An approximate solver gives an approximate derivative. In reverse mode it is applied to the
    cotangent, in forward mode to the tangent.

    References
    ----------
    .. [1] M. Blondel et al. Efficient and Modular Implicit Differentiation. NeurIPS 2022.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> import lowrank_inverse as li
    >>> def inner(w, h):
    ...     return 0.5 * ((w - 3) ** 2 + h * w**2)
    >>> @implicit_minimizer(inner, solver=li.CG())
    ... def train(init, h):
    ...     return 3 / (1 + h)
    >>> print(jax.grad(lambda h: train(0.0, h))(1.0))
    -0.75
    """
    settings = default_solver(solver)
    value = scalar(inner_loss, name="inner_loss")

    def minimized(train: Callable[..., Any]) -> Callable[..., Any]:
        @jax.custom_jvp
        def minimizer(init: PyTree, inputs: Any) -> Any:
            return train(init, *inputs)

        @minimizer.defjvp
        def derivative(primals: Any, tangents: Any) -> tuple[Any, Any]:
            init, inputs = primals
            params = minimizer(init, inputs)
            theta = as_parameters(params)

            def coefficients(inputs: Any) -> Any:
                return flat_ridge(ridge(inputs[0]) if callable(ridge) else ridge, theta)

            def gradient(inputs: Any) -> jax.Array:
                found = theta.gradient(lambda params: value(params, *inputs))(theta.vector)
                known = coefficients(inputs)
                return found if known is None else found + known * theta.vector

            with full_precision():
                H = HessianOperator(
                    lambda params: value(params, *inputs), theta, chunk_size=chunk_size
                )
                known = coefficients(inputs)
                A = H if known is None else ShiftedOperator(H, known)

                def solve(_: Any, b: jax.Array) -> jax.Array:
                    # Traced more than once: each time the same columns.
                    same = copy.deepcopy(rng)
                    return settings.prepare(A, rng=same, b=b).solve(b).value

                _, change = jax.jvp(gradient, (inputs,), (tangents[1],))
                # The solve as one linear and symmetric step, so that jax can transpose it.
                moved = jax.lax.custom_linear_solve(lambda v: A @ v, -change, solve, symmetric=True)
            return params, _tangents(params, theta.restore(moved))

        return minimizer

    def decorator(train: Callable[..., Any]) -> Callable[..., Any]:
        plain = minimized(train)

        @wraps(train)
        def wrapped(init: PyTree, hparams: PyTree, *args: Any, **options: Any) -> Any:
            minimizer = minimized(partial(train, **options)) if options else plain
            return minimizer(init, (hparams, *args))

        return wrapped

    return decorator


def _tangents(params: PyTree, moved: Any) -> Any:
    """Return `moved` in the structure of `params`, with the zero tangents of what is no float."""

    def tangent(leaf: Any, move: Any) -> Any:
        if move is not None or leaf is None:
            return move
        return np.zeros(np.shape(leaf), jax.dtypes.float0)

    return jax.tree_util.tree_map(tangent, params, moved, is_leaf=lambda leaf: leaf is None)
