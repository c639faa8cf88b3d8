"""A check that JAX's second derivative of a loss is correct."""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np

from lowrank_inverse._typing import PyTree
from lowrank_inverse.bilevel.hessian_check import HessianCheck, compare, directions
from lowrank_inverse_jax.curvature.hessian import HessianOperator
from lowrank_inverse_jax.parameters import as_parameters

__all__ = ["check_hessian"]


def check_hessian(loss: Any, params: PyTree, *, seed: int = 0) -> HessianCheck:
    """Compare a product with the Hessian of a loss to a difference of its gradients.

    JAX differentiates only what it traces. A gradient may depend on more: weights computed from a
    stopped gradient, or numbers that a ``custom_vjp`` saved. The hypergradient is then that of
    another problem, although its residual is small.

    Parameters
    ----------
    loss : callable (params) -> scalar, or list of callables
        See `HessianOperator`.
    params : pytree
        See `HessianOperator`; not traced.
    seed : int
        Seed of the random direction.

    Returns
    -------
    HessianCheck
        With `relative_error`, `blocks` by parameter, `ok`, and `explain()`.

    Notes
    -----
    Cost: three gradients and one product. They are computed in float64 if the loss permits it:
    float32 arrays inside it are promoted. In float32, errors below about 2 % are not detected.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> def loss(w):
    ...     return (jax.lax.stop_gradient(w) ** 2 * w**2).sum()
    >>> check = check_hessian(loss, jnp.array([1.0, 2.0]))
    >>> print(check.ok, round(check.relative_error, 3), check.worst)
    False 0.667 params
    """
    narrow = as_parameters(params)
    host = np.asarray(narrow.vector, np.float64)
    sizes = [array.size for array in narrow.arrays(narrow.vector)]
    v = directions(host, sizes, seed)
    with _float64():
        try:
            found = _compared(loss, params, host, v, jnp.float64)
        except TypeError:  # the loss mixes its dtypes by hand
            found = None
    if found is None:
        found = _compared(loss, params, host, v, narrow.dtype)
    step, unit, product, gradients = found
    return compare(product, gradients, step, narrow.names, sizes, unit)


def _compared(loss: Any, params: PyTree, host: np.ndarray, v: np.ndarray, dtype: Any) -> Any:
    theta = as_parameters(params)
    unit = float(jnp.finfo(dtype).eps)
    step = unit**0.5
    at, move = jnp.asarray(host, dtype), jnp.asarray(step * v, dtype)

    def operator(vector: jax.Array) -> HessianOperator:
        return HessianOperator(loss, theta.replace(vector))

    below, above = at - move, at + move
    H = operator(at)
    product = H @ ((above - below) / (2 * step))  # along what rounding made of the direction
    gradients = [operator(below).gradient, H.gradient, operator(above).gradient]
    wide = tuple(np.asarray(gradient, np.float64) for gradient in gradients)
    return step, unit, np.asarray(product, np.float64), wide


def _float64() -> Any:
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    return jax.experimental.enable_x64()  # type: ignore[attr-defined]
