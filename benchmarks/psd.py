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

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import lowrank_inverse as li
from benchmarks._psd_peers import MAX_STEPS, PEERS, is_there
from benchmarks._report import machine, publish, table

SAMPLINGS = ("uniform", "diagonal_squared", "greedy", "rpcholesky", "gaussian")
GROUP, GRID, NUM_LARGE = 30, 32, 8
AUTO = "ours, RPCholesky, rank auto"
FALLING = ("smile", "spiral", "ridge")


@dataclass(frozen=True)
class System:
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


def solver_at(rank: Any, sampling: str, damping: float, rtol: float) -> li.NystromCG:
    """Return the settings of one column of the table."""
    return li.NystromCG(
        rank=rank, damping=damping, sampling=sampling, rtol=rtol, max_steps=MAX_STEPS
    )


def measured(system: System, b: np.ndarray, rtol: float, run: Callable[[], Any]) -> dict[str, Any]:
    """Time `run`, and compute its residual."""
    start = time.perf_counter()
    try:
        x, steps, *rest = run()
    except Exception as error:  # a peer that fails is a result, too
        return {"failed": f"{type(error).__name__}: {error}"}
    seconds = time.perf_counter() - start
    r = b - (system.matrix @ x + system.damping * x)
    residual = float(np.linalg.norm(r) / np.linalg.norm(b))
    met = bool(residual <= 1.001 * rtol)
    rank = int(rest[0]) if rest and rest[0] is not None else None
    return {"steps": steps, "seconds": seconds, "residual": residual, "met": met, "rank": rank}


def by_sampling(
    system: System, b: np.ndarray, rank: int, rtol: float, seed: int
) -> dict[str, dict[str, Any]]:
    """Measure CG and each choice of columns."""
    solvers: dict[str, Any] = {"CG": li.CG(damping=system.damping, rtol=rtol, max_steps=MAX_STEPS)}
    for sampling in SAMPLINGS:
        solvers[sampling] = solver_at(rank, sampling, system.damping, rtol)
    return {
        name: measured(system, b, rtol, partial(ours, solver, system, b, seed))
        for name, solver in solvers.items()
    }


def against_peers(
    system: System, b: np.ndarray, rank: int, rtol: float, seed: int, peers: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Measure a rank that grows, and every peer: with a rank, at `rank` and at what that found."""
    auto = solver_at("auto", "rpcholesky", system.damping, rtol)
    results = {AUTO: measured(system, b, rtol, partial(ours, auto, system, b, seed))}
    for name, (_, has_rank, run) in peers.items():
        arguments = system.matrix, b, system.damping, rtol
        if not has_rank:
            run(system.matrix, np.zeros_like(b), system.damping, rtol, rank)  # compiles, if it does
            results[name] = measured(system, b, rtol, partial(run, *arguments, rank))
            continue
        for k, label in ((rank, f"k = {rank}"), (results[AUTO]["rank"], "k as ours")):
            results[f"{name}, {label}"] = measured(system, b, rtol, partial(run, *arguments, k))
    return results


def shown_steps(result: dict[str, Any]) -> str:
    """Steps, or that they were not enough."""
    return str(result["steps"]) if result["met"] else f">{result['steps']}"


def shown_time(result: dict[str, Any]) -> str:
    """Seconds and steps, and the residual where it is above the tolerance."""
    if "failed" in result:
        return result["failed"].split(":")[0]
    text = f"{result['seconds']:.2f} s, {result['steps']}"
    return text if result["met"] else f"{text}, only {result['residual']:.0e}"


def main(arguments: list[str]) -> int:
    """Print both tables and write JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks psd",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", type=int, default=3000, help="order n (default: 3000)")
    parser.add_argument("--rank", type=int, default=300, help="columns (default: 300)")
    parser.add_argument("--rtol", type=float, default=1e-8, help="tolerance (default: 1e-8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for results")
    options = parser.parse_args(arguments)
    if options.size < 100 or not 1 <= options.rank <= options.size:
        given = f"{options.size} and {options.rank}"
        parser.error(f"--size must be at least 100 and --rank from 1 to it; got {given}")
    present = {name: peer for name, peer in PEERS.items() if is_there(peer[0])}
    if is_there("jax"):
        import jax

        jax.config.update("jax_enable_x64", True)
    seed, rtol = options.seed, options.rtol
    problems = systems(options.size, seed)
    steps: dict[str, dict[str, Any]] = {}
    times: dict[str, dict[str, Any]] = {}
    for _, _, run in present.values():  # what a library loads at its first call is not timed
        run(np.eye(50), np.ones(50), 0.1, rtol, 5)
    for name, system in tqdm(problems.items(), desc="psd", unit="system"):
        n = len(system.matrix)
        b = np.random.default_rng(seed + 1).standard_normal(n)
        rank = min(options.rank, n)
        steps[name] = by_sampling(system, b, rank, rtol, seed)
        if name in FALLING:
            times[name] = {
                "ours, CG": steps[name]["CG"],
                f"ours, RPCholesky, k = {rank}": steps[name]["rpcholesky"],
                **against_peers(system, b, rank, rtol, seed, present),
            }
    step_rows = [
        {
            "PCG steps": name,
            "n": str(len(problems[name].matrix)),
            "damping": f"{problems[name].damping:.0e}",
            **{column: shown_steps(result) for column, result in steps[name].items()},
        }
        for name in problems
    ]
    time_rows = [
        {"time and steps": solver, **{name: shown_time(times[name][solver]) for name in FALLING}}
        for solver in times[FALLING[0]]
    ]
    absent = [name for name in PEERS if name not in present]
    ranks = ", ".join(
        f"{name} {times[name]['ours, RPCholesky, rank auto']['rank']}" for name in FALLING
    )
    text = (
        f"{table(step_rows)}\n\n{table(time_rows)}\n\n"
        f"Relative residual {rtol:.0e}, at most {MAX_STEPS} steps; preconditioners of "
        f"{options.rank} columns. Rank auto: {ranks}.\n"
        f"Not installed: {', '.join(absent) or 'none'}."
    )
    about = machine(
        *("numpy", "scipy", "torch", "jax", "lineax", "linear_operator", "rlaopt"), seed=seed
    )
    publish(options.output, "psd", text, about, steps=steps, times=times, absent=absent)
    return 0
