"""Derivatives of the loss of each example of a function of pytrees."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from lowrank_inverse._typing import Batch, Data, PyTree
from lowrank_inverse.arrays.checks import describe
from lowrank_inverse.arrays.conversion import eps
from lowrank_inverse.influence.checkpoint import digest
from lowrank_inverse.influence.dataset import Examples
from lowrank_inverse.influence.loss_checks import check_tokens
from lowrank_inverse.operators.function import FunctionOperator
from lowrank_inverse_jax.curvature.derivatives import full_precision
from lowrank_inverse_jax.influence.data import as_batches, flatten
from lowrank_inverse_jax.parameters import as_parameters

CHUNK_SIZE = 32


class JaxBackend:
    """What the core needs of a loss of each example; see its `Backend`.

    Each function is compiled once for each shape of a batch; batches are arguments, so that one
    compilation serves all of a size.
    """

    def __init__(
        self,
        loss: Callable[..., Any],
        params: PyTree,
        outputs: Callable[..., Any] | None,
        mesh: Mesh | None = None,
    ) -> None:
        for name, function in (("loss", loss), ("outputs", outputs)):
            if not callable(function) and (name == "loss" or function is not None):
                raise TypeError(f"`{name}` must be a function; got {describe(function)}.")
        self._loss, self._outputs = loss, outputs
        self._params = as_parameters(jax.tree_util.tree_map(_widened, params), mesh=mesh)
        self.layout = self._params.layout
        self.n, self.like = self._params.n, self._params.vector[:0]
        self.has_outputs, self.unit = outputs is not None, eps(self.like)
        self._products = {
            "hessian": jax.jit(self._hessian),
            "ggn": jax.jit(self._gauss_newton),
            "empirical_fisher": jax.jit(self._fisher),
        }
        self._total = jax.jit(jax.grad(self._weighted))
        self._values = jax.jit(self._losses)
        self._slopes = jax.jit(partial(self._pushed, self._losses))
        self._token_slopes = jax.jit(partial(self._pushed, self._of_tokens))
        self._token_gradients = jax.jit(jax.jacrev(lambda v, b: self._of_tokens(v, b)[0]))
        self._gradients = jax.jit(self._each)

    def vector(self) -> jax.Array:
        """Return the parameters, shape (n,)."""
        return self._params.vector

    def sizes(self) -> dict[str, int]:
        """Return the number of entries of each float leaf by its path."""
        return self._params.sizes

    def examples(self, data: Data, name: str, batch_size: int | None, budget: int) -> Examples:
        """Return a pytree of arrays, a list of batches or an iterable of them as examples."""
        examples = Examples(
            as_batches(data, name, batch_size, budget),
            name=name,
            flatten=flatten,
            batch_size=batch_size,
            memory_budget=budget,
        )
        self.layout.check(examples.get(0), name)
        return examples

    def ridge(self, ridge: Any) -> Any:
        """Return a number, a vector, or a tree of them like the parameters, as number or vector."""
        if isinstance(ridge, numbers.Real):
            return ridge
        if getattr(ridge, "shape", None) in ((), (self.n,)):
            return jnp.asarray(ridge, self.like.dtype)
        spread = jax.tree_util.tree_map(
            lambda p, r: jnp.broadcast_to(jnp.asarray(r, p.dtype), p.shape),
            self._params.restore(self.vector()),
            ridge,
        )
        return self._params.collect(spread, name="ridge")

    def fingerprint(self) -> str:
        """Hash the leaves of the parameters, those that are not differentiated by too."""
        return digest(*jax.tree_util.tree_leaves(self._params.replace(self.vector())))

    def measuring(self, loss: Callable[..., Any]) -> JaxBackend:
        """Return the same with another loss."""
        return JaxBackend(
            loss, self._params.replace(self.vector()), self._outputs, self.layout.mesh
        )

    def losses(self, batch: Batch, *, anew: bool = False) -> Any:
        """Return the loss of each example; `anew` not as it was compiled."""
        with full_precision():
            return (self._losses if anew else self._values)(self.vector(), self._spread(batch))

    def operator(
        self, examples: Examples, curvature: str, weights: np.ndarray | None = None
    ) -> MeanCurvature:
        """Return the weighted curvature over all examples, divided by their number."""
        if curvature == "ggn" and not self.has_outputs:
            raise ValueError(
                "curvature='ggn' needs `outputs`, a function (params, batch) -> outputs; the loss "
                "is then called as loss(outputs, batch). Pass it, or use curvature='hessian' or "
                "'empirical_fisher'."
            )
        w = np.ones(examples.num) if weights is None else weights
        gradient = self.total(examples, w) / examples.num
        return MeanCurvature(self, self._products[curvature], examples, w, gradient)

    def product_bytes(self, batch: Batch, curvature: str) -> int:
        """Ask the compiler for the memory of a product with the curvature of one batch."""
        leaves, _ = flatten(batch)
        size = next(leaf.shape[0] for leaf in leaves if jnp.ndim(leaf) > 0)
        w, block = jnp.ones(size, self.like.dtype), jnp.ones((self.n, 1), self.like.dtype)
        with full_precision():
            lowered = self._products[curvature].lower(self.vector(), self._spread(batch), w, block)
            about = lowered.compile().memory_analysis()
        return int(getattr(about, "temp_size_in_bytes", 0))

    def gradients(self, batch: Batch) -> jax.Array:
        """Return the gradient of each example as a column, shape (n, size)."""
        with full_precision():
            return self._gradients(self.vector(), self._spread(batch))

    def slopes(self, batch: Batch, Z: jax.Array) -> jax.Array:
        """Return the inner products of all gradients with the columns of `Z`: (m, size)."""
        with full_precision():
            return self._slopes(self.vector(), self._spread(batch), Z)

    def token_slopes(self, batch: Batch, Z: jax.Array) -> jax.Array:
        """Return the same for the loss of each token: (m, size, tokens)."""
        with full_precision():
            return self._token_slopes(self.vector(), batch, Z)

    def token_gradients(self, batch: Batch) -> jax.Array:
        """Return the gradient of each token's loss in a batch of one example: (n, tokens)."""
        with full_precision():
            return self._token_gradients(self.vector(), batch).T

    def total(self, examples: Examples, weights: np.ndarray) -> jax.Array:
        """Return ``sum_i w_i g_i``, shape (n,)."""
        result = jnp.zeros_like(self.vector())
        for start, batch in examples.parts():
            w = weights[start : start + examples.size(batch)]
            if np.any(w):
                with full_precision():
                    result = result + self._total(self.vector(), *self.weighted(batch, w))
        return result

    def weighted(self, batch: Batch, w: np.ndarray) -> tuple[Any, jax.Array]:
        """Return a batch and host weights, in the dtype of the parameters, on the devices."""
        return self._spread(batch), self.layout.examples(np.asarray(w, self.like.dtype))

    def _spread(self, batch: Batch) -> Any:
        """Return a batch with its examples cut over the devices."""
        if self.layout.mesh is None:
            return batch
        leaves, rebuild = flatten(batch)
        return rebuild([self.layout.examples(x) for x in leaves])

    def _losses(self, vector: jax.Array, batch: Batch) -> Any:
        losses = _per_example(self._raw_losses(vector, batch))
        # What is no array, or of another shape, is refused by name further on.
        return self.layout.rows(losses) if getattr(losses, "ndim", 0) == 1 else losses

    def _raw_losses(self, vector: jax.Array, batch: Batch) -> Any:
        batch, params = self._spread(batch), self._params.replace(vector)
        if self._outputs is None:
            return self._loss(params, batch)
        return self._loss(self._outputs(params, batch), batch)

    def _of_tokens(self, vector: jax.Array, batch: Batch) -> Any:
        return check_tokens(self._raw_losses(vector, batch))

    def _weighted(self, vector: jax.Array, batch: Batch, w: jax.Array) -> jax.Array:
        return jnp.sum(w * self._losses(vector, batch))

    def _each(self, vector: jax.Array, batch: Batch) -> jax.Array:
        leaves, rebuild = flatten(self._spread(batch))
        rows = [i for i, leaf in enumerate(leaves) if jnp.ndim(leaf) > 0]

        def of_one(vector: jax.Array, *one: jax.Array) -> jax.Array:
            alone = list(leaves)
            for i, leaf in zip(rows, one, strict=True):
                alone[i] = leaf[None]
            return self._losses(vector, rebuild(alone)).sum()

        axes = (None, *(0 for _ in rows))
        gradient = jax.vmap(jax.grad(of_one), in_axes=axes, out_axes=1)
        each: jax.Array = self.layout.rows(gradient(vector, *(leaves[i] for i in rows)))
        return each

    def _pushed(
        self, losses: Callable[..., Any], vector: jax.Array, batch: Batch, Z: jax.Array
    ) -> jax.Array:
        push = jax.linearize(lambda v: losses(v, batch), vector)[1]
        slopes: jax.Array = self.layout.rows(_mapped(push, Z), axis=1)
        return slopes

    def _hessian(
        self, vector: jax.Array, batch: Batch, w: jax.Array, block: jax.Array
    ) -> jax.Array:
        gradient = jax.grad(lambda v: self._weighted(v, batch, w))
        return self._multiplied(jax.linearize(gradient, vector)[1], block)

    def _gauss_newton(
        self, vector: jax.Array, batch: Batch, w: jax.Array, block: jax.Array
    ) -> jax.Array:
        assert self._outputs is not None
        batch = self._spread(batch)
        outputs = partial(self._outputs_at, batch=batch)
        out, push = jax.linearize(outputs, vector)
        pull = jax.linear_transpose(push, vector)
        curve = jax.linearize(
            jax.grad(lambda z: jnp.sum(w * _per_example(self._loss(z, batch)))), out
        )[1]
        return self._multiplied(lambda v: pull(curve(push(v)))[0], block)

    def _outputs_at(self, vector: jax.Array, batch: Batch) -> Any:
        assert self._outputs is not None
        return self._outputs(self._params.replace(vector), batch)

    def _fisher(self, vector: jax.Array, batch: Batch, w: jax.Array, block: jax.Array) -> jax.Array:
        push = jax.linearize(lambda v: self._losses(v, batch), vector)[1]
        pull = jax.linear_transpose(push, vector)
        return self._multiplied(lambda v: pull(w * push(v))[0], block)

    def _multiplied(self, linear: Callable[[jax.Array], jax.Array], block: jax.Array) -> jax.Array:
        lay = self.layout.rows
        products: jax.Array = lay(_mapped(lambda v: lay(linear(lay(v))), block), axis=1).T
        return products


