"""The Nyström preconditioner against its formula on dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg

import lowrank_inverse as li
from lowrank_inverse.low_rank.preconditioner import NystromPreconditioner
from lowrank_inverse.results.solution import Pairs
from lowrank_inverse.solvers.recycled import recycled_approximation
from tests.conftest import host
from tests.oracles import relative_error
from tests.problems import WIDTH, N, indices, matrix, rhs, symmetric

DAMPING = 1e-3
RANK = 6


def dense_preconditioner(eager, A, approx, level_at):
    """Eq. 1.3 of Frangella, Tropp and Udell, with the level that `level_at` gives for g."""
    A, H = eager.seen(A), host(approx @ eager.asarray(np.eye(N))).astype(np.float64)
    values, vectors = np.linalg.eigh(H)
    g, U = values[::-1][:RANK], vectors[:, ::-1][:, :RANK]
    level = level_at(g, (np.trace(A) - g.sum()) / (N - RANK))
    flattened = (level + DAMPING) * (U / (g + DAMPING)) @ U.T
    return flattened + np.eye(N) - U @ U.T


def smallest(g, missed):
    return g[-1]


def mirrored(g, missed):
    assert missed < g[-1]
    return missed**2 / g[-1]


@pytest.mark.parametrize("sampling", ["greedy", "rpcholesky", "gaussian"])
def test_the_level_lies_below_the_mean_of_what_was_missed(eager, sampling):
    A = matrix("exponential")
    approx = li.nystrom(eager.asarray(A), RANK, sampling=sampling, rng=0)
    P = NystromPreconditioner(approx, DAMPING)
    expected = dense_preconditioner(eager, A, approx, mirrored)
    tolerance = 1e-2 if eager.dtype == "float32" else 1e-8
    for block in (rhs(), rhs(width=WIDTH)):
        found = host(P @ eager.asarray(block))
        assert relative_error(found, expected @ block) < tolerance


def test_without_a_trace_the_level_is_the_smallest_eigenvalue(eager):
    A = matrix("exponential")
    approx = li.nystrom(eager.asarray(A), indices=indices(rank=RANK))
    assert approx.residual_trace is None
    expected = dense_preconditioner(eager, A, approx, smallest)
    found = host(NystromPreconditioner(approx, DAMPING) @ eager.asarray(rhs()))
    assert relative_error(found, expected @ rhs()) < (1e-2 if eager.dtype == "float32" else 1e-8)


def test_the_trace_of_an_indefinite_matrix_is_not_used():
    A = symmetric(np.r_[np.linspace(4, 3, 12), np.linspace(-0.1, -3.0, 12)])
    approx = li.nystrom(A, 20, sampling="gaussian", rng=0)
    assert approx.num_negative > 0
    assert approx.residual_trace is not None
    approx.trace, known = None, approx.trace
    expected = NystromPreconditioner(approx, DAMPING) @ rhs()
    approx.trace = known
    np.testing.assert_array_equal(NystromPreconditioner(approx, DAMPING) @ rhs(), expected)


def test_a_matrix_found_whole_keeps_a_definite_preconditioner_without_damping():
    factor = np.random.default_rng(0).standard_normal((N, 4))
    A = factor @ factor.T
    approx = li.nystrom(A, 4, sampling="greedy")
    P = NystromPreconditioner(approx, 0.0) @ np.eye(N)
    assert np.linalg.eigvalsh((P + P.T) / 2)[0] > 0
    b = A @ rhs()
    solution = li.cg(A, b, preconditioner=NystromPreconditioner(approx, 0.0), rtol=1e-8)
    assert solution.converged
    assert solution.num_steps <= 3


def smooth_kernel(n=300):
    points = np.sort(np.random.default_rng(0).random(n))[:, None]
    y = np.sin(9 * points[:, 0]) + 0.1 * np.random.default_rng(1).standard_normal(n)
    return np.exp(-(((points - points.T) / 0.1) ** 2) / 2), y


@pytest.mark.parametrize("sampling", ["rpcholesky", "uniform"])
@pytest.mark.parametrize("damping", [0.0, 1e-10, 1e-6])
def test_the_basis_is_orthonormal_for_the_worst_conditioned_columns(eager, sampling, damping):
    K = eager.asarray(smooth_kernel(100)[0])
    approx = li.nystrom(K, 60, sampling=sampling, rng=0)
    U = host(approx.eigenvectors()[0]).astype(np.float64)
    unit = 100 * np.finfo(eager.dtype).eps
    assert np.linalg.norm(U.T @ U - np.eye(U.shape[1]), 2) < unit
    # The eigenvalues of the preconditioner follow from its formula: none is negative.
    P = host(NystromPreconditioner(approx, damping) @ eager.asarray(np.eye(100)))
    values = np.linalg.eigvalsh((P + P.T).astype(np.float64) / 2)
    assert values[0] > 0
    assert values[-1] < 1 + unit


@pytest.mark.parametrize("rank", [20, 100, "auto"])
@pytest.mark.parametrize("damping", [1e-6, 1e-8, 1e-10])
def test_a_small_damping_leaves_what_cholesky_leaves(rank, damping):
    K, y = smooth_kernel()
    factor = scipy.linalg.cho_factor(K + damping * np.eye(len(y)))
    left = np.linalg.norm(y - (K @ (x := scipy.linalg.cho_solve(factor, y)) + damping * x))
    solver = li.NystromCG(rank=rank, sampling="rpcholesky", damping=damping, rtol=1e-6)
    solution = li.solve(K, y, solver=solver, rng=0)
    assert solution.residual_norm <= max(1e-6 * np.linalg.norm(y), 10 * left)
    assert solution.message in ("converged", "stagnated")


def test_the_trace_saves_steps_on_a_smooth_kernel():
    points = np.random.default_rng(0).standard_normal((600, 2))
    A = li.KernelOperator(points, lengthscale=0.5)
    b = np.random.default_rng(1).standard_normal(600)
    approx, dense = li.nystrom(A, 60, sampling="greedy"), A @ np.eye(600)
    counts = []
    for trace in (approx.trace, None):
        approx.trace = trace
        P = NystromPreconditioner(approx, 1e-5)
        solution = li.cg(dense, b, damping=1e-5, preconditioner=P, rtol=1e-8)
        assert solution.converged
        counts.append(int(solution.num_steps))
    assert counts[0] < 0.95 * counts[1]


@pytest.mark.parametrize("matrix", [-np.eye(N), np.zeros((N, N))], ids=["negative", "zeros"])
def test_where_nothing_is_to_be_flattened_the_preconditioner_is_the_identity(eager, matrix):
    S = eager.asarray(np.eye(N)[:, :3])
    pairs = Pairs(S, eager.asarray(matrix) @ S)
    recycled = recycled_approximation(li.aslinearoperator(eager.asarray(matrix)), 0.0, pairs)
    assert recycled.rank == 0
    identity = eager.asarray(np.eye(N))
    np.testing.assert_array_equal(host(NystromPreconditioner(recycled, 0.0) @ identity), np.eye(N))


def test_a_matrix_of_zeros_whose_trace_is_known_needs_no_preconditioner(eager):
    approx = li.nystrom(eager.asarray(np.zeros((N, N))), 3, sampling="greedy")
    assert approx.trace == 0
    found = host(NystromPreconditioner(approx, 0.0) @ eager.asarray(rhs()))
    np.testing.assert_array_equal(found, host(eager.asarray(rhs())))
