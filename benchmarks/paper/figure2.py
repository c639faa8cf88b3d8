"""Figure 2 of the paper: a weight decay for each parameter, by ways to invert, l = k = 5.

Beside the paper's curves stands what they hang on: how long each hypergradient is, and how the
methods compare once their steps are equally long.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._measure import Found
from benchmarks._report import publish, pyplot, table
from benchmarks.paper import _curves, _methods, _runs
from benchmarks.paper import _weight_decay as decay

K, ALPHA = 5, 0.01
CONTROLS = [decay.OWN, decay.AS_EXACT, decay.AS_NYSTROM, *decay.FIRST_STEPS]

Curves = dict[str, list[Found]]


def get(curves: Curves, method: str, control: str | float = decay.OWN) -> list[Found]:
    """Return the curves of a method, one for each seed."""
    return curves[decay.label(method, K, ALPHA, control)]


def best(curves: Curves, method: str, setting: decay.Setting) -> list[Found]:
    """Return the curves at the rate with the lowest mean loss after the first steps.

    A rate at which a seed diverges, be it later, is taken only where there is no other.
    """

    def key(found: list[Found]) -> tuple[bool, float]:
        start, end = (np.array(_curves.losses(found, at)) for at in (0, setting.control_steps))
        return bool((end > start).any()), float(np.mean(_curves.losses(found, setting.early)))

    return min((get(curves, method, control) for control in decay.FIRST_STEPS), key=key)


def as_published(curves: Curves, setting: decay.Setting) -> list[dict[str, str]]:
    """Return the rows at the paper's rate; the paper gives curves and no numbers."""
    rows = []
    for method in decay.METHODS:
        found = get(curves, method)
        rows.append(
            {
                "inverse": method,
                f"loss after {setting.early}": _curves.entry(_curves.losses(found, setting.early)),
                f"after {setting.outer_steps}": _curves.entry(
                    _curves.losses(found, setting.outer_steps)
                ),
                "length of h": _curves.typical(found, "norms"),
                "over the exact": _curves.over_exact(found),
                "cosine": f"{np.mean([c['cosines'][0] for c in found]):.3f}",
                "error of q": _curves.typical(found, "errors"),
                "products": f"{np.mean([c['products'] for c in found]):.0f}",
            }
        )
    return rows


def at_equal_lengths(curves: Curves, setting: decay.Setting) -> list[dict[str, str]]:
    """Return the rows of the control."""
    early, rows = setting.early, []
    for method in decay.METHODS:
        chosen = best(curves, method, setting)
        rows.append(
            {
                "inverse": method,
                **{
                    control: _curves.entry(_curves.losses(get(curves, method, control), early))
                    for control in (decay.AS_EXACT, decay.AS_NYSTROM)
                },
                "at the best rate": _curves.entry(_curves.losses(chosen, early)),
                "the rate": _curves.short(np.mean([c["rate"] for c in chosen])),
            }
        )
    return rows


def judge(curves: Curves, setting: decay.Setting) -> list[Found]:
    """Hold the paper's claims against the curves."""
    early, nystrom = setting.early, _methods.PAPER_NYSTROM
    rivals = [_methods.PAPER_CG, _methods.PAPER_NEUMANN]
    names = [nystrom, *rivals]
    own = {name: _curves.losses(get(curves, name), early) for name in names}
    trained = {name: [c["training"][-1][-1] for c in get(curves, name)] for name in names}
    fair = {
        name: _curves.losses(best(curves, name, setting), early)
        for name in [*names, _methods.CG, _methods.IDENTITY]
    }
    found = get(curves, nystrom)
    equal = _curves.losses(get(curves, _methods.IDENTITY, decay.AS_NYSTROM), early)
    return [
        _runs.claim(
            "the Nyström method optimizes the weight decays faster than CG and Neumann do",
            f"validation loss after {early} outer steps at the paper's rate: {_curves.listed(own)}",
            _curves.lower(own[nystrom], [own[name] for name in rivals]),
        ),
        _runs.claim(
            "with the Nyström method the inner problem's training loss comes down quickly",
            f"training loss at the end of the last inner run: {_curves.listed(trained)}",
            _curves.lower(trained[nystrom], [trained[name] for name in rivals]),
        ),
        _runs.claim(
            "the task showcases the ability of the Nyström approximation",
            f"its hypergradient is {_curves.over_exact(found)} times as long as the exact one, its "
            f"inverse product off by {_curves.typical(found, 'errors')} in relative terms; the "
            f"identity with steps of the same length: {_curves.entry(equal)}; each at the best of "
            f"{len(decay.FIRST_STEPS)} rates: {_curves.listed(fair)}",
            _curves.lower(fair[nystrom], [v for name, v in fair.items() if name != nystrom]),
        ),
    ]


