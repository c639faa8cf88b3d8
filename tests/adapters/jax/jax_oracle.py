"""A small network in nested pytrees, and Eq. (3) written out with dense derivatives."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from lowrank_inverse_jax import hypergradient
from tests.conftest import x64

NUM_EXAMPLES, NUM_FEATURES, NUM_HIDDEN, NUM_OUTPUTS = 6, 3, 2, 2
N = NUM_HIDDEN * (NUM_FEATURES + 1) + NUM_OUTPUTS * (NUM_HIDDEN + 1)
LOG_DECAY = -0.7

Tree = Any


def forward(params: Tree, x: Any) -> Any:
    """Apply a network of one hidden layer; what is no array of floats in `params` is ignored."""
    weight, bias = params["out"]
    return jnp.tanh(x @ params["hidden"]["weight"] + params["hidden"]["bias"]) @ weight + bias


def data_term(params: Tree, hparams: Tree, x: Any, y: Any) -> Any:
    """Return the mean of squared errors, each with its weight."""
    errors = jnp.sum((forward(params, x) - y) ** 2, axis=1)
    return jnp.mean(errors / (1 + jnp.exp(-hparams["weights"])))


def squares(params: Tree) -> Any:
    """Return half the sum of squares of all float leaves of the network."""
    leaves = jax.tree_util.tree_leaves([params["hidden"], params["out"]])
    return 0.5 * sum(jnp.sum(leaf**2) for leaf in leaves)


def inner(params: Tree, hparams: Tree, x: Any, y: Any) -> Any:
    """Add a weight decay to the data term: the hyperparameters are example weights and decay."""
    return data_term(params, hparams, x, y) + jnp.exp(hparams["log_decay"]) * squares(params)


def outer(params: Tree, hparams: Tree, x: Any, y: Any) -> Any:
    """Return an error on other data, and a term of the hyperparameters themselves."""
    error = jnp.mean((forward(params, x) - y) ** 2)
    return error + 0.05 * jnp.sum(hparams["weights"] ** 2)


class Dense(NamedTuple):
    """All that Eq. (3) is made of, in NumPy's float64."""

    hessian: np.ndarray
    mixed: np.ndarray
    inner_grad: np.ndarray
    outer_grad: np.ndarray
    direct: np.ndarray

    def ihvp(self, damping: Any = 0.0) -> np.ndarray:
        """Solve with the damping, a number or one for each parameter, on the diagonal."""
        damped = self.hessian + np.diag(np.broadcast_to(damping, self.outer_grad.shape))
        return np.linalg.solve(damped, self.outer_grad)

    def at(self, q: np.ndarray) -> np.ndarray:
        """Return the hypergradient with `q` in the place of the solution."""
        return self.direct - self.mixed.T @ q


@functools.partial(jax.jit, static_argnums=(0, 1))
def _derivatives(inner: Any, outer: Any, params: Tree, hparams: Tree, *args: Any) -> Any:
    theta, to_params = ravel_pytree(params)
    phi, to_hparams = ravel_pytree(hparams)
    inner_args, outer_args = args

    def f(t: Any, p: Any) -> Any:
        return inner(to_params(t), to_hparams(p), *inner_args)

    def g(t: Any, p: Any) -> Any:
        return outer(to_params(t), to_hparams(p), *outer_args)

    gradient = jax.grad(f)
    return (
        jax.hessian(f)(theta, phi),
        jax.jacrev(gradient, argnums=1)(theta, phi),
        gradient(theta, phi),
        *jax.grad(g, argnums=(0, 1))(theta, phi),
    )


def dense(
    inner: Any, outer: Any, params: Tree, hparams: Tree, inner_args: Any = (), outer_args: Any = ()
) -> Dense:
    """Differentiate two functions of trees of floats on flat vectors, in float64."""
    with x64(True):
        trees = jax.tree_util.tree_map(
            lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)),
            (params, hparams, inner_args, outer_args),
        )
        return Dense(*map(np.asarray, _derivatives(inner, outer, *trees)))


class Problem:
    """Weighted regression by a network in one dtype, the same numbers in each."""

    def __init__(self, dtype: str = "float64", seed: int = 3) -> None:
        rng = np.random.default_rng(seed)

        def draw(*shape: int) -> Any:
            return jnp.asarray(rng.standard_normal(shape).astype(np.float32), dtype)

        self.dtype = dtype
        self.params: Tree = {
            "hidden": {"weight": draw(NUM_FEATURES, NUM_HIDDEN), "bias": draw(NUM_HIDDEN)},
            "out": (draw(NUM_HIDDEN, NUM_OUTPUTS), draw(NUM_OUTPUTS)),
        }
        self.hparams: Tree = {
            "weights": jnp.asarray(np.linspace(-1, 1, NUM_EXAMPLES, dtype=np.float32), dtype),
            "log_decay": jnp.asarray(np.float32(LOG_DECAY), dtype),
        }
        x = draw(NUM_EXAMPLES, NUM_FEATURES)
        # Near a fit, where the Hessian is nearly that of Gauss-Newton.
        noise = np.float32(0.1) * draw(NUM_EXAMPLES, NUM_OUTPUTS)
        self.inner_args = (x, forward(self.params, x) + noise)
        self.outer_args = (draw(NUM_EXAMPLES, NUM_FEATURES), draw(NUM_EXAMPLES, NUM_OUTPUTS))

    def hypergradient(self, **options: Any) -> Any:
        """Call the function under test, with any of its arguments replaced."""
        arguments: dict[str, Any] = {
            "inner_loss": inner,
            "outer_loss": outer,
            "params": self.params,
            "hparams": self.hparams,
            "inner_args": self.inner_args,
            "outer_args": self.outer_args,
            "chunk_size": 1,  # fewer shapes to compile for where nothing is jitted
        }
        return hypergradient(**{**arguments, **options})

    def loss(self, params: Tree) -> Any:
        """Return the inner loss at these hyperparameters."""
        return inner(params, self.hparams, *self.inner_args)

    def dense(self, **options: Any) -> Dense:
        """Return the dense derivatives, with losses or trees replaced."""
        arguments: dict[str, Any] = {
            "inner": inner,
            "outer": outer,
            "params": self.params,
            "hparams": self.hparams,
            "inner_args": self.inner_args,
            "outer_args": self.outer_args,
        }
        return dense(**{**arguments, **options})


def flat(tree: Tree) -> np.ndarray:
    """Return the leaves one after the other in NumPy's float64."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree_util.tree_leaves(tree)]
    return np.concatenate([leaf.reshape(-1) for leaf in leaves])


def relative(found: Any, wanted: Any) -> float:
    """Return the relative error of one tree, or flat vector, against another."""
    found, wanted = flat(found), flat(wanted)
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


class Counted:
    """A function that counts how often Python runs it: under ``jax.jit``, how often it is traced.

    Equal to itself alone, so that jax takes it for one function.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.calls = function, 0

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.function(*args)


@contextlib.contextmanager
def compilations() -> Iterator[list[str]]:
    """Collect the names of what XLA compiles in the block."""
    found: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            if message.startswith("Finished XLA compilation of"):
                found.append(message.split()[4])

    logger, handler = logging.getLogger("jax"), Handler()
    logger.addHandler(handler)
    logger.propagate = False
    try:
        with jax.log_compiles():
            yield found
    finally:
        logger.removeHandler(handler)
        logger.propagate = True
