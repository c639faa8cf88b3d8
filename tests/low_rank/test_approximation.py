"""The column-sampled approximation H_k = C W^+ C.T."""

from __future__ import annotations

import re

import numpy as np
import pytest

import lowrank_inverse as li
from lowrank_inverse.low_rank.column_sampling import sample_columns
from tests.conftest import host
from tests.oracles import nystrom, nystrom_truncated, operator_norm, relative_error
from tests.problems import (
    INDEFINITE,
    PSD,
    RANK,
    WIDTH,
    CountingOperator,
    N,
    conditioned,
    exactly_psd,
    indices,
    largest,
    matrix,
    rhs,
    symmetric,
)

K = indices()
WELL_CONDITIONED = ["identity", "linear", "polynomial", "step", "clusters"]


def apply(A, block):
    return li.nystrom(A, indices=K) @ block


def apply_all_columns(A, block):
    return li.nystrom(A, N, rng=0) @ block


def eigenvalues_and_logdet(A, damping):
    approx = li.nystrom(A, indices=K)
    return approx.eigenvalues, approx.logdet(damping)


def counts(A):
    approx = li.nystrom(A, indices=range(N))
    return approx.rank, approx.num_dropped, approx.num_negative


def dense(A, **arguments):
    return li.nystrom(A, **arguments) @ np.eye(len(A))


def with_dead_columns(seed=0):
    """A positive definite matrix bordered by zero rows and columns at 0, 7 and 11."""
    A = np.zeros((N, N))
    alive = np.setdiff1d(np.arange(N), [0, 7, 11])
    A[np.ix_(alive, alive)] = conditioned(100, alive.size, seed)
    return A


def with_repeated_columns():
    """A matrix whose rows and columns 9 and 15 repeat those of 3."""
    origin = np.arange(N)
    origin[[9, 15]] = 3
    return conditioned(100)[np.ix_(origin, origin)]


# What it is


@pytest.mark.parametrize("name", WELL_CONDITIONED)
def test_the_approximation_is_c_w_inverse_c_transposed(backend, name):
    reference = nystrom(backend.seen(matrix(name)), K)
    for block in (rhs(), rhs(width=WIDTH)):
        found = backend.run(apply, matrix(name), block)
        condition = np.linalg.cond(matrix(name)[np.ix_(K, K)])
        assert relative_error(found, reference @ backend.seen(block)) < (
            10 * backend.eps * np.sqrt(condition)
        )


@pytest.mark.parametrize("name", PSD)
def test_all_columns_reproduce_a_positive_semidefinite_matrix(backend, name):
    A = backend.seen(matrix(name))
    found = backend.run(apply_all_columns, matrix(name), np.eye(N))
    # What W has below eps times its largest eigenvalue is dropped.
    assert operator_norm(found - A) < 10 * N * backend.eps * largest(name)


@pytest.mark.parametrize("name", WELL_CONDITIONED)
def test_the_sampled_columns_are_reproduced(name):
    A = matrix(name)
    assert operator_norm(dense(A, indices=K)[:, K] - A[:, K]) < 1e-13


@pytest.mark.parametrize("name", PSD)
def test_the_approximation_lies_between_zero_and_the_matrix(name):
    A = matrix(name)
    approximated = dense(A, indices=K)
    # A change of W by dW changes C W^+ C.T by (C W^+) dW (C W^+).T.
    growth = operator_norm(A[:, K] @ np.linalg.pinv(A[np.ix_(K, K)], hermitian=True))
    slack = N * np.finfo(float).eps * largest(name) * growth**2
    assert np.linalg.eigvalsh(approximated)[0] > -slack
    assert np.linalg.eigvalsh(A - approximated)[0] > -slack


@pytest.mark.parametrize("rank", [5, 8, 12])
def test_a_matrix_of_low_rank_is_reproduced_from_any_rank_columns(library, rank):
    A = exactly_psd(np.random.default_rng(3), N, 5)
    approx = li.nystrom(library.asarray(A), rank, sampling="uniform", rng=0)
    assert approx.rank == 5
    assert approx.num_dropped == rank - 5
    assert relative_error(host(approx @ library.asarray(np.eye(N))), A) < 1e3 * library.eps


