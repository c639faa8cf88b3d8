"""Columns chosen by pivoted Cholesky."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chi2

import lowrank_inverse as li
from lowrank_inverse.low_rank.pivoting.factorization import METHODS
from tests.conftest import host
from tests.oracles import operator_norm
from tests.problems import (
    INDEFINITE,
    PSD,
    CountingOperator,
    N,
    conditioned,
    exactly_psd,
    largest,
    matrix,
    symmetric,
)


def without_entries(A):
    """Return an operator that reads columns and a diagonal, so that pivots come one by one."""
    operator = li.aslinearoperator(A)
    return li.FunctionOperator(
        operator.matvec,
        operator.shape[0],
        like=operator.like,
        columns=operator.columns,
        diagonal=operator.diagonal,
    )


FORMS = {"in blocks": li.aslinearoperator, "one by one": without_entries}
every_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
every_method = pytest.mark.parametrize("method", METHODS)


def schur_complement(A, pivots):
    """The residual, by the pseudo-inverse of the pivots' block in float64."""
    A = np.asarray(A, dtype=np.float64)
    if len(pivots) == 0:
        return A
    return A - A[:, pivots] @ np.linalg.lstsq(A[np.ix_(pivots, pivots)], A[pivots], rcond=None)[0]


def greedy_pivots(A, rank):
    """The textbook: eliminate the row and column of the largest diagonal entry."""
    R, pivots = np.array(A, dtype=np.longdouble), []
    for _ in range(rank):
        p = int(np.argmax(np.diagonal(R)))
        R = R - np.outer(R[:, p], R[p]) / R[p, p]
        pivots.append(p)
    return pivots


def kernel_matrix(n=60, width=0.1, seed=0):
    t = np.random.default_rng(seed).random(n)
    return np.exp(-((t[:, None] - t) ** 2) / (2 * width**2))


def with_diagonal(A):
    """Products, columns by products, and a diagonal: no entries to be had."""
    counting = CountingOperator(A)
    operator = li.FunctionOperator(
        lambda v: counting @ v,
        len(A),
        dtype=A.dtype,
        matmat=lambda block: counting @ block,
        diagonal=lambda: np.diagonal(A),
    )
    return operator, counting


# What it computes


@every_method
@every_form
@pytest.mark.parametrize("name", ["identity", "linear", "polynomial", "clusters", "exponential"])
def test_the_factor_is_the_cholesky_factor_of_the_pivots(method, form, name):
    A = matrix(name)
    found = li.pivoted_cholesky(form(A), 7, method=method, rng=0)
    assert found.factor.shape == found.columns.shape == (N, 7)
    np.testing.assert_array_equal(found.columns, A[:, found.pivots])
    L = found.factor[found.pivots]
    assert np.max(np.abs(np.triu(L, 1))) < 1e-12 * largest(name)
    tolerance = 1e-12 * largest(name) * np.linalg.cond(A[np.ix_(found.pivots, found.pivots)])
    residual = A - found.factor @ found.factor.T
    assert operator_norm(residual - schur_complement(A, found.pivots)) < tolerance
    np.testing.assert_allclose(found.residual_diagonal, np.diagonal(residual), atol=tolerance)
    assert found.residual_trace == pytest.approx(np.trace(residual), abs=N * tolerance)
    assert not found.indefinite


@every_form
@pytest.mark.parametrize("name", ["linear", "polynomial", "network", "clusters"])
def test_greedy_pivots_are_those_of_the_textbook_in_every_exact_form(form, name):
    found = li.pivoted_cholesky(form(matrix(name)), 8, method="greedy")
    assert found.pivots.tolist() == greedy_pivots(matrix(name), 8)


@every_form
def test_random_pivots_are_drawn_in_proportion_to_the_residual_diagonal(form):
    """Exact probabilities of all ordered pairs, against 2000 draws."""
    A = exactly_psd(np.random.default_rng(5), 6, 4)
    A[3], A[:, 3] = A[1], A[:, 1]
    A[3, 3] = A[1, 1]  # a duplicate
    first = np.diagonal(A) / np.trace(A)
    joint = np.zeros((6, 6))
    for i in range(6):
        d = np.maximum(np.diagonal(schur_complement(A, [i])), 0)
        d[d < 1e-12] = 0
        joint[i] = first[i] * d / d.sum()
    rng, counts = np.random.default_rng(0), np.zeros((6, 6))
    for _ in range(2000):
        pair = li.pivoted_cholesky(form(A), 2, rng=rng).pivots
        counts[pair[0], pair[1]] += 1
    possible = joint > 0
    assert not np.any(counts[~possible])
    common = joint > 5 / 2000
    observed = np.append(counts[common], counts[~common].sum())
    expected = 2000 * np.append(joint[common], joint[~common].sum())
    kept = expected > 0
    statistic = np.sum((observed[kept] - expected[kept]) ** 2 / expected[kept])
    assert statistic < chi2.ppf(1 - 1e-6, np.sum(kept) - 1)


