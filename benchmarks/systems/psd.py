"""Positive semidefinite systems: how many steps each choice of columns leaves, and how long.

Three matrices of order n whose spectrum falls, and two on which low rank does not help.

* smile, spiral: Gaussian kernels of bandwidth 0.2 and 0.02 between points that draw a face and a
  spiral, after Y. Chen, E. N. Epperly, J. A. Tropp, R. J. Webber. Randomly pivoted Cholesky:
  Practical approximation of a kernel matrix with few entry evaluations. Comm. Pure Appl. Math. 78,
  2025, and the examples published with it.
* ridge: X.T X for X with singular values 1, 1/2, 1/3, ...; features come in groups of 30 that are
  mixed within themselves, so that the diagonal falls as the eigenvalues do.
* poisson: the five-point Laplacian of a 32 × 32 grid. step: 8 eigenvalues 1, the others 1e-3.

The damping is 1e-7 n for the kernels, 1e-8 for the ridge, and 1e-4 for the last two. Steps count
until the relative residual is at most the tolerance; for a rank given, preconditioners have that
many columns. Times include the making of the preconditioner. Every residual is computed anew.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import lowrank_inverse as li
from benchmarks.harness.experiment import SEED, Option, Run, experiment
from benchmarks.harness.processes import Found
from benchmarks.harness.report import table
from benchmarks.harness.timing import seconds
from benchmarks.systems.peers import MAX_STEPS, PEERS, is_there

SAMPLINGS = ("uniform", "diagonal_squared", "greedy", "rpcholesky", "gaussian")
GROUP, GRID, NUM_LARGE = 30, 32, 8
AUTO = "ours, RPCholesky, rank auto"
FALLING = ("smile", "spiral", "ridge")


class System(NamedTuple):
    """A matrix and its damping."""

    matrix: np.ndarray
    damping: float


def smile_points(n: int, rng: np.random.Generator) -> np.ndarray:
    """Two eyes of √n points in discs, a mouth of n / 10 on a parabola, the rest on a circle."""
    eye, mouth = int(np.ceil(n**0.5)), n // 10
    parts = []
    for centre in (-4.0, 4.0):
        radius, angle = np.sqrt(rng.random(eye)), 2 * np.pi * rng.random(eye)
        parts.append([centre + radius * np.cos(angle), 4 + radius * np.sin(angle)])
    x = np.linspace(-5, 5, mouth)
    parts.append([x, x**2 / 16 - 5])
    angle = np.linspace(0, 2 * np.pi, n - 2 * eye - mouth)
    parts.append([10 * np.cos(angle), 10 * np.sin(angle)])
    return np.concatenate([np.stack(part, axis=1) for part in parts])


def spiral_points(n: int) -> np.ndarray:
    """Points of radius exp(-n (t / n)^1.5 / 1000) at the angles t / 200, t = 0 … n - 1."""
    t = np.arange(n)
    radius = np.exp(-1e-3 * n * (t / n) ** 1.5)
    return radius[:, None] * np.stack([np.cos(t / 200), np.sin(t / 200)], axis=1)


def ridge_matrix(n: int, rng: np.random.Generator) -> np.ndarray:
    """Make the matrix of a ridge regression with eigenvalues 1 / i² and groups of features."""
    A = np.zeros((n, n))
    for start in range(0, n, GROUP):
        stop = min(start + GROUP, n)
        Q = np.linalg.qr(rng.standard_normal((stop - start, stop - start)))[0]
        eigenvalues = 1 / np.arange(start + 1, stop + 1) ** 2.0
        A[start:stop, start:stop] = (Q * eigenvalues) @ Q.T
    order = rng.permutation(n)
    return A[np.ix_(order, order)]


def systems(n: int, seed: int) -> dict[str, System]:
    """Return the five systems."""
    rng = np.random.default_rng(seed)

    def kernel(X: np.ndarray, bandwidth: float) -> np.ndarray:
        K = li.KernelOperator(X, lengthscale=bandwidth).columns(np.arange(len(X)))
        return (K + K.T) / 2

    line = 2 * np.eye(GRID) - np.eye(GRID, k=1) - np.eye(GRID, k=-1)
    order = GRID**2
    Q = np.linalg.qr(rng.standard_normal((order, order)))[0]
    step = (Q * np.where(np.arange(order) < NUM_LARGE, 1.0, 1e-3)) @ Q.T
    found = {
        "smile": System(kernel(smile_points(n, rng), 0.2), 1e-7 * n),
        "spiral": System(kernel(spiral_points(n), 0.02), 1e-7 * n),
        "ridge": System(ridge_matrix(n, rng), 1e-8),
        "poisson": System(np.kron(line, np.eye(GRID)) + np.kron(np.eye(GRID), line), 1e-4),
        "step": System((step + step.T) / 2, 1e-4),
    }
    return {
        name: System(np.ascontiguousarray((s.matrix + s.matrix.T) / 2), s.damping)
        for name, s in found.items()
    }


def ours(solver: Any, system: System, b: np.ndarray, seed: int) -> tuple[np.ndarray, int, Any]:
    """Solve, and return the solution, the steps, and the rank of the preconditioner."""
    inverse = solver.prepare(system.matrix, rng=seed)
    solution = inverse.solve(b)
    return solution.value, int(solution.num_steps), inverse.rank


def measured(system: System, b: np.ndarray, rtol: float, run: Callable[[], Any]) -> Found:
    """Time `run`, and compute its residual."""
    found: list[Any] = []
    try:
        elapsed = seconds(lambda: found.extend(run()))
    except Exception as error:  # a peer that fails is a result, too
        return {"failed": f"{type(error).__name__}: {error}"}
    x, steps, *rest = found
    r = b - (system.matrix @ x + system.damping * x)
    residual = float(np.linalg.norm(r) / np.linalg.norm(b))
    rank = int(rest[0]) if rest and rest[0] is not None else None
    met = bool(residual <= 1.001 * rtol)
    return {"steps": steps, "seconds": elapsed, "residual": residual, "met": met, "rank": rank}


def compare(
    system: System, peers: dict[str, Any], *, name: str, rank: int, rtol: float, seed: int
) -> dict[str, dict[str, Found]]:
    """Measure CG and each choice of columns; on a spectrum that falls also each peer.

    A peer with a rank is measured at `rank`, and at what a rank that grows has found.
    """
    n, damping = len(system.matrix), system.damping
    b, k = np.random.default_rng(seed + 1).standard_normal(n), min(rank, n)
    shared: Found = {"damping": damping, "rtol": rtol, "max_steps": MAX_STEPS}

    def by(solver: Any) -> Found:
        return measured(system, b, rtol, partial(ours, solver, system, b, seed))

    steps = {"CG": by(li.CG(**shared))}
    for sampling in SAMPLINGS:
        steps[sampling] = by(li.NystromCG(rank=k, sampling=sampling, **shared))
    if name not in FALLING:
        return {"steps": steps}
    auto = by(li.NystromCG(rank="auto", sampling="rpcholesky", **shared))
    times = {"ours, CG": steps["CG"], f"ours, RPCholesky, k = {k}": steps["rpcholesky"], AUTO: auto}
    for peer, (_, has_rank, run) in peers.items():
        if not has_rank:  # compiles, if it does
            run(system.matrix, np.zeros_like(b), damping, rtol, k)
        ranks = {f"{peer}, k = {k}": k, f"{peer}, k as ours": auto["rank"]}
        for label, size in (ranks if has_rank else {peer: k}).items():
            solve = partial(run, system.matrix, b, damping, rtol, size)
            times[label] = measured(system, b, rtol, solve)
    return {"steps": steps, "times": times}


def shown_steps(result: Found) -> str:
    """Steps, or that they were not enough."""
    return str(result["steps"]) if result["met"] else f">{result['steps']}"


def shown_time(result: Found) -> str:
    """Seconds and steps, and the residual where it is above the tolerance."""
    if "failed" in result:
        return result["failed"].split(":")[0]
    text = f"{result['seconds']:.2f} s, {result['steps']}"
    return text if result["met"] else f"{text}, only {result['residual']:.0e}"


@experiment(
    *("psd", __doc__),
    Option("size", 3000, "order n", least=100),
    Option("rank", 300, "columns", least=1),
    Option("rtol", 1e-8, "tolerance"),
    SEED,
    packages=("numpy", "scipy", "torch", "jax", "lineax", "linear_operator", "rlaopt"),
)
def main(run: Run) -> None:
    options = run.options
    seed, rtol = options.seed, options.rtol
    present = {name: peer for name, peer in PEERS.items() if is_there(peer[0])}
    if is_there("jax"):
        import jax

        jax.config.update("jax_enable_x64", True)
    for _, _, peer in present.values():  # what a library loads at its first call is not timed
        peer(np.eye(50), np.ones(50), 0.1, rtol, 5)
    steps, times = {}, {}
    problems = systems(options.size, seed)
    for name, system in problems.items():
        settings = {"name": name, "rank": options.rank, "rtol": rtol, "seed": seed}
        cell = f"{name}, n = {len(system.matrix)}"
        found = run.each(partial(compare, system, present), {cell: settings}, apart=False)[cell]
        steps[name] = found["steps"]
        if name in FALLING:
            times[name] = found["times"]
    step_rows = [
        {
            "PCG steps": name,
            "n": str(len(system.matrix)),
            "damping": f"{system.damping:.0e}",
            **{column: shown_steps(result) for column, result in steps[name].items()},
        }
        for name, system in problems.items()
    ]
    time_rows = [
        {"time and steps": solver, **{name: shown_time(times[name][solver]) for name in FALLING}}
        for solver in times[FALLING[0]]
    ]
    absent = [name for name in PEERS if name not in present]
    ranks = ", ".join(f"{name} {times[name][AUTO]['rank']}" for name in FALLING)
    run.publish(
        table(step_rows),
        table(time_rows),
        f"Relative residual {rtol:.0e}, at most {MAX_STEPS} steps; preconditioners of "
        f"{options.rank} columns. Rank auto: {ranks}.\nNot installed: "
        f"{', '.join(absent) or 'none'}.",
        **{"steps": steps, "times": times, "absent": absent},
    )
