"""The Gaussian sketch, and estimated diagonals."""

from __future__ import annotations

import numpy as np
import pytest

import lowrank_inverse as li
from tests.conftest import host
from tests.oracles import damped_solve, operator_norm, relative_error
from tests.problems import PSD, RANK, CountingOperator, N, exactly_psd, largest, matrix, rhs

# The Gaussian sketch


def sketched(A, block):
    approx = li.nystrom(A, RANK, sampling="gaussian", rng=5)
    return approx @ block, approx.inverse(0.125) @ block, approx.eigenvalues


def test_the_vectors_are_an_orthonormal_basis_of_a_gaussian_range(n=N, k=RANK, seed=5):
    """What the sketch is made with: an orthonormal basis of a Gaussian range."""
    approx = li.nystrom(np.eye(n), k, sampling="gaussian", rng=seed)
    Omega = approx.columns
    np.testing.assert_allclose(Omega.T @ Omega, np.eye(k), atol=1e-14)
    G = np.random.default_rng(seed).standard_normal((n, k))
    assert np.linalg.norm(G - Omega @ (Omega.T @ G)) < 1e-12


@pytest.mark.parametrize("name", ["linear", "polynomial", "clusters", "exponential"])
def test_the_sketch_is_the_dense_nystrom_formula_on_every_backend(backend, name):
    Omega = np.linalg.qr(np.random.default_rng(5).standard_normal((N, RANK)))[0]
    A = backend.seen(matrix(name)).astype(np.longdouble)
    Y, W = A @ Omega, Omega.T @ A @ Omega
    H = Y @ damped_solve(W, 0, Y.T)
    block = rhs(width=3)
    product, solution, eigenvalues = backend.run(sketched, matrix(name), block)
    condition = np.linalg.cond(W.astype(np.float64))
    tolerance = 100 * backend.eps * (condition if backend.is_narrow else np.sqrt(condition))
    assert relative_error(product, H @ block) < tolerance
    assert relative_error(solution, damped_solve(H, 0.125, block)) < tolerance
    expected = np.linalg.eigvalsh(H.astype(np.float64))[::-1][:RANK]
    np.testing.assert_allclose(eigenvalues, expected, rtol=0, atol=tolerance * largest(name))


@pytest.mark.parametrize("name", PSD)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_sketch_lies_between_zero_and_the_matrix(name, dtype):
    A = matrix(name).astype(dtype)
    H = (li.nystrom(A, RANK, sampling="gaussian", rng=0) @ np.eye(N, dtype=dtype)).astype(float)
    slack = 10 * N * np.finfo(dtype).eps * largest(name)
    assert np.linalg.eigvalsh(H)[0] > -slack
    assert np.linalg.eigvalsh(A.astype(float) - H)[0] > -slack


@pytest.mark.parametrize("rank", [5, 8, N])
def test_a_matrix_of_low_rank_is_reproduced(library, rank):
    A = exactly_psd(np.random.default_rng(3), N, 5)
    approx = li.nystrom(library.asarray(A), rank, sampling="gaussian", rng=0)
    assert relative_error(host(approx @ library.asarray(np.eye(N))), A) < 1e3 * library.eps


def test_the_sketch_beats_uniform_columns_on_a_coherent_matrix():
    A = np.diag(np.where(np.arange(200) < 4, 1.0, 1e-3))
    errors = {
        sampling: np.mean(
            [
                operator_norm(A - li.nystrom(A, 20, sampling=sampling, rng=seed) @ np.eye(200))
                for seed in range(5)
            ]
        )
        for sampling in ("uniform", "gaussian")
    }
    assert errors["gaussian"] < 0.1 * errors["uniform"]


def test_one_approximation_serves_every_form_of_the_inverse():
    approx = li.nystrom(matrix("linear"), RANK, sampling="gaussian", rng=0)
    assert approx.indices is None
    expected = damped_solve(approx @ np.eye(N), 0.1, rhs())
    for chunk_size in (None, 3, 1):
        found = approx.inverse(0.1, chunk_size=chunk_size) @ rhs()
        assert relative_error(found, expected) < 1e-12
    assert repr(approx) == "NystromApproximation(n=24, columns=8, rank=8, dropped=0, negative=0)"


@pytest.mark.parametrize(("chunk_size", "widths"), [(None, [8]), (3, [3, 3, 2])])
def test_products_come_in_chunks_and_are_counted(chunk_size, widths):
    A = CountingOperator(matrix("linear"))
    approx = li.nystrom(A, RANK, sampling="gaussian", rng=0, chunk_size=chunk_size)
    assert A.widths == widths
    assert approx.num_products == A.num_products == RANK


def test_the_sketch_needs_no_diagonal_and_serves_both_settings():
    A = CountingOperator(matrix("exponential"))
    for solver in (
        li.Nystrom(rank=RANK, damping=0.1, sampling="gaussian"),
        li.NystromCG(rank=RANK, damping=0.1, sampling="gaussian"),
    ):
        before = A.num_products
        inverse = solver.prepare(A, rng=0)
        assert inverse.num_products == A.num_products - before == RANK
        solution = inverse.solve(rhs())
        assert relative_error(solution.value, damped_solve(A.A, 0.1, rhs())) < 0.1


@pytest.mark.parametrize("name", ["slightly", "half"])
def test_an_indefinite_matrix_gives_a_semidefinite_sketch_and_is_counted(name):
    approx = li.nystrom(matrix(name), N, sampling="gaussian", rng=0)
    assert approx.num_negative == np.sum(np.linalg.eigvalsh(matrix(name)) < 0)
    assert np.linalg.eigvalsh(approx @ np.eye(N))[0] > -1e-13


