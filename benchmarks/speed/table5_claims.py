"""The paper's Table 5, on WideResNet-28-2, and its claims held against what was measured."""

from __future__ import annotations

import statistics

from benchmarks.harness import claims
from benchmarks.harness.claims import IN_PART, NOT_SUPPORTED, SUPPORTED, claim
from benchmarks.harness.experiment import Run
from benchmarks.harness.processes import Found
from benchmarks.speed.torch_methods import num_products

MODEL, RANKS = "wrn", [5, 10, 20]
STORED, TOGETHER = "Nyström, stored", "Nyström, stored, k products a batch"
SPARING, STREAMED = "Nyström, chunked, κ = 1", "Nyström, streamed"
OURS = [
    STORED,
    "Nyström, stored, 5 products a batch",
    TOGETHER,
    SPARING,
    "Nyström, chunked, κ = 5",
    "Nyström, chunked, κ = k",
    STREAMED,
    "CG",
    "Neumann",
]
PEERS = ["hypergrad Nyström", "hypergrad CG", "hypergrad Neumann"]
METHODS = ["CG", "Neumann", STORED, TOGETHER, SPARING, STREAMED, *PEERS]
PAPER = {
    "CG": {5: (0.44, 2.46), 10: (0.83, 2.46), 20: (1.68, 2.46)},
    "Neumann": {5: (0.40, 2.39), 10: (0.75, 2.39), 20: (1.48, 2.39)},
    TOGETHER: {5: (0.24, 4.66), 10: (0.33, 8.15), 20: (0.54, 15.1)},
    SPARING: {5: (3.11, 1.94), 10: (10.7, 1.94), 20: (41.0, 1.94)},
}
"""Seconds and GB on an A100, of the rows that correspond: its columns are taken all at a time."""


def left_out(measured: dict[str, Found]) -> list[str]:
    """Say what failed, and what would have taken too long."""
    return [
        f"{name}: {outcome}, {found[outcome]}"
        for name, found in measured.items()
        for outcome in ("failed", "left out")
        if outcome in found
    ]


def get(measured: dict[str, Found], method: str, k: int) -> Found:
    """Return a measurement; one that failed ends the experiment."""
    found = measured[f"{MODEL}, {method}, k = {k}"]
    if "failed" in found:
        raise SystemExit(f"paper_table5: {method}, k = {k} failed: {found['failed']}")
    return found


def seconds(measured: dict[str, Found], method: str, k: int) -> tuple[float, str]:
    """Return the time of a method; of one that was left out, by its products, and say so."""
    found = get(measured, method, k)
    if "seconds" in found:
        return found["seconds"], f"{found['seconds']:.2f} s"
    products = num_products(method, k)
    needed = products * statistics.median(measured[f"{MODEL}, graph"]["product"])
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
            return SUPPORTED
        return IN_PART if ratio > 1.1 else NOT_SUPPORTED

    forms = {TOGETHER: "all columns at a time", STORED: "one column at a time"}
    gains = {form: faster("CG", form) for form in forms}
    losses = {SPARING: faster(SPARING, TOGETHER), STREAMED: faster(STREAMED, STORED)}
    levels = [f["mib"] for rank in RANKS if "mib" in (f := get(measured, SPARING, rank))]
    constant = max(levels) <= 1.25 * min(levels)
    wanted = [paper("CG", TOGETHER, 0), paper(TOGETHER, "CG", 1), paper(SPARING, TOGETHER, 0)]
    slow = verdict(losses[SPARING][0], wanted[2])
    return [
        claim(
            f"the Nyström method is {wanted[0]:.1f} x as fast as CG at k = l = {k}",
            "; ".join(
                f"{forms[form]}: {gain:.2g} x ({how})" for form, (gain, how) in gains.items()
            ),
            claims.verdict([gain >= 0.5 * wanted[0] for gain, _ in gains.values()]),
        ),
        claim(
            f"it takes {wanted[1]:.1f} x the memory of CG",
            "; ".join(f"{name}: {memory(form):.2g} x" for form, name in forms.items()),
            verdict(memory(TOGETHER), wanted[1]),
        ),
        claim(
            f"with κ = 1 its memory is constant in k, and it is {wanted[2]:.0f} x as slow",
            f"{' to '.join(f'{level:.0f}' for level in (min(levels), max(levels)))} MiB, "
            f"{losses[SPARING][0]:.2g} x as slow ({losses[SPARING][1]}); streamed, which is ours: "
            f"{losses[STREAMED][0]:.2g} x as slow ({losses[STREAMED][1]}) with "
            f"{memory(STREAMED):.2g} x the memory of CG",
            slow if constant or slow == NOT_SUPPORTED else IN_PART,
        ),
    ]


def beside_the_paper(measured: dict[str, Found], absent: str = "left out") -> list[dict[str, str]]:
    """Return time and memory of each method, over those of CG with l = 5, in the paper and here.

    `absent` stands where there is no time.
    """
    base = measured.get(f"{MODEL}, CG, k = 5", {})
    rows = []
    for method in METHODS:
        for k in RANKS:
            found = measured.get(f"{MODEL}, {method}, k = {k}", {})
            paper = PAPER.get(method, {}).get(k)
            if not found and paper is None:
                continue
            here, based = "seconds" in found, "seconds" in found and "seconds" in base
            rows.append(
                {
                    "method": f"{method}, k = {k}",
                    "paper: s": f"{paper[0]:.2f}" if paper else "",
                    "GB": f"{paper[1]:.2f}" if paper else "",
                    "/ CG, l = 5": f"{paper[0] / PAPER['CG'][5][0]:.2f}" if paper else "",
                    "here: s": f"{found['seconds']:.2f}" if here else absent,
                    "MiB": f"{found['mib']:.0f}" if here else "",
                    "/ CG, l = 5 ": f"{found['seconds'] / base['seconds']:.2f}" if based else "",
                }
            )
    return rows


def draw(run: Run, measured: dict[str, Found]) -> None:
    """Draw time and memory against k, the paper's to the left and ours to the right."""
    figure, axes = run.figure(2, 2, 11, 8, sharex=True)
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
    run.draw(figure)
