"""Time and peak memory of the Nyström inverse against n and k, and what a budget chooses.

A perceptron whose width sets n, one hypergradient each: the columns, the inverse and the mixed
derivative. Slopes are of a straight line through the logarithms, fitted to the larger half of the
sizes: the smaller ones are ruled by what a call costs at any size. Each measurement has a process
of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks.harness.experiment import DEVICE, SEED, THREADS, Option, Run, experiment
from benchmarks.harness.processes import Found
from benchmarks.harness.report import table
from benchmarks.harness.timing import MIB, Peak, seconds
from benchmarks.speed.networks import CLASSES, Reweighting, perceptron

SIZES = [10**4, 30_000, 10**5, 300_000, 10**6, 3_000_000, 10**7]
BATCH = 16
INPUTS = 64
DAMPING = 1.0
HELD = ("stored", "streamed")
NUMBERS = [21, 12, 6, 2, 1]
"""Budgets, in vectors of n numbers, at k = 20: all columns, and less and less of a chunk."""


def problem(n: int, seed: int, device: str) -> Reweighting:
    """Return the problem of a perceptron with about n parameters."""
    width = round((-(INPUTS + CLASSES + 2) + ((INPUTS + CLASSES + 2) ** 2 + 4 * n) ** 0.5) / 2)
    torch.manual_seed(seed)
    model = perceptron((INPUTS, width, width, CLASSES))
    return Reweighting(model, (INPUTS,), BATCH, seed=seed, device=device)


def measure(n: int, k: int, memory: str | float, seed: int, device: str, repeats: int) -> Found:
    """Measure one hypergradient; with a budget for its memory, say what it chose."""
    import lowrank_inverse as li
    import lowrank_inverse_torch as lit

    budget = not isinstance(memory, str)

    def solver(memory: Any) -> Any:
        return li.Nystrom(rank=k, damping=DAMPING, sampling="uniform", memory=memory)

    def run(p: Reweighting, memory: Any = memory) -> Any:
        arguments = p.inner, p.outer, p.model, p.w
        return lit.hypergradient(*arguments, solver=solver(memory), rng=0)

    run(problem(10**4, seed, device), 1e9 if budget else memory)  # loads code
    p = problem(n, seed, device)
    found: Found = {"n": p.n, "k": k}
    with Peak(device) as graph:
        p.products()()
    try:
        with Peak(device) as peak:
            first = seconds(lambda: run(p), device)
    except ValueError as error:
        if not budget:
            raise
        return found | {"refused": str(error)}
    times = [seconds(lambda: run(p), device) for _ in range(repeats)]
    if budget:
        H = lit.HessianOperator(p.inner, p.model)
        plan = solver(memory).prepare(H, rng=0).memory
        found |= {"chose": plan.memory, "chunk": plan.chunk_size, "planned": plan.num_bytes / MIB}
    return found | {
        "first": first,
        "seconds": float(np.median(times)),
        "times": times,
        "mib": peak.num_bytes / MIB,
        "graph": graph.num_bytes / MIB,
    }


@experiment(
    *("scaling", __doc__),
    Option("sizes", SIZES, "n", least=1),
    Option("ranks", [5, 10, 20, 40, 80], "k", least=1),
    Option("rank", 20, "at which n varies", least=1),
    Option("size", 10**6, "at which k varies", least=1),
    Option("budgets", NUMBERS, "in vectors of n numbers, of the largest n", least=1),
    Option("repeats", 3, "of each call", least=1),
    *(DEVICE, THREADS, SEED),
    packages=("torch", "numpy"),
)
def main(run: Run) -> None:
    options, largest = run.options, max(run.options.sizes)
    if options.device != "cpu":
        run.name += f"-{options.device}"
    # A little more, for a width is a whole number, and so n is only about what was asked for.
    budgets = [4.1 * largest * numbers + 32 * options.rank**2 for numbers in options.budgets]
    against = {
        "n": {held: [(held, n, options.rank) for n in options.sizes] for held in HELD},
        "k": {held: [(held, options.size, k) for k in options.ranks] for held in HELD},
    }
    wanted = [each for lines in against.values() for line in lines.values() for each in line]
    wanted += [(budget, largest, options.rank) for budget in budgets]
    shared = {"seed": options.seed, "device": options.device, "repeats": options.repeats}
    cells = {(m, n, k): {"memory": m, "n": n, "k": k, **shared} for m, n, k in wanted}
    found = run.each(measure, cells)
    series = {
        size: {held: [found[cell] for cell in line] for held, line in lines.items()}
        for size, lines in against.items()
    }
    rows, refused = [], []
    for budget in budgets:
        f = found[budget, largest, options.rank]
        if "refused" in f:
            refused.append(f"Budget {budget / MIB:.0f} MiB: {f['refused']}")
            continue
        rows.append(
            {
                "memory": f"{budget / MIB:.0f} MiB",
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
    run.publish(
        *(table(grown(size, lines)) for size, lines in series.items()),
        table(rows) if rows else "",
        *refused,
        measurements={
            f"{held}, n = {n}, k = {k}" if isinstance(held, str) else f"{held:.0f} bytes": one
            for (held, n, k), one in found.items()
        },
    )
    draw(run, series)


def grown(size: str, series: dict[str, list[Found]]) -> list[dict[str, str]]:
    """Return the table against n or k, with the slopes."""
    rows = []
    for held, found in series.items():
        for f in found:
            rows.append(
                {
                    f"against {size}": held,
                    "n": f"{f['n']}",
                    "k": f"{f['k']}",
                    "s": f"{f['seconds']:.3f}",
                    "MiB": f"{f['mib']:.0f}",
                    "k n numbers, MiB": f"{4 * f['n'] * f['k'] / MIB:.0f}",
                    "a gradient's graph, MiB": f"{f['graph']:.0f}",
                }
            )
        slopes = {
            key: f"{slope([f[size] for f in found], [f[what] for f in found]):.2f}"
            for key, what in (("s", "seconds"), ("MiB", "mib"))
        }
        rows.append(dict.fromkeys(rows[-1], "") | {f"against {size}": f"{held}: slope"} | slopes)
    return rows


def slope(sizes: list[int], values: list[float]) -> float:
    """Fit the exponent of a power of the size, to the larger half."""
    half = len(sizes) // 2
    if len(sizes[half:]) < 2 or min(values[half:]) <= 0:
        return float("nan")
    return float(np.polyfit(np.log(sizes[half:]), np.log(values[half:]), 1)[0])


def draw(run: Run, series: dict[str, dict[str, list[Found]]]) -> None:
    """Draw time and memory against n and against k, on logarithmic axes."""
    figure, axes = run.figure(2, 2, 11, 8)
    panels = ("seconds", "seconds"), ("mib", "peak memory, MiB")
    for column, (size, lines) in zip(axes.T, series.items(), strict=True):
        for axis, (what, label) in zip(column, panels, strict=True):
            for held, found in lines.items():
                points = [(f[size], f[what]) for f in found if f[what] > 0]
                axis.loglog([x for x, _ in points], [y for _, y in points], "o-", label=held)
            axis.set(xlabel=size, ylabel=label)
            if size == "k":
                ticks = [f["k"] for f in found]
                axis.set_xticks(ticks, [str(k) for k in ticks])
                axis.minorticks_off()
            axis.grid(alpha=0.3)
        numbers = [4 * f["n"] * f["k"] / MIB for f in found]
        column[1].loglog([f[size] for f in found], numbers, "k--", label="k n numbers")
        for axis in column:
            axis.legend()
    run.draw(figure)
