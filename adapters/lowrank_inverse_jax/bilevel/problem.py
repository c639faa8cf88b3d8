"""A bilevel problem of functions of pytrees, and steps of optimizers, in flat host vectors."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lowrank_inverse.arrays.conversion import to_host
from lowrank_inverse.bilevel.evaluation import Differentiated, tolerant_solver
from lowrank_inverse.solvers.state import HypergradientState
from lowrank_inverse_jax.bilevel.hypergradient import flat_ridge, hypergradient
from lowrank_inverse_jax.curvature.derivatives import full_precision
from lowrank_inverse_jax.curvature.losses import scalar
from lowrank_inverse_jax.parameters import Parameters


class Problem:
    """A bilevel problem in flat vectors of the host, compiled."""

    def __init__(
        self,
        losses: tuple[Any, Any],
        args: tuple[Any, Any],
        theta: Parameters,
        phi: Parameters,
        *,
        ridge: Any,
        solver: Any,
        **options: Any,
    ) -> None:
        self._theta, self._phi, self._args, self._solver = theta, phi, args, solver
        self.params, self.hparams = host(theta.vector), host(phi.vector)
        self.eps = float(jnp.finfo(theta.dtype).eps)
        inner_value = scalar(losses[0], name="inner_loss")
        outer_value = scalar(losses[1], name="outer_loss")
        ridge_of = ridge if callable(ridge) else lambda hparams: ridge

        def inner(vector: jax.Array, h: jax.Array, inner_args: Any) -> jax.Array:
            hparams = phi.replace(h)
            value = inner_value(theta.replace(vector), hparams, *inner_args)
            known = flat_ridge(ridge_of(hparams), theta)
            return value if known is None else value + 0.5 * jnp.sum(known * vector**2)

        def differentiate(vector: Any, h: Any, state: Any, rtol: Any, args: Any) -> Any:
            params, hparams = theta.replace(vector), phi.replace(h)
            out = hypergradient(
                *losses,
                params,
                hparams,
                inner_args=args[0],
                outer_args=args[1],
                solver=tolerant_solver(solver, rtol),
                ridge=ridge,
                state=state,
                mesh=theta.layout.mesh,
                **options,
            )
            known = flat_ridge(ridge_of(hparams), theta)
            mean = jnp.mean(jnp.zeros(()) if known is None else known)
            value = outer_value(params, hparams, *args[1])
            found = value, phi.collect(out.grads), out.solution.value, mean
            return found, out.info, out.state

        self._inner = jax.jit(jax.value_and_grad(inner))
        self._differentiate = jax.jit(differentiate)

    def inner(self, x: np.ndarray, h: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the inner loss with its ridge, and the gradient by the parameters."""
        with full_precision():
            value, gradient = self._inner(*self._at(x, h), self._args[0])
        return float(value), host(gradient)

    def differentiate(
        self, x: np.ndarray, h: np.ndarray, state: Any, rtol: float
    ) -> Differentiated:
        """Return the outer loss and its hypergradient."""
        n, dtype = self._theta.n, self._theta.dtype
        if self._solver is None and state.value is None:  # zeros: all is compiled once
            lay = self._theta.layout.rows
            pairs = lay(jnp.zeros((n, min(tolerant_solver(None, 1.0).recycle, n)), dtype))
            state = HypergradientState(lay(jnp.zeros(n, dtype)), pairs, pairs)
        wanted = jnp.asarray(rtol, dtype)
        found, info, state = self._differentiate(*self._at(x, h), state, wanted, self._args)
        value, gradient, product, ridge = found
        return Differentiated(
            float(value), host(gradient), host(product), info, state, float(ridge)
        )

    def restore(self, x: np.ndarray, h: np.ndarray) -> tuple[Any, Any]:
        """Return parameters and hyperparameters in the structures of the user."""
        vector, other = self._at(x, h)
        return self._theta.replace(vector), self._phi.replace(other)

    def _at(self, x: np.ndarray, h: np.ndarray) -> tuple[jax.Array, jax.Array]:
        pairs = (x, self._theta), (h, self._phi)
        vector, other = (own.layout.rows(jnp.asarray(v, own.dtype)) for v, own in pairs)
        return vector, other


class OptimizerStep:
    """Steps of an optimizer of optax on a flat vector, compiled."""

    def __init__(self, optimizer: Any, params: Parameters) -> None:
        self._params, self._state, self._init = params, None, optimizer.init

        def update(vector: jax.Array, gradient: jax.Array, state: Any) -> tuple[jax.Array, Any]:
            tree = params.restore(vector)
            changes, state = optimizer.update(params.restore(gradient), state, tree)
            return vector + params.collect(changes), state

        self._update = jax.jit(update)

    def reset(self) -> None:
        """Forget what it has seen."""
        self._state = None

    def __call__(self, x: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        """Return where a step leads."""
        vector, slope = (jnp.asarray(v, self._params.dtype) for v in (x, gradient))
        state = self._init(self._params.restore(vector)) if self._state is None else self._state
        vector, self._state = self._update(vector, slope, state)
        return host(vector)


def host(vector: jax.Array) -> np.ndarray:
    """Return a vector in float64 on the host."""
    return to_host(vector).astype(np.float64)


def is_optimizer(given: Any) -> bool:
    """Whether it is one of optax, or like one."""
    return hasattr(given, "init") and hasattr(given, "update")


def side(bound: Any, phi: Parameters) -> np.ndarray:
    """Return one of the bounds as a flat vector."""
    if isinstance(bound, (int, float)):
        return np.full(phi.n, float(bound))
    return host(phi.collect(bound, name="bounds", expand=True))
