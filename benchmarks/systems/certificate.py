"""How tight the certificate is: the bound over the true error, and how often it falls short.

Random positive semidefinite systems of 300 rows with known eigenvalues, three dampings, and the
answers of several solvers, good and bad. The error is that against the dense solution in float64.
A bound may be 1 at best; below 1 it would be wrong.
"""

from __future__ import annotations

from itertools import product

import numpy as np

import lowrank_inverse as li
from benchmarks.harness.experiment import Run, experiment, seeds
from benchmarks.harness.report import table

SIZE, RANK = 300, 40
SPECTRA = {
    "i⁻²": 1.0 / np.arange(1, SIZE + 1) ** 2,
    "exp(-i/5)": np.exp(-np.arange(SIZE) / 5.0),
    "step": np.where(np.arange(SIZE) < 30, 1.0, 1e-3),
    "rank 60": np.where(np.arange(SIZE) < 60, 1.0 / np.arange(1, SIZE + 1), 0.0),
}
DAMPINGS = (1e-1, 1e-2, 1e-3)
INVERSES = ("no inverse", "uniform", "rpcholesky", "greedy", "gaussian")


def answers(A: np.ndarray, b: np.ndarray, damping: float, seed: int) -> list[np.ndarray]:
    """Approximate solutions to certify."""
    solvers = (
        li.Nystrom(rank=20, damping=damping, sampling="uniform"),
        li.CG(damping=damping, max_steps=3),
        li.CG(damping=damping, max_steps=15),
        li.NystromCG(rank=20, damping=damping, sampling="uniform", max_steps=2),
        li.Neumann(damping=damping),
        li.Identity(scale=1e-30),
    )
    return [li.solve(A, b, solver=solver, rng=seed).value for solver in solvers]


def ratios(seed: int, dtype: str) -> dict[str, list[tuple[float, float]]]:
    """Bounds over true errors, Euclidean and energy, for each inverse given to the certificate."""
    rng = np.random.default_rng(seed)
    Q = np.linalg.qr(rng.standard_normal((SIZE, SIZE)))[0]
    found: dict[str, list[tuple[float, float]]] = {inverse: [] for inverse in INVERSES}
    for eigenvalues in SPECTRA.values():
        A = (Q * eigenvalues) @ Q.T
        A = ((A + A.T) / 2).astype(dtype)
        b = rng.standard_normal(SIZE).astype(dtype)
        approximations = {
            sampling: li.nystrom(A, RANK, sampling=sampling, rng=seed + 1)
            for sampling in INVERSES[1:]
        }
        for damping in DAMPINGS:
            M = A.astype(np.float64) + damping * np.eye(SIZE)
            exact = np.linalg.solve(M, b.astype(np.float64))
            inverses = {"no inverse": None}
            inverses |= {name: each.inverse(damping) for name, each in approximations.items()}
            for x, (name, inverse) in product(answers(A, b, damping, seed), inverses.items()):
                e = x - exact
                bounds = li.certify(A, b, x, damping=damping, inverse=inverse)
                energy = float(bounds.energy_bound / np.sqrt(e @ M @ e))
                found[name].append((float(bounds.error_bound / np.linalg.norm(e)), energy))
    return found


@experiment("certificate", __doc__, seeds(5))
def main(run: Run) -> None:
    dtypes = ("float32", "float64")
    found = run.repeated(ratios, {dtype: {"dtype": dtype} for dtype in dtypes}, apart=False)
    rows, results = [], {}
    for dtype, sampling in product(dtypes, INVERSES):
        values = np.array([pair for one in found[dtype] for pair in one[sampling]])
        name = sampling if sampling == "no inverse" else f"{sampling}, k = {RANK}"
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
    run.publish(
        table(rows),
        f"n = {SIZE}; spectra {', '.join(SPECTRA)}; dampings "
        f"{', '.join(f'{d:.0e}' for d in DAMPINGS)}; six answers each.",
        ratios=results,
    )
