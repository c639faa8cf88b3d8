"""What Tables 2 and 3 share: columns on the hypergradients, and the picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks._measure import Found
from benchmarks._report import pyplot

EXPLAINED = (
    "cosine, length: of the hypergradient against the derivative through all inner steps, which\n"
    "is the true one, at the first update (where all methods are at one place) and at the last.\n"
    "indefinite: share of the hypergradients where the solver met negative curvature. products:\n"
    "with the Hessian, one to measure the residual included."
)


def columns(found: Sequence[Found]) -> dict[str, str]:
    """Describe the hypergradients of some runs; blank where there are none."""
    checks = [run["checks"] for run in found if run["checks"]]
    names = ["cosine, first", "last", "length, first", "indefinite", "products"]
    if not checks:
        return dict.fromkeys(names, "")
    values = (
        f"{np.mean([check[0]['cosine'] for check in checks]):.2f}",
        f"{np.mean([check[-1]['cosine'] for check in checks]):.2f}",
        f"{np.median([check[0]['length'] for check in checks]):.2g}",
        f"{mean_of(found, 'negative'):.0%}",
        f"{mean_of(found, 'products'):.1f}",
    )
    return dict(zip(names, values, strict=True))


def mean_of(found: Sequence[Found], key: str) -> float:
    """Return the mean of a quantity over all the hypergradients of some runs; NaN if none."""
    values = [value for run in found for value in run[key]]
    return float(np.mean(values)) if values else float("nan")


def skipped(found: dict[str, Sequence[Found]]) -> str:
    """Say which methods had updates that had to be left out."""
    counts = {name: sum(run["skipped"] for run in group) for name, group in found.items()}
    named = [f"{name} {count}" for name, count in counts.items() if count]
    return f"Updates left out, singular or not finite: {', '.join(named)}." if named else ""


def draw(path: Path, panels: dict[str, dict[str, Sequence[Found]]]) -> None:
    """Draw the loss on unseen data over the updates, and the test accuracy, one row a panel."""
    plt = pyplot()
    figure, axes = plt.subplots(
        *(len(panels), 2), figsize=(12, 4.6 * len(panels)), layout="constrained", squeeze=False
    )
    for (left, right), (title, by_method) in zip(axes, panels.items(), strict=True):
        for place, (method, found) in enumerate(by_method.items()):
            color = f"C{place}"
            accuracy = [run["accuracy"] for run in found]
            right.barh(place, np.mean(accuracy), xerr=np.std(accuracy), color=color)
            losses = np.array([run["losses"] for run in found])
            if losses.size:
                window = max(1, losses.shape[1] // 10)
                smooth = np.apply_along_axis(
                    np.convolve, 1, losses, np.full(window, 1 / window), mode="valid"
                )
                updates = np.arange(smooth.shape[1]) + window
                left.plot(updates, smooth.mean(axis=0), color=color, label=method)
        left.set(xlabel="update", ylabel="outer loss, running mean", title=title)
        left.legend(fontsize="small")
        right.set_yticks(range(len(by_method)), by_method)
        right.invert_yaxis()
        right.set(xlabel="test accuracy", title=title)
    figure.savefig(path, dpi=150)
    plt.close(figure)
