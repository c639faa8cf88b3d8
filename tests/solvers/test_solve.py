"""The front door: one call for every solver."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.sparse as sp
from array_api_compat import device
from scipy.sparse.linalg import aslinearoperator as scipy_operator

import lowrank_inverse as li
from lowrank_inverse import Reason
from tests.conftest import host
from tests.oracles import damped_solve, norm, relative_error
from tests.problems import WIDTH, CountingOperator, N, conditioned, matrix, rhs
from tests.solvers.test_settings import DAMPING, EVERY, K, every_solver

FIXED = li.Solution(np.ones(3), 1.0, 0, 0, False, 1)


def plain_iteration(matvec, b):
    """A solver as callers write them: 50 steps of Richardson's iteration."""
    x = 0 * b
    for _ in range(50):
        x = x + 0.9 * (b - matvec(x))
    return x


# The answer


@every_solver
def test_solve_is_prepare_and_solve(solver):
    A, b = matrix("linear"), rhs(width=WIDTH)
    found = li.solve(A, b, solver=solver)
    inverse = solver.prepare(A)
    expected = inverse.solve(b)
    np.testing.assert_array_equal(found.value, expected.value)
    np.testing.assert_array_equal(found.reason, expected.reason)
    assert found.num_products == inverse.num_products + expected.num_products
    assert found.error_bound is None


@pytest.mark.parametrize(
    "solver", [li.CG(damping=0.1, rtol=1e-6), li.NystromCG(damping=0.1, indices=K)]
)
def test_every_kind_of_operator_is_accepted(solver):
    dense = matrix("polynomial")
    expected = damped_solve(dense, 0.1, rhs())
    for A in (
        dense,
        sp.csr_array(dense),
        sp.csc_matrix(dense),
        scipy_operator(dense),
        li.FunctionOperator(lambda v: dense @ v, N),
        li.shifted(dense, 0.0),
        CountingOperator(dense),
    ):
        assert relative_error(li.solve(A, rhs(), solver=solver).value, expected) < 1e-3


def by_front_door(A, b):
    solver = li.NystromCG(damping=DAMPING, indices=K)
    return li.solve(A, b, solver=solver, certify=True)


def test_solutions_of_the_front_door_are_right_on_every_backend(backend):
    A, b = backend.seen(matrix("linear")), backend.seen(rhs(width=WIDTH))
    solution = backend.run(by_front_door, matrix("linear"), rhs(width=WIDTH))
    exact = damped_solve(A, DAMPING, b)
    assert np.all(solution.converged)
    assert relative_error(solution.value, exact) < 1e-3
    assert np.all(norm(solution.value - exact) <= solution.error_bound)
    assert np.all(solution.error_bound <= 1e-3 * norm(exact))


def test_solutions_keep_library_dtype_and_device(library):
    b = library.asarray(rhs(width=WIDTH))
    for solver in EVERY:
        certify = not isinstance(solver, li.Identity)
        solution = li.solve(library.asarray(matrix("linear")), b, solver=solver, certify=certify)
        for part in (solution.value, solution.residual_norm, solution.error_bound):
            if part is not None:
                assert type(part) is type(b)
                assert part.dtype == b.dtype
                assert device(part) == device(b)


# Costs


@every_solver
@pytest.mark.parametrize("width", [None, WIDTH])
@pytest.mark.parametrize("certify", [False, True])
def test_num_products_is_what_the_operator_counted(solver, width, certify):
    if certify and isinstance(solver, li.Identity):
        pytest.skip("has no damping to certify with")
    A = CountingOperator(matrix("linear"))
    solution = li.solve(A, rhs(width=width), solver=solver, certify=certify)
    assert solution.num_products == A.num_products


@pytest.mark.parametrize("width", [None, WIDTH])
def test_the_calls_of_a_function_are_counted_too(width):
    A = CountingOperator(conditioned(5))
    solution = li.solve(A, rhs(width=width), solver=plain_iteration)
    assert solution.num_products == A.num_products == 51 * (width or 1)


# State


def test_state_is_where_cg_starts():
    A, b = matrix("linear"), rhs(width=WIDTH)
    for solver in (li.CG(damping=0.01), li.NystromCG(damping=0.01, indices=K)):
        cold = li.solve(A, b, solver=solver)
        warm = li.solve(A, b, solver=solver, x0=cold.value)
        assert np.all(warm.num_steps == 0)
        assert np.all(warm.converged)
        assert relative_error(warm.value, cold.value) < 1e-14
        near = li.solve(A, b + 1e-3 * rhs(width=WIDTH, seed=5), solver=solver, x0=cold.value)
        assert np.all(near.converged)
        assert np.sum(near.num_steps) < np.sum(cold.num_steps)


