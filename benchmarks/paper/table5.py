"""Table 5 of the paper on its own network, WideResNet-28-2: time and memory of a hypergradient.

The measurements are those of ``python -m benchmarks table5``, which has more networks and methods;
here the paper's claims are held against them.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import table5
from benchmarks._measure import Found, Records, use_threads
from benchmarks._report import machine, publish, pyplot, table
from benchmarks._torch_speed import num_products
from benchmarks.paper import _runs, _verdicts

MODEL, NAME = "wrn", "paper_table5"
SMALL = False  # a small network, to try it
RANKS = [5, 10, 20]
STORED, TOGETHER = "Nyström, stored", "Nyström, stored, k products a batch"
SPARING, STREAMED = "Nyström, chunked, κ = 1", "Nyström, streamed"
METHODS = ["CG", "Neumann", STORED, TOGETHER, SPARING, STREAMED, *table5.PEERS]
PAPER = {
    "CG": {5: (0.44, 2.46), 10: (0.83, 2.46), 20: (1.68, 2.46)},
    "Neumann": {5: (0.40, 2.39), 10: (0.75, 2.39), 20: (1.48, 2.39)},
    TOGETHER: {5: (0.24, 4.66), 10: (0.33, 8.15), 20: (0.54, 15.1)},
    SPARING: {5: (3.11, 1.94), 10: (10.7, 1.94), 20: (41.0, 1.94)},
}
"""Seconds and GB on an A100, of the rows that correspond: its columns are taken all at a time."""


@dataclass(frozen=True)
class Setting:
    """How long it may take; on the CPU the batch is small, 128 on a GPU as in the paper's code."""

    repeats: int
    limit: float  # seconds that a call may take; what would take longer is left out


FULL, QUICK = Setting(repeats=10, limit=600.0), Setting(repeats=2, limit=90.0)


def get(measured: dict[str, Found], method: str, k: int) -> Found:
    """Return a measurement; one that failed ends the experiment."""
    found = measured[f"{MODEL}, {method}, k = {k}"]
    if "failed" in found:
        raise SystemExit(f"{NAME}: {method}, k = {k} failed: {found['failed']}")
    return found