@every_method
def test_the_residual_trace_of_random_data_falls_as_the_best_rank_k_error(method):
    A = symmetric(1.0 / np.arange(1, 201) ** 2)
    for k in (10, 40):
        best = np.sum(1.0 / np.arange(k + 1, 201) ** 2)
        traces = [
            li.pivoted_cholesky(A, k, method=method, rng=seed).residual_trace for seed in range(5)
        ]
        assert best <= np.mean(traces) < 4 * best


def test_pivots_beat_uniform_columns_where_points_crowd():
    t = np.concatenate([np.random.default_rng(0).normal(0, 0.01, 180), np.linspace(1, 3, 20)])
    A = np.exp(-((t[:, None] - t) ** 2) / 0.02)
    uniform = [
        np.trace(A) - float(np.sum(li.nystrom(A, 15, sampling="uniform", rng=seed).eigenvalues))
        for seed in range(5)
    ]
    for method in METHODS:
        assert li.pivoted_cholesky(A, 15, method=method, rng=0).residual_trace < 0.3 * np.mean(
            uniform
        )


# Where it ends


@every_method
@every_form
@pytest.mark.parametrize("rank", [1, 5, 12])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_matrix_of_rank_r_gives_r_pivots(method, form, rank, dtype):
    for seed in range(5):
        A = exactly_psd(np.random.default_rng(seed), 40, rank).astype(dtype)
        found = li.pivoted_cholesky(form(A), 30, method=method, rng=seed)
        assert found.pivots.size == np.linalg.matrix_rank(A.astype(np.float64)) == rank
        assert found.exhausted
        assert np.unique(found.pivots).size == rank
        assert np.all(np.isfinite(found.residual_diagonal))
        assert np.all(np.isfinite(found.factor))
        assert found.residual_trace < 1e3 * np.finfo(dtype).eps * np.trace(A)


@every_method
@every_form
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_pivoting_far_below_the_precision_ends_without_garbage(method, form, dtype):
    """Where matrices of decaying spectrum make others return NaN, or pivots twice."""
    A = kernel_matrix(200, 0.3).astype(dtype)
    found = li.pivoted_cholesky(form(A), 200, method=method, rng=0)
    assert found.exhausted
    assert found.pivots.size < 60
    assert np.unique(found.pivots).size == found.pivots.size
    assert not found.indefinite
    residual = A.astype(np.float64) - found.factor.astype(np.float64) @ found.factor.T
    assert np.all(np.isfinite(found.factor))
    assert operator_norm(residual) < 200 * 300 * np.finfo(dtype).eps
    assert np.min(found.residual_diagonal) > -300 * np.finfo(dtype).eps


@every_method
@every_form
def test_duplicates_are_never_both_taken(method, form):
    origin = np.arange(40) % 10
    A = conditioned(100, 10)[np.ix_(origin, origin)]
    for seed in range(10):
        found = li.pivoted_cholesky(form(A), 40, method=method, rng=seed)
        assert sorted(found.pivots % 10) == list(range(10))


@every_method
def test_the_zero_matrix_has_no_pivots(library, method):
    found = li.pivoted_cholesky(library.asarray(np.zeros((N, N))), 4, method=method, rng=0)
    assert found.pivots.shape == (0,)
    assert tuple(found.columns.shape) == tuple(found.factor.shape) == (N, 0)
    assert found.exhausted and not found.indefinite
    assert found.residual_trace == 0 and found.num_products == 0


@every_method
def test_rows_of_zeros_are_never_taken(method):
    A = np.zeros((N, N))
    alive = np.setdiff1d(np.arange(N), [0, 7, 11])
    A[np.ix_(alive, alive)] = conditioned(100, alive.size)
    found = li.pivoted_cholesky(A, N, method=method, rng=0)
    assert sorted(found.pivots) == alive.tolist()
    assert found.exhausted


@every_method
@every_form
def test_all_columns_of_a_definite_matrix_are_taken_once(method, form):
    found = li.pivoted_cholesky(form(conditioned(100)), N, method=method, rng=0)
    assert sorted(found.pivots) == list(range(N))
    assert found.exhausted and found.residual_trace == 0


@every_method
def test_a_matrix_of_one_row_is_no_special_case(eager, method):
    found = li.pivoted_cholesky(eager.asarray(np.array([[4.0]])), 1, method=method, rng=0)
    assert found.pivots.tolist() == [0]
    assert host(found.factor).tolist() == [[2.0]]
    assert found.exhausted


