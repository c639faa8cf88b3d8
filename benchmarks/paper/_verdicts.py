"""When a mean over seeds counts as above another: by more than their deviations together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.paper._runs import IN_PART, NOT_SUPPORTED, SUPPORTED


def gap(left: Sequence[float], right: Sequence[float]) -> float:
    """Return by how much the mean on the left is above the other, less the deviations' sum.

    Positive where it is above; both are comparable where neither is.
    """
    # Of 1e-9, so that a tie is none by rounding.
    room = np.std(left) + np.std(right) + 1e-9
    return float(np.mean(left) - np.mean(right) - room)


def above(left: Sequence[float], right: Sequence[float]) -> bool:
    """Whether one mean is above another."""
    return gap(left, right) > 0


def comparable(left: Sequence[float], right: Sequence[float]) -> bool:
    """Whether neither mean is above the other."""
    return not above(left, right) and not above(right, left)


def verdict(held: Sequence[bool]) -> str:
    """Supported where a claim held every time, in part where it held sometimes."""
    return SUPPORTED if all(held) else IN_PART if any(held) else NOT_SUPPORTED