class MeanCurvature(FunctionOperator):
    """``1 / num * sum_i w_i C_i`` over the batches of a data set, with its gradient."""

    def __init__(
        self,
        backend: JaxBackend,
        product: Callable[..., jax.Array],
        examples: Examples,
        weights: np.ndarray,
        gradient: jax.Array,
    ) -> None:
        self.gradient = gradient
        vector = backend.vector()

        def multiply(block: jax.Array) -> jax.Array:
            total = jnp.zeros_like(block)
            for start, batch in examples.parts():
                w = weights[start : start + examples.size(batch)]
                if np.any(w):
                    with full_precision():
                        total = total + product(vector, *backend.weighted(batch, w), block)
            return total / examples.num

        super().__init__(
            lambda v: multiply(v[:, None])[:, 0], backend.n, like=backend.like, matmat=multiply
        )


def _mapped(linear: Callable[[jax.Array], jax.Array], block: jax.Array) -> jax.Array:
    """Return the images of the columns of a block as rows, some at a time."""
    return jax.lax.map(linear, block.T, batch_size=min(CHUNK_SIZE, block.shape[1]))


def _per_example(losses: Any) -> Any:
    """Return one loss for each example: those of its tokens are summed."""
    return losses.sum(axis=1) if getattr(losses, "ndim", None) == 2 else losses


def _widened(leaf: Any) -> Any:
    """Return an array in less than float32 in it, others as they are."""
    low = hasattr(leaf, "dtype") and leaf.dtype in (jnp.bfloat16, jnp.float16)
    return jnp.asarray(leaf, jnp.float32) if low else leaf
