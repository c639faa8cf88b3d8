"""Hessian and Gauss-Newton operators of functions of pytrees, by one linearization."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lowrank_inverse._typing import Indices
from lowrank_inverse.arrays.checks import check_count, check_finite, check_indices, describe
from lowrank_inverse.arrays.conversion import is_traced
from lowrank_inverse.operators.base import Operator
from lowrank_inverse_jax.curvature.derivatives import both_ways, linearized
from lowrank_inverse_jax.parameters import Parameters, as_parameters

__all__ = ["GaussNewtonOperator", "HessianOperator", "hessian_columns", "hvp"]


Linear = Callable[[jax.Array], jax.Array]


def full_precision() -> Any:
    """Return a context in which matrix products keep the precision of their operands."""
    return jax.default_matmul_precision("highest")


class CurvatureOperator(Operator):
    """What the Hessian and the Gauss-Newton operator have in common.

    Parameters
    ----------
    linearize : callable (vector) -> (gradient, product), or list of callables
        For each batch. The linearization of a single one is kept; of several, each is made again
        for each chunk of products.
    params : Parameters
    chunk_size : int
        Products taken at a time.
    """

    def __init__(
        self,
        linearize: Sequence[Callable[[jax.Array], tuple[jax.Array, Linear]]],
        params: Parameters,
        chunk_size: int,
    ) -> None:
        self.chunk_size = check_count("chunk_size", chunk_size)
        self.params, self._lay = params, params.layout.rows
        self.shape, self.dtype, self.like = (params.n, params.n), params.dtype, params.vector[:0]
        self._linearize = linearize
        with full_precision():
            if len(linearize) == 1:
                gradient, self._linear = linearize[0](params.vector)
            else:
                gradients = [one(params.vector)[0] for one in linearize]
                gradient = jnp.stack(gradients).mean(axis=0)
                self._linear = self._mean_product
            self.gradient = self._lay(gradient)
        check_finite("gradient of the loss", self.gradient)

    def _mean_product(self, v: jax.Array) -> jax.Array:
        products = [one(self.params.vector)[1](v) for one in self._linearize]
        return jnp.stack(products).mean(axis=0)

    def _product(self, v: jax.Array) -> jax.Array:
        product: jax.Array = self._lay(self._linear(self._lay(v)))
        return product

    def _multiply(self, block: jax.Array) -> jax.Array:
        with full_precision():
            if block.ndim == 1:
                return self._product(block)
            return self._by_chunks(lambda j: block[:, j], jnp.arange(block.shape[1]))

    def columns(self, indices: Indices) -> jax.Array:
        """Compute columns by products with unit vectors.

        Parameters
        ----------
        indices : sequence of distinct ints, shape (k,), which may be traced

        Returns
        -------
        jax.Array, shape (n, k)

        Notes
        -----
        k products, `chunk_size` at a time; unit vectors are made a chunk at a time too.
        """
        indices = check_indices(indices, self.shape[0])
        chosen = jnp.asarray(self.params.layout.put(indices, "indices"))
        places = jnp.arange(self.shape[0])
        with full_precision():  # no scatter, which checkify cannot batch
            return self._by_chunks(lambda j: (places == j).astype(self.dtype), chosen)

    def _by_chunks(self, vector: Callable[[jax.Array], jax.Array], items: jax.Array) -> jax.Array:
        """Return the products with ``vector(item)`` as columns."""

        def product(item: jax.Array) -> jax.Array:
            return self._product(vector(item))

        if items.size == 0:
            return jnp.zeros((self.shape[0], 0), self.dtype)
        if is_traced(self.gradient) or is_traced(items):
            rows = jax.lax.map(product, items, batch_size=self.chunk_size)
            return self._lay(rows, axis=1).T
        # An eager lax.map compiles anew at each call.
        if self.chunk_size == 1:
            return self._lay(jnp.stack([product(item) for item in items], axis=1))
        chunks = [items[i : i + self.chunk_size] for i in range(0, items.size, self.chunk_size)]
        return self._lay(jnp.concatenate([jax.vmap(product)(chunk) for chunk in chunks]).T)


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


class GaussNewtonOperator(CurvatureOperator):
    """The Gauss-Newton matrix ``J^T H_L J`` of ``loss(outputs(params))`` as an operator [1]_.

    J is the Jacobian of the outputs by the parameters and ``H_L`` the Hessian of the loss by the
    outputs. Positive semidefinite where the loss is convex in the outputs.

    Parameters
    ----------
    loss : callable (outputs) -> scalar, or list of callables
        The loss of the outputs.
    outputs : callable (params) -> array or pytree, or list of callables
        The outputs of the network. Lists pair up with those of `loss`, and the operator is the
        plain mean over the pairs.
    params, chunk_size, mesh
        As in `HessianOperator`.

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
        params: Any,
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


def as_list(functions: Any, *, name: str = "loss") -> list[Callable[..., Any]]:
    """Return one function, or several, as a list."""
    listed = list(functions) if isinstance(functions, (list, tuple)) else [functions]
    if not listed or not all(callable(function) for function in listed):
        raise TypeError(
            f"`{name}` must be a function, or a non-empty list of functions; "
            f"got {describe(functions)}. In JAX, pass the function and not its value."
        )
    return listed


def scalar(loss: Callable[..., Any], *, name: str = "loss") -> Callable[..., jax.Array]:
    """Return `loss` with its result checked to be one real number."""
    if not callable(loss):
        raise TypeError(
            f"`{name}` must be a function; got {describe(loss)}. Pass the function, not its value."
        )

    def checked(*args: Any) -> jax.Array:
        value = loss(*args)
        if not isinstance(value, (jax.Array, float)):
            raise TypeError(f"`{name}` must return a scalar array; got {describe(value)}.")
        value = jnp.asarray(value)
        if value.ndim != 0:
            raise ValueError(
                f"`{name}` must return a scalar; got shape {value.shape}. Take its mean or its sum."
            )
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise TypeError(f"`{name}` must be real and floating-point; got {value.dtype}.")
        return value

    return checked