def test_state_is_not_used_by_solvers_that_do_not_iterate_from_a_start():
    A, b = matrix("linear"), rhs()
    state = li.solve(A, b, solver=li.CG(damping=DAMPING))._replace(value=np.full(N, np.nan))
    for solver in (EVERY[0], li.Exact(damping=DAMPING), li.Neumann(damping=DAMPING), li.Identity()):
        expected = li.solve(A, b, solver=solver)
        np.testing.assert_array_equal(
            li.solve(A, b, solver=solver, x0=state.value).value, expected[0]
        )


# The default path


def test_without_a_solver_a_small_matrix_is_solved_exactly():
    for name in ("linear", "geometric", "half"):
        A, b = matrix(name), matrix(name) @ rhs()
        solution = li.solve(A, b)
        assert solution.method == f"Exact: n = {N} is small and the entries can be read"
        assert solution.converged
        assert norm(A @ solution.value - b) <= 1e-5 * norm(b)


def test_the_default_takes_what_the_operator_can_do():
    X = np.random.default_rng(0).standard_normal((1100, 2))
    kernel, b = li.KernelOperator(X), rhs(1100)
    dense = kernel @ np.eye(1100)
    expected = np.linalg.solve(dense + 0.1 * np.eye(1100), b)
    for A, method in (
        (kernel, "NystromCG: columns and diagonal of A can be read"),
        (dense, "NystromCG: columns and diagonal of A can be read"),
        (CountingOperator(dense), "CG: A is known by products"),
    ):
        solution = li.solve(A, b, damping=0.1, rtol=1e-8)
        assert solution.method == method
        assert relative_error(solution.value, expected) < 1e-6
    given = li.solve(dense, b, damping=0.1, preconditioner=li.DiagonalOperator(1100))
    assert given.method == "CG: a preconditioner was given"


@every_solver
def test_a_damping_of_the_call_comes_on_top_of_that_of_the_solver(solver):
    A, b = matrix("linear"), rhs()
    if not hasattr(solver, "damping"):
        pytest.skip("has no damping")
    found = li.solve(A, b, damping=0.3, solver=solver)
    expected = li.solve(A, b, solver=dataclasses.replace(solver, damping=solver.damping + 0.3))
    assert relative_error(found.value, expected.value) < 1e-12
    assert found.num_products == expected.num_products


def test_a_tolerance_a_callback_and_a_start_reach_conjugate_gradients():
    A, b, seen = matrix("polynomial"), rhs(), []
    for solver in (li.CG(), li.NystromCG(indices=K)):
        seen.clear()
        tight = li.solve(A, b, solver=solver, rtol=1e-9, callback=lambda k, r: seen.append(int(k)))
        assert tight.residual_norm <= 1e-9 * norm(b)
        assert seen[-1] == tight.num_steps
        assert li.solve(A, b, solver=solver, x0=tight.value).num_steps == 0


def test_a_preconditioner_for_another_solver_is_refused():
    with pytest.raises(TypeError, match=r"`preconditioner` is for CG; got solver=Exact"):
        li.solve(np.eye(3), np.ones(3), solver=li.Exact(), preconditioner=np.eye(3))


def test_progress_shows_the_steps(capsys):
    li.solve(matrix("linear"), rhs(), solver=li.CG(), progress=True)
    assert "steps" in capsys.readouterr().err


