"""What one approximation says at any damping."""

from __future__ import annotations

import numpy as np
import pytest

import lowrank_inverse as li
from tests.conftest import host
from tests.oracles import damped_inverse, damped_solve, nystrom, relative_error
from tests.problems import PSD, RANK, WIDTH, N, indices, matrix, rhs, symmetric

K = indices()
DAMPINGS = (1e-4, 1e-2, 1.0, 1e2)


def functions(A, damping):
    approx = li.nystrom(A, indices=K)
    return (
        approx.trace_inverse(damping),
        approx.effective_dimension(damping),
        approx.sufficient_rank(damping),
    )


def path(A, b):
    return li.nystrom(A, indices=K).solve_path(b, (0.125, 1.0, 8.0))


@pytest.mark.parametrize("name", ["linear", "polynomial", "clusters"])
def test_the_functions_are_those_of_the_dense_approximation(backend, name):
    H = nystrom(backend.seen(matrix(name)), K).astype(np.float64)
    for damping in (0.0625, 1.0):
        inverse = damped_inverse(H, damping).astype(np.float64)
        trace, dimension, rank = backend.run(functions, matrix(name), damping)
        tolerance = 1e3 * backend.eps / damping
        assert trace == pytest.approx(np.trace(inverse), rel=tolerance)
        expected = np.trace(H @ inverse)
        assert dimension == pytest.approx(expected, rel=tolerance)
        assert rank == min(N, 2 * int(np.ceil(1.5 * expected)) + 1)


@pytest.mark.parametrize("width", [None, WIDTH])
def test_a_path_is_the_solution_at_each_damping(backend, width):
    H = nystrom(backend.seen(matrix("linear")), K)
    b = backend.seen(rhs(width=width))
    found = backend.run(path, matrix("linear"), rhs(width=width))
    assert found.shape == (3, *b.shape)
    for x, damping in zip(found, (0.125, 1.0, 8.0), strict=True):
        assert relative_error(x, damped_solve(H, damping, b)) < 1e3 * backend.eps


def test_a_path_takes_an_array_of_dampings_and_keeps_library_and_dtype(library):
    approx = li.nystrom(library.asarray(matrix("linear")), indices=K)
    b = library.asarray(rhs())
    found = approx.solve_path(b, library.asarray(np.array(DAMPINGS)))
    assert type(found) is type(b) and found.dtype == b.dtype
    for x, damping in zip(host(found), DAMPINGS, strict=True):
        expected = host(approx.inverse(damping) @ b)
        assert relative_error(x, expected) < 1e3 * library.eps


def test_the_effective_dimension_counts_the_eigenvalues_above_the_damping():
    A = np.diag([1.0, 1.0, 1.0, 1e-8, 1e-8, 0.0])
    approx = li.nystrom(A, 6, rng=0)
    assert approx.effective_dimension(1e-4) == pytest.approx(3, abs=1e-3)
    assert approx.effective_dimension(1.0) == pytest.approx(1.5, abs=1e-3)
    assert approx.sufficient_rank(1e-4) == 6  # 2 ceil(4.5) + 1 is beyond the matrix
    assert approx.sufficient_rank(1e2) == 3
    assert isinstance(approx.effective_dimension(1.0), float)
    assert isinstance(approx.sufficient_rank(1.0), int)


@pytest.mark.parametrize("name", PSD)
@pytest.mark.parametrize("damping", [1e-3, 1e-1])
def test_the_effective_dimension_grows_with_the_columns_up_to_that_of_the_matrix(name, damping):
    A, order = matrix(name), indices(rank=N)
    w = np.linalg.eigvalsh(A)
    found = [li.nystrom(A, indices=order[:k]).effective_dimension(damping) for k in (1, 4, RANK, N)]
    assert np.all(np.diff(found) > -1e-9)
    assert found[-1] == pytest.approx(np.sum(w / (w + damping)), rel=1e-6)


