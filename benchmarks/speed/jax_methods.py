"""The same problem in JAX from the same numbers, ours and jaxopt's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness.processes import Found
from benchmarks.harness.timing import MIB
from benchmarks.speed.jax_networks import OUTPUTS


def losses(data: Mapping[str, Any]) -> tuple[Any, Any, Any, jax.Array]:
    """Return both losses of a network, its parameters and the weights of the examples."""
    x, y, outer_x, outer_y = (jnp.asarray(data[name]) for name in ("x", "y", "outer_x", "outer_y"))
    flat = [jnp.asarray(data[f"p{i}"]) for i in range(int(data["num_params"]))]

    outputs = OUTPUTS[str(data.get("model", "mlp"))]

    def entropies(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logs = jax.nn.log_softmax(outputs(params, x))
        return -jnp.take_along_axis(logs, y[:, None], axis=1)[:, 0]

    def inner(params: Any, w: jax.Array) -> jax.Array:
        return (jax.nn.sigmoid(w) * entropies(params, x, y)).mean()

    def outer(params: Any, w: jax.Array) -> jax.Array:
        return entropies(params, outer_x, outer_y).mean()

    return inner, outer, flat, jnp.asarray(data["w"])


def function(
    method: str, inner: Any, outer: Any, damping: float, step: float, k: int
) -> Callable[[Any, jax.Array], Any]:
    """Return a method as a function of (params, hparams)."""
    if method == "jaxopt CG":
        from jaxopt.implicit_diff import root_vjp
        from jaxopt.linear_solve import solve_cg

        solve = functools.partial(solve_cg, ridge=damping, maxiter=k, tol=0.0)

        def call(params: Any, w: jax.Array) -> jax.Array:
            cotangent, direct = jax.grad(outer, argnums=(0, 1))(params, w)
            return direct + root_vjp(jax.grad(inner), params, (w,), cotangent, solve=solve)[0]

        return call
    import lowrank_inverse as li
    import lowrank_inverse_jax as lij

    cg = li.CG(damping=damping, rtol=0.0, max_steps=k)
    nystrom = li.Nystrom(rank=k, damping=damping, sampling="uniform")
    solver = cg if method.startswith("CG") else nystrom
    return lambda params, w: lij.hypergradient(inner, outer, params, w, solver=solver, rng=0)


def measure(
    path: str,
    method: str,
    k: int,
    damping: float,
    step: float,
    repeats: int,
    limit: float,
    further: bool = True,
) -> Found:
    """Measure a method on the problem in the file `path`; compilation is not timed."""
    from benchmarks.speed.measure import timed

    with np.load(path) as data:
        inner, outer, params, w = losses(data)
        reference = data.get("reference")
    hvp = jax.jit(lambda p, v: jax.jvp(lambda q: jax.grad(inner)(q, w), (p,), (v,))[1])

    held = {}

    def make(k: int) -> Callable[[], Any]:
        run = jax.jit(function(method, inner, outer, damping, step, k))
        program = run.lower(params, w).compile()
        held[k] = program.memory_analysis().temp_size_in_bytes / MIB
        return lambda: jax.block_until_ready(program(params, w))

    def product() -> Callable[[], Any]:
        jax.block_until_ready(hvp(params, params))
        return lambda: jax.block_until_ready(hvp(params, params))

    limits = {"repeats": repeats, "limit": limit, "further": further}
    found = timed(make, k, product, reference=reference, **limits)
    return found | {"n": sum(p.size for p in params), "program mib": held[k]}
