"""Orthonormal bases of Krylov spaces, and the sketches made of them."""

from __future__ import annotations

import numpy as np
import pytest

import lowrank_inverse as li
from lowrank_inverse.iterative.krylov_space import KrylovSpace
from tests.conftest import host
from tests.oracles import damped_solve, norm, operator_norm, relative_error
from tests.problems import INDEFINITE, PSD, CountingOperator, N, conditioned, matrix, rhs, symmetric

DAMPING = 0.05


def vectors_and_products(A, b, count):
    space = KrylovSpace(li.aslinearoperator(A), b)
    space.grow(count)
    return space.vectors, space.products, space.size


def krylov_inverse(A, b, rank):
    approx = li.nystrom(A, rank, sampling="krylov", b=b)
    return approx.inverse(DAMPING) @ b


@pytest.mark.parametrize("width", [None, 3])
@pytest.mark.parametrize("name", ["polynomial", "rank one", "half"])
def test_the_vectors_are_orthonormal_and_span_the_krylov_space(backend, name, width):
    A, b = matrix(name), rhs(width=width)
    S, Y, size = backend.run(lambda A, b: vectors_and_products(A, b, 9), A, b)
    S, Y = host(S).astype(float), host(Y).astype(float)
    unit = 100 * N * np.finfo(backend.dtype).eps
    found = np.any(S != 0, axis=0)
    assert operator_norm(S.T @ S - np.diag(found.astype(float))) < unit
    assert operator_norm(Y - A @ S) < unit * operator_norm(A)
    # The first block lies in the span, and so do its images, until the count is reached.
    for power in range(9 // (width or 1)):
        block = np.linalg.matrix_power(A / operator_norm(A), power) @ b
        outside = block - S @ (S.T @ block)
        assert np.linalg.norm(outside) < unit * 10.0**power * np.linalg.norm(b), power
    assert int(size) >= found.sum()


def test_an_invariant_space_ends_the_products():
    # Three eigenvalues, exactly: those of a matrix that was rotated differ by rounding.
    A = CountingOperator(np.diag(np.array([1.0, 0.5, 0.0])[np.arange(N) % 3]))
    approx = li.nystrom(A, 20, sampling="krylov", b=rhs())
    assert approx.num_columns == approx.num_products == A.num_products == 3
    assert (
        relative_error(approx.inverse(DAMPING) @ rhs(), damped_solve(A.A, DAMPING, rhs())) < 1e-12
    )


@pytest.mark.parametrize("rank", [1, 2, 5, 10, 20])
@pytest.mark.parametrize("name", [*PSD, *INDEFINITE])
def test_a_krylov_inverse_is_no_worse_than_conjugate_gradients_at_equal_products(name, rank):
    A, b = matrix(name), rhs()
    damping = DAMPING + max(0.0, -2 * np.linalg.eigvalsh(A)[0])  # positive definite
    cg = li.cg(A, b, damping=damping, max_steps=rank, rtol=0)
    solver = li.Nystrom(rank=rank, damping=damping, sampling="krylov")
    found = li.solve(CountingOperator(A), b, solver=solver)
    assert found.num_products <= rank + 1
    assert found.residual_norm <= cg.residual_norm * (1 + 1e-6) + 1e-12 * norm(b)


@pytest.mark.parametrize("name", PSD)
def test_on_positive_semidefinite_matrices_the_approximation_lies_between_zero_and_the_matrix(name):
    A = matrix(name)
    approx = li.nystrom(A, 6, sampling="krylov", b=rhs())
    H = approx @ np.eye(N)
    slack = 1e4 * N * np.finfo(float).eps * operator_norm(A)
    assert np.linalg.eigvalsh(H)[0] > -slack
    assert np.linalg.eigvalsh(A - H)[0] > -slack


@pytest.mark.parametrize("name", PSD)
def test_certify_bounds_the_error(name):
    A, b = matrix(name), rhs()
    for rank in (2, 8):
        solver = li.Nystrom(rank=rank, damping=DAMPING, sampling="krylov")
        found = li.solve(A, b, solver=solver, certify=True)
        error = norm(found.value - damped_solve(A, DAMPING, b))
        assert error <= found.error_bound * (1 + 1e-8) + 1e-12 * norm(b) / DAMPING


@pytest.mark.parametrize("name", INDEFINITE)
def test_negative_eigenvalues_are_kept_between_those_of_the_matrix(name):
    A, b = matrix(name), rhs()
    w = np.linalg.eigvalsh(A)
    approx = li.nystrom(A, 12, sampling="krylov", b=b)
    assert approx.keeps_negative
    assert approx.num_negative > 0
    g = approx.eigenvalues
    assert np.all(np.diff(g) <= 0)
    for i, value in enumerate(sorted(g)):  # Cauchy's interlacing
        assert w[i] - 1e-12 <= value <= w[len(w) - len(g) + i] + 1e-12
    H = approx @ np.eye(N)
    assert relative_error(np.linalg.eigvalsh(H)[[0, -1]], g[[-1, 0]]) < 1e-12
    damping = 1.5 * abs(w[0])
    inverse = approx.inverse(damping) @ np.eye(N)
    assert relative_error(inverse, np.linalg.inv(H + damping * np.eye(N))) < 1e-10


def test_what_lies_below_the_damping_is_reported_as_negative_curvature():
    A, b = matrix("half"), rhs()
    for damping, negative in ((0.1, True), (2.0, False)):
        solver = li.Nystrom(rank=12, damping=damping, sampling="krylov")
        assert bool(solver.prepare(A, b=b).negative_curvature) is negative


@pytest.mark.parametrize("rank", [3, 6, 9])
def test_every_library_and_precision_has_the_same_inverse(backend, rank):
    A, b = conditioned(100), rhs()
    found = backend.run(lambda A, b: krylov_inverse(A, b, rank), A, b)
    expected = krylov_inverse(A, b, rank)
    # The k products determine the answer up to rounding, magnified by the condition of A + damping.
    assert relative_error(found, expected) < 1e3 * N * np.finfo(backend.dtype).eps / DAMPING


def test_the_space_may_grow():
    A, b = li.aslinearoperator(conditioned(1e3)), rhs()
    whole, parts = KrylovSpace(A, b), KrylovSpace(A, b)
    whole.grow(12)
    for count in (1, 5, 5, 12):
        parts.grow(count)
    assert parts.size == 12
    assert relative_error(parts.vectors, whole.vectors) < 1e-9


def test_without_a_right_hand_side_it_starts_from_a_vector_of_the_seed():
    A = matrix("polynomial")
    first, again, other = (li.nystrom(A, 5, sampling="krylov", rng=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.columns, again.columns)
    assert not np.array_equal(first.columns, other.columns)


@pytest.mark.parametrize("b", [np.zeros(N), np.zeros((N, 2))], ids=["vector", "block"])
def test_a_right_hand_side_of_zero_gives_the_solution_zero(b):
    found = li.solve(matrix("linear"), b, solver=li.Nystrom(rank=5, damping=0.1, sampling="krylov"))
    assert not found.value.any()
    assert found.converged.all()


def test_dependent_right_hand_sides_take_no_more_than_the_space_needs():
    A, b = CountingOperator(conditioned(10)), rhs(width=2)
    B = np.concatenate([b, b @ np.array([[1.0], [2.0]]), 0 * b[:, :1]], axis=1)
    solver = li.Nystrom(rank=N, damping=0.1, sampling="krylov")
    found = li.solve(A, B, solver=solver)
    assert relative_error(found.value, damped_solve(A.A, 0.1, B)) < 1e-2
    assert not found.value[:, 3].any()


@pytest.mark.parametrize("ridge", [0.3, np.linspace(0.1, 2.0, N)], ids=["number", "vector"])
def test_a_ridge_stays_out_of_the_sketch(ridge):
    A = symmetric(np.where(np.arange(N) < 4, 1.0, 0.0))
    shifted = li.aslinearoperator(A) + li.DiagonalOperator(N, ridge)
    solver = li.Nystrom(rank=5, sampling="krylov")
    found = li.solve(shifted, rhs(), solver=solver)
    dense = A + np.diag(np.broadcast_to(ridge, N))
    assert relative_error(found.value, np.linalg.solve(dense, rhs())) < 1e-10


@pytest.mark.parametrize(
    ("A", "b", "sampling"),
    [
        (CountingOperator(matrix("linear")), rhs(), "krylov"),
        (CountingOperator(matrix("linear")), None, "uniform"),
        (matrix("linear"), rhs(), "rpcholesky"),
    ],
    ids=["products and b", "products alone", "a matrix"],
)
def test_auto_takes_what_the_operator_allows(A, b, sampling):
    found = li.nystrom(A, 5, b=b, rng=3)
    options = {"b": b} if sampling == "krylov" else {}
    expected = li.nystrom(A, 5, sampling=sampling, rng=3, **options)
    assert np.array_equal(found.columns, expected.columns)
