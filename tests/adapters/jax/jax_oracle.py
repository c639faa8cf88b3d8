"""The problem of both adapters in jax, with what is seen of its compilation."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from lowrank_inverse_jax import hypergradient
from tests.adapters.shared import problem as shared
from tests.adapters.shared.frameworks import Jax, Tree
from tests.adapters.shared.problem import Dense, inner, outer
from tests.conftest import x64


@functools.partial(jax.jit, static_argnums=(0, 1))
def _derivatives(inner: Any, outer: Any, params: Tree, hparams: Tree) -> Any:
    theta, to_params = ravel_pytree(params)
    phi, to_hparams = ravel_pytree(hparams)

    def f(t: Any, p: Any) -> Any:
        return inner(to_params(t), to_hparams(p))

    def g(t: Any, p: Any) -> Any:
        return outer(to_params(t), to_hparams(p))

    gradient = jax.grad(f)
    return (
        jax.hessian(f)(theta, phi),
        jax.jacrev(gradient, argnums=1)(theta, phi),
        gradient(theta, phi),
        *jax.grad(g, argnums=(0, 1))(theta, phi),
    )


def dense(inner: Any, outer: Any, params: Tree, hparams: Tree) -> Dense:
    """Differentiate two functions of any pytrees of floats on flat vectors, in float64."""
    with x64(True):
        trees = jax.tree_util.tree_map(
            lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), (params, hparams)
        )
        return Dense(*map(np.asarray, _derivatives(inner, outer, *trees)))


class Problem(shared.Problem):
    """The shared problem, its data handed over as arguments of the losses."""

    def __init__(self, dtype: str = "float64") -> None:
        super().__init__(Jax(), dtype)

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

    def dense(self) -> Dense:
        """Return the dense derivatives."""
        return shared.oracle()


def flat(tree: Tree) -> np.ndarray:
    """Return the leaves of any pytree one after the other in NumPy's float64."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree_util.tree_leaves(tree)]
    return np.concatenate([leaf.reshape(-1) for leaf in leaves])


def relative(found: Any, wanted: Any) -> float:
    """Return the relative error of one pytree, or flat vector, against another."""
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


def precisions(jaxpr: Any) -> list[Any]:
    """Precisions of all matrix products in a jaxpr and in what it calls."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(equation.params["precision"])
        for value in equation.params.values():
            for one in value if isinstance(value, tuple) else (value,):
                inside = getattr(one, "jaxpr", one)
                if hasattr(inside, "eqns"):
                    found += precisions(inside)
    return found