@pytest.mark.parametrize("name", ["linear", "polynomial", "exponential", "network"])
def test_the_error_falls_with_every_column_that_joins(name):
    A = matrix(name)
    order = indices(rank=N)
    previous = np.zeros((N, N))
    errors = []
    for k in range(1, N + 1):
        approximated = dense(A, indices=order[:k])
        assert np.linalg.eigvalsh(approximated - previous)[0] > -1e-12 * largest(name)
        errors.append(operator_norm(A - approximated))
        previous = approximated
    assert np.all(np.diff(errors) < 1e-12 * largest(name))
    assert errors[N // 2] < 0.9 * errors[0]
    assert errors[-1] < 1e-12 * largest(name)


def test_sampling_by_the_diagonal_beats_uniform_sampling_on_a_heterogeneous_diagonal():
    scale = np.exp(-np.arange(N) / 3)
    A = scale[:, None] * conditioned(5) * scale

    def error(sampling):
        kept = [dense(A, rank=RANK, sampling=sampling, rng=seed) for seed in range(20)]
        return np.mean([np.trace(A - approximated) for approximated in kept])

    assert error("diagonal") < 0.2 * error("uniform")
    assert error("diagonal_squared") < 0.2 * error("uniform")


# Eigenvalues and determinant


@pytest.mark.parametrize("name", ["linear", "polynomial", "exponential", "low rank", "network"])
def test_eigenvalues_and_logdet_are_those_of_the_dense_approximation(backend, name):
    A, damping = backend.seen(matrix(name)), float(backend.seen(0.01))
    reference = nystrom_truncated(A, K, backend.eps)
    eigenvalues, logdet = backend.run(eigenvalues_and_logdet, matrix(name), 0.01)
    expected = np.linalg.eigvalsh((reference + reference.T) / 2)[::-1]
    condition = np.linalg.cond(reference[np.ix_(K, K)] + backend.eps * largest(name) * np.eye(RANK))
    tolerance = (100 + condition) * backend.eps * largest(name)
    np.testing.assert_allclose(eigenvalues, expected[:RANK], rtol=0, atol=tolerance)
    np.testing.assert_allclose(expected[RANK:], 0, atol=tolerance)
    sign, expected_logdet = np.linalg.slogdet(reference + damping * np.eye(N))
    assert sign == 1
    np.testing.assert_allclose(logdet, expected_logdet, rtol=0, atol=RANK * tolerance / damping)


def test_one_approximation_gives_the_logdet_at_every_damping():
    A = matrix("polynomial")
    approx, reference = li.nystrom(A, indices=K), nystrom(A, K).astype(np.float64)
    assert isinstance(approx.logdet(0.1), float)
    for damping in (1e-6, 1e-3, 1.0, 1e3):
        expected = np.linalg.slogdet(reference + damping * np.eye(N))[1]
        assert approx.logdet(damping) == pytest.approx(expected, rel=1e-11)


def test_eigenvalues_are_in_float64_where_there_is_float64(backend):
    eigenvalues, _ = backend.run(eigenvalues_and_logdet, matrix("polynomial"), 0.01)
    assert eigenvalues.dtype == ("float32" if backend.is_narrow else "float64")
    assert eigenvalues.shape == (RANK,)
    assert np.all(np.diff(eigenvalues) <= 0)


# Columns without a use


def test_dead_columns_are_dropped_counted_and_without_effect(library):
    A = with_dead_columns()
    chosen = [0, 2, 7, 5, 11, 8]
    approx = li.nystrom(library.asarray(A), indices=chosen)
    assert (approx.rank, approx.num_dropped, approx.num_negative) == (3, 3, 0)
    without = nystrom(library.seen(A), [2, 5, 8])
    identity = library.asarray(np.eye(N))
    assert relative_error(host(approx @ identity), without) < 1e2 * library.eps
    assert np.all(host(approx.eigenvalues)[3:] <= (library.eps**2 if library.is_narrow else 0))


def test_repeated_columns_are_dropped_counted_and_without_effect(library):
    A = with_repeated_columns()
    assert np.array_equal(A[:, 3], A[:, 9]) and np.array_equal(A[:, 3], A[:, 15])
    approx = li.nystrom(library.asarray(A), indices=[3, 2, 9, 5, 15])
    assert (approx.rank, approx.num_dropped, approx.num_negative) == (3, 2, 0)
    without = nystrom(library.seen(A), [3, 2, 5])
    assert relative_error(host(approx @ library.asarray(np.eye(N))), without) < 1e3 * library.eps


def test_the_zero_matrix_has_the_approximation_zero(library):
    approx = li.nystrom(library.asarray(np.zeros((N, N))), 4, sampling="uniform")
    assert (approx.rank, approx.num_dropped, approx.num_negative) == (0, 4, 0)
    assert not np.any(host(approx @ library.asarray(rhs())))
    assert approx.logdet(0.5) == pytest.approx(N * np.log(0.5))


# Negative curvature


@pytest.mark.parametrize("name", INDEFINITE)
def test_directions_of_negative_curvature_are_counted(backend, name):
    negative = int(np.sum(INDEFINITE[name](N) < 0))
    rank, num_dropped, num_negative = backend.run(counts, matrix(name))
    assert num_negative == negative
    assert num_dropped >= negative
    assert rank == N - num_dropped


@pytest.mark.parametrize("name", PSD)
def test_rounding_is_not_taken_for_negative_curvature(backend, name):
    _, _, num_negative = backend.run(counts, matrix(name))
    assert num_negative == 0


@pytest.mark.parametrize("name", INDEFINITE)
def test_the_approximation_of_an_indefinite_matrix_is_positive_semidefinite(name):
    approximated = dense(matrix(name), indices=range(N))
    assert np.linalg.eigvalsh(approximated)[0] > -1e-13
    # With all columns it is the positive part.
    eigenvalues, vectors = np.linalg.eigh(matrix(name))
    positive = (vectors * np.maximum(eigenvalues, 0)) @ vectors.T
    assert relative_error(approximated, positive) < 1e-12


@pytest.mark.parametrize(
    ("arguments", "kept"),
    [
        ({}, 2),
        ({"indefinite_pivot_rtol": 1e-2}, 1),
        ({"indefinite_pivot_rtol": 1e-9}, 3),
        ({"indefinite_pivot_rtol": 0.5}, 1),
        ({"indefinite_pivot_rtol": 0}, 3),
    ],
)
def test_pivots_are_dropped_up_to_the_tolerance_that_applies(arguments, kept):
    A = np.diag([1.0, 1e-3, 1e-6, -1e-1])
    approx = li.nystrom(A, indices=range(4), **arguments)
    assert (approx.rank, approx.num_dropped, approx.num_negative) == (kept, 4 - kept, 1)


@pytest.mark.parametrize(("arguments", "kept"), [({}, 3), ({"indefinite_pivot_rtol": 0.1}, 3)])
def test_without_negative_curvature_machine_epsilon_is_the_tolerance(arguments, kept):
    A = np.diag([1.0, 1e-3, 1e-14, 1e-17])
    assert li.nystrom(A, indices=range(4), **arguments).rank == kept
    A = np.diag([1.0, 1e-3, 1e-6, 1e-8]).astype("float32")
    assert li.nystrom(A, indices=range(4), **arguments).rank == kept


# How it is made


def test_columns_core_and_indices_are_those_of_the_matrix(library):
    A = library.seen(matrix("linear"))
    approx = li.nystrom(library.asarray(matrix("linear")), indices=K)
    np.testing.assert_array_equal(host(approx.columns), A[:, K])
    np.testing.assert_array_equal(host(approx.core), A[np.ix_(K, K)])
    np.testing.assert_array_equal(approx.indices, K)
    assert tuple(approx.shape) == (N, N)
    assert approx.dtype == approx.columns.dtype


@pytest.mark.parametrize("sampling", ["uniform", "diagonal", "diagonal_squared"])
def test_columns_are_those_of_the_sampling_and_seed(sampling):
    A = matrix("network")
    approx = li.nystrom(A, RANK, sampling=sampling, rng=4)
    np.testing.assert_array_equal(approx.indices, sample_columns(A, RANK, sampling=sampling, rng=4))


@pytest.mark.parametrize(("chunk_size", "widths"), [(None, [8]), (3, [3, 3, 2]), (1, [1] * 8)])
def test_columns_cost_a_product_each_in_chunks_of_the_size_asked_for(chunk_size, widths):
    A = CountingOperator(matrix("linear"))
    approx = li.nystrom(A, indices=K, chunk_size=chunk_size)
    assert A.widths == widths
    assert approx.num_products == A.num_products == RANK
    np.testing.assert_allclose(approx.columns, A.A[:, K], rtol=0, atol=1e-16)


@pytest.mark.parametrize("scale", [2.0**66, 2.0**-66])
def test_the_scale_of_the_matrix_is_the_scale_of_the_approximation(backend, scale):
    for name in ("polynomial", "exponential", "low rank"):
        expected = backend.run(apply, matrix(name), rhs())
        found = backend.run(apply, scale * matrix(name), rhs())
        if not backend.is_narrow:
            np.testing.assert_array_equal(found, expected * expected.dtype.type(scale))
        # An eigendecomposition in float32 scales its matrix on the way.
        assert relative_error(found.astype(np.float64) / scale, expected) < 1e-3


def test_the_counts_can_be_read_off_the_printed_form():
    A = symmetric([3.0, 2.0, 0.0, -1.0])
    assert repr(li.nystrom(A, indices=range(4))) == (
        "NystromApproximation(n=4, columns=4, rank=2, dropped=2, negative=1)"
    )


# Bad input


@pytest.mark.parametrize("arguments", [{}, {"rank": 2, "indices": [0, 1]}])
def test_exactly_one_of_rank_and_indices_must_be_given(arguments):
    with pytest.raises(ValueError, match=r"pass exactly one of `rank` .* and `indices`"):
        li.nystrom(np.eye(3), **arguments)


@pytest.mark.parametrize(
    ("rank", "error", "message"),
    [
        (0, ValueError, "`rank` must be from 1 to 3; got 0"),
        (4, ValueError, "`rank` must be from 1 to 3; got 4"),
        (2.0, TypeError, "`rank` must be a whole number"),
        (True, TypeError, "`rank` must be a whole number"),
    ],
)
def test_a_rank_out_of_range_is_refused(eager, rank, error, message):
    with pytest.raises(error, match=message):
        li.nystrom(eager.asarray(np.eye(3)), rank, rng=0)


@pytest.mark.parametrize(
    ("chosen", "error", "message"),
    [
        ([0, 3], ValueError, r"`indices` must lie in 0 … 2"),
        ([-1], ValueError, r"`indices` must lie in 0 … 2"),
        ([1, 1], ValueError, "`indices` must be distinct"),
        ([0.5], TypeError, "`indices` must be .* of integers"),
    ],
)
def test_indices_out_of_range_or_repeated_are_refused(eager, chosen, error, message):
    with pytest.raises(error, match=message):
        li.nystrom(eager.asarray(np.eye(3)), indices=chosen)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_sampled_column_that_is_not_finite_is_refused(eager, bad):
    A = np.eye(3)
    A[1, 1] = bad
    A = eager.asarray(A)
    function = li.FunctionOperator(lambda v: v, 3, like=A[0, :], columns=lambda chosen: A[:, :2])
    for operator in (A, function):
        with pytest.raises(ValueError, match="`columns of A` must be finite; it holds NaN or Inf"):
            li.nystrom(operator, indices=[0, 1])


@pytest.mark.parametrize("damping", [0.0, -1.0, np.nan, np.inf])
def test_a_logdet_needs_a_positive_damping(damping):
    with pytest.raises(ValueError, match="`damping` must be finite and > 0"):
        li.nystrom(np.eye(3), 2, rng=0).logdet(damping)


@pytest.mark.parametrize("rtol", [-1e-3, np.nan])
def test_a_negative_pivot_tolerance_is_refused(rtol):
    with pytest.raises(ValueError, match="`indefinite_pivot_rtol` must be finite and >= 0"):
        li.nystrom(np.eye(3), 2, rng=0, indefinite_pivot_rtol=rtol)


@pytest.mark.parametrize("damping", [1e-20, 1e-9, 1.0])
def test_a_summary_counts_no_more_eigenvalues_than_it_prints(damping):
    X = np.random.default_rng(0).standard_normal((80, 1))
    K = np.exp(-((X - X.T) ** 2) / 2)
    approx = li.nystrom(K, 60, rng=0)
    assert approx.num_dropped > 0
    text = approx.summary(damping)
    printed, last = re.search(r"eigenvalues: (\d+), from .* to (\S+)", text).groups()
    above = int(re.search(r"damping .*: (\d+) eigenvalues above it", text)[1])
    assert above <= int(printed) <= approx.rank
    assert (above == int(printed)) == (float(last) > damping)


def test_a_vector_of_another_length_dtype_or_library_is_refused():
    torch = pytest.importorskip("torch")
    approx = li.nystrom(np.eye(3), 2, rng=0)
    with pytest.raises(ValueError, match="`block` must have 3 rows"):
        approx @ np.ones(4)
    with pytest.raises(TypeError, match="nothing is promoted silently"):
        approx @ np.ones(3, dtype="float32")
    with pytest.raises(TypeError, match="must come from one library"):
        approx @ torch.ones(3, dtype=torch.float64)
