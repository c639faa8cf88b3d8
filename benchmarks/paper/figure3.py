"""Figure 3 of the paper: weight decays learned with α and ρ in {0.01, 0.1, 1}, l = k = 5."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks._measure import Found
from benchmarks._report import publish, pyplot, table
from benchmarks.paper import _curves, _methods, _runs
from benchmarks.paper import _weight_decay as decay

K, ALPHAS = 5, [0.01, 0.1, 1.0]


def rows(curves: dict[str, list[Found]], setting: decay.Setting) -> list[dict[str, str]]:
    """Return the loss of every method and α = ρ, and how long its first hypergradient is."""
    lines = []
    for method in decay.METHODS:
        line = {"inverse": method}
        for alpha in ALPHAS:
            found = curves[decay.label(method, K, alpha)]
            line[f"α = ρ = {alpha:g}: loss"] = _curves.entry(_curves.losses(found, setting.early))
            line[f"|h| / exact ({alpha:g})"] = _curves.over_exact(found)
        lines.append(line)
    return lines


def judge(curves: dict[str, list[Found]], setting: decay.Setting) -> list[Found]:
    """Hold the paper's claims against the curves."""

    def losses(method: str, alpha: float) -> list[float]:
        return _curves.losses(curves[decay.label(method, K, alpha)], setting.early)

    nystrom, rivals = _methods.PAPER_NYSTROM, [_methods.PAPER_CG, _methods.PAPER_NEUMANN]
    pairs = [(rival, alpha) for rival in rivals for alpha in ALPHAS]
    won = [
        f"{rival} at {alpha:g}"
        for rival, alpha in pairs
        if _curves.lower(losses(nystrom, alpha), [losses(rival, alpha)]) == _runs.SUPPORTED
    ]
    share = len(won) / len(pairs)
    lengths = ", ".join(
        f"{_curves.over_exact(curves[decay.label(nystrom, K, alpha)])} at ρ = {alpha:g}"
        for alpha in ALPHAS
    )
    start = _curves.losses(curves[decay.label(nystrom, K, ALPHAS[0])], 0)
    return [
        _runs.claim(
            "the Nyström method surpasses CG and Neumann in most cases",
            f"its loss after {setting.early} outer steps is lower, by more than both deviations, "
            f"in {len(won)} of {len(pairs)} pairs with the same α = ρ ({', '.join(won) or 'none'})",
            # Most: more than half; the other half could be called a draw, and less no support.
            _runs.SUPPORTED
            if share > 0.5
            else _runs.IN_PART
            if share == 0.5
            else _runs.NOT_SUPPORTED,
        ),
        _curves.steady(
            "it is robust to the choice of ρ",
            {f"ρ = {alpha:g}": losses(nystrom, alpha) for alpha in ALPHAS},
            start,
            f"; length of its hypergradient over that of the exact one: {lengths}",
        ),
    ]


def draw(curves: dict[str, list[Found]], path: Path) -> None:
    """Draw the validation losses, one panel a method, one curve an α = ρ."""
    plt = pyplot()
    figure, axes = plt.subplots(
        2, 5, figsize=(13.5, 5.6), sharex=True, sharey=True, layout="constrained"
    )
    for axis, method in zip(axes.flat, decay.METHODS, strict=True):
        for alpha in ALPHAS:
            curve = _curves.mean_curve(curves[decay.label(method, K, alpha)])
            axis.plot(curve, label=f"α = ρ = {alpha:g}")
        axis.set_title(method, fontsize=9)
    # What diverges is left to run out of the picture.
    top = float(np.mean(_curves.losses(next(iter(curves.values())), 0)))
    axes[0, 0].set_ylim(0.25, 1.15 * top)
    for axis in axes[:, 0]:
        axis.set_ylabel("validation loss")
    for axis in axes[1]:
        axis.set_xlabel("outer step")
    axes[0, 0].legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: list[str]) -> int:
    """Follow all methods, print the table and the claims, write JSON and the picture."""
    options = decay.parse("figure3", __doc__, arguments)
    curves, about, setting = decay.measure("figure3", options, ks=[K], alphas=ALPHAS)
    claims = judge(curves, setting)
    text = "\n\n".join(
        [
            table(rows(curves, setting)),
            f"Validation loss after {setting.early} outer steps of SGD at rate "
            f"{setting.outer_rate:g}. |h| / exact: the length of the first hypergradient over\n"
            "that of the exact one.",
            _curves.described(setting, options.seeds),
            _runs.told(claims),
        ]
    )
    results = _curves.summary(curves, setting)
    publish(options.output, "figure3", text, about, claims=claims, **results)
    draw(curves, options.output / "figure3.png")
    print(f"Picture: {options.output / 'figure3.png'}")
    return 0
