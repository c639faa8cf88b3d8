"""Cost of a step of conjugate gradients in JAX: ours, jax.scipy's and lineax's, on one operator.

Every solver makes the same number of steps on the same compiled product, in turn, over several
rounds. The ratios are medians over the rounds. Float64, for in float32 lineax 0.1.1 returns NaN on
the larger operator. "product" is the floor: the product alone, as often
as the steps, in one compiled loop.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import lineax
import numpy as np
from jax.scipy.sparse.linalg import cg as jax_cg
from tqdm import tqdm

import lowrank_inverse as li
from benchmarks._report import machine, publish, table
from lowrank_inverse_jax import GaussNewtonOperator

STEPS = 50
DAMPING = 1e-4

Solve = Callable[[Any, jax.Array], jax.Array]


def matrix_problem(n: int, rng: np.random.Generator) -> tuple[Any, jax.Array, Any]:
    """Make a dense matrix with eigenvalues from 1 to 1e-6."""
    Q = np.linalg.qr(rng.standard_normal((n, n)))[0]
    A = (Q * np.logspace(0, -6, n)) @ Q.T
    data = jnp.asarray((A + A.T) / 2, dtype=jnp.float64)
    return data, jnp.asarray(rng.standard_normal(n), jnp.float64), lambda A: lambda v: A @ v


def network_problem(width: int, rng: np.random.Generator) -> tuple[Any, jax.Array, Any]:
    """Make the Gauss-Newton matrix of a perceptron on a batch of 256, through its operator."""
    params = [
        jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[0]), jnp.float64)
        for shape in ((100, width), (width, width), (width, 10))
    ]
    x = jnp.asarray(rng.standard_normal((256, 100)), jnp.float64)
    y = jnp.asarray(rng.integers(0, 10, 256))

    def outputs(params: Any) -> jax.Array:
        return jnp.tanh(jnp.tanh(x @ params[0]) @ params[1]) @ params[2]

    def loss(outputs: jax.Array) -> jax.Array:
        return -jnp.take_along_axis(jax.nn.log_softmax(outputs), y[:, None], axis=1).mean()

    n = sum(p.size for p in params)

    def product(params: Any) -> Any:
        G = GaussNewtonOperator(loss, outputs, params)
        return lambda v: G @ v

    return params, jnp.asarray(rng.standard_normal(n), jnp.float64), product


def solvers() -> dict[str, Callable[[Any, jax.Array], jax.Array]]:
    """Return what runs STEPS steps, given a product and a right-hand side."""

    def ours(product: Any, b: jax.Array) -> jax.Array:
        A = li.FunctionOperator(product, b.size, like=b)
        return li.cg(A, b, damping=DAMPING, rtol=0.0, max_steps=STEPS).value

    def scipy(product: Any, b: jax.Array) -> jax.Array:
        return jax_cg(lambda v: product(v) + DAMPING * v, b, tol=0.0, maxiter=STEPS)[0]

    def by_lineax(product: Any, b: jax.Array) -> jax.Array:
        A = lineax.FunctionLinearOperator(
            lambda v: product(v) + DAMPING * v,
            jax.eval_shape(lambda: b),
            lineax.positive_semidefinite_tag,
        )
        solver = lineax.CG(rtol=0.0, atol=0.0, max_steps=STEPS)
        return lineax.linear_solve(A, b, solver, throw=False).value

    def floor(product: Any, b: jax.Array) -> jax.Array:
        return jax.lax.fori_loop(0, STEPS, lambda _, v: product(v), b)

    return {"ours": ours, "jax.scipy": scipy, "lineax": by_lineax, "product": floor}


def seconds(run: Callable[[], jax.Array]) -> float:
    """Time one call."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def measure(data: Any, b: jax.Array, product: Any, rounds: int, *, jit: bool) -> dict[str, list]:
    """Time every solver in turn; the first, compiling round is left out under jit only."""
    runs = {}
    for name, solve in solvers().items():

        def function(data: Any, b: jax.Array, solve: Solve = solve) -> jax.Array:
            return solve(product(data), b)

        runs[name] = jax.jit(function) if jit else function
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            elapsed = seconds(lambda run=run: run(data, b))
            if round_ > 0:
                times[name].append(elapsed)
    return times


def main(arguments: list[str]) -> int:
    """Print the table and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks jax-cg", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default: 15)")
    parser.add_argument("--sizes", type=int, nargs=2, default=(3000, 400), metavar=("N", "WIDTH"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for results")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1; got {options.rounds}")
    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(options.seed)
    n, width = options.sizes
    problems = {
        f"matrix, n = {n}": matrix_problem(n, rng),
        f"Gauss-Newton, n = {110 * width + width**2}": network_problem(width, rng),
    }
    rows, found = [], {}
    cases = [(problem, jit) for problem in problems for jit in (True, False)]
    for problem, jit in tqdm(cases, desc="jax-cg", unit="case"):
        rounds = options.rounds if jit else min(options.rounds, 3)
        times = measure(*problems[problem], rounds, jit=jit)
        found[f"{problem}, {'jit' if jit else 'eager'}"] = times
        ratios = {
            name: np.median(np.asarray(times["ours"]) / np.asarray(other))
            for name, other in times.items()
        }
        rows.append(
            {
                f"{STEPS} steps": f"{problem}, {'jit' if jit else 'eager'}",
                "ours, ms a step": f"{1e3 * np.median(times['ours']) / STEPS:.3f}",
                "ours / jax.scipy": f"{ratios['jax.scipy']:.2f}",
                "ours / lineax": f"{ratios['lineax']:.2f}",
                "ours / product": f"{ratios['product']:.2f}",
            }
        )
    text = f"{table(rows)}\n\nMedians of ratios over {options.rounds} rounds (eager: up to 3)."
    about = machine("jax", "lineax", "numpy", device=str(jax.devices()[0]), seed=options.seed)
    publish(options.output, "jax_cg", text, about, seconds=found)
    return 0
