"""The truncated Neumann series."""

from __future__ import annotations

import functools

import numpy as np
import pytest

import lowrank_inverse as li
from lowrank_inverse import Reason
from lowrank_inverse.estimators.extreme_eigenvalues import NUM_POWER_STEPS
from tests.conftest import host
from tests.iterative.claims import check_claims
from tests.oracles import damped, damped_solve, neumann_sum, norm, relative_error
from tests.problems import (
    PSD,
    WIDTH,
    CountingOperator,
    N,
    conditioned,
    largest,
    matrix,
    orthogonal,
    rhs,
    symmetric,
)


@functools.cache
def run_terms(num_terms, rtol=0.0):
    def run(A, b, damping, step_size):
        return li.neumann(
            A, b, damping=damping, step_size=step_size, num_terms=num_terms, rtol=rtol
        )

    return run


@functools.cache
def run_default(num_terms=10, rtol=1e-5):
    def run(A, b, damping):
        return li.neumann(A, b, damping=damping, num_terms=num_terms, rtol=rtol)

    return run


# The sum


@pytest.mark.parametrize("num_terms", [1, 2, 3, 10])
@pytest.mark.parametrize("width", [None, WIDTH])
def test_every_number_of_terms_gives_the_dense_partial_sum(backend, num_terms, width):
    if backend.name == "jax_jit" and (num_terms in (1, 2) or width is None):
        pytest.skip("another compilation that says no more")
    A, b = matrix("linear"), rhs(width=width)
    damping, step_size = float(backend.seen(0.1)), float(backend.seen(0.8))
    solution = backend.run(run_terms(num_terms), A, b, damping, step_size)
    B = damped(backend.seen(A), damping)
    expected = neumann_sum(B, backend.seen(b), step_size, num_terms)
    assert relative_error(solution.value, expected) < 30 * backend.eps
    assert np.all(solution.num_steps == num_terms)
    assert np.all(solution.reason == Reason.MAX_STEPS)
    check_claims(backend.seen(A), backend.seen(b), solution, damping=damping)


def test_many_terms_converge_to_the_dense_solution(backend):
    A, b = conditioned(10), rhs(width=WIDTH)
    damping = float(backend.seen(0.1))
    solution = backend.run(run_default(500), A, b, damping)
    assert np.all(solution.converged)
    assert relative_error(solution.value, damped_solve(backend.seen(A), damping, b)) < 1e-3
    check_claims(backend.seen(A), backend.seen(b), solution, damping=damping)


@pytest.mark.parametrize("num_terms", [1, 10])
def test_an_indefinite_matrix_is_summed_all_the_same(num_terms):
    A, b = matrix("half"), rhs()
    solution = li.neumann(A, b, step_size=0.3, num_terms=num_terms)
    assert relative_error(solution.value, neumann_sum(A, b, 0.3, num_terms)) < 1e-13


def test_the_error_falls_with_every_term():
    A, b, damping = matrix("linear"), rhs(), 0.1
    exact = damped_solve(A, damping, b)
    errors = [
        relative_error(li.neumann(A, b, damping=damping, num_terms=terms).value, exact)
        for terms in (1, 2, 4, 8, 16, 32, 64)
    ]
    assert np.all(np.diff(errors) < 0)
    assert errors[-1] < 0.01


# The step size


@pytest.mark.parametrize("name", PSD)
@pytest.mark.parametrize("seed", range(3))
def test_the_default_step_size_converges_on_every_spectrum(name, seed):
    for damping_share in (0.0, 1e-3, 1.0):
        A, damping = matrix(name, seed=seed), damping_share * largest(name)
        solution = li.neumann(A, rhs(width=WIDTH), damping=damping, num_terms=1, rtol=0.0)
        # One term is step_size * b.
        step_size = solution.value[0, 0] / rhs(width=WIDTH)[0, 0]
        assert 0 < step_size < 2 / (largest(name) + damping)
        assert step_size >= (1 - 1e-12) / (largest(name) + damping)


@pytest.mark.parametrize("name", PSD)
def test_the_residual_never_grows_with_the_default_step_size(backend, name):
    damping = 0.01 * largest(name)
    solution = backend.run(run_default(40), matrix(name), rhs(width=WIDTH), damping)
    seen = float(backend.seen(damping))
    check_claims(backend.seen(matrix(name)), backend.seen(rhs(width=WIDTH)), solution, damping=seen)
    assert set(np.unique(solution.reason)) <= {Reason.CONVERGED, Reason.MAX_STEPS}
    assert np.all(solution.residual_norm < norm(rhs(width=WIDTH)))


def test_the_default_step_size_depends_on_no_seed_and_not_on_b():
    A, B = matrix("polynomial"), rhs(width=WIDTH)
    together = li.neumann(A, B, damping=0.1).value
    for j in range(WIDTH):
        assert relative_error(together[:, j], li.neumann(A, B[:, j], damping=0.1).value) < 1e-14


@pytest.mark.parametrize("factor", [2.05, 4.0, 100.0])
def test_a_step_size_that_cannot_converge_is_reported(backend, factor):
    A, damping = matrix("linear"), 0.1
    solution = backend.run(run_terms(60), A, rhs(width=WIDTH), damping, factor / 1.1)
    assert np.all(solution.reason == Reason.DIVERGED)
    assert not np.any(solution.converged)


