"""How tight the certificate is: the bound over the true error, and how often it falls short.

Random positive semidefinite systems of 300 rows with known eigenvalues, three dampings, and the
answers of several solvers, good and bad. The error is that against the dense solution in float64.
A bound may be 1 at best; below 1 it would be wrong.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from tqdm import tqdm

import lowrank_inverse as li
from benchmarks._report import machine, publish, table

SIZE, RANK = 300, 40
SPECTRA = {
    "i⁻²": 1.0 / np.arange(1, SIZE + 1) ** 2,
    "exp(-i/5)": np.exp(-np.arange(SIZE) / 5.0),
    "step": np.where(np.arange(SIZE) < 30, 1.0, 1e-3),
    "rank 60": np.where(np.arange(SIZE) < 60, 1.0 / np.arange(1, SIZE + 1), 0.0),
}
DAMPINGS = (1e-1, 1e-2, 1e-3)
INVERSES = (None, "uniform", "rpcholesky", "greedy", "gaussian")


def answers(A: np.ndarray, b: np.ndarray, damping: float, seed: int) -> dict[str, np.ndarray]:
    """Approximate solutions to certify."""
    solvers = {
        "Nyström, k = 20": li.Nystrom(rank=20, damping=damping),
        "CG, 3 steps": li.CG(damping=damping, max_steps=3),
        "CG, 15 steps": li.CG(damping=damping, max_steps=15),
        "Nyström-CG, 2 steps": li.NystromCG(rank=20, damping=damping, max_steps=2),
        "Neumann, 10 terms": li.Neumann(damping=damping),
        "zero": li.Identity(scale=1e-30),
    }
    return {name: li.solve(A, b, solver=solver, rng=seed).value for name, solver in solvers.items()}


def ratios(seed: int, dtype: str) -> dict[str, list[tuple[float, float]]]:
    """Bounds over true errors, Euclidean and energy, for each inverse given to the certificate."""
    rng = np.random.default_rng(seed)
    Q = np.linalg.qr(rng.standard_normal((SIZE, SIZE)))[0]
    found: dict[str, list[tuple[float, float]]] = {str(inverse): [] for inverse in INVERSES}
    for eigenvalues in SPECTRA.values():
        A = (Q * eigenvalues) @ Q.T
        A = ((A + A.T) / 2).astype(dtype)
        b = rng.standard_normal(SIZE).astype(dtype)
        for damping in DAMPINGS:
            M = A.astype(np.float64) + damping * np.eye(SIZE)
            exact = np.linalg.solve(M, b.astype(np.float64))
            for x in answers(A, b, damping, seed).values():
                e = x - exact
                true = np.linalg.norm(e), np.sqrt(e @ M @ e)
                for sampling in INVERSES:
                    inverse = None
                    if sampling is not None:
                        approx = li.nystrom(A, RANK, sampling=sampling, rng=seed + 1)
                        inverse = approx.inverse(damping)
                    bounds = li.certify(A, b, x, damping=damping, inverse=inverse)
                    found[str(sampling)].append(
                        (float(bounds.error_bound / true[0]), float(bounds.energy_bound / true[1]))
                    )
    return found


def main(arguments: list[str]) -> int:
    """Print the table and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks certificate", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="matrices a case (default: 5)")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for results")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1; got {options.seeds}")
    rows, results = [], {}
    for dtype in ("float32", "float64"):
        runs = [
            ratios(seed, dtype)
            for seed in tqdm(range(options.seeds), desc=f"certificates, {dtype}", unit="matrix")
        ]
        for sampling in INVERSES:
            values = np.array([pair for run in runs for pair in run[str(sampling)]])
            name = "no inverse" if sampling is None else f"{sampling}, k = {RANK}"
            row = {"bound / error": f"{name}, {dtype}"}
            for column, kind in enumerate(("Euclidean", "energy")):
                middle, high, most = np.quantile(values[:, column], [0.5, 0.9, 1.0])
                row |= {
                    f"{kind}: median": f"{middle:.2f}",
                    "90 %" + " " * column: f"{high:.2f}",
                    "largest" + " " * column: f"{most:.2f}",
                }
            row["violated"] = f"{int(np.sum(np.min(values, axis=1) < 1))} of {len(values)}"
            rows.append(row)
            results[row["bound / error"]] = np.round(values, 4).tolist()
    about = machine("numpy", seeds=f"0…{options.seeds - 1}")
    text = (
        f"{table(rows)}\n\nn = {SIZE}; spectra {', '.join(SPECTRA)}; dampings "
        f"{', '.join(f'{d:.0e}' for d in DAMPINGS)}; six answers each."
    )
    publish(options.output, "certificate", text, about, ratios=results)
    return 0