def draw(curves: Curves, setting: decay.Setting, path: Path) -> None:
    """Draw validation and training loss at the paper's rate, and the two controls."""
    plt = pyplot()
    figure, ((top, same), (bottom, tuned)) = plt.subplots(
        2, 2, figsize=(11.5, 7.6), layout="constrained"
    )
    for method in decay.METHODS:
        style: dict[str, Any] = _curves.STYLES[method]
        found = get(curves, method)
        top.plot(_curves.mean_curve(found), label=method, **style)
        training = _curves.mean_curve(found, "training")
        steps = np.linspace(0, 1, training.shape[1])
        at = np.arange(len(training))[:, None] + 0.999 * steps
        bottom.plot(at.ravel(), training.ravel(), **{**style, "linewidth": 0.8})
        same.plot(_curves.mean_curve(get(curves, method, decay.AS_NYSTROM)), **style)
        tuned.plot(_curves.mean_curve(best(curves, method, setting)), **style)
    top.set(title="As published: outer SGD at rate 1", ylabel="validation loss")
    same.set(title="All steps as long as those of Nyström, Eq. (6)")
    tuned.set(title="Each at its best rate", xlabel="outer step")
    bottom.set(title="Inner problem, as published", xlabel="outer step", ylabel="training loss")
    for axis in (same, tuned):
        axis.set(ylim=top.get_ylim(), ylabel="validation loss")
    figure.legend(loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: list[str]) -> int:
    """Follow all methods, print the tables and the claims, write JSON and the picture."""
    options = decay.parse("figure2", __doc__, arguments)
    curves, about, setting = decay.measure(
        "figure2", options, ks=[K], alphas=[ALPHA], controls=CONTROLS
    )
    claims = judge(curves, setting)
    start = _curves.losses(get(curves, _methods.IDENTITY), 0)
    text = "\n\n".join(
        [
            table(as_published(curves, setting)),
            f"Validation loss after so many outer steps of SGD at rate {setting.outer_rate:g}; "
            f"before: {_curves.entry(start)}.\n"
            "h: the hypergradient, q: the inverse product in it; their length, cosine and error at "
            "the first outer\nstep, against the exact ones of a formula.",
            table(at_equal_lengths(curves, setting)),
            f"Validation loss after {setting.early} outer steps: with every h cut or stretched to "
            "the length of the exact one, or\nof Nyström's by Eq. (6); and with the best of the "
            f"{len(decay.FIRST_STEPS)} rates at which the first step has length\n"
            f"{', '.join(f'{length:g}' for length in decay.FIRST_STEPS)}, one at which a seed "
            f"diverges within {setting.control_steps} steps only where there is no other.",
            _curves.described(setting, options.seeds),
            _runs.told(claims),
        ]
    )
    publish(
        options.output,
        "figure2",
        text,
        about,
        claims=claims,
        **_curves.summary(curves, setting),
    )
    draw(curves, setting, options.output / "figure2.png")
    print(f"Picture: {options.output / 'figure2.png'}")
    return 0
