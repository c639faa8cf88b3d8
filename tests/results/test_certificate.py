"""Error bounds that hold for any approximate solution."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lowrank_inverse as li
from tests.oracles import damped, damped_solve, norm, operator_norm, relative_error, residual_norm
from tests.problems import (
    PSD,
    RANK,
    WIDTH,
    CountingOperator,
    N,
    exactly_psd,
    indices,
    largest,
    matrix,
    rhs,
)

KINDS = ["exact", "nystrom", "cg", "neumann", "zero", "random", "null space"]


def approximate_solution(kind, A, b, damping, chosen, rng):
    """Any x whatever, good or bad, in the dtype of `A`."""
    if kind == "exact":
        return damped_solve(A, damping, b).astype(A.dtype)
    if kind == "nystrom":
        return li.nystrom(A, indices=chosen).inverse(damping) @ b
    if kind == "cg":
        return li.cg(A, b, damping=damping, max_steps=int(rng.integers(1, len(b) + 1))).value
    if kind == "cg to the end":
        return li.cg(A, b, damping=damping, rtol=10 * np.finfo(A.dtype).eps).value
    if kind == "neumann":
        return li.neumann(A, b, damping=damping, num_terms=5).value
    if kind == "zero":
        return np.zeros_like(b)
    if kind == "random":
        return (rng.standard_normal(b.shape) * 10.0 ** rng.integers(-3, 4)).astype(A.dtype)
    # Large where A is small: the product cancels.
    vector = np.linalg.eigh(A.astype(np.float64))[1][:, 0]
    vector = vector if b.ndim == 1 else vector[:, None]
    return (damped_solve(A, damping, b) + 100 / damping * vector).astype(A.dtype)


@st.composite
def certificate_problems(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.integers(1, 40))
    A = exactly_psd(rng, n, draw(st.integers(1, n)))
    chosen = rng.choice(n, draw(st.integers(1, n)), replace=False)
    damping = 2.0 ** draw(st.integers(-12, 6))
    b = rng.standard_normal((n, 2) if draw(st.booleans()) else n)
    return A, chosen, damping, b, rng


def check_bounds_hold(problem, kind, dtype):
    A, chosen, damping, b, rng = problem
    A, b = A.astype(dtype), b.astype(dtype)
    x = approximate_solution(kind, A, b, damping, chosen, rng)
    error = np.asarray(x, dtype=np.longdouble) - damped_solve(A, damping, b)
    true_norm = norm(error)
    true_energy = np.sqrt(np.sum(error * (damped(A, damping) @ error), axis=0))
    # The k×k algebra knows H_k to the rounding of float64.
    slack = 1 + 1e3 * np.finfo(np.float64).eps * (operator_norm(A) / damping)
    for inverse in (None, li.nystrom(A, indices=chosen).inverse(damping)):
        certificate = li.certify(A, b, x, damping=damping, inverse=inverse)
        assert np.all(true_norm <= slack * certificate.error_bound)
        assert np.all(true_energy <= slack * certificate.energy_bound)
        assert np.all(np.isfinite(certificate.error_bound))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@settings(max_examples=40)
@given(problem=certificate_problems())
def test_no_bound_is_ever_violated(dtype, kind, problem):
    check_bounds_hold(problem, kind, dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bounds_hold_for_solutions_as_good_as_the_precision_allows(dtype):
    violations = []
    for seed in range(30):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(2, 41))
        A = exactly_psd(rng, n, int(rng.integers(1, n + 1)))
        chosen = rng.choice(n, int(rng.integers(1, n + 1)), replace=False)
        damping = 2.0 ** rng.integers(-12, -2)
        problem = (A, chosen, damping, rng.standard_normal(n), rng)
        try:
            check_bounds_hold(problem, "cg to the end", dtype)
        except AssertionError:
            violations.append(seed)
    assert violations == []


@pytest.mark.parametrize("seed", [18170, 21869, 27776])
def test_the_bound_is_not_below_the_error_by_the_rounding_of_small_pivots(seed):
    """The columns span A, so that the bound is the error: these are the worst of 60 000."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(10, 41))
    rank = int(rng.integers(1, n + 1))
    A = exactly_psd(rng, n, rank)
    count = int(rng.integers(max(1, rank - 4), min(n, rank + 4) + 1))
    chosen = rng.choice(n, count, replace=False)
    damping = 2.0 ** rng.integers(-12, 7)
    check_bounds_hold((A, chosen, damping, rng.standard_normal(n), rng), "random", "float64")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@settings(max_examples=1000)
