"""Figures 3 and 4 of the paper: weight decays learned with α and ρ in {0.01, 0.1, 1} at l = k = 5,
and with k in {5, 10, 20} columns at ρ = 0.01.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.harness.claims import IN_PART, NOT_SUPPORTED, SUPPORTED, claim
from benchmarks.harness.experiment import Run, experiment
from benchmarks.harness.processes import Found
from benchmarks.harness.report import table
from benchmarks.paper import methods
from benchmarks.paper.weight_decay import problem
from benchmarks.paper.weight_decay.curves import (
    Curves,
    entry,
    losses,
    lower,
    mean_curve,
    over_exact,
    publish,
    steady,
    typical,
)

K, ALPHAS = 5, [0.01, 0.1, 1.0]
KS, RHO = [5, 10, 20], 0.01
NYSTROM = methods.PAPER_NYSTROM


@experiment("figure3", __doc__, *problem.OPTIONS, packages=("torch", "numpy"))
def figure3(run: Run) -> None:
    curves = problem.measure(run, ks=[K], alphas=ALPHAS)
    names = {f"α = ρ = {alpha:g}": (K, alpha) for alpha in ALPHAS}
    others = [f"|h| / exact ({alpha:g})" for alpha in ALPHAS]
    publish(
        *(run, curves, judge_dampings(curves)),
        table(rows(curves, names, others, over_exact)),
        f"Validation loss after {problem.SETTING.early} outer steps of SGD at rate "
        f"{problem.SETTING.outer_rate:g}. |h| / exact: the length of the first hypergradient over\n"
        "that of the exact one.",
    )
    figure, axes = run.figure(2, 5, 13.5, 5.6, sharex=True, sharey=True)
    plot(axes, curves, names, problem.METHODS)
    # What diverges is left to run out of the picture.
    axes[0, 0].set_ylim(0.25, 1.15 * float(np.mean(losses(next(iter(curves.values())), 0))))
    run.draw(figure)


@experiment("figure4", __doc__, *problem.OPTIONS, packages=("torch", "numpy"))
def figure4(run: Run) -> None:
    curves = problem.measure(run, ks=KS, alphas=[RHO])
    names = {f"k = {k}": (k, RHO) for k in KS}
    publish(
        *(run, curves, judge_ranks(curves)),
        table(rows(curves, names, [f"error of q ({k})" for k in KS], errors)),
        f"Validation loss after {problem.SETTING.early} outer steps of SGD at rate "
        f"{problem.SETTING.outer_rate:g}. Error of q: of the first inverse\nproduct, against the "
        "exact one, relative.",
    )
    shown = [NYSTROM, problem.KNOWN_RIDGE, methods.NYSTROM_CG, methods.PAPER_CG]
    figure, axes = run.figure(1, len(shown), 13.5, 3.4, sharey=True)
    plot(axes, curves, names, shown)
    run.draw(figure)


def errors(found: list[Found]) -> str:
    """Write the relative error of the first inverse product."""
    return typical(found, "errors")


def rows(
    curves: Curves,
    names: dict[str, tuple[int, float]],
    others: list[str],
    describe: Callable[[list[Found]], str],
) -> list[dict[str, str]]:
    """Return the loss of every method at every choice, and something else about it."""
    lines = []
    for method in problem.METHODS:
        line = {"inverse": method}
        for (name, choice), other in zip(names.items(), others, strict=True):
            found = curves[problem.label(method, *choice)]
            line[f"{name}: loss"] = entry(losses(found, problem.SETTING.early))
            line[other] = describe(found)
        lines.append(line)
    return lines


def judge_dampings(curves: Curves) -> list[Found]:
    """Hold the paper's claims against the curves of Figure 3."""
    early = problem.SETTING.early

    def at(method: str, alpha: float) -> list[float]:
        return losses(curves[problem.label(method, K, alpha)], early)

    rivals = (methods.PAPER_CG, methods.PAPER_NEUMANN)
    pairs = [(rival, alpha) for rival in rivals for alpha in ALPHAS]
    won = [
        f"{rival} at {alpha:g}"
        for rival, alpha in pairs
        if lower(at(NYSTROM, alpha), [at(rival, alpha)]) == SUPPORTED
    ]
    share = len(won) / len(pairs)
    nystrom = {alpha: curves[problem.label(NYSTROM, K, alpha)] for alpha in ALPHAS}
    lengths = ", ".join(f"{over_exact(found)} at ρ = {a:g}" for a, found in nystrom.items())
    return [
        claim(
            "the Nyström method surpasses CG and Neumann in most cases",
            f"its loss after {early} outer steps is lower, by more than both deviations, "
            f"in {len(won)} of {len(pairs)} pairs with the same α = ρ ({', '.join(won) or 'none'})",
            # Most: more than half; the other half could be called a draw, and less no support.
            SUPPORTED if share > 0.5 else IN_PART if share == 0.5 else NOT_SUPPORTED,
        ),
        steady(
            "it is robust to the choice of ρ",
            {f"ρ = {alpha:g}": losses(found, early) for alpha, found in nystrom.items()},
            losses(nystrom[ALPHAS[0]], 0),
            f"; length of its hypergradient over that of the exact one: {lengths}",
        ),
    ]


def judge_ranks(curves: Curves) -> list[Found]:
    """Hold the paper's claim against the curves of Figure 4."""
    nystrom = {k: curves[problem.label(NYSTROM, k, RHO)] for k in KS}
    found = ", ".join(f"{errors(found)} at k = {k}" for k, found in nystrom.items())
    return [
        steady(
            "the curves of the Nyström method differ only marginally between k = 5, 10 and 20",
            {f"k = {k}": losses(found, problem.SETTING.early) for k, found in nystrom.items()},
            losses(nystrom[KS[0]], 0),
            f"; relative error of its first inverse product: {found}",
        )
    ]


def plot(axes: Any, curves: Curves, names: dict[str, tuple[int, float]], shown: list[str]) -> None:
    """Plot the validation losses, one panel a method, one curve a choice."""
    for axis, method in zip(axes.flat, shown, strict=True):
        for name, choice in names.items():
            axis.plot(mean_curve(curves[problem.label(method, *choice)]), label=name)
        axis.set_title(method, fontsize=9)
    for axis in axes[:, 0]:
        axis.set_ylabel("validation loss")
    for axis in axes[-1]:
        axis.set_xlabel("outer step")
    axes[0, 0].legend()
