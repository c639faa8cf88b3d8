"""When two methods count as equal, and what the settings of an experiment cut."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np

from benchmarks.paper._runs import IN_PART, NOT_SUPPORTED, SUPPORTED


def comparable(a: Sequence[float], b: Sequence[float], least: float = 0.0) -> bool:
    """Whether the means are within the sum of the deviations, or within `least`."""
    return bool(abs(np.mean(a) - np.mean(b)) <= max(np.std(a) + np.std(b), least))


def below(a: Sequence[float], b: Sequence[float], least: float = 0.0) -> bool:
    """Whether `a` is the lower one, and they are not comparable."""
    return bool(np.mean(a) < np.mean(b)) and not comparable(a, b, least)


def verdict(holds: Sequence[bool]) -> str:
    """Return what a claim comes to that says several things: all, some or none of them hold."""
    return SUPPORTED if all(holds) else IN_PART if any(holds) else NOT_SUPPORTED


def cuts(paper: Any, here: Any) -> str:
    """Say in which fields two settings of one dataclass differ."""
    changed = [
        f"{field.name.replace('_', ' ')} {getattr(here, field.name)} "
        f"(paper's setting: {getattr(paper, field.name)})"
        for field in fields(here)
        if getattr(paper, field.name) != getattr(here, field.name)
    ]
    return textwrap.fill("; ".join(changed), 96) if changed else "nothing"