@given(problem=certificate_problems())
def test_no_bound_is_ever_violated_in_thousands_of_cases(dtype, kind, problem):
    check_bounds_hold(problem, kind, dtype)


def certify(A, x, b, damping):
    return li.certify(A, b, x, damping=damping)


def certify_with_nystrom(A, x, b, damping):
    inverse = li.nystrom(A, indices=indices()).inverse(damping)
    return li.certify(A, b, x, damping=damping, inverse=inverse)


@pytest.mark.parametrize("name", ["linear", "polynomial", "step", "clusters"])
@pytest.mark.parametrize("width", [None, WIDTH])
def test_bounds_hold_and_are_not_far_off_on_every_backend(backend, name, width):
    if backend.name == "jax_jit" and width is None:
        pytest.skip("another compilation that says no more")
    A, damping = backend.seen(matrix(name)), 0.125
    b, x = backend.seen(rhs(width=width)), backend.seen(rhs(width=width, seed=7))
    error = x - damped_solve(A, damping, b)
    true_norm = norm(error)
    true_energy = np.sqrt(np.sum(error * (damped(A, damping) @ error), axis=0))
    for run in (certify, certify_with_nystrom):
        certificate = backend.run(run, matrix(name), x, b, damping)
        assert np.all(certificate.error_bound >= true_norm)
        assert np.all(certificate.energy_bound >= true_energy)
        assert relative_error(certificate.residual_norm, residual_norm(A, damping, x, b)) < 1e-5
        # Never above the bound by the residual alone.
        by_residual = certificate.residual_norm / damping
        assert np.all(certificate.error_bound <= by_residual * (1 + 1e-4))


def test_the_bound_without_an_inverse_is_the_residual_over_the_damping():
    A, b, x, damping = matrix("linear"), rhs(), rhs(seed=7), 0.1
    certificate = li.certify(A, b, x, damping=damping)
    residual = residual_norm(A, damping, x, b)
    assert relative_error(certificate.error_bound, residual / damping) < 1e-6
    assert relative_error(certificate.energy_bound, residual / np.sqrt(damping)) < 1e-6


def test_the_bound_with_an_inverse_is_the_square_root_of_r_n_r():
    A, b, x, damping = matrix("linear"), rhs(), rhs(seed=7), 0.1
    inverse = li.nystrom(A, indices=indices()).inverse(damping)
    r = b - A @ x - damping * x
    energy = np.sqrt(r @ (inverse @ r))
    certificate = li.certify(A, b, x, damping=damping, inverse=inverse)
    assert relative_error(certificate.energy_bound, energy) < 1e-6
    expected = min(energy / np.sqrt(damping), np.linalg.norm(r) / damping)
    assert relative_error(certificate.error_bound, expected) < 1e-6


def test_an_inverse_from_all_columns_makes_the_energy_bound_exact():
    A, b, x, damping = matrix("polynomial"), rhs(), rhs(seed=7), 1e-3
    error = x - damped_solve(A, damping, b)
    energy = np.sqrt(error @ (damped(A, damping) @ error))
    inverse = li.nystrom(A, N, rng=0).inverse(damping)
    certificate = li.certify(A, b, x, damping=damping, inverse=inverse)
    assert (1 - 1e-12) * energy <= certificate.energy_bound < (1 + 1e-6) * energy
    assert certificate.error_bound < 0.5 * li.certify(A, b, x, damping=damping).error_bound