def test_one_seed_gives_one_answer():
    A, b = matrix("exponential"), rhs()
    solver = li.Nystrom(rank=5, damping=1e-2)
    first, again, other = (li.solve(A, b, solver=solver, rng=seed).value for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert relative_error(other, first) > 1e-9


# Functions in the place of settings


def test_a_function_is_a_solver(library):
    A, b = conditioned(5), rhs(width=WIDTH)
    solution = host(li.solve(library.asarray(A), library.asarray(b), solver=plain_iteration))
    expected = damped_solve(library.seen(A), 0, library.seen(b))
    assert relative_error(solution.value, expected) < 1e-3
    np.testing.assert_array_equal(
        solution.reason, np.where(solution.converged, Reason.CONVERGED, Reason.DIRECT)
    )


def test_a_function_that_fails_is_not_believed():
    solution = li.solve(conditioned(5), rhs(), solver=lambda matvec, b: 0 * b)
    assert not solution.converged
    assert solution.residual_norm == pytest.approx(np.linalg.norm(rhs()))


@pytest.mark.parametrize(
    "function", [lambda matvec, b: b[1:], lambda matvec, b: 1.0, lambda matvec, b: None]
)
def test_a_function_that_returns_another_shape_is_reported(function):
    with pytest.raises(ValueError, match="`solver` must return an array of the shape of b"):
        li.solve(np.eye(3), np.ones(3), solver=function)


@pytest.mark.parametrize(
    "function", [lambda matvec, b: b.astype("float32"), lambda matvec, b: b.astype(int)]
)
def test_a_function_that_returns_another_dtype_is_reported(function):
    with pytest.raises(TypeError, match=r"promoted silently|real floating dtype"):
        li.solve(np.eye(3), np.ones(3), solver=function)


@pytest.mark.parametrize("solver", ["cg", 3, li.CG, li.Nystrom])
def test_what_is_no_solver_is_refused_with_an_example(solver):
    with pytest.raises(TypeError, match=r"`solver` must be settings such as Nystrom\(rank=20"):
        li.solve(np.eye(3), np.ones(3), solver=solver)


# The other way round: a solver for libraries that take solve(matvec, b)


@every_solver
def test_as_solve_gives_a_function_of_matvec_and_b(solver, library):
    if solver.__class__ is li.Nystrom and solver.chunk_size == 3:
        pytest.skip("said by the others")
    A, b = library.asarray(matrix("linear")), library.asarray(rhs())
    found = li.as_solve(solver)(lambda v: A @ v, b)
    assert type(found) is type(b)
    assert relative_error(host(found), host(solver.prepare(A) @ b)) < 1e4 * library.eps


def test_as_solve_takes_blocks(library):
    A, b = library.asarray(matrix("linear")), library.asarray(rhs(width=WIDTH))
    found = li.as_solve(li.CG(damping=DAMPING))(lambda v: A @ v, b)
    expected = damped_solve(library.seen(matrix("linear")), DAMPING, library.seen(rhs(width=WIDTH)))
    assert relative_error(host(found), expected) < 1e-3


def test_as_solve_takes_a_seed():
    A, b = matrix("exponential"), rhs()
    solver = li.Nystrom(rank=5, damping=1e-2, sampling="uniform")
    found = li.as_solve(solver, rng=3)(lambda v: A @ v, b)
    assert relative_error(found, solver.prepare(A, rng=3) @ b) < 1e-12


def test_as_solve_of_a_function_calls_it():
    found = li.as_solve(plain_iteration)(lambda v: 0.5 * v, np.ones(3))
    np.testing.assert_allclose(found, 2.0, rtol=1e-6)


def test_as_solve_refuses_what_is_no_solver():
    with pytest.raises(TypeError, match="`solver` must be settings"):
        li.as_solve("cg")


# Bad input


@pytest.mark.parametrize("solver", [li.CG(), li.NystromCG(rank=2), li.Exact(), li.Neumann()])
def test_a_certificate_needs_a_positive_damping(solver):
    with pytest.raises(ValueError, match="`damping` must be finite and > 0"):
        li.solve(np.eye(3), np.ones(3), solver=solver, certify=True)


@pytest.mark.parametrize("solver", [li.Identity(), plain_iteration])
def test_a_certificate_needs_a_solver_with_a_damping(solver):
    with pytest.raises(ValueError, match="`damping` must be finite and > 0"):
        li.solve(np.eye(3), np.ones(3), solver=solver, certify=True)


@pytest.mark.parametrize(
    ("A", "b", "error", "message"),
    [
        (np.ones((2, 3)), np.ones(3), ValueError, "`A` must be square"),
        (np.array([[1.0, 2.0], [0.0, 1.0]]), np.ones(2), ValueError, "`A` must be symmetric"),
        (np.eye(3, dtype=int), np.ones(3), TypeError, "`A` must have a real floating dtype"),
        (np.eye(3), np.ones(2), ValueError, "`b` must have 3 rows"),
        (np.eye(3), np.ones(3, dtype="float32"), TypeError, "nothing is promoted silently"),
        ("A", np.ones(3), TypeError, "`A` must be an array or have"),
    ],
)
@pytest.mark.parametrize("solver", [li.CG(), li.Nystrom(rank=1, damping=1e-2), plain_iteration])
def test_a_system_that_does_not_fit_is_refused(solver, A, b, error, message):
    with pytest.raises(error, match=message):
        li.solve(A, b, solver=solver)


def test_a_solution_says_its_reason_in_words_for_each_column():
    solution = FIXED._replace(reason=np.array([0, 1, 1, 4, 7]))
    assert solution.message == "1 converged, 2 max_steps, 1 diverged, 1 direct"
    assert FIXED._replace(reason=np.array(6)).message == "indefinite_preconditioner"