def test_a_divergence_that_overflows_is_still_called_a_divergence(library):
    A, b = library.asarray(matrix("linear")), library.asarray(rhs())
    solution = host(li.neumann(A, b, step_size=50.0, num_terms=400))
    assert solution.reason == Reason.DIVERGED
    assert not solution.converged


@pytest.mark.parametrize("factor", [0.1, 1.0, 1.9])
def test_a_step_size_that_converges_is_not_called_divergent(backend, factor):
    A = conditioned(5)
    solution = backend.run(run_terms(1000, 1e-5), A, rhs(), 0.0, factor)
    assert solution.reason == Reason.CONVERGED
    check_claims(backend.seen(A), backend.seen(rhs()), solution)


def test_divergence_is_reported_for_the_columns_it_befalls():
    A = np.diag(np.linspace(0.1, 1, N))
    B = np.eye(N)[:, [0, N - 1]]
    solution = li.neumann(A, B, step_size=2.5, num_terms=20)
    assert solution.reason.tolist() == [Reason.MAX_STEPS, Reason.DIVERGED]


def test_a_top_eigenvector_that_the_estimate_misses_is_reported_and_not_believed():
    v = np.random.default_rng(0).standard_normal(N)  # where the estimate starts
    Q = orthogonal(N)
    q = Q[:, 0] - v * (v @ Q[:, 0]) / (v @ v)
    q /= np.linalg.norm(q)
    A = 0.1 * np.eye(N) + 10 * np.outer(q, q)
    solution = li.neumann(A, rhs(), num_terms=50)
    assert solution.reason == Reason.DIVERGED


# Indefinite matrices


def test_negative_curvature_is_a_reason(backend):
    solution = backend.run(run_terms(10), matrix("half"), rhs(width=WIDTH), 0.0, 0.5)
    assert np.all(solution.reason == Reason.NEGATIVE_CURVATURE)
    assert not np.any(solution.converged)


def test_a_negative_definite_matrix_is_a_reason_with_the_default_step_size_too(backend):
    solution = backend.run(run_default(), -conditioned(10), rhs(), 0.0)
    assert solution.reason == Reason.NEGATIVE_CURVATURE


# Zeros and scales


def test_the_zero_matrix_with_damping_is_solved_in_one_term(backend):
    solution = backend.run(run_default(), np.zeros((N, N)), rhs(), 0.5)
    assert solution.converged
    assert solution.num_steps <= 3
    assert relative_error(solution.value, 2 * rhs()) < 1e-5


# Costs and tolerance


@pytest.mark.parametrize("width", [None, WIDTH])
@pytest.mark.parametrize("step_size", [None, 0.5])
@pytest.mark.parametrize("num_terms", [1, 7, 500])
def test_num_products_is_what_the_operator_counted(width, step_size, num_terms):
    A = CountingOperator(conditioned(5))
    solution = li.neumann(A, rhs(width=width), step_size=step_size, num_terms=num_terms)
    assert solution.num_products == A.num_products
    setup = NUM_POWER_STEPS if step_size is None else 0
    assert solution.num_products == setup + np.max(solution.num_steps) * (width or 1)


@pytest.mark.parametrize("rtol", [1e-2, 1e-5, 1e-8])
def test_the_series_ends_at_the_tolerance(rtol):
    A, b = conditioned(5), rhs()
    solution = li.neumann(A, b, num_terms=1000, rtol=rtol)
    assert solution.converged
    assert solution.residual_norm <= rtol * norm(b)
    shorter = li.neumann(A, b, num_terms=int(solution.num_steps) - 1, rtol=rtol)
    assert shorter.residual_norm > rtol * norm(b)
    assert shorter.reason == Reason.MAX_STEPS


# Products that are not finite


def test_a_matrix_with_nan_is_a_flag_with_a_step_size_given_too(backend):
    A = conditioned(10)
    A[3, 3] = np.nan
    solution = backend.run(run_terms(3), A, rhs(width=WIDTH), 0.1, 0.5)
    assert np.all(solution.reason == Reason.NONFINITE)
    assert np.all(np.isfinite(solution.value))


# Bad input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"num_terms": 0}, ValueError, "`num_terms` must be at least 1; got 0"),
        ({"num_terms": 2.0}, TypeError, "`num_terms` must be a whole number"),
        ({"step_size": 0.0}, ValueError, "`step_size` must be finite and > 0"),
        ({"step_size": -1.0}, ValueError, "`step_size` must be finite and > 0"),
        ({"step_size": np.nan}, ValueError, "`step_size` must be finite and > 0"),
        ({"step_size": "1"}, TypeError, "`step_size` must be a real number"),
        ({"damping": None}, TypeError, "`damping` must be a real number"),
        ({"rtol": -1.0}, ValueError, "`rtol` must be finite and >= 0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        li.neumann(np.eye(3), np.ones(3), **arguments)


def test_a_step_size_that_is_refused_is_not_told_of_low_rank_matrices():
    with pytest.raises(ValueError, match="`step_size`") as caught:
        li.neumann(np.eye(3), np.ones(3), step_size=0.0)
    assert "low-rank" not in str(caught.value)


def test_symmetric_with_one_eigenvalue_takes_one_term():
    solution = li.neumann(symmetric(np.full(N, 3.0)), rhs(), num_terms=50)
    assert solution.num_steps == 1
    assert solution.converged
