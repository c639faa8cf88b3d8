"""The trace, and a damping of its size."""

from __future__ import annotations

from typing import Any

import numpy as np

from lowrank_inverse.arrays.conversion import like, to_host
from lowrank_inverse.arrays.linalg import dot
from lowrank_inverse.operators.function import aslinearoperator

TRACE_PROBES = 16
AUTO_FRACTION = 0.1


def auto_damping(A: Any, seed: int) -> float:
    """Return a tenth of the mean eigenvalue, by Hutchinson's estimate of the trace."""
    A = aslinearoperator(A)
    n = int(A.shape[0])
    num = min(TRACE_PROBES, n)
    signs = np.random.default_rng(seed).integers(0, 2, (n, num)) * 2.0 - 1.0
    probes = like(signs, A.like)
    mean = float(to_host(dot(probes, A @ probes)).astype(np.float64).mean()) / n
    if not mean > 0:
        raise ValueError(
            f"`damping` can be 'auto' only where the curvature has a positive mean eigenvalue; it "
            f"is about {mean:.3g}. Give a number."
        )
    return AUTO_FRACTION * mean
