"""Cost of a step of conjugate gradients in JAX: ours, jax.scipy's and lineax's, on one operator.

Every solver makes the same number of steps on the same compiled product. Where the buffers of a
compiled loop lie in memory changes its speed by up to half, and is drawn anew with each process:
so several processes run all the solvers, each in an order of its own, and the table has medians of
the ratios within a process, of CPU time. Float64, for in float32 lineax 0.1.1 returns NaN on the
larger operator. "product" is the floor: the product alone, as often as the steps, in one compiled
loop. The last row is a whole hypergradient, in float32, ours beside jaxopt's: of the perceptron
that ``peers`` has, trained for a while.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import product as pairs
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.sparse.linalg import cg as jax_cg

import lowrank_inverse as li
from benchmarks.harness.experiment import Option, Run, experiment
from benchmarks.harness.report import table
from benchmarks.harness.timing import in_turn
from benchmarks.systems.peers import by_lineax
from lowrank_inverse_jax import GaussNewtonOperator

STEPS, HYPERGRADIENT_STEPS = 50, 20
DAMPING = 1e-4
BATCHES = {"network": 256, "network, large batch": 1024}


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


def ours(product: Any, b: jax.Array) -> jax.Array:
    A = li.FunctionOperator(product, b.size, like=b)
    return li.cg(A, b, damping=DAMPING, rtol=0.0, max_steps=STEPS).value


SOLVERS: dict[str, Callable[[Any, jax.Array], jax.Array]] = {
    "ours": ours,
    "jax.scipy": lambda product, b: jax_cg(
        lambda v: product(v) + DAMPING * v, b, tol=0.0, maxiter=STEPS
    )[0],
    "lineax": lambda product, b: (
        by_lineax(lambda v: product(v) + DAMPING * v, b, rtol=0.0, max_steps=STEPS).value
    ),
    "product": lambda product, b: jax.lax.fori_loop(0, STEPS, lambda _, v: product(v), b),
}


def measure(
    problem: str, n: int, width: int, seed: int, rounds: int, jit: bool
) -> dict[str, float]:
    """Return the median time of every solver; the first, compiling call is left out."""
    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(seed)
    if problem == "matrix":
        data, b, product = matrix_problem(n, rng)
    else:
        data, b, product = network_problem(width, BATCHES[problem], rng)
    runs = {}
    for name in rng.permutation(list(SOLVERS)):

        def solve(data: Any, b: jax.Array, solver: Any = SOLVERS[name]) -> jax.Array:
            return solver(product(data), b)

        function = jax.jit(solve) if jit else solve
        runs[str(name)] = lambda function=function: jax.block_until_ready(function(data, b))
    return median_times(runs, rounds)


def median_times(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Time functions in turn, each called once before; CPU time."""
    times = in_turn(runs, repeats=rounds, clock=time.process_time)
    return {name: float(np.median(found)) for name, found in times.items()}


def hypergradients(seed: int, rounds: int, batch: int, small: bool) -> dict[str, float]:
    """Return the median time of a hypergradient by each library, compiled, at equal steps."""
    from benchmarks.speed import jax_methods
    from benchmarks.speed import measure as in_torch

    problem = in_torch.build("mlp", batch, seed=0, device="cpu", small=small)
    problem.train(100)
    lowest, highest = in_torch.spectrum(problem)
    damping, step = in_torch.damping_and_step(lowest, highest, least=1e-2 * highest)
    numbers = in_torch.arrays(problem)
    _, _, params, w = jax_methods.losses(numbers)
    data = {name: numbers[name] for name in ("x", "y", "outer_x", "outer_y")}
    runs = {}
    for name in np.random.default_rng(seed).permutation(["CG (jax)", "jaxopt CG"]):

        def differentiate(data: Any, params: Any, w: jax.Array, name: str = str(name)) -> jax.Array:
            inner, outer, _, _ = jax_methods.losses({**numbers, **data})
            arguments = inner, outer, damping, step, HYPERGRADIENT_STEPS
            found = jax_methods.function(name, *arguments)(params, w)
            return getattr(found, "grads", found)

        call = jax.jit(differentiate).lower(data, params, w).compile()
        runs[str(name)] = lambda call=call: jax.block_until_ready(call(data, params, w))
    return median_times(runs, rounds) | {"n": problem.n}


@experiment(
    *("jax-cg", __doc__),
    Option("processes", 7, "for each row", least=1),
    Option("rounds", 5, "in each process", least=1),
    Option("sizes", [3000, 400], "order of the matrix, and width of the network", least=1),
    Option("batch", 128, "examples of the hypergradient", least=1),
    packages=("jax", "lineax", "jaxopt", "numpy"),
)
def main(run: Run) -> None:
    options = run.options
    n, width = options.sizes
    titles = {"matrix": f"matrix, n = {n}"}
    for problem, batch in BATCHES.items():
        titles[problem] = f"Gauss-Newton, n = {110 * width + width**2}, batch {batch}"
    rows, seconds = [], {}
    for jit, problem in pairs((True, False), titles):
        settings = {"problem": problem, "n": n, "width": width, "rounds": options.rounds}
        title = f"{titles[problem]}, {'jit' if jit else 'eager'}"
        count = options.processes if jit else min(options.processes, 2)
        cells = {(title, seed): {"seed": seed, "jit": jit, **settings} for seed in range(count)}
        seconds[title] = runs = list(run.each(measure, cells).values())
        rows.append(
            {
                f"{STEPS} steps": title,
                "ours, ms a step": f"{1e3 * np.median([one['ours'] for one in runs]) / STEPS:.2f}",
            }
            | {
                f"ours / {name}": f"{np.median([one['ours'] / one[name] for one in runs]):.2f}"
                for name in ("jax.scipy", "lineax", "product")
            }
            | {"ours / jaxopt": ""}
        )
    given = {"rounds": options.rounds, "batch": options.batch, "small": n < 100}
    cells = {("hypergradient", seed): {"seed": seed, **given} for seed in range(options.processes)}
    seconds["hypergradient"] = runs = list(run.each(hypergradients, cells).values())
    title = (
        f"hypergradient of {HYPERGRADIENT_STEPS}, n = {runs[0]['n']}, batch {options.batch}, jit"
    )
    ours = np.median([one["CG (jax)"] for one in runs])
    rows.append(
        dict.fromkeys(rows[0], "")
        | {f"{STEPS} steps": title}
        | {"ours, ms a step": f"{1e3 * ours / HYPERGRADIENT_STEPS:.2f}"}
        | {"ours / jaxopt": f"{np.median([o['CG (jax)'] / o['jaxopt CG'] for o in runs]):.2f}"}
    )
    run.publish(
        table(rows),
        f"Medians over {options.processes} processes (eager: up to 2), of CPU time.",
        seconds=seconds,
    )
