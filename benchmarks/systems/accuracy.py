"""How accurate the damped inverse is with columns in float32.

A symmetric matrix with known eigenvalues, 50 of its columns, and a right-hand side in its range:
the case in which ``1 / damping`` magnifies rounding the most. The error is that against the same
Nyström inverse in float64, the median over seeds. Eq. 6 is the paper's formula as it stands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from array_api_compat import array_namespace

import lowrank_inverse as li
from benchmarks.harness.experiment import Run, experiment, seeds
from benchmarks.harness.report import table
from lowrank_inverse.arrays.conversion import to_host

SIZE, RANK = 1500, 50
ROW_CASES = (("network", 1e-1), ("network", 1e-2), ("network", 1e-3), ("i⁻²", 1e-4), ("exp", 1e-4))
FORMS: dict[str, Any] = {
    "Eq. 6 in float32": lambda H, K, rho, v: equation_6(H[:, K], H[np.ix_(K, K)], rho, v),
    "stored (default)": lambda H, K, rho, v: li.nystrom(H, indices=K).inverse(rho) @ v,
    "Algorithm 1, chunk 1": lambda H, K, rho, v: (
        li.nystrom(H, indices=K).inverse(rho, chunk_size=1) @ v
    ),
    "chunked, chunk 5": lambda H, K, rho, v: (
        li.chunked_inverse(H, K, damping=rho, chunk_size=5) @ v
    ),
    "streamed": lambda H, K, rho, v: li.streamed_inverse(H, K, damping=rho, chunk_size=RANK) @ v,
}


def equation_6(C: Any, W: Any, damping: float, v: Any) -> Any:
    """Invert by Eq. (6) of the paper, term by term in the numbers of the columns."""
    solve = array_namespace(C).linalg.solve
    return v / damping - C @ solve(W + C.T @ C / damping, C.T @ v) / damping**2


def spectrum(name: str, rng: np.random.Generator) -> np.ndarray:
    """Eigenvalues: forty that decay from 10 over a small bulk, powers, or exponentials."""
    i = np.arange(SIZE)
    if name == "network":
        return np.concatenate([10 * np.exp(-i[:40] / 8), 1e-3 * rng.random(SIZE - 40) ** 3])
    return 1 / (i + 1.0) ** 2 if name == "i⁻²" else np.exp(-i / 4)


def errors(
    name: str, damping: float, seed: int, array: Callable[[np.ndarray], Any] = np.asarray
) -> dict[str, float]:
    """Relative error of each form for one case, in the library of `array`."""
    rng = np.random.default_rng(seed)
    Q = np.linalg.qr(rng.standard_normal((SIZE, SIZE)))[0]
    H = (Q * spectrum(name, rng)) @ Q.T
    H = (H + H.T) / 2
    K = rng.choice(SIZE, RANK, replace=False)
    v = H @ rng.standard_normal(SIZE)
    exact = li.nystrom(H, indices=K).inverse(damping) @ v
    H32, v32 = array(H.astype(np.float32)), array(v.astype(np.float32))
    found = {form: to_host(invert(H32, K, damping, v32)) for form, invert in FORMS.items()}
    return {
        form: float(np.linalg.norm(x - exact) / np.linalg.norm(exact)) for form, x in found.items()
    }


@experiment("accuracy", __doc__, seeds(5))
def main(run: Run) -> None:
    cases = {case: dict(zip(("name", "damping"), case, strict=True)) for case in ROW_CASES}
    by_case = run.repeated(errors, cases, apart=False)
    rows = [
        {"relative error": form}
        | {
            f"{name}, ρ = {damping:.0e}": f"{np.median([e[form] for e in by_seed]):.0e}"
            for (name, damping), by_seed in by_case.items()
        }
        for form in FORMS
    ]
    run.publish(
        table(rows),
        f"Median over {run.options.seeds} seeds; n = {SIZE}, k = {RANK}.",
        cases=[
            {"spectrum": name, "damping": damping, "errors": by_seed}
            for (name, damping), by_seed in by_case.items()
        ],
    )
