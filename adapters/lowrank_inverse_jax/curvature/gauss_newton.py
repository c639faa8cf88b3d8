"""The Gauss-Newton matrix of functions of pytrees as an operator, by one linearization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from lowrank_inverse._typing import PyTree
from lowrank_inverse_jax.curvature.derivatives import both_ways, linearized
from lowrank_inverse_jax.curvature.losses import as_list, scalar
from lowrank_inverse_jax.curvature.mean_operator import CurvatureOperator, Linear
from lowrank_inverse_jax.parameters import as_parameters

__all__ = ["GaussNewtonOperator"]


class GaussNewtonOperator(CurvatureOperator):
    """The Gauss-Newton matrix ``J^T H_L J`` of ``loss(outputs(params))`` as an operator [1]_.

    J is the Jacobian of the outputs with respect to the parameters, and ``H_L`` the Hessian of the
    loss with respect to the outputs. The matrix is positive semidefinite if the loss is convex in
    the outputs.

    Parameters
    ----------
    loss : callable (outputs) -> scalar, or list of callables
        The loss of the outputs.
    outputs : callable (params) -> array or pytree, or list of callables
        The outputs of the network. With lists, the operator is the mean over the pairs of `loss`
        and `outputs`.
    params, chunk_size, mesh
        See `HessianOperator`.

    References
    ----------
    .. [1] N. Schraudolph. Fast Curvature Matrix-Vector Products for Second-Order Gradient
       Descent. Neural Computation, 2002.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> G = GaussNewtonOperator(lambda y: (y**2).sum(), jnp.sin, jnp.array([0.0, 0.0]))
    >>> print(G @ jnp.array([1.0, 2.0]))
    [2. 4.]
    """

    def __init__(
        self,
        loss: Any,
        outputs: Any,
        params: PyTree,
        *,
        chunk_size: int = 8,
        mesh: Mesh | None = None,
    ) -> None:
        params = as_parameters(params, mesh=mesh)
        losses, functions = as_list(loss), as_list(outputs, name="outputs")
        if len(losses) != len(functions):
            raise ValueError(
                f"`loss` and `outputs` must pair up; got {len(losses)} and {len(functions)}."
            )

        def linearizer(one: Any, function: Any) -> Callable[[jax.Array], tuple[jax.Array, Linear]]:
            def linearize(vector: jax.Array) -> tuple[jax.Array, Linear]:
                out, push, pull = both_ways(lambda v: function(params.replace(v)), vector)
                gradient, curve = linearized(jax.grad(scalar(one)), out)
                return pull(gradient), lambda v: pull(curve(push(v)))

            return linearize

        pairs = zip(losses, functions, strict=True)
        super().__init__([linearizer(*pair) for pair in pairs], params, chunk_size)
