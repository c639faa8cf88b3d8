"""Verdicts on what the paper claims, and when two methods count as equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

SUPPORTED, IN_PART, NOT_SUPPORTED = "supported", "in part", "not supported"


def claim(paper: str, ours: str, verdict: str) -> dict[str, Any]:
    """Say what the paper claims, what came out here, and whether that supports it."""
    if verdict not in (SUPPORTED, IN_PART, NOT_SUPPORTED):
        raise ValueError(f"`verdict` must be one of the three; got {verdict!r}.")
    return {"paper": paper, "ours": ours, "verdict": verdict}


def told(claims: Sequence[dict[str, Any]]) -> str:
    """Write claims out, one paragraph each."""
    return "\n".join(f"Paper: {c['paper']}\nHere:  {c['ours']}\n→ {c['verdict']}" for c in claims)


def verdict(holds: Sequence[bool]) -> str:
    """Return what a claim comes to that says several things: all, some or none of them hold."""
    return SUPPORTED if all(holds) else IN_PART if any(holds) else NOT_SUPPORTED


def comparable(a: Sequence[float], b: Sequence[float], least: float = 0.0) -> bool:
    """Whether the means are within the sum of the deviations, or within `least`."""
    return bool(abs(np.mean(a) - np.mean(b)) <= max(np.std(a) + np.std(b), least))


def below(a: Sequence[float], b: Sequence[float], least: float = 0.0) -> bool:
    """Whether `a` is the lower one, and they are not comparable."""
    return bool(np.mean(a) < np.mean(b)) and not comparable(a, b, least)


def above(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether `a` is the higher one, and they are not comparable."""
    return below(b, a)
