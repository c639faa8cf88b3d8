"""Figure 2 of the paper: a weight decay for each parameter, by ways to invert, l = k = 5.

Beside the paper's curves stands what they hang on: how long each hypergradient is, and how the
methods compare once their steps are equally long.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.harness.claims import claim
from benchmarks.harness.experiment import Run, experiment
from benchmarks.harness.processes import Found
from benchmarks.harness.report import table
from benchmarks.paper import methods
from benchmarks.paper.weight_decay import problem
from benchmarks.paper.weight_decay.curves import (
    Curves,
    entry,
    listed,
    losses,
    lower,
    mean_curve,
    over_exact,
    publish,
    short,
    typical,
)

K, ALPHA, METHODS = 5, 0.01, problem.METHODS
CONTROLS = [problem.OWN, problem.AS_EXACT, problem.AS_NYSTROM, *problem.FIRST_STEPS]
STYLES: dict[str, dict[str, Any]] = {
    method: {"color": f"C{number}", "linewidth": 1.4} for number, method in enumerate(METHODS)
}
for _method in methods.PAPER_METHODS:
    STYLES[_method]["linestyle"] = "--"
STYLES[problem.EXACT] |= {"color": "black", "linestyle": ":"}


def get(curves: Curves, method: str, control: str | float = problem.OWN) -> list[Found]:
    """Return the curves of a method, one for each seed."""
    return curves[problem.label(method, K, ALPHA, control)]


def best(curves: Curves, method: str) -> list[Found]:
    """Return the curves at the rate with the lowest mean loss after the first steps.

    A rate at which a seed diverges, be it later, is taken only where there is no other.
    """

    setting = problem.SETTING

    def key(found: list[Found]) -> tuple[bool, float]:
        start, end = (np.array(losses(found, at)) for at in (0, setting.control_steps))
        return bool((end > start).any()), float(np.mean(losses(found, setting.early)))

    return min((get(curves, method, control) for control in problem.FIRST_STEPS), key=key)


def as_published(curves: Curves) -> list[dict[str, str]]:
    """Return the rows at the paper's rate; the paper gives curves and no numbers."""
    setting, rows = problem.SETTING, []
    for method in METHODS:
        found = get(curves, method)
        rows.append(
            {
                "inverse": method,
                f"loss after {setting.early}": entry(losses(found, setting.early)),
                f"after {setting.outer_steps}": entry(losses(found, setting.outer_steps)),
                "length of h": typical(found, "norms"),
                "over the exact": over_exact(found),
                "cosine": f"{np.mean([c['cosines'][0] for c in found]):.3f}",
                "error of q": typical(found, "errors"),
                "products": f"{np.mean([c['products'] for c in found]):.0f}",
            }
        )
    return rows


def at_equal_lengths(curves: Curves) -> list[dict[str, str]]:
    """Return the rows of the control."""
    early, rows = problem.SETTING.early, []
    for method in METHODS:
        chosen = best(curves, method)
        rows.append(
            {
                "inverse": method,
                **{
                    control: entry(losses(get(curves, method, control), early))
                    for control in (problem.AS_EXACT, problem.AS_NYSTROM)
                },
                "at the best rate": entry(losses(chosen, early)),
                "the rate": short(np.mean([c["rate"] for c in chosen])),
            }
        )
    return rows


def judge(curves: Curves) -> list[Found]:
    """Hold the paper's claims against the curves."""
    early, nystrom = problem.SETTING.early, methods.PAPER_NYSTROM
    rivals = [methods.PAPER_CG, methods.PAPER_NEUMANN]
    names = [nystrom, *rivals]
    own = {name: losses(get(curves, name), early) for name in names}
    trained = {name: [c["training"][-1][-1] for c in get(curves, name)] for name in names}
    fair = {
        name: losses(best(curves, name), early) for name in [*names, methods.CG, methods.IDENTITY]
    }
    found = get(curves, nystrom)
    equal = losses(get(curves, methods.IDENTITY, problem.AS_NYSTROM), early)
    return [
        claim(
            "the Nyström method optimizes the weight decays faster than CG and Neumann do",
            f"validation loss after {early} outer steps at the paper's rate: {listed(own)}",
            lower(own[nystrom], [own[name] for name in rivals]),
        ),
        claim(
            "with the Nyström method the inner problem's training loss comes down quickly",
            f"training loss at the end of the last inner run: {listed(trained)}",
            lower(trained[nystrom], [trained[name] for name in rivals]),
        ),
        claim(
            "the task showcases the ability of the Nyström approximation",
            f"its hypergradient is {over_exact(found)} times as long as the exact one, its "
            f"inverse product off by {typical(found, 'errors')} in relative terms; the "
            f"identity with steps of the same length: {entry(equal)}; each at the best of "
            f"{len(problem.FIRST_STEPS)} rates: {listed(fair)}",
            lower(fair[nystrom], [v for name, v in fair.items() if name != nystrom]),
        ),
    ]


@experiment("figure2", __doc__, *problem.OPTIONS, packages=("torch", "numpy"))
def main(run: Run) -> None:
    curves = problem.measure(run, ks=[K], alphas=[ALPHA], controls=CONTROLS)
    setting, start = problem.SETTING, losses(get(curves, methods.IDENTITY), 0)
    publish(
        *(run, curves, judge(curves)),
        table(as_published(curves)),
        f"Validation loss after so many outer steps of SGD at rate {setting.outer_rate:g}; "
        f"before: {entry(start)}.\n"
        "h: the hypergradient, q: the inverse product in it; their length, cosine and error at "
        "the first outer\nstep, against the exact ones of a formula.",
        table(at_equal_lengths(curves)),
        f"Validation loss after {setting.early} outer steps: with every h cut or stretched to "
        "the length of the exact one, or\nof Nyström's by Eq. (6); and with the best of the "
        f"{len(problem.FIRST_STEPS)} rates at which the first step has length\n"
        f"{', '.join(f'{length:g}' for length in problem.FIRST_STEPS)}, one at which a seed "
        f"diverges within {setting.control_steps} steps only where there is no other.",
    )
    draw(run, curves)


def draw(run: Run, curves: Curves) -> None:
    """Draw validation and training loss at the paper's rate, and the two controls."""
    figure, ((top, same), (bottom, tuned)) = run.figure(2, 2, 11.5, 7.6)
    for method in METHODS:
        style, found = STYLES[method], get(curves, method)
        top.plot(mean_curve(found), label=method, **style)
        training = mean_curve(found, "training")
        steps = np.linspace(0, 1, training.shape[1])
        at = np.arange(len(training))[:, None] + 0.999 * steps
        bottom.plot(at.ravel(), training.ravel(), **{**style, "linewidth": 0.8})
        same.plot(mean_curve(get(curves, method, problem.AS_NYSTROM)), **style)
        tuned.plot(mean_curve(best(curves, method)), **style)
    top.set(title="As published: outer SGD at rate 1", ylabel="validation loss")
    same.set(title="All steps as long as those of Nyström, Eq. (6)")
    tuned.set(title="Each at its best rate", xlabel="outer step")
    bottom.set(title="Inner problem, as published", xlabel="outer step", ylabel="training loss")
    for axis in (same, tuned):
        axis.set(ylim=top.get_ylim(), ylabel="validation loss")
    figure.legend(loc="outside lower center", ncols=4)
    run.draw(figure)
