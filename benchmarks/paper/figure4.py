"""Figure 4 of the paper: weight decays learned with k in {5, 10, 20} columns, ρ = 0.01."""

from __future__ import annotations

from pathlib import Path

from benchmarks._measure import Found
from benchmarks._report import publish, pyplot, table
from benchmarks.paper import _curves, _methods, _runs
from benchmarks.paper import _weight_decay as decay

KS, RHO = [5, 10, 20], 0.01


def rows(curves: dict[str, list[Found]], setting: decay.Setting) -> list[dict[str, str]]:
    """Return the loss of every method and k, and the error of its inverse product."""
    lines = []
    for method in decay.METHODS:
        line = {"inverse": method}
        for k in KS:
            found = curves[decay.label(method, k, RHO)]
            line[f"k = {k}: loss"] = _curves.entry(_curves.losses(found, setting.early))
            line[f"error of q ({k})"] = _curves.typical(found, "errors")
        lines.append(line)
    return lines


def judge(curves: dict[str, list[Found]], setting: decay.Setting) -> list[Found]:
    """Hold the paper's claims against the curves."""
    nystrom = {k: curves[decay.label(_methods.PAPER_NYSTROM, k, RHO)] for k in KS}
    errors = ", ".join(
        f"{_curves.typical(found, 'errors')} at k = {k}" for k, found in nystrom.items()
    )
    return [
        _curves.steady(
            "the curves of the Nyström method differ only marginally between k = 5, 10 and 20",
            {f"k = {k}": _curves.losses(found, setting.early) for k, found in nystrom.items()},
            _curves.losses(nystrom[KS[0]], 0),
            f"; relative error of its first inverse product: {errors}",
        )
    ]


def draw(curves: dict[str, list[Found]], path: Path) -> None:
    """Draw the validation losses of the Nyström forms, one panel a method, one curve a k."""
    plt = pyplot()
    shown = [_methods.PAPER_NYSTROM, decay.KNOWN_RIDGE, _methods.NYSTROM_CG, _methods.PAPER_CG]
    figure, axes = plt.subplots(
        1, len(shown), figsize=(13.5, 3.4), sharey=True, layout="constrained"
    )
    for axis, method in zip(axes, shown, strict=True):
        for k in KS:
            axis.plot(_curves.mean_curve(curves[decay.label(method, k, RHO)]), label=f"k = {k}")
        axis.set_title(method, fontsize=10)
        axis.set_xlabel("outer step")
    axes[0].set_ylabel("validation loss")
    axes[0].legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: list[str]) -> int:
    """Follow all methods, print the table and the claims, write JSON and the picture."""
    options = decay.parse("figure4", __doc__, arguments)
    curves, about, setting = decay.measure("figure4", options, ks=KS, alphas=[RHO])
    claims = judge(curves, setting)
    text = "\n\n".join(
        [
            table(rows(curves, setting)),
            f"Validation loss after {setting.early} outer steps of SGD at rate "
            f"{setting.outer_rate:g}. Error of q: of the first inverse\nproduct, against the exact "
            "one, relative.",
            _curves.described(setting, options.seeds),
            _runs.told(claims),
        ]
    )
    results = _curves.summary(curves, setting)
    publish(options.output, "figure4", text, about, claims=claims, **results)
    draw(curves, options.output / "figure4.png")
    print(f"Picture: {options.output / 'figure4.png'}")
    return 0
