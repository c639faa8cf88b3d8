"""What every solution of an iteration must satisfy, whatever became of it."""

from __future__ import annotations

from typing import Any

import numpy as np

from lowrank_inverse import Reason
from tests.oracles import LONG, norm, operator_norm, residual_norm


def check_claims(A: Any, b: Any, solution: Any, *, damping: Any = 0.0, rtol: Any = 1e-5) -> None:
    """Compare the residual that is reported, and the success that is claimed, with the true one."""
    A, b = np.asarray(A, dtype=LONG), np.asarray(b, dtype=LONG)
    value = np.asarray(solution.value)
    assert np.all(np.isfinite(value))
    assert np.all(np.isfinite(solution.residual_norm))
    true = residual_norm(A, damping, value, b)
    scale = operator_norm(A) + float(damping)
    rounding = 10 * np.finfo(value.dtype).eps * (scale * norm(value) + norm(b))
    assert np.all(np.abs(solution.residual_norm - true) <= rounding)
    assert np.all(true[solution.converged] <= (rtol * norm(b) + rounding)[solution.converged])
    np.testing.assert_array_equal(solution.converged, solution.reason == Reason.CONVERGED)
    assert solution.error_bound is None
