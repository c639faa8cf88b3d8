"""No certificate is ever violated: thousands of positive semidefinite systems of every kind."""

from __future__ import annotations

import numpy as np
import pytest

import lowrank_inverse as li
from tests.oracles import damped, damped_solve, norm
from tests.problems import CountingOperator

NUM_CASES = 10_000
NUM_QUICK = 400
LARGEST = 60


def semidefinite(rng, n):
    """A positive semidefinite matrix that float32 holds without rounding, of any rank."""
    rank = int(rng.integers(0, n + 1))
    X = rng.integers(-8, 9, (n, rank)) * 2.0 ** -rng.integers(0, 5, rank)
    kind = rng.integers(4)
    if kind == 1:  # duplicate rows and columns
        X = X[rng.integers(0, max(1, n // 3), n)]
    elif kind == 2:  # zero rows and columns
        X[rng.random(n) < 0.4] = 0.0
    elif kind == 3:  # rows that differ by orders of magnitude
        X[rng.random(n) < 0.5] *= 0.0625
    A = X @ X.T
    assert np.array_equal(A, A.astype(np.float32))
    return A


def right_hand_side(rng, A, vectors):
    n = len(A)
    kind = rng.integers(4)
    b = rng.standard_normal((n, 2))
    if kind == 1:
        b = vectors[:, :1] * rng.standard_normal((1, 2))  # near the null space, if there is one
    elif kind == 2:
        b = A @ b
    elif kind == 3:
        b[:, 0] = 0.0
    return b if rng.random() < 0.5 else b[:, 1]


def approximate(rng, A, b, damping, vectors):
    """Any x whatever; `b` and the answer in the dtype of `A`."""
    kind = rng.integers(7)
    if kind == 0:
        x = damped_solve(A, damping, b)
    elif kind == 1:
        rank = int(rng.integers(1, len(A) + 1))
        x = li.nystrom(A, rank, rng=rng).inverse(damping) @ b
    elif kind == 2:
        x = li.cg(A, b, damping=damping, max_steps=int(rng.integers(1, 30))).value
    elif kind == 3:
        x = li.cg(A, b, damping=damping, rtol=10 * np.finfo(A.dtype).eps).value
    elif kind == 4:
        x = np.zeros_like(b)
    elif kind == 5:
        x = rng.standard_normal(b.shape) * norm(b) / damping * 10.0 ** rng.integers(-6, 3)
    else:  # so large along a small eigenvector that the product is nothing but rounding
        vector = vectors[:, 0] if b.ndim == 1 else vectors[:, :1]
        size = 10.0 ** rng.integers(-2, 6) * np.max(norm(b)) / damping
        x = damped_solve(A, damping, b) + size * vector
    return np.asarray(x).astype(A.dtype)


def violations(seed, dtype):
    """Solve one random system, and say which bounds of its certificates do not hold."""
    rng = np.random.default_rng([seed, 11])
    n = int(rng.integers(1, LARGEST + 1))
    A = semidefinite(rng, n)
    vectors = np.linalg.eigh(A)[1]
    b = right_hand_side(rng, A, vectors)
    scale = 2.0 ** rng.choice([0, 0, 66, -66])  # about 1e±20, and exact
    damping = float(scale * 2.0 ** rng.integers(-20, 7))
    size = min(scale, 1.0) * 2.0 ** rng.choice([0, 20, -20])  # lest A x overflow in float32
    A, b = (scale * A).astype(dtype), (size * b).astype(dtype)
    x = approximate(rng, A, b, damping, vectors)
    error = np.asarray(x, dtype=np.longdouble) - damped_solve(A, damping, b)
    true = norm(error), np.sqrt(np.sum(error * (damped(A, damping) @ error), axis=0))
    rank = int(rng.integers(1, n + 1))
    sampling = str(rng.choice(["uniform", "diagonal", "greedy", "rpcholesky", "gaussian"]))
    inverse = li.nystrom(A, rank, sampling=sampling, rng=rng).inverse(damping)
    found = []
    for operator in (A, CountingOperator(A)):
        for N in (None, inverse):
            certificate = li.certify(operator, b, x, damping=damping, inverse=N)
            names = ("error_bound", "energy_bound")
            for name, actual in zip(names, true, strict=True):
                bound = np.asarray(getattr(certificate, name), dtype=np.longdouble)
                if not np.all(np.isfinite(bound)) or np.any(actual > bound * (1 + 1e-9)):
                    where = type(operator).__name__, "bare" if N is None else sampling
                    found.append((seed, *where, name, float(np.max(actual / bound))))
    return found


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_certificate_is_violated_in_hundreds_of_random_systems(dtype):
    found = [violation for seed in range(NUM_QUICK // 2) for violation in violations(seed, dtype)]
    assert found == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_no_certificate_is_violated_in_ten_thousand_random_systems(dtype):
    seeds = range(NUM_QUICK // 2, NUM_QUICK // 2 + NUM_CASES // 2)
    found = [violation for seed in seeds for violation in violations(seed, dtype)]
    assert found == []


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_product_of_nothing_but_rounding_is_allowed_for_without_the_entries_of_the_matrix(dtype):
    """A residual of zero by chance proves nothing where x is large and A x small."""
    for seed in range(50):
        rng = np.random.default_rng(seed)
        A = semidefinite(rng, 40).astype(dtype)
        null = np.linalg.eigh(A.astype(np.float64))[1][:, 0]
        damping = 2.0**-30
        # A right-hand side that the rounded product meets to the last bit.
        x = (2.0**20 * null).astype(dtype)
        b = (A @ x + dtype_of(A, damping) * x).astype(dtype)
        error = np.asarray(x, dtype=np.longdouble) - damped_solve(A, damping, b)
        for operator in (A, CountingOperator(A)):
            assert norm(error) <= li.certify(operator, b, x, damping=damping).error_bound


def dtype_of(A, number):
    return A.dtype.type(number)
