"""How accurate the damped inverse is with columns in float32.

A symmetric matrix with known eigenvalues, 50 of its columns, and a right-hand side in its range:
the case in which ``1 / damping`` magnifies rounding the most. The error is that against the same
Nyström inverse in float64, the median over seeds. Eq. 6 is the paper's formula as it stands.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

import lowrank_inverse as li
from benchmarks._report import machine, publish, table

SIZE, RANK = 1500, 50
ROW_CASES = (("network", 1e-1), ("network", 1e-2), ("network", 1e-3), ("i⁻²", 1e-4), ("exp", 1e-4))


def spectrum(name: str, rng: np.random.Generator) -> np.ndarray:
    """Eigenvalues: forty that decay from 10 over a small bulk, powers, or exponentials."""
    i = np.arange(SIZE)
    if name == "network":
        return np.concatenate([10 * np.exp(-i[:40] / 8), 1e-3 * rng.random(SIZE - 40) ** 3])
    return 1 / (i + 1.0) ** 2 if name == "i⁻²" else np.exp(-i / 4)


def equation_6(C: np.ndarray, K: np.ndarray, damping: float, v: np.ndarray) -> np.ndarray:
    """Invert by Eq. 6 in the dtype of the columns."""
    rho = C.dtype.type(damping)
    return v / rho - C @ np.linalg.solve(C[K] + C.T @ C / rho, C.T @ v) / rho**2


FORMS: dict[str, Callable[[np.ndarray, np.ndarray, float, np.ndarray], np.ndarray]] = {
    "Eq. 6 in float32": lambda H, K, rho, v: equation_6(H[:, K], K, rho, v),
    "stored (default)": lambda H, K, rho, v: li.nystrom(H, indices=K).inverse(rho) @ v,
    "Algorithm 1, chunk 1": lambda H, K, rho, v: (
        li.nystrom(H, indices=K).inverse(rho, chunk_size=1) @ v
    ),
    "chunked, chunk 5": lambda H, K, rho, v: (
        li.chunked_inverse(H, K, damping=rho, chunk_size=5) @ v
    ),
    "streamed": lambda H, K, rho, v: li.streamed_inverse(H, K, damping=rho, chunk_size=RANK) @ v,
}


def errors(case: tuple[str, float], seed: int) -> dict[str, float]:
    """Relative error of each form for one case."""
    name, damping = case
    rng = np.random.default_rng(seed)
    Q = np.linalg.qr(rng.standard_normal((SIZE, SIZE)))[0]
    H = (Q * spectrum(name, rng)) @ Q.T
    H = (H + H.T) / 2
    K = rng.choice(SIZE, RANK, replace=False)
    v = H @ rng.standard_normal(SIZE)
    exact = li.nystrom(H, indices=K).inverse(damping) @ v
    H32, v32 = H.astype(np.float32), v.astype(np.float32)
    return {
        form: float(np.linalg.norm(invert(H32, K, damping, v32) - exact) / np.linalg.norm(exact))
        for form, invert in FORMS.items()
    }


def main(arguments: list[str]) -> int:
    """Print the table and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks accuracy", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="matrices a case (default: 5)")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for results")
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1; got {options.seeds}")
    found = {
        case: [errors(case, seed) for seed in range(options.seeds)]
        for case in tqdm(ROW_CASES, desc="float32 accuracy", unit="case")
    }
    rows = [
        {
            "relative error": form,
            **{
                f"{name}, ρ = {damping:.0e}": f"{np.median([e[form] for e in by_seed]):.0e}"
                for (name, damping), by_seed in found.items()
            },
        }
        for form in FORMS
    ]
    cases = [
        {"spectrum": name, "damping": damping, "errors": by_seed}
        for (name, damping), by_seed in found.items()
    ]
    about = machine("numpy", seeds=f"0…{options.seeds - 1}")
    text = f"{table(rows)}\n\nMedian over {options.seeds} seeds; n = {SIZE}, k = {RANK}."
    publish(options.output, "accuracy", text, about, cases=cases)
    return 0
