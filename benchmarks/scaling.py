"""Time and peak memory of the Nyström inverse against n and k, and what a budget chooses.

A perceptron whose width sets n, one hypergradient each: the columns, the inverse and the mixed
derivative. Slopes are of a straight line through the logarithms, fitted to the larger half of the
sizes: the smaller ones are ruled by what a call costs at any size. Each measurement has a process
of its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from benchmarks._measure import MIB, Found, Peak, Records, apart, seconds, use_threads
from benchmarks._networks import CLASSES, Reweighting, perceptron
from benchmarks._report import machine, publish, pyplot, table

SIZES = [10**4, 30_000, 10**5, 300_000, 10**6, 3_000_000, 10**7]
RANKS = [5, 10, 20, 40, 80]
BATCH = 16
INPUTS = 64
DAMPING = 1.0
STORAGES = ("stored", "streamed")
NUMBERS = [21, 12, 6, 2, 1]
"""Budgets, in vectors of n numbers, at k = 20: all columns, and less and less of a chunk."""


def problem(n: int, seed: int, device: str) -> Reweighting:
    """Return the problem of a perceptron with about n parameters."""
    width = round((-(INPUTS + CLASSES + 2) + ((INPUTS + CLASSES + 2) ** 2 + 4 * n) ** 0.5) / 2)
    torch.manual_seed(seed)
    model = perceptron((INPUTS, width, width, CLASSES))
    return Reweighting(model, (INPUTS,), BATCH, seed=seed, device=device)


def measure(
    n: int,
    k: int,
    storage: str,
    budget: float | None,
    seed: int,
    device: str,
    repeats: int,
) -> Found:
    """Measure one hypergradient; with a budget, say what it chose."""
    import lowrank_inverse as li
    import lowrank_inverse_torch as lit

    settings: dict[str, Any] = {"rank": k, "damping": DAMPING, "memory": storage}
    if budget:
        settings["memory"] = budget

    def run(p: Reweighting, **others: Any) -> Any:
        solver = li.Nystrom(**settings | others)
        return lit.hypergradient(p.inner, p.outer, p.model, p.w, solver=solver, rng=0)

    run(problem(10**4, seed, device), **({"memory": 1e9} if budget else {}))  # loads code
    p = problem(n, seed, device)
    found: Found = {"n": p.n, "k": k}
    with Peak(device) as graph:
        p.products()()
    try:
        with Peak(device) as peak:
            first = seconds(lambda: run(p), device)
    except ValueError as error:
        if storage != "auto":
            raise
        return found | {"refused": str(error)}
    times = [seconds(lambda: run(p), device) for _ in range(repeats)]
    if storage == "auto":
        H = lit.HessianOperator(p.inner, p.model)
        plan = li.Nystrom(**settings).prepare(H, rng=0).memory
        found |= {"chose": plan.memory, "chunk": plan.chunk_size, "planned": plan.num_bytes / MIB}
    return found | {
        "first": first,
        "seconds": float(np.median(times)),
        "times": times,
        "mib": peak.num_bytes / MIB,
        "graph": graph.num_bytes / MIB,
    }


def slope(sizes: list[int], values: list[float]) -> float:
    """Fit the exponent of a power of the size, to the larger half."""
    half = len(sizes) // 2
    if len(sizes[half:]) < 2 or min(values[half:]) <= 0:
        return float("nan")
    return float(np.polyfit(np.log(sizes[half:]), np.log(values[half:]), 1)[0])


def draw(series: dict[str, dict[str, list[Found]]], path: Path) -> None:
    """Draw time and memory against n and against k, on logarithmic axes."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for column, size in enumerate(("n", "k")):
        for row, (what, label) in enumerate((("seconds", "seconds"), ("mib", "peak memory, MiB"))):
            axis = axes[row][column]
            for storage, found in series[size].items():
                points = [(f[size], f[what]) for f in found if f[what] > 0]
                if points:
                    axis.loglog(*zip(*points, strict=True), "o-", label=storage)
            if what == "mib":
                any_of = next(iter(series[size].values()))
                numbers = [(f[size], 4 * f["n"] * f["k"] / MIB) for f in any_of]
                axis.loglog(*zip(*numbers, strict=True), "k--", label="k n numbers")
            axis.set(xlabel=size, ylabel=label)
            if size == "k":
                ticks = sorted({f["k"] for found in series["k"].values() for f in found})
                axis.set_xticks(ticks, [str(k) for k in ticks])
                axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str]) -> int:
    """Measure, print the tables, write JSON and the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks scaling", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="N")
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, metavar="K")
    parser.add_argument("--rank", type=int, default=20, help="at which n varies (default: 20)")
    parser.add_argument("--size", type=int, default=10**6, help="at which k varies (default: 1e6)")
    parser.add_argument(
        "--budgets",
        type=int,
        nargs="*",
        default=NUMBERS,
        metavar="M",
        help="in vectors of n numbers, of the largest n (default: %(default)s)",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="of each call (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="of the processor (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for results")
    options = parser.parse_args(arguments)
    use_threads(options.threads)
    if (
        min(
            *options.sizes,
            *options.ranks,
            options.rank,
            options.size,
            options.repeats,
            options.threads,
        )
        < 1
    ):
        parser.error("sizes, ranks and --repeats must be at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    name = f"scaling-{options.device}" if options.device != "cpu" else "scaling"
    about = machine(
        *("torch", "numpy"),
        device=torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        threads=options.threads,
        seed=options.seed,
        repeats=options.repeats,
        batch=BATCH,
        damping=DAMPING,
    )
    records = Records(options.output / f"{name}.json", about)
    largest = max(options.sizes)
    cases = [("n", storage, n, options.rank, None) for storage in STORAGES for n in options.sizes]
    cases += [("k", storage, options.size, k, None) for storage in STORAGES for k in options.ranks]
    # A little more, for a width is a whole number, and so n is only about what was asked for.
    budgets = [4.1 * largest * numbers + 32 * options.rank**2 for numbers in options.budgets]
    cases += [("budget", "auto", largest, options.rank, budget) for budget in budgets]
    series: dict[str, dict[str, list[Found]]] = {"n": {}, "k": {}, "budget": {}}
    for against, storage, n, k, budget in tqdm(cases, desc=name, unit="case"):
        settings = {"n": n, "k": k, "storage": storage, "budget": budget}
        settings |= {"seed": options.seed, "device": options.device, "repeats": options.repeats}
        key = f"{storage}, n = {n}, k = {k}" + (f", budget {budget:.0f}" if budget else "")
        found = records.get(
            key, lambda settings=settings: apart("benchmarks.scaling:measure", settings)
        )
        if "failed" in found:
            raise RuntimeError(f"{key}: {found['failed']}")
        series[against].setdefault(storage, []).append(found | {"budget": budget})
    publish(options.output, name, report(series), about, measurements=records.found)
    picture = options.output / f"{name}.png"
    draw(series, picture)
    print(f"Picture: {picture}")
    return 0


def report(series: dict[str, dict[str, list[Found]]]) -> str:
    """Return the tables: against n, against k, and under budgets."""
    parts = []
    for size in ("n", "k"):
        lines = []
        for storage, found in series[size].items():
            sizes = [f[size] for f in found]
            for f in found:
                lines.append(
                    {
                        f"against {size}": storage,
                        "n": f"{f['n']}",
                        "k": f"{f['k']}",
                        "s": f"{f['seconds']:.3f}",
                        "MiB": f"{f['mib']:.0f}",
                        "k n numbers, MiB": f"{4 * f['n'] * f['k'] / MIB:.0f}",
                        "a gradient's graph, MiB": f"{f['graph']:.0f}",
                    }
                )
            line = dict.fromkeys(lines[-1], "")
            line |= {f"against {size}": f"{storage}: slope", "n": "", "k": ""}
            for key, what in (("s", "seconds"), ("MiB", "mib")):
                line[key] = f"{slope(sizes, [f[what] for f in found]):.2f}"
            lines.append(line)
        parts.append(table(lines))
    lines, refused = [], []
    for f in series["budget"].get("auto", []):
        if "refused" in f:
            refused.append(f"Budget {f['budget'] / MIB:.0f} MiB: {f['refused']}")
            continue
        lines.append(
            {
                "memory_budget": f"{f['budget'] / MIB:.0f} MiB",
                "n": f"{f['n']}",
                "k": f"{f['k']}",
                "chosen": f["chose"],
                "chunk_size": str(f["chunk"] or "all"),
                "planned, MiB": f"{f['planned']:.0f}",
                "s": f"{f['seconds']:.3f}",
                "peak, MiB": f"{f['mib']:.0f}",
                "a gradient's graph, MiB": f"{f['graph']:.0f}",
            }
        )
    parts += [table(lines)] if lines else []
    return "\n\n".join(parts + refused)
