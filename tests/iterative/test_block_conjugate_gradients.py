"""Block conjugate gradients: one Krylov space for all right-hand sides."""

from __future__ import annotations

import numpy as np
import pytest

import lowrank_inverse as li
from lowrank_inverse.results.solution import Reason
from tests.conftest import host
from tests.oracles import damped_solve, norm, relative_error
from tests.problems import CountingOperator, N, conditioned, matrix, rhs

DAMPING = 0.05
B = rhs(width=4)


def energy(A, damping, x, exact):
    """Return the norm of each column's error that ``A + damping I`` defines."""
    error = np.asarray(x, dtype=np.float64) - exact
    return np.sqrt(np.sum(error * (A @ error + damping * error), axis=0))


@pytest.mark.parametrize("name", ["linear", "polynomial", "geometric", "network"])
def test_the_answer_is_that_of_the_dense_inverse(backend, name):
    rtol = 1e-4 if backend.dtype == "float32" else 1e-10
    A = matrix(name)
    found = backend.run(lambda A, b: li.cg(A, b, damping=DAMPING, rtol=rtol), A, B)
    assert host(found.converged).all()
    exact = damped_solve(backend.seen(A), DAMPING, backend.seen(B))
    # The error is at most the residual over the smallest eigenvalue.
    assert np.all(norm(host(found.value) - exact) <= 1.01 * rtol * norm(B) / DAMPING)


@pytest.mark.parametrize("steps", range(1, 9))
@pytest.mark.parametrize("name", ["linear", "polynomial", "network", "geometric"])
def test_no_column_is_worse_than_on_its_own_at_any_step(name, steps):
    # In exact arithmetic: the space of the block contains that of each of its columns.
    A, exact = matrix(name), damped_solve(matrix(name), DAMPING, B)
    block = li.cg(A, B, damping=DAMPING, rtol=0, max_steps=steps)
    alone = li.cg(A, B, damping=DAMPING, rtol=0, max_steps=steps, block_size=1)
    slack = 1e-10 * energy(A, DAMPING, 0 * B, exact)
    assert np.all(
        energy(A, DAMPING, block.value, exact)
        <= energy(A, DAMPING, alone.value, exact) * (1 + 1e-6) + slack
    )


def test_products_are_counted_and_fewer_than_column_by_column():
    A, b = conditioned(1e3, n=200), rhs(n=200, width=10)
    counts = {}
    for block_size in (1, 32):
        counting = CountingOperator(A)
        found = li.cg(counting, b, rtol=1e-8, block_size=block_size)
        assert found.num_products == counting.num_products
        assert found.converged.all()
        counts[block_size] = counting.num_products
    assert counts[32] < counts[1] / 2


def test_columns_that_are_done_leave_the_block():
    A = CountingOperator(np.diag(np.linspace(1.0, 100.0, N)))
    easy = np.eye(N)[:, :3]  # eigenvectors
    found = li.cg(A, np.concatenate([easy, rhs()[:, None]], axis=1), rtol=1e-10)
    assert found.num_steps[:3].tolist() == [1, 1, 1]
    assert found.num_steps[3] > 5
    assert A.widths[0] == 4
    assert set(A.widths[1:-1]) == {1}


@pytest.mark.parametrize("width", [2, 2 * N])
def test_dependent_and_many_columns_break_nothing(backend, width):
    rtol = 1e-4 if backend.dtype == "float32" else 1e-9
    b = rhs(width=width)
    b = np.concatenate([b, b[:, :1], 2 * b[:, :1], np.zeros((N, 1))], axis=1)
    A = conditioned(1e2)
    found = backend.run(lambda A, b: li.cg(A, b, rtol=rtol), A, b)
    assert host(found.converged).all()
    assert relative_error(found.value, np.linalg.solve(A, b)) < 1e2 * 2 * rtol
    assert not host(found.value)[:, -1].any()


def test_equal_columns_cost_no_more_than_one():
    A, b = CountingOperator(conditioned(1e2)), rhs()
    block = li.cg(A, np.stack([b, b, -b], axis=1))
    assert set(A.widths[:-1]) == {1}
    assert relative_error(block.value[:, 2], -block.value[:, 0]) < 1e-12


def test_columns_of_all_sizes_are_solved_alike():
    A, b = conditioned(1e3), B * np.array([1e-150, 1.0, 1e-8, 1e150])
    found = li.cg(A, b, rtol=1e-10)
    assert found.converged.all()
    for j in range(4):
        assert relative_error(found.value[:, j], np.linalg.solve(A, b[:, j])) < 1e-6


@pytest.mark.parametrize("scale", [2.0**-60, 2.0**60])
def test_the_scale_of_the_matrix_changes_nothing_but_that_of_the_answer(scale):
    A = conditioned(1e3)
    plain, scaled = li.cg(A, B, rtol=1e-8), li.cg(scale * A, B, rtol=1e-8)
    assert np.array_equal(plain.num_steps, scaled.num_steps)
    assert relative_error(scaled.value * scale, plain.value) < 1e-12


