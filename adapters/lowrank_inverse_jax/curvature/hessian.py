"""The Hessian of a function of pytrees as an operator, by one linearization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from lowrank_inverse._typing import Indices
from lowrank_inverse_jax.curvature.derivatives import linearized
from lowrank_inverse_jax.curvature.losses import as_list, scalar
from lowrank_inverse_jax.curvature.mean_operator import CurvatureOperator, Linear
from lowrank_inverse_jax.parameters import as_parameters

__all__ = ["HessianOperator", "hessian_columns", "hvp"]


class HessianOperator(CurvatureOperator):
    """The Hessian of a loss as an operator: one linearization of its gradient.

    Parameters
    ----------
    loss : callable (params) -> scalar, or list of callables
        H is the plain mean over a list (batches), which is linearized again for each product, so
        that one linearization is in memory at a time.
    params : pytree
        Where to differentiate; see `as_parameters`.
    chunk_size : int
        Products taken at a time, in one batch. Memory grows with it.
    mesh : jax.sharding.Mesh, optional
        Over whose devices vectors, products and columns are cut along their first axis, all axes
        of the mesh taken together; `params` lie on it as they like.

    Attributes
    ----------
    shape, dtype : (n, n), dtype
    gradient : jax.Array, shape (n,)
        Of the loss.
    params : Parameters
        With `restore` and `collect` between vectors and the user's structure.

    Raises
    ------
    TypeError, ValueError
        A loss that is no real scalar, or not finite (unchecked while tracing); parameters without
        a float array, or of several dtypes.

    Notes
    -----
    A product costs about two gradients; some more where the loss has a ``jax.custom_vjp``, which
    has no forward mode: then it is taken in reverse over reverse. Matrix products inside have the
    full precision of their operands, also on a GPU that would take TF32 by default. Outside
    ``jax.jit`` each operation is dispatched by itself: wrap the function that makes and uses the
    operator in ``jax.jit``.

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
        self, loss: Any, params: Any, *, chunk_size: int = 8, mesh: Mesh | None = None
    ) -> None:
        params = as_parameters(params, mesh=mesh)

        def linearizer(one: Any) -> Callable[[jax.Array], tuple[jax.Array, Linear]]:
            gradient = params.gradient(scalar(one))
            return lambda vector: linearized(gradient, vector)

        super().__init__([linearizer(one) for one in as_list(loss)], params, chunk_size)


def hvp(loss: Any, params: Any, v: Any) -> Any:
    """Multiply the Hessian of a loss with one vector.

    Parameters
    ----------
    loss, params
        As in `HessianOperator`.
    v : jax.Array, shape (n,) or (n, m), or the structure of `params`

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


def hessian_columns(loss: Any, params: Any, indices: Indices, *, chunk_size: int = 8) -> jax.Array:
    """Compute columns of the Hessian of a loss, shape (n, k).

    Arguments, costs and errors are those of `HessianOperator` and of its `columns`.

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
