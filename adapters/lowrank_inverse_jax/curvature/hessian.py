"""The Hessian of a function of pytrees as an operator, by one linearization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from lowrank_inverse._typing import Indices, PyTree
from lowrank_inverse_jax.curvature.derivatives import linearized
from lowrank_inverse_jax.curvature.losses import as_list, scalar
from lowrank_inverse_jax.curvature.mean_operator import CurvatureOperator, Linear
from lowrank_inverse_jax.parameters import as_parameters

__all__ = ["HessianOperator", "hessian_columns", "hvp"]


class HessianOperator(CurvatureOperator):
    """The Hessian of a loss as an operator, by one linearization of its gradient [1]_.

    Parameters
    ----------
    loss : callable (params) -> scalar, or list of callables
        For a list, H is the mean over the callables (batches). Each product then linearizes them
        again, so that only one linearization is in memory at a time.
    params : pytree
        Parameters at which to differentiate; see `as_parameters`.
    chunk_size : int
        Products computed at a time, in one batch; memory grows in proportion.
    mesh : jax.sharding.Mesh, optional
        Devices over which vectors, products and columns are sharded along their first axis, over
        all axes of the mesh together. `params` may have any sharding on it.

    Attributes
    ----------
    shape, dtype : (n, n), dtype
        Those of the parameters.
    gradient : jax.Array, shape (n,)
        Gradient of the loss.
    params : Parameters
        Converts between vectors and the user's structure, by `restore` and `collect`.

    Raises
    ------
    TypeError, ValueError
        If the loss is not a real finite scalar (finiteness is not checked while tracing), the
        parameters have no array of floats, or their dtypes differ.

    Notes
    -----
    A product costs about two gradients, and more if the loss has a ``jax.custom_vjp``: without a
    forward mode, it is computed in reverse over reverse. Matrix products inside have the full
    precision of their operands, also on a GPU with TF32 by default. Outside ``jax.jit`` each
    operation is dispatched by itself: compile the function that creates and uses the operator.

    References
    ----------
    .. [1] B. Pearlmutter. Fast Exact Multiplication by the Hessian. Neural Computation, 1994.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> H = HessianOperator(lambda x: x[0] ** 2 * x[1], jnp.array([1.0, 2.0]))
    >>> print(H @ jnp.array([1.0, 0.0]))
    [4. 2.]
    """

    def __init__(
        self, loss: Any, params: PyTree, *, chunk_size: int = 8, mesh: Mesh | None = None
    ) -> None:
        params = as_parameters(params, mesh=mesh)

        def linearizer(one: Any) -> Callable[[jax.Array], tuple[jax.Array, Linear]]:
            gradient = params.gradient(scalar(one))
            return lambda vector: linearized(gradient, vector)

        super().__init__([linearizer(one) for one in as_list(loss)], params, chunk_size)


def hvp(loss: Any, params: PyTree, v: Any) -> Any:
    """Multiply the Hessian of a loss by a vector or a block of vectors.

    Parameters
    ----------
    loss, params
        See `HessianOperator`.
    v : jax.Array, shape (n,) or (n, m), or the structure of `params`
        The vectors.

    Returns
    -------
    jax.Array or structure
        ``H @ v`` in the form of `v`.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> print(hvp(lambda x: (x**3).sum(), jnp.array([1.0, 2.0]), jnp.ones(2)))
    [ 6. 12.]
    """
    H = HessianOperator(loss, params)
    if isinstance(v, jax.Array) and v.shape[:1] == (H.params.n,):
        return H @ v
    return H.params.restore(H @ H.params.collect(v))


def hessian_columns(
    loss: Any, params: PyTree, indices: Indices, *, chunk_size: int = 8
) -> jax.Array:
    """Compute columns of the Hessian of a loss, shape (n, k).

    For arguments, costs and errors see `HessianOperator` and its `columns`.

    Examples
    --------
    >>> import jax.numpy as jnp
    >>> print(
    ...     hessian_columns(lambda x: x[0] ** 2 * x[1], jnp.array([1.0, 2.0]), [1])[
    ...         :, 0
    ...     ]
    ... )
    [2. 0.]
    """
    return HessianOperator(loss, params, chunk_size=chunk_size).columns(indices)