@every_method
@pytest.mark.parametrize("rtol", [1e-1, 1e-3])
def test_entries_below_the_tolerance_are_left_alone(method, rtol):
    A = matrix("geometric")
    found = li.pivoted_cholesky(A, N, method=method, rng=0, rtol=rtol)
    assert 0 < found.pivots.size < N
    assert np.max(found.residual_diagonal) <= rtol * np.max(np.diagonal(A))
    fewer = li.pivoted_cholesky(A, found.pivots.size - 1, method="greedy", rtol=rtol)
    if method == "greedy":
        assert not fewer.exhausted


# Indefinite matrices


@every_method
@every_form
@pytest.mark.parametrize("name", INDEFINITE)
def test_an_indefinite_matrix_is_flagged_and_breaks_nothing(method, form, name):
    found = li.pivoted_cholesky(form(matrix(name)), N, method=method, rng=0)
    assert found.indefinite
    assert np.all(np.isfinite(found.factor)) and np.all(np.isfinite(found.residual_diagonal))
    assert np.unique(found.pivots).size == found.pivots.size


@every_method
@pytest.mark.parametrize("name", PSD)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rounding_is_not_taken_for_an_indefinite_matrix(method, name, dtype):
    for seed in range(3):
        A = matrix(name, seed=seed).astype(dtype)
        assert not li.pivoted_cholesky(A, N, method=method, rng=seed).indefinite


@every_method
def test_a_negative_diagonal_entry_is_flagged_before_its_column_is_read(method):
    found = li.pivoted_cholesky(np.diag([1.0, 2.0, -1.0]), 2, method=method, rng=0)
    assert sorted(found.pivots) == [0, 1]
    assert found.indefinite


@pytest.mark.parametrize("sampling", METHODS)
@pytest.mark.parametrize(
    "A",
    [
        np.diag([1.0, 2.0, -1.0]),
        np.array([[0.0, 1.0], [1.0, 0.0]]),
        -np.eye(3),
        np.array([[1.0, 2.0], [2.0, 1.0]]),
    ],
    ids=["negative entry", "zero diagonal", "negative definite", "too large off the diagonal"],
)
def test_the_approximation_proves_an_indefinite_matrix_indefinite(A, sampling):
    approx = li.nystrom(A, 1, sampling=sampling, rng=0)
    assert approx.num_negative >= 1
    lowest = np.linalg.eigvalsh(A)[0]
    # By Cauchy's interlacing it is never below the lowest of A.
    assert lowest - 1e-12 <= np.min(approx.core_eigenvalues) < 0
    inverse = li.Nystrom(rank=1, damping=0.25, sampling=sampling).prepare(A, rng=0)
    assert inverse.negative_curvature
    assert not li.Nystrom(rank=1, damping=2.5, sampling=sampling).prepare(A).negative_curvature


# Every library, every scale


@every_method
@every_form
def test_one_seed_gives_the_same_pivots_on_every_library(library, method, form):
    A = exactly_psd(np.random.default_rng(2), 40, 25)
    A = library.seen(A + np.diag(np.arange(40.0)) / 4)
    expected = li.pivoted_cholesky(form(A.astype(library.dtype)), 20, method=method, rng=3)
    found = li.pivoted_cholesky(form(library.asarray(A)), 20, method=method, rng=3)
    np.testing.assert_array_equal(found.pivots, expected.pivots)
    assert type(found.columns) is type(library.asarray(A))
    assert type(found.factor) is type(found.columns)
    assert found.factor.dtype == found.columns.dtype == library.asarray(A).dtype
    np.testing.assert_array_equal(host(found.columns), A[:, found.pivots])
    np.testing.assert_allclose(host(found.factor), expected.factor, atol=1e3 * library.eps)


@every_method
@every_form
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scale", [2.0**66, 2.0**-66, 1e20, 1e-20])
def test_the_scale_of_the_matrix_does_not_choose_the_pivots(method, form, dtype, scale):
    for name in ("polynomial", "network", "clusters"):
        A = matrix(name)
        expected = li.pivoted_cholesky(form(A.astype(dtype)), 9, method=method, rng=1)
        found = li.pivoted_cholesky(form((scale * A).astype(dtype)), 9, method=method, rng=1)
        np.testing.assert_array_equal(found.pivots, expected.pivots)
        assert found.exhausted == expected.exhausted
        assert found.residual_trace / scale == pytest.approx(expected.residual_trace, rel=1e-3)


