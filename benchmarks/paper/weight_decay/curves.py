"""What the curves of Figures 2, 3 and 4 come to: losses, lengths, verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from benchmarks.harness.claims import IN_PART, NOT_SUPPORTED, SUPPORTED, claim
from benchmarks.harness.experiment import Run
from benchmarks.harness.processes import Found
from benchmarks.harness.report import spread
from benchmarks.paper.weight_decay import problem

Curves = dict[str, list[Found]]


def losses(curves: Sequence[Found], step: int) -> list[float]:
    """Return the validation loss after `step` outer steps, infinite where it had diverged."""
    return [c["validation"][step] if step < len(c["validation"]) else np.inf for c in curves]


def entry(values: Sequence[float], form: str = ".3f") -> str:
    """Write mean ± deviation, or in how many runs it diverged."""
    bad = int(np.sum(~np.isfinite(values)))
    return f"diverges, {bad} of {len(values)}" if bad else spread(values, form)


def lower(ours: Sequence[float], others: Sequence[Sequence[float]]) -> str:
    """Judge whether a loss is below all others.

    Supported where its mean is lower than each by more than the two deviations together; in part
    where it is lower than each.
    """
    if not np.isfinite(ours).all():
        return NOT_SUPPORTED
    verdicts = []
    for other in (each for each in others if np.isfinite(each).all()):
        gap = np.mean(other) - np.mean(ours)
        verdicts.append(2 if gap > np.std(ours) + np.std(other) else 1 if gap > 0 else 0)
    return [NOT_SUPPORTED, IN_PART, SUPPORTED][min(verdicts, default=2)]


def mean_curve(curves: Sequence[Found], key: str = "validation") -> np.ndarray:
    """Return the mean over the seeds, as far as all of them went."""
    length = min(len(curve[key]) for curve in curves)
    return np.mean([np.asarray(curve[key][:length]) for curve in curves], axis=0)


def short(value: Any) -> str:
    """Write two digits, and no power of ten where it can be done without."""
    return f"{float(f'{value:.2g}'):g}"


def typical(curves: Sequence[Found], key: str) -> str:
    """Write the mean at the first outer step."""
    return short(np.mean([curve[key][0] for curve in curves]))


def over_exact(curves: Sequence[Found]) -> str:
    """Write how long the first hypergradient is, over the exact one."""
    return short(np.mean([c["norms"][0] / c["exact_norms"][0] for c in curves]))


def listed(values: dict[str, list[float]]) -> str:
    """Write the values of several methods in a line."""
    return ", ".join(f"{name} {entry(losses)}" for name, losses in values.items())


def steady(
    paper: str, values: dict[str, list[float]], start: Sequence[float], more: str = ""
) -> Found:
    """Judge whether a choice makes no difference.

    Supported where the means lie within a tenth of what the best of them gains from the start; in
    part within a quarter.
    """
    means = [float(np.mean(v)) for v in values.values()]
    gain, between = float(np.mean(start)) - min(means), max(means) - min(means)
    share = between / gain if gain > 0 and np.isfinite(between) else np.inf
    ours = (
        f"validation loss from {entry(start)} to {listed(values)}: they lie within "
        f"{100 * share:.0f} % of the gain{more}"
    )
    verdict = SUPPORTED if share <= 0.1 else IN_PART if share <= 0.25 else NOT_SUPPORTED
    return claim(paper, ours, verdict)


def publish(run: Run, curves: Curves, claims: list[Found], *parts: str) -> None:
    """Publish the parts of a text with what was run; the curves without their training."""
    setting = problem.SETTING
    described = (
        f"D = {setting.dimension}, {setting.examples} points for the inner and for the outer "
        f"problem, {setting.inner_steps} inner steps of SGD at {setting.inner_rate:g} from θ = 0,\n"
        f"outer SGD with momentum {setting.momentum:g}; mean ± deviation over {run.options.seeds} "
        "seeds. `--quick` cuts nothing here."
    )
    kept = {
        name: [{k: v for k, v in curve.items() if k != "training"} for curve in found]
        for name, found in curves.items()
    }
    run.publish(*parts, described, claims=claims, setting=asdict(setting), curves=kept)