def test_a_sketch_that_is_not_finite_is_refused():
    A = li.FunctionOperator(lambda v: np.nan * v, 3)
    with pytest.raises(ValueError, match="`products of A` must be finite"):
        li.nystrom(A, 2, sampling="gaussian", rng=0)


def test_no_columns_can_be_drawn_by_a_sketch():
    from lowrank_inverse.low_rank.column_sampling import sample_columns

    with pytest.raises(ValueError, match=r"draws no columns\. Use nystrom"):
        sample_columns(np.eye(3), 2, sampling="gaussian")


# Estimated diagonals


@pytest.mark.parametrize("num_products", [2, 3, 4, 7, 12])
@pytest.mark.parametrize("name", ["linear", "exponential", "slightly", "half"])
def test_the_estimate_is_unbiased_and_knows_its_error(num_products, name):
    A, rng, draws = matrix(name), np.random.default_rng(0), 400
    estimates = [li.estimate_diagonal(A, num_products, rng=rng) for _ in range(draws)]
    values = np.array([estimate.value for estimate in estimates])
    spread = np.std(values, axis=0) + 1e-15
    deviation = np.abs(np.mean(values, axis=0) - np.diagonal(A)) / (spread / draws**0.5)
    assert np.max(deviation) < 6
    claimed = np.sqrt(np.mean([estimate.standard_error**2 for estimate in estimates], axis=0))
    np.testing.assert_allclose(claimed, spread, rtol=0.35)


def test_the_error_of_the_estimate_falls_much_faster_than_that_of_plain_sampling():
    A = matrix("exponential", 200)
    errors = {}
    for m in (8, 60):
        errors[m] = np.mean(
            [
                np.linalg.norm(li.estimate_diagonal(A, m, rng=seed).value - np.diagonal(A))
                for seed in range(5)
            ]
        )
    assert errors[60] < 0.02 * errors[8]  # the root of 60 / 8 is 2.7


def test_the_estimate_is_that_of_every_library_and_costs_what_it_says(library):
    expected = li.estimate_diagonal(library.seen(matrix("linear")), 9, rng=4)
    A = CountingOperator(library.asarray(matrix("linear")))
    found = li.estimate_diagonal(A, 9, rng=4)
    assert found.num_products == A.num_products == 9
    assert type(found.value) is type(A.A) and found.value.dtype == A.A.dtype
    np.testing.assert_allclose(host(found.value), expected.value, atol=100 * library.eps)
    np.testing.assert_allclose(
        host(found.standard_error), expected.standard_error, atol=100 * library.eps
    )


def test_an_estimate_serves_as_weights_where_asked_for():
    A = CountingOperator(np.diag(np.where(np.arange(60) < 5, 1.0, 1e-6)))
    estimate = li.estimate_diagonal(A, 4, rng=0)
    for sampling in ("diagonal", "diagonal_squared"):
        approx = li.nystrom(A, 5, sampling=sampling, diagonal=estimate, rng=0)
        assert sorted(approx.indices) == list(range(5))
        weights = li.nystrom(A, 5, sampling=sampling, diagonal=estimate.value, rng=0)
        np.testing.assert_array_equal(weights.indices, approx.indices)


@pytest.mark.parametrize("memory", ["stored", "streamed"])
def test_the_settings_buy_an_estimate_only_when_told_to(memory):
    A = CountingOperator(np.diag(np.where(np.arange(60) < 5, 1.0, 1e-6)))
    solver = li.Nystrom(
        rank=5, damping=0.1, sampling="diagonal", memory=memory, diagonal_products=6
    )
    inverse = solver.prepare(A, rng=0)
    assert inverse.num_products == A.num_products
    assert A.num_products == 6 + (5 if memory == "stored" else 10)
    with pytest.raises(TypeError, match="has no diagonal"):
        li.Nystrom(rank=5, damping=0.1, sampling="diagonal", memory=memory).prepare(A, rng=0)
    # Not where there is a diagonal, nor where there is no use for one.
    dense = li.Nystrom(rank=5, damping=0.1, sampling="diagonal", memory=memory, diagonal_products=6)
    assert dense.prepare(A.A, rng=0).num_products == (5 if memory == "stored" else 10)
    uniform = li.Nystrom(
        rank=5, damping=0.1, sampling="uniform", memory=memory, diagonal_products=6
    )
    assert uniform.prepare(A, rng=0).num_products == (5 if memory == "stored" else 10)


def test_an_estimate_is_no_diagonal_to_pivot_on():
    A = CountingOperator(matrix("linear"))
    estimate = li.estimate_diagonal(A, 4, rng=0)
    with pytest.raises(ValueError, match="needs the true diagonal of `A`"):
        li.nystrom(A, 4, sampling="greedy", diagonal=estimate)


@pytest.mark.parametrize(
    ("num_products", "error", "message"),
    [
        (1, ValueError, "`num_products` must be at least 2"),
        (0, ValueError, "`num_products` must be at least 1"),
        (2.0, TypeError, "`num_products` must be a whole number"),
    ],
)
def test_a_number_of_products_out_of_range_is_refused(num_products, error, message):
    with pytest.raises(error, match=message):
        li.estimate_diagonal(np.eye(3), num_products)


def test_weights_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="`diagonal` must have 3 rows"):
        li.nystrom(np.eye(3), 2, sampling="diagonal", diagonal=np.ones(2))
    with pytest.raises(ValueError, match="`diagonal` must be finite"):
        li.nystrom(np.eye(3), 2, sampling="diagonal", diagonal=np.array([1.0, np.nan, 1.0]))
