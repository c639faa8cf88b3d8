"""When two methods count as equal, and what the settings of an experiment cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from benchmarks._report import table
from benchmarks.paper._runs import IN_PART, NOT_SUPPORTED, SUPPORTED


def comparable(a: Sequence[float], b: Sequence[float], least: float = 0.0) -> bool:
    """Whether the means are within the sum of the deviations, or within `least`."""
    return bool(abs(np.mean(a) - np.mean(b)) <= max(np.std(a) + np.std(b), least))


def below(a: Sequence[float], b: Sequence[float], least: float = 0.0) -> bool:
    """Whether `a` is the lower one, and they are not comparable."""
    return bool(np.mean(a) < np.mean(b)) and not comparable(a, b, least)


def above(a: Sequence[float], b: Sequence[float], least: float = 0.0) -> bool:
    """Whether `a` is the higher one, and they are not comparable."""
    return below(b, a, least)


def verdict(holds: Sequence[bool]) -> str:
    """Return what a claim comes to that says several things: all, some or none of them hold."""
    return SUPPORTED if all(holds) else IN_PART if any(holds) else NOT_SUPPORTED


def cuts(paper: Any, here: Any) -> str:
    """Return a table of the fields in which two settings of one dataclass differ."""
    full = asdict(paper)
    rows = [
        {"setting": name.replace("_", " "), "here": str(value), "in full": str(full[name])}
        for name, value in asdict(here).items()
        if value != full[name]
    ]
    return table(rows) if rows else "The setting in full."