def test_the_residual_trace_is_known_where_the_diagonal_was_looked_at():
    A = matrix("polynomial")
    products = li.FunctionOperator(lambda v: A @ v, N)
    for operator, sampling in ((A, "uniform"), (A, "diagonal"), (products, "gaussian")):
        assert li.nystrom(operator, 5, sampling=sampling, rng=0).residual_trace is None
    for sampling in ("greedy", "rpcholesky"):
        approx = li.nystrom(A, 5, sampling=sampling, rng=0)
        H = nystrom(A, approx.indices)
        assert approx.residual_trace == pytest.approx(np.trace(A - H), rel=1e-9)
    sketch = li.nystrom(A, 5, sampling="gaussian", rng=0)
    H = sketch @ np.eye(N)
    assert sketch.residual_trace == pytest.approx(np.trace(A - H), rel=1e-9)


def test_the_summary_says_what_was_found_and_whether_it_is_enough():
    A = symmetric(np.exp(-np.arange(60.0)))
    approx = li.nystrom(A, 20, sampling="greedy")
    text = approx.summary(1e-3)
    assert text.splitlines()[0] == repr(approx)
    assert f"eigenvalues: {approx.rank}, from 1 to " in text
    assert "residual trace: " in text
    above = int(np.sum(approx.eigenvalues > 1e-3))
    assert f"damping 0.001: {above} eigenvalues above it, effective dimension" in text
    enough = approx.sufficient_rank(1e-3)
    assert f"enough for it: {enough} columns; there are 20: " in text
    assert enough > 20
    assert text.endswith(": enough, for the residual trace is below the damping")
    few = li.nystrom(A, 5, sampling="greedy")
    assert few.residual_trace > 1e-3
    assert few.summary(1e-3).endswith("there are 5: more columns would help")
    assert approx.summary(1.0).endswith(": enough")
    assert "damping" not in approx.summary()
    assert "eigenvalues" not in li.nystrom(np.zeros((3, 3)), 2, rng=0).summary()


def test_columns_that_missed_nothing_but_rounding_are_enough_for_every_damping(eager):
    factor = np.random.default_rng(0).standard_normal((N, 4))
    approx = li.nystrom(eager.asarray(factor @ factor.T), 4, sampling="greedy")
    damping = 1e-3 * float(np.finfo(eager.dtype).eps)
    assert approx.sufficient_rank(damping) > 4
    words = "rounding" if approx.residual_trace > damping else "below the damping"
    assert approx.summary(damping).endswith(f": enough, for the residual trace is {words}")
    fewer = li.nystrom(eager.asarray(factor @ factor.T), 3, sampling="greedy")
    assert fewer.summary(damping).endswith("more columns would help")


def test_the_residual_trace_of_an_indefinite_matrix_proves_nothing():
    A = np.diag(np.r_[np.linspace(3, 1, 6), np.full(N - 6, -0.45)])
    approx = li.nystrom(A, 8, sampling="gaussian", rng=0)
    assert approx.num_negative > 0
    assert "residual trace is" not in approx.summary(1e-3)


@pytest.mark.parametrize("name", ["trace_inverse", "effective_dimension", "sufficient_rank"])
@pytest.mark.parametrize("damping", [0.0, -1.0, np.nan])
def test_a_damping_that_is_not_positive_is_refused(name, damping):
    with pytest.raises(ValueError, match="`damping` must be finite and > 0"):
        getattr(li.nystrom(np.eye(3), 2, rng=0), name)(damping)


def test_a_right_hand_side_that_does_not_fit_a_path_is_refused():
    approx = li.nystrom(np.eye(3), 2, rng=0)
    with pytest.raises(ValueError, match="`b` must have 3 rows"):
        approx.solve_path(np.ones(4), [1.0])
    with pytest.raises(ValueError, match="`b` must be finite"):
        approx.solve_path(np.full(3, np.nan), [1.0])
    with pytest.raises(ValueError, match="`damping` must be finite and > 0"):
        approx.solve_path(np.ones(3), [1.0, 0.0])