def test_a_start_is_taken_up():
    A, exact = conditioned(1e2), np.linalg.solve(conditioned(1e2), B)
    found = li.cg(A, B, x0=exact, rtol=1e-8)
    assert not found.num_steps.any()
    assert found.num_products == 4
    near = li.cg(A, B, x0=exact + 1e-3 * rhs(width=4, seed=9), rtol=1e-8)
    assert relative_error(near.value, exact) < 1e-6


def test_a_preconditioner_shortens_the_way():
    A = matrix("geometric", n=200)
    b = rhs(n=200, width=5)
    approx = li.nystrom(A, 40, sampling="rpcholesky")
    M = li.NystromCG(damping=1e-4, rank=40).prepare(A).preconditioner
    plain = li.cg(A, b, damping=1e-4, rtol=1e-8)
    faster = li.cg(A, b, damping=1e-4, rtol=1e-8, preconditioner=M)
    assert approx.rank == 40
    assert faster.converged.all()
    assert faster.num_steps.max() < plain.num_steps.max()
    assert relative_error(faster.value, damped_solve(A, 1e-4, b)) < 1e-3


def test_negative_curvature_is_reported_for_the_columns_at_work():
    A = matrix("half")
    found = li.cg(A, np.concatenate([np.zeros((N, 1)), B], axis=1))
    assert found.reason[0] == Reason.CONVERGED
    assert set(found.reason[1:].tolist()) == {Reason.NEGATIVE_CURVATURE}
    assert np.isfinite(found.value).all()


def test_an_indefinite_preconditioner_is_reported():
    found = li.cg(conditioned(10), B, preconditioner=-np.eye(N))
    assert set(found.reason.tolist()) == {Reason.INDEFINITE_PRECONDITIONER}


def test_products_that_are_not_finite_are_reported():
    A = li.FunctionOperator(lambda v: np.full_like(v, np.nan), N)
    found = li.cg(A, B)
    assert set(found.reason.tolist()) == {Reason.NONFINITE}
    assert np.isfinite(found.value).all()


def test_a_singular_matrix_and_a_right_hand_side_in_its_range():
    A = matrix("low rank")
    found = li.cg(A, A @ B, rtol=1e-8)
    assert found.converged.all()
    assert np.all(norm(A @ found.value - A @ B) <= 1e-8 * norm(A @ B) * 1.01)


def test_a_singular_matrix_and_a_right_hand_side_beside_its_range():
    found = li.cg(matrix("low rank"), B, rtol=1e-8)
    assert not found.converged.any()
    assert np.isfinite(found.value).all()


def test_steps_that_run_out_are_reported_and_the_residual_is_that_of_the_answer():
    A = conditioned(1e4)
    found = li.cg(A, B, max_steps=3)
    assert set(found.reason.tolist()) == {Reason.MAX_STEPS}
    assert relative_error(found.residual_norm, norm(B - A @ found.value)) < 1e-10


def test_a_tolerance_out_of_reach_ends_in_stagnation():
    A = conditioned(1e6).astype(np.float32)
    found = li.cg(A, B.astype(np.float32), rtol=0.0)
    assert not found.converged.any()
    assert np.isfinite(found.value).all()


def test_more_columns_than_a_block_are_solved_one_block_after_the_other():
    A, b = CountingOperator(conditioned(1e2)), rhs(width=10)
    found = li.cg(A, b, block_size=4, rtol=1e-9, x0=0.1 * b)
    assert max(A.widths) == 4
    assert found.num_products == A.num_products
    assert relative_error(found.value, np.linalg.solve(A.A, b)) < 1e-6
    assert found.num_steps.shape == found.reason.shape == (10,)


def test_directions_and_their_products_are_kept():
    A = conditioned(1e2)
    S, Y = li.cg(A, B, damping=0.1, keep=9).directions
    assert S.shape == Y.shape == (N, 9)
    assert relative_error(Y, A @ S) < 1e-12
    assert relative_error(np.linalg.norm(S, axis=0), np.ones(9)) < 1e-12
    with pytest.raises(ValueError, match="`keep` needs `b`"):
        li.cg(A, B, keep=3, block_size=1)


def test_a_sequence_of_blocks_recycles():
    A, solver = CountingOperator(conditioned(1e4, n=200)), li.CG(damping=1e-3, rtol=1e-6)
    state, products = li.HypergradientState(), []
    for seed in range(3):
        b = rhs(n=200, width=5, seed=seed)
        solution = li.solve(A, b, solver=solver, state=state)
        assert solution.converged.all()
        state = solution.state._replace(value=None)
        products.append(solution.num_products)
    assert max(products[1:]) < products[0]


def test_the_callback_sees_every_step():
    seen = []
    found = li.cg(conditioned(1e2), B, callback=lambda steps, norms: seen.append((steps, norms)))
    assert len(seen) == found.num_steps.max()
    assert seen[-1][0].shape == seen[-1][1].shape == (4,)
