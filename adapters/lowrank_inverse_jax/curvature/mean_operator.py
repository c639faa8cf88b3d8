"""The mean curvature over batches as an operator, with one linearization in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from lowrank_inverse._typing import Indices
from lowrank_inverse.arrays.checks import check_count, check_finite, check_indices
from lowrank_inverse.arrays.conversion import is_traced
from lowrank_inverse.operators.base import Operator
from lowrank_inverse_jax.curvature.derivatives import full_precision
from lowrank_inverse_jax.parameters import Parameters

Linear = Callable[[jax.Array], jax.Array]


class CurvatureOperator(Operator):
    """The common base of the Hessian and the Gauss-Newton operator.

    Parameters
    ----------
    linearize : callable (vector) -> (gradient, product), or list of callables
        One for each batch. The linearization of a single batch is kept. With several, each is
        computed again for each chunk of products.
    params : Parameters
        The parameters.
    chunk_size : int
        Products computed at a time.
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
        indices : sequence of distinct ints, shape (k,)
            May be traced.

        Returns
        -------
        jax.Array, shape (n, k)

        Notes
        -----
        Cost: k products, `chunk_size` at a time, from as many unit vectors.
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
