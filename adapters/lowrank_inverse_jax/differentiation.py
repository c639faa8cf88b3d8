"""How jax differentiates a solve: as one linear and symmetric step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from lowrank_inverse._typing import OperatorLike, Scalar
from lowrank_inverse.operators.differentiation import constant, damped_product, register


class _Rules:
    """Rules for :func:`lowrank_inverse.operators.differentiation.register`."""

    @staticmethod
    def solve(
        A: OperatorLike,
        damping: Scalar,
        b: jax.Array,
        make: Any,
        x0: Any,
        keep: int,
        found: Any,
        noted: bool,
    ) -> Any:
        """Return ``run(b, x0, keep)``, differentiated by ``jax.lax.custom_linear_solve``."""
        run = make(constant(A), constant(damping))
        told: dict[str, Any] = {}
        known = jax.lax.stop_gradient(b)

        def solve(_: Any, rhs: jax.Array) -> Any:
            # The same function solves for tangents and cotangents, which start from zero.
            start = None if x0 is None else jnp.where(jnp.all(rhs == known), x0, 0 * x0)
            solution = run(rhs, start, keep)
            leaves, told["structure"] = jax.tree_util.tree_flatten(solution._replace(value=None))
            told["leaves"] = leaves
            arrays = [leaf for leaf in leaves if isinstance(leaf, jax.Array)]
            return solution.value, arrays

        value, arrays = jax.lax.custom_linear_solve(
            lambda x: damped_product(A, damping, x), b, solve, symmetric=True, has_aux=True
        )
        fixed = iter(jax.lax.stop_gradient(arrays))
        leaves = [next(fixed) if isinstance(leaf, jax.Array) else leaf for leaf in told["leaves"]]
        return jax.tree_util.tree_unflatten(told["structure"], leaves)._replace(value=value)

    @staticmethod
    def recomputed(function: Callable[..., Any], *arrays: jax.Array) -> Any:
        return jax.checkpoint(function)(*arrays)


register("jax", _Rules())
