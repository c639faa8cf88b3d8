"""Entries from 1e-12 to 1e12, equal rows, zero rows, tiny dampings: nothing false is claimed."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

import lowrank_inverse as li
from tests.oracles import LONG, norm

QUICK, MANY = 20, 2000
SOLVERS: dict[str, Any] = {
    "none given": lambda damping: None,
    "CG": lambda damping: li.CG(damping=damping),
    "NystromCG": lambda damping: li.NystromCG(rank=4, damping=damping),
    "NystromCG, pivots": lambda damping: li.NystromCG(
        rank="auto", sampling="rpcholesky", damping=damping
    ),
    "NystromCG, Gaussian": lambda damping: li.NystromCG(
        rank=4, sampling="gaussian", damping=damping
    ),
    "Nystrom": lambda damping: li.Nystrom(rank=4, damping=damping or 1e-9),
    "Nystrom, refined": lambda damping: li.Nystrom(rank=4, damping=damping or 1e-9, refine=3),
    "Nystrom, streamed": lambda damping: li.Nystrom(
        rank=4, damping=damping or 1e-9, memory="streamed"
    ),
    "Neumann": lambda damping: li.Neumann(damping=damping, num_terms=30),
    "Exact": lambda damping: li.Exact(damping=damping),
}


def system(seed, dtype):
    """Return a symmetric matrix, two right-hand sides and a damping, drawn to be hard."""
    generator = np.random.default_rng([seed, 7])
    n = int(generator.integers(1, 13))
    G = generator.standard_normal((n, int(generator.integers(1, n + 3))))
    if generator.random() < 0.6:
        G *= 10.0 ** generator.uniform(-6, 6, n)[:, None]
    if n > 2 and generator.random() < 0.4:
        G[generator.integers(0, n, 2)] = G[generator.integers(0, n)]
    if generator.random() < 0.3:
        G[generator.integers(0, n)] = 0.0
    A = G @ G.T
    if generator.random() < 0.2:
        A -= generator.random() * np.max(np.diagonal(A)) * np.eye(n)
    size = np.max(np.abs(A)) or 1.0
    damping = float(generator.choice([0.0, 10.0 ** generator.uniform(-16, 1) * size]))
    b = np.stack([A @ generator.standard_normal(n), generator.standard_normal(n)], axis=1)
    if generator.random() < 0.3:
        b[:, 1] *= 10.0 ** generator.uniform(-12, 12, n)
    return A.astype(dtype), b.astype(dtype), float(np.asarray(damping, dtype))


def check(name, seed, dtype):
    A, b, damping = system(seed, dtype)
    solver = SOLVERS[name](damping)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # that nothing better than zero was found
        extra = {"damping": damping} if solver is None else {}
        solution = li.solve(A, b, solver=solver, rng=0, **extra)
    assert np.all(np.isfinite(solution.value)), (name, seed)
    shift = damping if solver is None else solver.damping
    B = A.astype(LONG) + LONG(np.asarray(shift, dtype)) * np.eye(len(A))
    true = norm(b.astype(LONG) - B @ solution.value.astype(LONG))
    # Woodbury's identity without columns may lose every digit: then the residual may overflow.
    finite = np.isfinite(solution.residual_norm)
    assert np.all(solution.residual_norm[~finite] == np.inf), (name, seed)
    size = norm(np.abs(B) @ np.abs(solution.value.astype(LONG)) + np.abs(b))
    assert np.all(size[~finite] > np.finfo(dtype).max / (4 * len(A))), (name, seed)
    assert np.all(np.asarray(solution.reason)[~finite] == li.Reason.NONFINITE), (name, seed)
    claimed = np.asarray(solution.converged)
    assert np.all(true[claimed] <= norm(b)[claimed]), (name, seed)
    # What is called the residual norm is that of the value, up to the rounding of the product.
    error = np.abs(true - solution.residual_norm)[finite]
    assert np.all(error <= 100 * np.finfo(dtype).eps * size[finite]), (name, seed)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_hard_system_is_solved_or_said_not_to_be(name, dtype):
    for seed in range(QUICK):
        check(name, seed, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", SOLVERS)
def test_two_thousand_hard_systems_are_solved_or_said_not_to_be(name, dtype):
    for seed in range(QUICK, QUICK + MANY):
        check(name, seed, dtype)
