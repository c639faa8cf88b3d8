"""Exact: Cholesky where it can be, eigenvalues where it must, every unit as precise as another."""

from __future__ import annotations

import numpy as np
import pytest

import lowrank_inverse as li
from lowrank_inverse.arrays.linalg import cholesky, cholesky_solve
from lowrank_inverse.solvers.base import direct_solution
from tests.conftest import host
from tests.oracles import relative_error
from tests.problems import INDEFINITE, PSD, WIDTH, N, largest, matrix, rhs

UNITS = 10.0 ** np.random.default_rng(3).uniform(-9, 9, N)


def covariance(units=UNITS):
    """Return a well-conditioned covariance of variables in the given units."""
    samples = np.random.default_rng(4).standard_normal((10 * N, N))
    return np.cov(samples.T) * np.outer(units, units)


@pytest.mark.parametrize("name", PSD)
def test_a_cholesky_factor_solves_as_the_dense_inverse_does(eager, name):
    A = matrix(name) + 0.1 * largest(name) * np.eye(N)
    L = cholesky(eager.asarray(A))
    np.testing.assert_array_equal(np.triu(host(L), 1), 0)
    for b in (rhs(), rhs(width=WIDTH)):
        found = host(cholesky_solve(L, eager.asarray(b)))
        assert found.shape == b.shape
        assert relative_error(found, np.linalg.solve(A, b)) < 1e3 * eager.eps


@pytest.mark.parametrize("name", INDEFINITE)
def test_an_indefinite_matrix_has_no_cholesky_factor(eager, name):
    assert cholesky(eager.asarray(matrix(name))) is None


@pytest.mark.parametrize("damping", [0.0, 1e-12 * UNITS.min() ** 2])
def test_variables_in_small_units_are_as_precise_as_those_in_large_ones(damping):
    C, wanted = covariance(), rhs(width=WIDTH) / UNITS[:, None]
    solution = li.solve(C, C @ wanted, damping=damping)
    assert solution.converged.all()
    np.testing.assert_allclose(solution.value * UNITS[:, None], rhs(width=WIDTH), rtol=1e-10)


def test_of_a_singular_matrix_in_mixed_units_each_variable_is_solved_for():
    C, wanted = covariance(), rhs() / UNITS
    twice = np.r_[np.arange(N), 0]  # one variable is there twice
    C = C[np.ix_(twice, twice)]
    C[1] = C[:, 1] = wanted[1] = 0.0  # and one without variance
    inverse = li.Exact().prepare(C)
    assert inverse.rank == N - 1
    assert not inverse.negative_curvature
    b = C[:, :N] @ wanted
    solution = inverse.solve(b)
    assert solution.converged
    value = np.r_[solution.value[0] + solution.value[-1], solution.value[1:-1]]
    np.testing.assert_allclose(value * UNITS, wanted * UNITS, atol=1e-10)


def test_a_residual_that_only_the_large_units_hide_is_told():
    C, b = np.diag([1.0, 1e-18]), np.array([1.0, 1e-9])
    lacking = np.array([1.0, 0.0])
    assert direct_solution(C, 0.0, b, lacking, 0).converged
    told = direct_solution(C, 0.0, b, lacking, 0, scale=np.array([1.0, 1e9]))
    assert told.message == "direct"
    assert told.residual_norm == 1e-9


def test_a_damped_matrix_takes_no_eigenvalues(monkeypatch):
    def refused(*arguments):
        raise AssertionError("decomposed")

    monkeypatch.setattr(np.linalg, "eigh", refused)
    A, b = matrix("linear"), rhs()
    assert li.Exact(damping=0.1).prepare(A).solve(b).converged