def seconds(measured: dict[str, Found], method: str, k: int) -> tuple[float, str]:
    """Return the time of a method; of one that was left out, by its products, and say so."""
    found = get(measured, method, k)
    if "seconds" in found:
        return found["seconds"], f"{found['seconds']:.2f} s"
    products, times = num_products(method, k), sorted(measured[f"{MODEL}, graph"]["product"])
    needed = products * times[len(times) // 2]
    return needed, f"{needed:.0f} s, left out, by its {products} products"


def judge(measured: dict[str, Found]) -> list[Found]:
    """Hold the paper's claims against the measurements.

    A ratio supports its claim where it is at least half the paper's, and in part where it is above
    1.1; memory is constant where it stays within a quarter. The paper's code takes all columns at a
    time: that form decides, and where only the other one is as fast, the claim holds in part.
    """
    k = max(RANKS)

    def faster(over: str, under: str) -> tuple[float, str]:
        (above, first), (below, second) = seconds(measured, over, k), seconds(measured, under, k)
        return above / below, f"{first} against {second}"

    def memory(method: str) -> float:
        return get(measured, method, k)["mib"] / get(measured, "CG", k)["mib"]

    def paper(over: str, under: str, which: int) -> float:
        return PAPER[over][k][which] / PAPER[under][k][which]

    def verdict(ratio: float, paper: float) -> str:
        if ratio >= 0.5 * paper:
            return _runs.SUPPORTED
        return _runs.IN_PART if ratio > 1.1 else _runs.NOT_SUPPORTED

    forms = {TOGETHER: "all columns at a time", STORED: "one column at a time"}
    gains = {form: faster("CG", form) for form in forms}
    losses = {SPARING: faster(SPARING, TOGETHER), STREAMED: faster(STREAMED, STORED)}
    levels = [f["mib"] for rank in RANKS if "mib" in (f := get(measured, SPARING, rank))]
    constant = max(levels) <= 1.25 * min(levels)
    wanted = [paper("CG", TOGETHER, 0), paper(TOGETHER, "CG", 1), paper(SPARING, TOGETHER, 0)]
    slow = verdict(losses[SPARING][0], wanted[2])
    return [
        _runs.claim(
            f"the Nyström method is {wanted[0]:.1f} x as fast as CG at k = l = {k}",
            "; ".join(
                f"{forms[form]}: {gain:.2g} x ({how})" for form, (gain, how) in gains.items()
            ),
            _verdicts.verdict([gain >= 0.5 * wanted[0] for gain, _ in gains.values()]),
        ),
        _runs.claim(
            f"it takes {wanted[1]:.1f} x the memory of CG",
            "; ".join(f"{name}: {memory(form):.2g} x" for form, name in forms.items()),
            verdict(memory(TOGETHER), wanted[1]),
        ),
        _runs.claim(
            f"with κ = 1 its memory is constant in k, and it is {wanted[2]:.0f} x as slow",
            f"{' to '.join(f'{level:.0f}' for level in (min(levels), max(levels)))} MiB, "
            f"{losses[SPARING][0]:.2g} x as slow ({losses[SPARING][1]}); streamed, which is ours: "
            f"{losses[STREAMED][0]:.2g} x as slow ({losses[STREAMED][1]}) with "
            f"{memory(STREAMED):.2g} x the memory of CG",
            slow if constant or slow == _runs.NOT_SUPPORTED else _runs.IN_PART,
        ),
    ]


def beside_the_paper(measured: dict[str, Found]) -> list[dict[str, str]]:
    """Return time and memory of each method, over those of CG with l = 5, in the paper and here."""
    base = measured[f"{MODEL}, CG, k = 5"]
    rows = []
    for method in METHODS:
        for k in RANKS:
            found = measured.get(f"{MODEL}, {method}, k = {k}", {})
            paper = PAPER.get(method, {}).get(k)
            if not found and paper is None:
                continue
            here = "seconds" in found and "seconds" in base
            rows.append(
                {
                    "method": f"{method}, k = {k}",
                    "paper: s": f"{paper[0]:.2f}" if paper else "",
                    "GB": f"{paper[1]:.2f}" if paper else "",
                    "/ CG, l = 5": f"{paper[0] / PAPER['CG'][5][0]:.2f}" if paper else "",
                    "here: s": f"{found['seconds']:.2f}" if here else "left out",
                    "MiB": f"{found['mib']:.0f}" if here else "",
                    "/ CG, l = 5 ": f"{found['seconds'] / base['seconds']:.2f}" if here else "",
                }
            )
    return rows


def draw(measured: dict[str, Found], path: Path) -> None:
    """Draw time and memory against k, the paper's to the left and ours to the right."""
    plt = pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained", sharex=True)
    for number, method in enumerate(METHODS):
        found = {k: measured.get(f"{MODEL}, {method}, k = {k}", {}) for k in RANKS}
        here = {k: (f["seconds"], f["mib"]) for k, f in found.items() if "seconds" in f}
        for column, values in enumerate((PAPER.get(method, {}), here)):
            for which, axis in enumerate(axes[:, column]):
                style = {"color": f"C{number}", "label": method if column == 1 else None}
                if values:
                    axis.plot(list(values), [v[which] for v in values.values()], "o-", **style)
    for column, title in enumerate(("paper, an A100", "here")):
        axes[0, column].set(title=title, yscale="log", ylabel="seconds")
        axes[1, column].set(yscale="log", xticks=RANKS, xlabel="k = l")
        axes[1, column].set_ylabel("peak of memory, MiB" if column else "peak of memory, GB")
    axes[0, 1].legend(fontsize="small")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: list[str]) -> int:
    """Measure, print the table and the claims, write JSON and the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks paper-table5", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, minutes on a CPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, help="examples (default: 4 on the CPU, 128 on CUDA)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for results")
    options: Any = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    setting = QUICK if options.quick else FULL
    use_threads(1)
    about = machine(
        *("torch", "hypergrad", "numpy"),
        device=torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        threads=1,
        seed=options.seed,
        batch=options.batch or table5.BATCHES[options.device][MODEL],
        repeats=setting.repeats,
        limit=setting.limit,
    )
    records = Records(options.output / f"{NAME}.runs.json", about)
    methods = [m for m in METHODS if m not in table5.PEERS or table5.has_peers()]
    wanted = argparse.Namespace(
        **vars(options) | {"quick": SMALL, "ranks": RANKS},
        repeats=setting.repeats,
        limit=setting.limit,
    )
    with tqdm(total=len(RANKS) * len(methods), desc=NAME) as progress:
        table5.measure_model(MODEL, methods, wanted, records, progress)
    measured = records.found
    claims = judge(measured)
    left_out = [
        f"{name}: {outcome}, {found[outcome]}"
        for name, found in measured.items()
        for outcome in ("failed", "left out")
        if outcome in found
    ]
    text = "\n\n".join(
        [
            table(beside_the_paper(measured)),
            "The paper: an A100; the time of a hypergradient and its peak of memory.\n"
            f"Here: one thread, n = {measured[f'{MODEL}, graph']['n']}, "
            f"a batch of {about['batch']}. At least half the paper's ratio supports its claim.",
            *(["\n".join(left_out)] if left_out else []),
            _runs.told(claims),
        ]
    )
    publish(options.output, NAME, text, about, claims=claims, measurements=measured)
    draw(measured, options.output / f"{NAME}.png")
    print(f"Picture: {options.output / NAME}.png")
    return 0