def test_bounds_tighten_with_the_rank_of_the_inverse():
    A, b, damping = matrix("exponential"), rhs(), 1e-3
    x, order = rhs(seed=7), indices(rank=N)
    bounds = [li.certify(A, b, x, damping=damping).energy_bound]
    for k in (2, 8, N):
        inverse = li.nystrom(A, indices=order[:k]).inverse(damping)
        bounds.append(li.certify(A, b, x, damping=damping, inverse=inverse).energy_bound)
    assert np.all(np.diff(bounds) < 0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_an_exact_solution_has_a_bound_of_the_size_of_rounding(dtype):
    A, b, damping = matrix("linear").astype(dtype), rhs().astype(dtype), 0.1
    x = damped_solve(A, damping, b).astype(dtype)
    bound = li.certify(A, b, x, damping=damping).error_bound
    assert bound < 1e3 * np.finfo(dtype).eps * norm(x)


@pytest.mark.parametrize("c", [1e20, 1e-20])
@pytest.mark.parametrize("s", [1.0, 1e15, 1e-15])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_scaling_scales_the_bounds(dtype, c, s):
    A, b, x = matrix("linear"), rhs(), rhs(seed=7)

    def bounds(c, s):
        scaled = (c * A).astype(dtype)
        inverse = li.nystrom(scaled, indices=indices()).inverse(0.1 * c)
        return li.certify(
            scaled,
            (s * b).astype(dtype),
            (s / c * x).astype(dtype),
            damping=0.1 * c,
            inverse=inverse,
        )

    expected, found = bounds(1.0, 1.0), bounds(c, s)
    assert found.residual_norm / s == pytest.approx(expected.residual_norm, rel=1e-4)
    assert float(found.error_bound) * c / s == pytest.approx(expected.error_bound, rel=1e-4)
    assert float(found.energy_bound) * c**0.5 / s == pytest.approx(expected.energy_bound, rel=1e-4)


@pytest.mark.parametrize("with_inverse", [False, True])
def test_a_certificate_costs_a_product_a_column_and_two_for_an_unknown_norm(with_inverse):
    A = CountingOperator(matrix("linear"))
    inverse = li.nystrom(A, indices=indices()).inverse(0.1) if with_inverse else None
    before = A.num_products
    li.certify(A, rhs(width=WIDTH), rhs(width=WIDTH), damping=0.1, inverse=inverse)
    assert A.num_products - before == WIDTH + 2
    assert before == (RANK if with_inverse else 0)


def test_certificates_keep_library_and_dtype(library):
    b = library.asarray(rhs(width=WIDTH))
    for part in li.certify(library.asarray(matrix("linear")), b, b, damping=0.1):
        assert type(part) is type(b)
        assert part.dtype == b.dtype
        assert tuple(part.shape) == (WIDTH,)


@pytest.mark.parametrize("name", PSD)
def test_solve_certifies_every_solver(name):
    A, damping = matrix(name), 0.01 * largest(name)
    exact = damped_solve(A, damping, rhs(width=WIDTH))
    for solver in (
        li.Nystrom(rank=4, damping=damping),
        li.Nystrom(rank=4, damping=damping, memory="streamed"),
        li.Nystrom(rank=4, damping=damping, memory="chunked"),
        li.Nystrom(rank=4, damping=damping, refine=2),
        li.NystromCG(rank=4, damping=damping, max_steps=2),
        li.CG(damping=damping, max_steps=2),
        li.Neumann(damping=damping),
        li.Exact(damping=damping),
    ):
        solution = li.solve(A, rhs(width=WIDTH), solver=solver, rng=0, certify=True)
        assert solution.error_bound.shape == (WIDTH,)
        assert np.all(norm(solution.value - exact) <= solution.error_bound)
        without = li.solve(A, rhs(width=WIDTH), solver=solver, rng=0)
        assert without.error_bound is None
        np.testing.assert_array_equal(without.value, solution.value)


# Bad input


@pytest.mark.parametrize("damping", [0.0, -1.0, np.nan])
def test_a_damping_that_is_not_positive_is_refused(damping):
    with pytest.raises(ValueError, match="`damping` must be finite and >"):
        li.certify(np.eye(3), np.ones(3), np.ones(3), damping=damping)


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (np.ones(2), ValueError, "`x.?` must match `b`"),
        (np.ones((3, 1)), ValueError, "`x.?` must match `b`"),
        (np.array([1.0, np.nan, 1.0]), ValueError, "`x.?` must be finite"),
    ],
)
def test_a_solution_that_does_not_fit_is_refused(x, error, message):
    with pytest.raises(error, match=message):
        li.certify(np.eye(3), np.ones(3), x, damping=0.1)


def test_the_message_names_the_argument_that_is_wrong():
    with pytest.raises(ValueError, match="`x` must"):
        li.certify(np.eye(3), np.ones(3), np.ones(2), damping=0.1)