def test_seeds_and_generators_choose_the_pivots():
    A = kernel_matrix()
    first, again, other = (li.pivoted_cholesky(A, 8, rng=seed).pivots for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert set(first) != set(other)
    generator = np.random.default_rng(0)
    np.testing.assert_array_equal(li.pivoted_cholesky(A, 8, rng=generator).pivots, first)
    assert set(li.pivoted_cholesky(A, 8, rng=generator).pivots) != set(first)


# Costs


@every_method
def test_without_entries_each_pivot_costs_one_product_and_no_more(method):
    A, counting = with_diagonal(kernel_matrix())
    found = li.pivoted_cholesky(A, 9, method=method, rng=0)
    assert counting.widths == [1] * 9
    assert found.num_products == counting.num_products == 9


@every_method
@pytest.mark.parametrize("chunk_size", [None, 4])
def test_nystrom_reads_no_column_again(method, chunk_size):
    A, counting = with_diagonal(kernel_matrix())
    approx = li.nystrom(A, 9, sampling=method, rng=0, chunk_size=chunk_size)
    assert approx.num_products == counting.num_products
    assert counting.num_products == 9
    np.testing.assert_allclose(approx.columns, counting.A[:, approx.indices], rtol=0, atol=1e-15)
    for solver in (
        li.Nystrom(rank=9, damping=0.1, sampling=method),
        li.NystromCG(rank=9, damping=0.1, sampling=method),
    ):
        before = counting.num_products
        assert solver.prepare(A, rng=0).num_products == counting.num_products - before == 9


@every_method
def test_nystrom_takes_the_columns_of_the_pivots(library, method):
    A = library.asarray(kernel_matrix())
    approx = li.nystrom(A, 9, sampling=method, rng=4)
    pivots = li.pivoted_cholesky(A, 9, method=method, rng=4).pivots
    np.testing.assert_array_equal(approx.indices, pivots)
    assert approx.num_products == 9
    assert approx.residual_trace == pytest.approx(
        float(60 - np.sum(host(approx.eigenvalues))), abs=60 * 1e2 * library.eps
    )


@every_method
def test_nystrom_of_the_zero_matrix_is_zero(library, method):
    approx = li.nystrom(library.asarray(np.zeros((N, N))), 4, sampling=method, rng=0)
    assert (approx.rank, approx.num_negative, approx.residual_trace) == (0, 0, 0.0)
    assert not np.any(host(approx @ library.asarray(np.ones(N))))


# Bad input


@every_method
def test_an_operator_without_a_diagonal_is_refused_with_a_remedy(method):
    with pytest.raises(TypeError, match=r"no diagonal\. .*`diagonal=` to FunctionOperator"):
        li.pivoted_cholesky(li.FunctionOperator(lambda v: v, 3), 2, method=method)


@every_method
def test_a_diagonal_that_is_not_that_of_the_columns_is_refused(method):
    A = li.FunctionOperator(lambda v: 2 * v, 3, diagonal=lambda: np.ones(3))
    with pytest.raises(ValueError, match="the diagonal of `A` must be that of its columns"):
        li.pivoted_cholesky(A, 2, method=method, rng=0)


@every_method
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(method, bad):
    A = np.eye(3)
    A[0, 0] = bad
    with pytest.raises(ValueError, match="`diagonal of A` must be finite"):
        li.pivoted_cholesky(A, 2, method=method)
    A = li.FunctionOperator(lambda v: bad * v, 3, diagonal=lambda: np.ones(3))
    with pytest.raises(ValueError, match="`columns of A` must be finite"):
        li.pivoted_cholesky(A, 2, method=method)


def test_a_diagonal_of_another_length_is_refused():
    A = li.FunctionOperator(lambda v: v, 3, diagonal=lambda: np.ones(2))
    with pytest.raises(ValueError, match="`diagonal of A` must have 3 rows"):
        li.pivoted_cholesky(A, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rank": 0}, ValueError, "`rank` must be from 1 to 3; got 0"),
        ({"rank": 4}, ValueError, "`rank` must be from 1 to 3; got 4"),
        ({"rank": 2, "method": "best"}, ValueError, "`method` must be one of 'greedy', 'rpch"),
        ({"rank": 2, "rtol": -1.0}, ValueError, "`rtol` must be finite and >= 0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        li.pivoted_cholesky(np.eye(3), **arguments)


def test_a_traced_matrix_is_refused_with_a_remedy(jax_backend):
    import jax

    def pivot(A):
        return li.nystrom(A, 2, sampling="greedy").eigenvalues

    with pytest.raises(TypeError, match=r"unknown while jax traces\. .*pass `indices`"):
        jax.jit(pivot)(jax_backend.asarray(np.eye(3)))
