"""Cost of a step of conjugate gradients in JAX: ours, jax.scipy's and lineax's, on one operator.

Every solver makes the same number of steps on the same compiled product. Where the buffers of a
compiled loop lie in memory changes its speed by up to half, and is drawn anew with each process:
so several processes run all the solvers, each in an order of its own, and the table has medians of
the ratios within a process. Float64, for in float32 lineax 0.1.1 returns NaN on the larger
operator. "product" is the floor: the product alone, as often as the steps, in one compiled loop.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
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
BATCHES = {"network": 256, "network, large batch": 1024}

Solve = Callable[[Any, jax.Array], jax.Array]
Times = dict[str, list[float]]


def matrix_problem(n: int, rng: np.random.Generator) -> tuple[Any, jax.Array, Any]:
    """Make a dense matrix with eigenvalues from 1 to 1e-6, its eigenvectors by two reflections."""
    A = np.diag(np.logspace(0, -6, n))
    for v in rng.standard_normal((2, n)):
        v = v / np.linalg.norm(v)
        A -= 2 * np.outer(v, v @ A)
        A -= 2 * np.outer(A @ v, v)
    data = jnp.asarray((A + A.T) / 2, dtype=jnp.float64)
    return data, jnp.asarray(rng.standard_normal(n), jnp.float64), lambda A: lambda v: A @ v


def network_problem(width: int, batch: int, rng: np.random.Generator) -> tuple[Any, Any, Any]:
    """Make the Gauss-Newton matrix of a perceptron on a batch, through its operator."""
    params = [
        jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[0]), jnp.float64)
        for shape in ((100, width), (width, width), (width, 10))
    ]
    x = jnp.asarray(rng.standard_normal((batch, 100)), jnp.float64)
    y = jnp.asarray(rng.integers(0, 10, batch))

    def product(data: Any) -> Any:
        params, x, y = data

        def outputs(params: Any) -> jax.Array:
            return jnp.tanh(jnp.tanh(x @ params[0]) @ params[1]) @ params[2]

        def loss(outputs: jax.Array) -> jax.Array:
            return -jnp.take_along_axis(jax.nn.log_softmax(outputs), y[:, None], axis=1).mean()

        G = GaussNewtonOperator(loss, outputs, params)
        return lambda v: G @ v

    n = sum(p.size for p in params)
    return (params, x, y), jnp.asarray(rng.standard_normal(n), jnp.float64), product


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


def measure(problem: str, sizes: tuple[int, int], seed: int, rounds: int, jit: bool) -> Times:
    """Time every solver `rounds` times; the first, compiling round is left out."""
    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(seed)
    n, width = sizes
    if problem == "matrix":
        data, b, product = matrix_problem(n, rng)
    else:
        data, b, product = network_problem(width, BATCHES[problem], rng)
    runs = {}
    for name, solve in solvers().items():

        def function(data: Any, b: jax.Array, solve: Solve = solve) -> jax.Array:
            return solve(product(data), b)

        runs[name] = jax.jit(function) if jit else function
    times: Times = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name in rng.permutation(list(runs)):
            elapsed = seconds(lambda run=runs[name]: run(data, b))
            if round_ > 0:
                times[name].append(elapsed)
    return times


def in_processes(processes: int, *settings: Any) -> Any:
    """Yield the times that each of several fresh processes measured, one after the other."""
    for seed in range(processes):
        context = get_context("spawn")
        with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
            problem, sizes, rounds, jit = settings
            yield pool.submit(measure, problem, sizes, seed, rounds, jit).result()


def main(arguments: list[str]) -> int:
    """Print the table and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks jax-cg", description=__doc__)
    parser.add_argument("--processes", type=int, default=7, help="for each row (default: 7)")
    parser.add_argument("--rounds", type=int, default=5, help="in each process (default: 5)")
    parser.add_argument("--sizes", type=int, nargs=2, default=(3000, 400), metavar=("N", "WIDTH"))
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for results")
    options = parser.parse_args(arguments)
    for name in ("processes", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1; got {getattr(options, name)}")
    n, width = options.sizes
    titles = {"matrix": f"matrix, n = {n}"}
    for problem, batch in BATCHES.items():
        titles[problem] = f"Gauss-Newton, n = {110 * width + width**2}, batch {batch}"
    cases = [(problem, True) for problem in titles] + [(problem, False) for problem in titles]
    counts = [options.processes if jit else min(options.processes, 2) for _, jit in cases]
    progress = tqdm(desc="jax-cg", unit="process", total=sum(counts))
    rows, found = [], {}
    for (problem, jit), count in zip(cases, counts, strict=True):
        runs = []
        for times in in_processes(count, problem, options.sizes, options.rounds, jit):
            runs.append({name: float(np.median(found)) for name, found in times.items()})
            progress.update()
        title = f"{titles[problem]}, {'jit' if jit else 'eager'}"
        found[title] = runs
        ratio = {name: np.median([run["ours"] / run[name] for run in runs]) for name in runs[0]}
        rows.append(
            {
                f"{STEPS} steps": title,
                "ours, ms a step": f"{1e3 * np.median([run['ours'] for run in runs]) / STEPS:.2f}",
                "ours / jax.scipy": f"{ratio['jax.scipy']:.2f}",
                "ours / lineax": f"{ratio['lineax']:.2f}",
                "ours / product": f"{ratio['product']:.2f}",
            }
        )
    progress.close()
    text = f"{table(rows)}\n\nMedians over {options.processes} processes (eager: up to 2)."
    about = machine("jax", "lineax", "numpy", device=str(jax.devices()[0]))
    publish(options.output, "jax_cg", text, about, seconds=found)
    return 0
