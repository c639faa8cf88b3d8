"""How solutions print themselves, and what a failed solve says."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

import lowrank_inverse as li
from lowrank_inverse import Reason
from lowrank_inverse.results.errors import ADVICE
from tests.conftest import host, open_backend
from tests.problems import WIDTH, N, conditioned, matrix, rhs

INDEFINITE = np.diag(np.where(np.arange(N) < N - 1, 1.0, -1.0))
NOT_FINITE = li.FunctionOperator(lambda v: np.full_like(v, np.inf), N)
SPLIT = np.diag(np.arange(N) + 1.0)
EASY_AND_HARD = np.stack([np.eye(N)[0], np.ones(N)], axis=1)


class Indefinite:
    """Settings whose preconditioner is no good."""

    damping = 0.0

    def prepare(self, A, *, rng=None, b=None):
        bad = li.FunctionOperator(lambda r: -r, N)
        inverse = li.CG().prepare(A)
        inverse._run = lambda b, x0: li.cg(A, b, preconditioner=bad)
        return inverse


FAILURES = {
    Reason.MAX_STEPS: (matrix("polynomial"), li.CG(max_steps=2), "Raise `max_steps`, loosen"),
    Reason.NEGATIVE_CURVATURE: (INDEFINITE, li.CG(), "not positive definite. Raise `damping`"),
    Reason.SINGULAR: (np.zeros((N, N)), li.CG(), "singular to rounding, and b is not in its range"),
    Reason.STAGNATED: (conditioned(1e3), li.CG(rtol=0.0), "out of reach in this precision. Use"),
    Reason.DIVERGED: (
        matrix("linear"),
        li.Neumann(num_terms=50, step_size=100.0),
        "Omit `step_size`",
    ),
    Reason.NONFINITE: (NOT_FINITE, li.CG(), "Look for an overflow in A @ v"),
    Reason.INDEFINITE_PRECONDITIONER: (matrix("linear"), Indefinite(), "preconditioner is not pos"),
    Reason.DIRECT: (matrix("linear"), li.Nystrom(rank=2, damping=0.01), "use NystromCG, which"),
}


# Errors


def test_every_reason_but_success_has_its_advice_and_its_test():
    assert set(ADVICE) == set(FAILURES) == set(Reason) - {Reason.CONVERGED}


@pytest.mark.parametrize("reason", FAILURES, ids=lambda reason: reason.name)
def test_a_failure_is_an_error_that_says_what_to_try(reason):
    A, solver, advice = FAILURES[reason]
    with pytest.raises(li.SolveError, match=advice) as caught:
        li.solve(A, rhs(), solver=solver, rng=0, throw=True)
    assert f"{reason.name.lower()}: " in str(caught.value)
    silent = li.solve(A, rhs(), solver=solver, rng=0)
    assert silent.reason == reason
    np.testing.assert_array_equal(caught.value.solution.value, silent.value)
    assert caught.value.solution.num_products == silent.num_products


@pytest.mark.parametrize(
    ("solver", "advice"),
    [
        (li.Neumann(num_terms=2), "Raise `num_terms`, or use CG"),
        (li.Identity(), "a multiple of b is not a solution"),
        (lambda matvec, b: 0 * b, "the function given as `solver` did not reach the tolerance"),
    ],
)
def test_the_advice_knows_the_solver(solver, advice):
    with pytest.raises(li.SolveError, match=advice):
        li.solve(matrix("linear"), rhs(), solver=solver, throw=True)


def test_a_singular_system_without_solution_asks_for_a_damping():
    with pytest.raises(li.SolveError, match=r"singular to rounding.* Raise `damping`"):
        li.solve(matrix("low rank"), rhs(), solver=li.Exact(), throw=True)


def test_the_error_counts_the_columns_that_failed():
    with pytest.raises(li.SolveError, match="1 of 2 right-hand sides did not converge") as caught:
        li.solve(SPLIT, EASY_AND_HARD, solver=li.CG(max_steps=3), throw=True)
    assert caught.value.solution.converged.tolist() == [True, False]
    assert "converged:" not in str(caught.value)


def test_success_raises_nothing_and_changes_nothing(library):
    A, b = library.asarray(matrix("linear")), library.asarray(rhs(width=WIDTH))
    solution = host(li.solve(A, b, solver=li.CG(damping=0.1), throw=True, certify=True))
    again = host(li.solve(A, b, solver=li.CG(damping=0.1), certify=True))
    for part, other in zip(solution, again, strict=True):
        np.testing.assert_array_equal(part, other)


def test_the_error_has_the_certificate_that_was_asked_for():
    with pytest.raises(li.SolveError) as caught:
        li.solve(
            matrix("linear"),
            rhs(),
            solver=li.CG(damping=0.1, max_steps=1),
            throw=True,
            certify=True,
        )
    assert caught.value.solution.error_bound > 0


def test_the_error_survives_pickling():
    with pytest.raises(li.SolveError) as caught:
        li.solve(matrix("linear"), rhs(), solver=li.CG(max_steps=1), throw=True)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert str(copy) == str(caught.value)
    np.testing.assert_array_equal(copy.solution.value, caught.value.solution.value)


def test_throwing_is_refused_where_jax_traces():
    with open_backend("jax", "float64") as jax_backend:
        import jax

        A = jax_backend.asarray(matrix("linear"))
        solve = jax.jit(lambda b: li.solve(A, b, solver=li.CG(damping=0.1), throw=True).value)
        with pytest.raises(TypeError, match="`throw=True` needs to know how the solve ended"):
            solve(jax_backend.asarray(rhs()))


# Print


def test_a_solution_prints_what_happened_and_not_its_numbers(library):
    A, b = library.asarray(matrix("linear")), library.asarray(rhs(width=WIDTH))
    solution = li.solve(A, b, solver=li.CG(damping=0.1), certify=True)
    title, *rest = str(solution).splitlines()
    assert title == f"Solution of shape ({N}, {WIDTH}): {WIDTH} converged"
    fields = dict(line.strip().split("  ", 1) for line in rest)
    norms = host(solution).residual_norm
    assert list(fields) == ["residual norm", "error bound", "steps", "products", "method"]
    low, high = map(float, fields["residual norm"].split(" to "))
    assert low == pytest.approx(norms.min(), rel=1e-2)
    assert high == pytest.approx(norms.max(), rel=1e-2)
    assert int(fields["products"]) == solution.num_products
    assert repr(solution) == str(solution)


def test_a_solution_for_one_right_hand_side_prints_single_numbers():
    solution = li.solve(np.diag([1.0, 2.0, 4.0]), np.ones(3), solver=li.CG(max_steps=2))
    assert str(solution).splitlines()[0] == "Solution of shape (3,): max_steps"
    assert " to " not in str(solution)
    assert "error bound" not in str(solution)


def test_a_certificate_prints_its_bounds():
    certificate = li.certify(np.diag([3.0, 1.0]), np.ones(2), np.array([0.25, 0.4]), damping=1.0)
    lines = str(certificate).splitlines()
    assert lines[0] == "Certificate"
    for name, value in zip(certificate._fields, certificate, strict=True):
        assert any(
            line.strip().startswith(name.replace("_", " ")) and f"{value:.2e}" in line
            for line in lines
        )


def test_what_jax_traces_or_puts_in_place_of_arrays_prints_too():
    assert (
        repr(li.Solution(0, 1, 2, 3, 4, 5))
        == "Solution(0, 1, 2, 3, 4, 5, None, None, None, None, None)"
    )
    with open_backend("jax", "float64") as jax_backend:
        import jax

        printed = []

        def function(A, b):
            solution = li.solve(A, b, solver=li.CG(damping=0.1), certify=True)
            printed.append(repr(solution))
            return solution.value

        jax.jit(function)(jax_backend.asarray(matrix("linear")), jax_backend.asarray(rhs()))
    assert "residual norm  unknown while tracing" in printed[0]


@pytest.mark.parametrize("n", [40, 1100])
def test_without_a_solver_an_answer_that_is_no_better_than_zero_warns(n):
    diagonal = np.ones(n)
    diagonal[1::2] = -1.0
    diagonal[0] = 0.0
    A, b = np.diag(diagonal), np.eye(n)[0]
    with pytest.warns(RuntimeWarning, match="1 of 1 solutions are no better than zero") as warned:
        solution = li.solve(A, b)
    assert warned[0].filename == __file__
    assert not solution.converged
    assert li.solve(np.eye(n), b).converged  # and no other does
    assert not li.solve(A, b, solver=li.CG()).converged
