"""What is measured in JAX: the same problem from the same numbers, ours and jaxopt's."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._measure import MIB, Found, Peak, in_turn, ratio, seconds


def losses(data: Mapping[str, Any]) -> tuple[Any, Any, Any, jax.Array]:
    """Return both losses of a perceptron, its parameters and the weights of the examples."""
    x, y, outer_x, outer_y = (jnp.asarray(data[name]) for name in ("x", "y", "outer_x", "outer_y"))
    flat = [jnp.asarray(data[f"p{i}"]) for i in range(int(data["num_params"]))]

    def outputs(params: Any, x: jax.Array) -> jax.Array:
        for i in range(0, len(params), 2):  # as torch stores them: (out, in)
            x = x @ params[i].T + params[i + 1]
            x = jnp.tanh(x) if i + 2 < len(params) else x
        return x

    def entropies(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logs = jax.nn.log_softmax(outputs(params, x))
        return -jnp.take_along_axis(logs, y[:, None], axis=1)[:, 0]

    def inner(params: Any, w: jax.Array) -> jax.Array:
        return (jax.nn.sigmoid(w) * entropies(params, x, y)).mean()

    def outer(params: Any, w: jax.Array) -> jax.Array:
        return entropies(params, outer_x, outer_y).mean()

    return inner, outer, flat, jnp.asarray(data["w"])


def methods(inner: Any, outer: Any, damping: float, step: float, k: int) -> dict[str, Any]:
    """Return functions of (params, hparams), each compiled."""

    def ours(solver: Any) -> Callable[..., Any]:
        import lowrank_inverse_jax as lij

        return lambda params, w: lij.hypergradient(inner, outer, params, w, solver=solver, rng=0)

    def nystrom() -> Any:
        import lowrank_inverse as li

        return ours(li.Nystrom(rank=k, damping=damping))

    def cg() -> Any:
        import lowrank_inverse as li

        return ours(li.CG(damping=damping, rtol=0.0, max_steps=k))

    def jaxopt_cg() -> Any:
        from jaxopt.implicit_diff import root_vjp
        from jaxopt.linear_solve import solve_cg

        solve = functools.partial(solve_cg, ridge=damping, maxiter=k, tol=0.0)

        def call(params: Any, w: jax.Array) -> jax.Array:
            cotangent, direct = jax.grad(outer, argnums=(0, 1))(params, w)
            return direct + root_vjp(jax.grad(inner), params, (w,), cotangent, solve=solve)[0]

        return call

    return {"Nyström (jax)": nystrom, "CG (jax)": cg, "jaxopt CG": jaxopt_cg}


def compare(
    path: str, method: str, k: int, damping: float, step: float, repeats: int, limit: float
) -> Found:
    """Measure a method on the problem in the file `path`; compilation is not timed."""
    with np.load(path) as data:
        inner, outer, params, w = losses(data)
        reference = data["reference"]

    def compiled(k: int) -> Callable[[], Any]:
        run = jax.jit(methods(inner, outer, damping, step, k)[method]())
        program = run.lower(params, w).compile()
        return lambda: jax.block_until_ready(program(params, w))

    run = compiled(k)
    found: list[Any] = []
    with Peak() as peak:
        first = seconds(lambda: found.append(run()))
    info = getattr(found[0], "info", None)
    answer = np.asarray(getattr(found[0], "grads", found[0]))
    tangents = [jnp.asarray(p) for p in params]
    pull = jax.jit(lambda p, v: jax.jvp(lambda q: jax.grad(inner)(q, w), (p,), (v,))[1])
    jax.block_until_ready(pull(params, tangents))
    runs = {"run": run, "product": lambda: jax.block_until_ready(pull(params, tangents))}
    times = in_turn(runs, "cpu", repeats=repeats, budget=limit / 10)
    return {
        "mib": peak.num_bytes / MIB,
        "first": first,
        "seconds": statistics.median(times["run"]),
        "product": statistics.median(times["product"]),
        "in products": ratio(times, "run", "product"),
        "products": None if info is None else int(info.num_products),
        "error": float(np.linalg.norm(answer - reference) / np.linalg.norm(reference)),
        "times": times,
    }
