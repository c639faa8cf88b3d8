"""Conjugate gradients that never lie."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lowrank_inverse as li
from lowrank_inverse import Reason
from tests.conftest import host, open_backend
from tests.iterative.claims import check_claims
from tests.iterative.test_both_iterations import Failing
from tests.oracles import (
    LONG,
    damped_solve,
    krylov_optima,
    norm,
    operator_norm,
    relative_error,
    residual_norm,
    solve,
    textbook_cg,
)
from tests.problems import (
    PSD,
    WIDTH,
    CountingOperator,
    N,
    conditioned,
    indices,
    largest,
    matrix,
    orthogonal,
    rhs,
    symmetric,
)

SMALL = 12
"""Rows of the problems whose every step count is compared."""


def run_cg(A, b):
    return li.cg(A, b)


def run_damped(A, b, damping):
    return li.cg(A, b, damping=damping)


def run_tight(A, b, damping):
    return li.cg(A, b, damping=damping, rtol=1e-12)


def run_from(A, b, x0):
    return li.cg(A, b, x0=x0)


def run_preconditioned(A, b, M):
    return li.cg(A, b, preconditioner=M)


@functools.cache
def run_steps(max_steps, preconditioned=False):
    def run(A, b, M, x0):
        preconditioner = M if preconditioned else None
        return li.cg(A, b, preconditioner=preconditioner, x0=x0, rtol=0.0, max_steps=max_steps)

    return run


# The answer


@pytest.mark.parametrize("name", PSD)
def test_a_damped_system_is_solved_to_the_tolerance(backend, name):
    damping = float(backend.seen(0.01 * largest(name)))
    for b in (rhs(), rhs(width=WIDTH)):
        solution = backend.run(run_damped, matrix(name), b, damping)
        A, b = backend.seen(matrix(name)), backend.seen(b)
        check_claims(A, b, solution, damping=damping)
        assert np.all(solution.converged)
        assert solution.message in ("converged", f"{WIDTH} converged")
        # The residual at 1e-5 and a condition number of 100.
        assert relative_error(solution.value, damped_solve(A, damping, b)) < 1e-3


@pytest.mark.parametrize("name", PSD)
def test_a_tight_tolerance_gives_the_dense_solution(name):
    damping = 0.01 * largest(name)
    solution = run_tight(matrix(name), rhs(width=WIDTH), damping)
    expected = damped_solve(matrix(name), damping, rhs(width=WIDTH))
    assert relative_error(solution.value, expected) < 1e-10


@pytest.mark.parametrize("name", ["low rank", "rank one"])
def test_a_singular_system_is_solved_where_it_has_a_solution(backend, name):
    A = matrix(name)
    b = A @ rhs()
    solution = backend.run(run_cg, A, b)
    assert np.all(solution.converged)
    expected = np.linalg.pinv(A, rcond=1e-6, hermitian=True) @ b
    assert relative_error(solution.value, expected) < 1e-3


@pytest.mark.parametrize("distinct", [1, 2, 3, 5])
def test_steps_are_at_most_the_number_of_distinct_eigenvalues(backend, distinct):
    A = symmetric(np.linspace(1, 3, distinct)[np.arange(N) % distinct])
    solution = backend.run(run_cg, A, rhs())
    assert solution.num_steps == distinct
    assert solution.converged


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize("start", ["zero", "elsewhere"])
def test_every_step_count_gives_the_optimum_over_the_krylov_space(library, preconditioned, start):
    A, b = conditioned(10, SMALL), rhs(SMALL)
    M = symmetric(np.linspace(1, 3, SMALL), seed=9)
    x0 = np.zeros(SMALL) if start == "zero" else rhs(SMALL, seed=5)
    seen_A, seen_b = library.seen(A), library.seen(b)
    optima = krylov_optima(
        seen_A, seen_b, M=library.seen(M) if preconditioned else None, x0=library.seen(x0)
    )
    exact = solve(seen_A, seen_b)

    def energy(e):
        return float(np.sqrt(e @ (seen_A @ e)))

    assert energy(optima[-1] - exact) < 1e-12 * energy(exact)
    assert energy(optima[SMALL // 2] - exact) > 1e-4 * energy(exact)  # the comparison has a point
    for j in range(1, SMALL + 1):
        solution = library.run(run_steps(j, preconditioned), A, b, M, x0)
        assert solution.num_steps == j
        assert solution.reason == Reason.MAX_STEPS
        difference = energy(np.asarray(solution.value, dtype=LONG) - optima[j - 1])
        assert difference < 2e3 * library.eps * energy(library.seen(x0) - exact)


@pytest.mark.parametrize("j", [1, pytest.param(4, marks=pytest.mark.slow), SMALL])
def test_compiled_steps_give_the_optimum_too(j):
    A, b, M = conditioned(10, SMALL), rhs(SMALL), symmetric(np.linspace(1, 3, SMALL), seed=9)
    x0 = rhs(SMALL, seed=5)
    with open_backend("jax_jit", "float64") as backend:
        solution = backend.run(run_steps(j, True), A, b, M, x0)
    optimum = krylov_optima(A, b, M=M, x0=x0)[j - 1]
    assert relative_error(solution.value, optimum) < 1e-11
    assert solution.num_steps == j


def test_columns_on_their_own_are_solved_like_vectors(library):
    A, B = conditioned(30), rhs(width=WIDTH)
    together = library.run(lambda A, b: li.cg(A, b, block_size=1), A, B)
    for j in range(WIDTH):
        alone = library.run(run_cg, A, B[:, j])
        assert abs(int(together.num_steps[j]) - int(alone.num_steps)) <= 1
        assert relative_error(together.value[:, j], alone.value) < 1e-4


def test_every_backend_takes_the_same_steps(backend):
    A, B = conditioned(10).astype(backend.dtype), rhs(width=WIDTH).astype(backend.dtype)
    expected = li.cg(A, B)
    solution = backend.run(run_cg, A, B)
    assert np.max(np.abs(solution.num_steps - expected.num_steps)) <= 1
    assert relative_error(solution.value, expected.value) < 1e-4


# Traps: false success


def hard_system(seed, in_range):
    A, b = conditioned(1e6, 40, seed).astype("float32"), rhs(40, seed=seed).astype("float32")
    return A, A @ b if in_range else b


@pytest.mark.parametrize("in_range", [True, False])
@pytest.mark.parametrize("dtype", ["float32"])
def test_success_is_claimed_on_the_true_residual_alone(backend, in_range):
    for seed in range(3):
        A, b = hard_system(seed, in_range)
        check_claims(A, b, backend.run(run_cg, A, b))


def test_the_residual_carried_along_would_have_claimed_a_false_success():
    """Whether it claims depends on the order of sums; what it claims never holds."""
    shares = []
    for seed in range(6):
        A, b = hard_system(seed, in_range=False)
        x, _, claimed = textbook_cg(A, b, 1e-5, 1000)
        if claimed:
            shares.append(residual_norm(A, 0, x, b) / norm(b))
    assert shares
    assert min(shares) > 100 * 1e-5


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e8])
@pytest.mark.parametrize("in_range", [True, False])
@pytest.mark.parametrize("rtol", [1e-2, 1e-5, 1e-12])
@pytest.mark.parametrize("library", ["numpy", pytest.param("torch", marks=pytest.mark.slow)])
def test_claims_hold_at_every_condition_number(library, dtype, condition, in_range, rtol):
    A = conditioned(condition)
    b = A @ rhs(width=WIDTH) if in_range else rhs(width=WIDTH)
    with open_backend(library, dtype) as backend:
        solution = host(li.cg(backend.asarray(A), backend.asarray(b), rtol=rtol))
        check_claims(backend.seen(A), backend.seen(b), solution, rtol=rtol)


@st.composite
def systems(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.integers(1, 16))
    eigenvalues = np.logspace(0, -draw(st.floats(0, 10)), n)
    kind = draw(st.sampled_from(["definite", "singular", "indefinite", "zero"]))
    eigenvalues[: n // 2] *= {"definite": 1, "singular": 0, "indefinite": -1, "zero": 0}[kind]
    A = (kind != "zero") * 10.0 ** draw(st.integers(-8, 8)) * symmetric(eigenvalues)
    b = 10.0 ** draw(st.integers(-8, 8)) * rng.standard_normal((n, 2))
    b[:, 1] *= draw(st.sampled_from([0.0, 1e-6, 1.0]))
    x0 = draw(st.sampled_from([None, 1e-10, 1.0, 1e10]))
    M = draw(st.sampled_from([None, np.ones(n), rng.random(n), -np.ones(n), rng.random(n) - 0.3]))
    return {
        "A": A,
        "b": b,
        "x0": None if x0 is None else x0 * rng.standard_normal((n, 2)),
        "preconditioner": None if M is None else symmetric(M, seed=3),
        "damping": draw(st.sampled_from([0.0, 1e-3, 1.0])) * operator_norm(A),
        "rtol": draw(st.sampled_from([1e-2, 1e-5, 1e-12])),
        "max_steps": draw(st.sampled_from([None, 1, 5])),
    }


def check_random_system(system, dtype):
    arrays = {
        key: value.astype(dtype) if isinstance(value, np.ndarray) else value
        for key, value in system.items()
    }
    solution = li.cg(**arrays)
    check_claims(arrays["A"], arrays["b"], solution, damping=system["damping"], rtol=system["rtol"])
    limit = system["max_steps"] or 10 * len(arrays["b"])
    assert np.all(solution.num_steps <= limit)
    assert not np.any(solution.reason == Reason.NONFINITE)
    assert not np.any(solution.value[:, ~np.any(arrays["b"], axis=0)])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@settings(max_examples=100)
@given(system=systems())
def test_no_claim_about_a_random_system_is_false(dtype, system):
    check_random_system(system, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@settings(max_examples=5000)
@given(system=systems())
def test_no_claim_about_thousands_of_random_systems_is_false(dtype, system):
    check_random_system(system, dtype)


# Traps: giving up too early


def strakos(n, condition, rho):
    """Eigenvalues on which the residual of CG stays high for longer than n steps."""
    i = np.arange(n)
    low = 1 / condition
    return symmetric(low + i / (n - 1) * (1 - low) * rho ** (n - 1 - i))


@pytest.mark.parametrize("n", [24, 40])
@pytest.mark.parametrize("condition", [1e5, 1e6, 1e7, 1e8])
@pytest.mark.parametrize("rho", [0.6, 0.8, 0.9, None])
def test_a_residual_that_stays_high_for_long_is_no_reason_to_give_up(n, condition, rho):
    A = conditioned(condition, n) if rho is None else strakos(n, condition, rho)
    within_reach = 0
    for seed in range(3):
        b = rhs(n, seed=seed)
        x, steps, claimed = textbook_cg(A, b, 1e-5, 10 * n)
        if not claimed or residual_norm(A, 0, x, b) > 1e-5 * norm(b):
            continue
        within_reach += 1
        solution = li.cg(A, b)
        check_claims(A, b, solution)
        assert solution.converged
        assert solution.num_steps < 1.5 * steps + 10
    assert within_reach or condition > 1e6


@pytest.mark.parametrize("seed", range(6))
def test_what_is_returned_for_a_hard_float32_system_is_as_good_as_textbook_cg(seed):
    A, b = hard_system(seed, in_range=False)
    exact = solve(A, b)
    plain, _, _ = textbook_cg(A, b, 0.0, 10 * len(b))
    solution = li.cg(A, b)
    check_claims(A, b, solution)
    assert relative_error(solution.value, exact) < 5 * relative_error(plain, exact)


# Traps: tolerances out of reach


@pytest.mark.parametrize("rtol", [1e-14, 0.0])
def test_a_tolerance_out_of_reach_ends_with_the_best_iterate_and_says_so(backend, rtol):
    if backend.dtype == "float64" and rtol == 1e-14:
        pytest.skip("within reach")
    A, b = conditioned(100), rhs(width=WIDTH)
    solution = backend.run(run_out_of_reach(rtol), A, b)
    A, b = backend.seen(A), backend.seen(b)
    check_claims(A, b, solution, rtol=rtol)
    assert not np.any(solution.converged)
    assert np.all(solution.reason == Reason.STAGNATED)
    assert np.all(solution.num_steps < 10 * N)
    assert np.all(solution.residual_norm < 100 * backend.eps * 100 * norm(b))
    assert relative_error(solution.value, solve(A, b)) < 100 * backend.eps * 100


@functools.cache
def run_out_of_reach(rtol):
    return lambda A, b: li.cg(A, b, rtol=rtol)


def test_an_exact_solution_met_on_the_way_ends_the_search_even_at_tolerance_zero(backend):
    solution = backend.run(run_out_of_reach(0.0), np.eye(N), rhs())
    assert solution.num_steps <= 2
    assert relative_error(solution.value, backend.seen(rhs())) < 2 * backend.eps


# Traps: scales


@pytest.mark.parametrize("size", [1e-12, 1e-20, 1e-30, 1e30])
def test_a_right_hand_side_of_any_size_is_solved(backend, size):
    A = conditioned(10)
    solution = backend.run(run_cg, A, size * rhs())
    assert solution.converged
    assert np.any(solution.value)
    expected = solve(backend.seen(A), rhs())
    assert relative_error(np.asarray(solution.value, dtype=LONG) / size, expected) < 1e-4


@pytest.mark.parametrize("share", [0.45, 0.1, 1e-70])
def test_a_right_hand_side_near_either_end_of_the_range_is_solved(backend, share):
    # The reciprocal of the largest entry may be subnormal, which some libraries take for zero.
    size = share * float(np.finfo(backend.dtype).max)
    if size < float(np.finfo(backend.dtype).tiny):
        size = 100 * float(np.finfo(backend.dtype).tiny)
    A, b = 100 * conditioned(10), rhs() / np.max(np.abs(rhs()))
    solution = backend.run(run_cg, A, size * b)
    assert solution.converged
    assert solution.num_steps > 1
    expected = solve(A, b)
    assert relative_error(np.asarray(solution.value, dtype=LONG) / LONG(size), expected) < 1e-4


@pytest.mark.parametrize("c", [1.0, 3.0, 1e20, 1e-20])
def test_the_identity_in_fifty_thousand_dimensions_takes_one_step_in_float32(c):
    b = np.random.default_rng(0).standard_normal(50_000).astype("float32")
    solution = li.cg(li.FunctionOperator(lambda v: v * np.float32(c), 50_000, like=b), b)
    assert solution.converged and solution.num_steps == 1
    np.testing.assert_allclose(solution.value, b / np.float32(c), rtol=1e-6)


@pytest.mark.parametrize("library", ["torch", "jax"])
def test_the_identity_in_fifty_thousand_dimensions_takes_one_step_in_other_libraries(library):
    make = pytest.importorskip({"torch": "torch", "jax": "jax.numpy"}[library]).asarray
    b = make(np.random.default_rng(0).standard_normal(50_000).astype("float32"))
    solution = li.cg(li.FunctionOperator(lambda v: v, 50_000, like=b), b)
    assert bool(solution.converged) and int(solution.num_steps) == 1
    assert relative_error(host(solution.value), host(b)) < 1e-6


# Traps: zeros


def test_exact_zeros_in_a_right_hand_side_are_no_obstacle(backend):
    A, b = np.diag(np.linspace(1, 2, N)), np.zeros(N)
    b[[3, 17]] = 1.0, -2.0
    solution = backend.run(run_cg, A, b)
    check_claims(backend.seen(A), b, solution)
    assert solution.converged
    assert not np.any(np.asarray(solution.value)[b == 0])


def test_a_zero_right_hand_side_has_the_solution_zero_at_once(backend):
    solution = backend.run(run_cg, conditioned(10), np.zeros(N))
    assert solution.converged and solution.num_steps == 0 and solution.residual_norm == 0
    assert not np.any(solution.value)
    assert solution.num_products == 0


def test_a_zero_right_hand_side_has_the_solution_zero_wherever_the_start(backend):
    solution = backend.run(run_from, conditioned(10), np.zeros(N), rhs())
    assert solution.converged
    assert not np.any(solution.value)


def test_a_block_without_columns_has_an_empty_solution():
    solution = li.cg(conditioned(10), np.ones((N, 0)))
    assert solution.value.shape == (N, 0)
    assert solution.converged.shape == (0,)


# Traps: blocks


def test_one_unfinished_column_is_not_hidden_by_the_others(backend):
    eigenvalues = np.linspace(1, 100, N)
    A = symmetric(eigenvalues)
    B = np.column_stack([orthogonal(N)[:, 3], rhs(), orthogonal(N)[:, 5]])
    solution = backend.run(run_two_steps, A, B)
    check_claims(backend.seen(A), backend.seen(B), solution)
    assert solution.converged.tolist() == [True, False, True]
    assert solution.reason.tolist() == [Reason.CONVERGED, Reason.MAX_STEPS, Reason.CONVERGED]
    assert solution.num_steps.tolist() == [1, 2, 1]
    assert solution.message == "2 converged, 1 max_steps"


def run_two_steps(A, b):
    return li.cg(A, b, max_steps=2)


def test_duplicate_right_hand_sides_get_duplicate_solutions(backend):
    A, b = conditioned(100), rhs()
    solution = backend.run(run_cg, A, np.column_stack([b, b, 2 * b]))
    check_claims(backend.seen(A), backend.seen(np.column_stack([b, b, 2 * b])), solution)
    assert np.all(solution.converged)
    # Equal to rounding: a library may multiply the columns of a block in different orders.
    assert np.ptp(solution.num_steps) <= 1
    for j, factor in ((1, 1), (2, 2)):
        assert relative_error(solution.value[:, j], factor * solution.value[:, 0]) < 1e-4


def test_columns_of_very_different_size_are_solved_alike(backend):
    A, b = conditioned(100), rhs()
    sizes = np.array([1.0, 2.0**-60, 2.0**60])
    solution = backend.run(run_cg, A, b[:, None] * sizes)
    assert np.all(solution.converged)
    assert np.ptp(solution.num_steps) <= 1
    values = solution.value.astype(np.float64) / sizes
    for j in (1, 2):
        assert relative_error(values[:, j], values[:, 0]) < 1e-4


# Traps: indefinite matrices


@pytest.mark.parametrize("name", ["half", "slightly"])
def test_negative_curvature_is_a_reason_and_never_a_success(backend, name):
    b = rhs(width=WIDTH)
    solution = backend.run(run_cg, matrix(name), b)
    check_claims(backend.seen(matrix(name)), backend.seen(b), solution)
    assert np.all(solution.reason == Reason.NEGATIVE_CURVATURE)
    assert not np.any(solution.converged)
    assert np.all(solution.residual_norm <= (1 + 1e-5) * norm(b))


@pytest.mark.parametrize(
    ("factor", "reason"), [(-1.0, Reason.NEGATIVE_CURVATURE), (0.0, Reason.SINGULAR)]
)
def test_curvature_that_is_negative_or_zero_everywhere_is_seen_at_the_first_step(
    backend, factor, reason
):
    solution = backend.run(run_cg, factor * np.eye(N), rhs())
    assert solution.reason == reason
    assert solution.num_steps == 0
    assert not np.any(solution.value)
    assert solution.residual_norm == pytest.approx(np.linalg.norm(rhs()), rel=1e-5)


def path_laplacian(n):
    """Return the Laplacian of a path: constants are its null space."""
    L = 2.0 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)
    L[0, 0] = L[-1, -1] = 1.0
    return L


@pytest.mark.parametrize("rank", [None, 4])
def test_a_singular_system_without_a_solution_is_called_singular(backend, rank):
    L, b = path_laplacian(N), np.eye(N)[0]

    def solve(L, b):
        M = None if rank is None else li.NystromCG(indices=range(rank)).prepare(L).preconditioner
        return li.cg(L, b, preconditioner=M)

    solution = backend.run(solve, L, b)
    assert solution.reason == Reason.SINGULAR
    assert solution.residual_norm <= 1 + 10 * backend.eps  # that of zero


def test_a_zero_row_is_no_overflow(backend):
    D, b = np.diag([0.0, 0.0, 1.0, 2.0, 3.0]), np.array([1.0, 0.0, 1.0, 1.0, 1.0])
    solution = backend.run(run_cg, D, b)
    assert solution.reason == Reason.SINGULAR
    assert solution.residual_norm <= norm(b)
    assert backend.run(run_cg, D, D @ b).reason == Reason.CONVERGED


def test_a_damping_that_outweighs_the_negative_curvature_makes_the_system_solvable(backend):
    solution = backend.run(run_damped, matrix("half"), rhs(), 1.5)
    check_claims(backend.seen(matrix("half")), backend.seen(rhs()), solution, damping=1.5)
    assert solution.converged


def test_negative_curvature_leaves_alone_the_columns_that_search_on_their_own(backend):
    A = np.diag(np.where(np.arange(N) < N - 1, np.linspace(1, 2, N), -1.0))
    B = rhs(width=WIDTH)
    B[-1, 0] = 0
    solution = backend.run(lambda A, b: li.cg(A, b, block_size=1), A, B)
    assert solution.reason.tolist() == [
        Reason.CONVERGED,
        Reason.NEGATIVE_CURVATURE,
        Reason.NEGATIVE_CURVATURE,
    ]


# Starting elsewhere


def test_a_start_at_the_exact_solution_takes_no_step(backend):
    A = np.diag(2.0 ** np.arange(-3, N - 3))
    x = np.round(8 * rhs(width=WIDTH))
    solution = backend.run(run_from, A, A @ x, x)
    assert np.all(solution.converged)
    assert not np.any(solution.num_steps)
    np.testing.assert_allclose(solution.value, x, rtol=4 * backend.eps)
    assert solution.num_products == WIDTH
    assert np.all(solution.residual_norm <= 10 * backend.eps * norm(A @ x))


def test_a_start_at_the_last_solution_takes_no_step(backend):
    A, b = conditioned(100), rhs(width=WIDTH)
    first = backend.run(run_cg, A, b)
    again = backend.run(run_from, A, b, first.value)
    assert not np.any(again.num_steps)
    assert np.all(again.converged)
    assert relative_error(again.value, first.value) < 10 * backend.eps


def test_a_start_nearby_saves_steps(backend):
    A, b = conditioned(100), rhs()
    exact = solve(A, b).astype(np.float64)
    cold = backend.run(run_cg, A, b)
    warm = backend.run(run_from, A, b, exact + 1e-3 * rhs(seed=8))
    assert warm.converged
    assert warm.num_steps < cold.num_steps
    check_claims(backend.seen(A), backend.seen(b), warm)


def test_a_start_far_away_is_recovered_from(backend):
    A, b = conditioned(10), rhs()
    solution = backend.run(run_from, A, b, 1e3 * rhs(seed=8))
    assert solution.converged
    check_claims(backend.seen(A), backend.seen(b), solution)


@pytest.mark.parametrize("ratio", [1e10, 1e20, 1e30])
def test_a_start_of_quite_another_size_than_the_right_hand_side_is_recovered_from(backend, ratio):
    A, b = conditioned(10), rhs() / ratio
    solution = backend.run(run_from, A, b, rhs(seed=8))
    check_claims(backend.seen(A), backend.seen(b), solution)
    assert solution.reason != Reason.NONFINITE  # no product was infinite
    assert solution.residual_norm <= norm(backend.seen(A) @ rhs(seed=8))


# Vectors are written over


class Own:
    """Gives out what is its own: its argument, or one array at every product."""

    def __init__(self, A=None, like=None):
        self.shape, self.A, self.dtype = (N, N), A, getattr(like, "dtype", np.dtype(float))
        self.given = None if A is None else A @ like

    def __matmul__(self, v):
        if self.A is None:
            return v
        self.given[...] = self.A @ v
        return self.given


@pytest.mark.parametrize("width", [None, WIDTH])
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_arrays_of_the_user_stay_as_they_are(library, width):
    with open_backend(library, "float64") as opened:
        A, M = opened.asarray(conditioned(100)), opened.asarray(np.linalg.inv(conditioned(10)))
        b, x0 = opened.asarray(rhs(width=width)), opened.asarray(rhs(width=width, seed=4))
        kept = [host(x).copy() for x in (A, M, b, x0)]
        expected = li.cg(A, b, damping=0.1, x0=x0, preconditioner=M)
        own = li.cg(Own(A, b), b, damping=0.1, x0=x0, preconditioner=Own(M, b))
        np.testing.assert_array_equal(host(own.value), host(expected.value))
        np.testing.assert_array_equal(host(own.num_steps), host(expected.num_steps))
        for x, before in zip((A, M, b, x0), kept, strict=True):
            np.testing.assert_array_equal(host(x), before)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_an_operator_may_return_its_argument(preconditioned):
    solution = li.cg(Own(), rhs(), damping=1.0, preconditioner=Own() if preconditioned else None)
    assert solution.num_steps == 1
    assert relative_error(solution.value, rhs() / 2) < 1e-15


def test_the_steps_can_be_differentiated_in_torch():
    torch = pytest.importorskip("torch")
    A, b = (torch.tensor(x, requires_grad=True) for x in (conditioned(10), rhs()))
    weights = torch.tensor(rhs(seed=3))
    solution = li.cg(A, b, damping=0.1, rtol=1e-14)
    found = torch.autograd.grad(weights @ solution.value, (A, b))
    B = conditioned(10) + 0.1 * np.eye(N)
    x, adjoint = np.linalg.solve(B, rhs()), np.linalg.solve(B, rhs(seed=3))
    assert relative_error(found[1].numpy(), adjoint) < 1e-6
    symmetric_part = (found[0] + found[0].T).numpy() / 2
    expected = -(np.outer(adjoint, x) + np.outer(x, adjoint)) / 2
    assert relative_error(symmetric_part, expected) < 1e-6


def test_the_steps_pass_through_the_transforms_of_torch():
    torch = pytest.importorskip("torch")
    A, b, weights = (torch.tensor(x) for x in (conditioned(10), rhs(), rhs(seed=3)))
    expected = np.linalg.solve(conditioned(10) + 0.1 * np.eye(N), rhs(seed=3))

    def scalar(b):
        return weights @ li.cg(A, b, damping=0.1, rtol=1e-14).value

    assert relative_error(torch.func.grad(scalar)(b).numpy(), expected) < 1e-6
    along = torch.tensor(rhs(seed=5))
    _, derivative = torch.func.jvp(scalar, (b,), (along,))
    assert derivative.item() == pytest.approx(expected @ rhs(seed=5), rel=1e-6)


# Preconditioners


def test_the_inverse_as_preconditioner_takes_one_step(backend):
    A = conditioned(10)
    solution = backend.run(run_preconditioned, A, rhs(), np.linalg.inv(A))
    assert solution.converged
    assert solution.num_steps == 1
    check_claims(backend.seen(A), backend.seen(rhs()), solution)


def test_a_preconditioner_changes_the_path_and_not_the_answer(backend):
    A = np.diag(np.logspace(0, 3, N)) + 0.1 * np.ones((N, N))
    jacobi = np.diag(1 / np.diagonal(A))
    plain = backend.run(run_cg, A, rhs())
    solution = backend.run(run_preconditioned, A, rhs(), jacobi)
    check_claims(backend.seen(A), backend.seen(rhs()), solution)
    assert solution.converged
    assert solution.num_steps < plain.num_steps / 2
    assert relative_error(solution.value, solve(backend.seen(A), backend.seen(rhs()))) < 1e-3


@pytest.mark.parametrize("scale", [2.0**66, 2.0**-66])
def test_the_scale_of_a_preconditioner_changes_not_one_bit(backend, scale):
    A, M = conditioned(100), symmetric(np.linspace(1, 3, N), seed=9)
    expected = backend.run(run_preconditioned, A, rhs(width=WIDTH), M)
    found = backend.run(run_preconditioned, A, rhs(width=WIDTH), scale * M)
    np.testing.assert_array_equal(found.num_steps, expected.num_steps)
    np.testing.assert_array_equal(found.value, expected.value)


def run_with_nystrom(A, b, damping):
    inverse = li.nystrom(A, indices=indices()).inverse(damping)
    return li.cg(A, b, damping=damping, preconditioner=inverse)


def test_a_nystrom_inverse_serves_as_preconditioner(backend):
    A, b, damping = matrix("exponential"), rhs(width=WIDTH), 0.01
    plain = backend.run(run_damped, A, b, damping)
    solution = backend.run(run_with_nystrom, A, b, damping)
    check_claims(backend.seen(A), backend.seen(b), solution, damping=backend.seen(damping))
    assert np.all(solution.converged)
    assert np.all(solution.num_steps < plain.num_steps)


@pytest.mark.parametrize(
    "eigenvalues",
    [-np.ones(N), np.zeros(N), np.where(np.arange(N) < N // 2, 1.0, -1.0)],
    ids=["negative", "zero", "half"],
)
def test_an_indefinite_preconditioner_is_a_reason(backend, eigenvalues):
    A, b = conditioned(10), rhs()
    solution = backend.run(run_preconditioned, A, b, symmetric(eigenvalues))
    check_claims(backend.seen(A), backend.seen(b), solution)
    assert solution.reason == Reason.INDEFINITE_PRECONDITIONER
    assert not solution.converged


def test_a_singular_preconditioner_never_claims_what_it_cannot_reach(backend):
    A, b = conditioned(10), rhs()
    M = symmetric(np.where(np.arange(N) < N // 2, 1.0, 0.0), seed=9)
    solution = backend.run(run_preconditioned, A, b, M)
    check_claims(backend.seen(A), backend.seen(b), solution)
    assert not solution.converged


# Products that are not finite


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_start_whose_product_is_not_finite_is_a_reason(library, bad):
    A, b = library.asarray(conditioned(10)), library.asarray(rhs())
    solution = host(li.cg(Failing(A, bad, 0), b, x0=b))
    assert solution.reason == Reason.NONFINITE
    assert np.all(np.isfinite(solution.value))


# Tolerances, steps and costs


@pytest.mark.parametrize("name", ["rtol", "atol"])
@pytest.mark.parametrize("tolerance", [1e-1, 1e-3, 1e-6, 1e-9])
def test_a_tolerance_is_met_and_no_more_than_needed_is_done(name, tolerance):
    A, b = conditioned(100), rhs()
    tolerances = {"rtol": 0.0, "atol": 0.0, name: tolerance}
    wanted = tolerance * (norm(b) if name == "rtol" else 1)
    solution = li.cg(A, b, **tolerances)
    assert solution.converged
    assert solution.residual_norm <= wanted
    # One step fewer would not have done.
    shorter = li.cg(A, b, max_steps=int(solution.num_steps) - 1, **tolerances)
    assert shorter.residual_norm > wanted
    assert shorter.reason == Reason.MAX_STEPS


def test_the_looser_of_both_tolerances_counts():
    A, b = conditioned(100), rhs()
    by_rtol = li.cg(A, b, rtol=1e-3, atol=0.0).num_steps
    assert li.cg(A, b, rtol=1e-3, atol=1e-9).num_steps == by_rtol
    assert li.cg(A, b, rtol=1e-12, atol=1e-3 * norm(b)).num_steps == by_rtol


def test_an_absolute_tolerance_above_the_right_hand_side_is_met_by_zero(library):
    for size in (1.0, 1e-20):
        b = library.asarray(size * rhs())
        solution = li.cg(library.asarray(conditioned(10)), b, atol=100.0 * size)
        assert bool(solution.converged)
        assert int(solution.num_steps) == 0
        assert solution.num_products == 0
        assert not np.any(host(solution.value))


@pytest.mark.parametrize("max_steps", [1, 3, 6])
def test_no_more_than_max_steps_are_taken(library, max_steps):
    A, B = conditioned(1e4), rhs(width=WIDTH)
    solution = host(li.cg(library.asarray(A), library.asarray(B), max_steps=max_steps))
    assert np.all(solution.num_steps == max_steps)
    assert np.all(solution.reason == Reason.MAX_STEPS)
    check_claims(library.seen(A), library.seen(B), solution)


def test_ten_n_steps_are_the_default_limit():
    A, b = conditioned(1e14), rhs()
    solution = li.cg(A, b, rtol=0.0)
    assert solution.num_steps <= 10 * N
    assert solution.num_products <= 20 * N


@pytest.mark.parametrize("name", ["half", "low rank"])
def test_num_products_is_right_where_the_solve_fails_too(name):
    A = CountingOperator(matrix(name))
    solution = li.cg(A, rhs(width=WIDTH))
    assert not np.any(solution.converged)
    assert solution.num_products == A.num_products


def test_a_well_conditioned_solve_costs_one_product_more_than_its_steps(library):
    A = CountingOperator(library.asarray(conditioned(10)))
    solution = li.cg(A, library.asarray(rhs()))
    assert A.num_products == solution.num_products == int(solution.num_steps) + 1


# Looks at the stopping test, and the caller's own


@pytest.mark.parametrize("width", [None, WIDTH])
@pytest.mark.parametrize("name", ["conditioned", "half"])
def test_rare_looks_at_the_stopping_test_change_nothing_but_the_products(library, width, name):
    A = library.asarray(conditioned(10) if name == "conditioned" else matrix(name))
    b = library.asarray(rhs(width=width))
    often = li.cg(A, b)
    operator = CountingOperator(A)
    seldom = li.cg(operator, b, check_every=7)
    for field in ("value", "residual_norm", "num_steps", "converged", "reason"):
        np.testing.assert_array_equal(getattr(host(seldom), field), getattr(host(often), field))
    assert seldom.num_products == operator.num_products > often.num_products
    sweeps = len(operator.widths)
    assert sweeps % 7 == 1  # seven at a time, and one to confirm


@pytest.mark.parametrize("width", [None, WIDTH])
def test_a_callback_hears_of_every_step(library, width):
    A, b = library.asarray(conditioned(100)), library.asarray(1e3 * rhs(width=width))
    heard = []
    solution = host(li.cg(A, b, callback=lambda *args: heard.append([host(a) for a in args])))
    totals = [np.sum(num_steps) for num_steps, _ in heard]
    assert np.all(np.diff(totals) > 0)
    assert totals[-1] == np.sum(solution.num_steps)
    assert len(heard) >= np.max(solution.num_steps)
    assert all(np.shape(norms) == solution.residual_norm.shape for _, norms in heard)
    rounding = 100 * library.eps * norm(1e3 * rhs(width=width))  # carried and true residual
    assert np.all(np.abs(heard[-1][1] - solution.residual_norm) < rounding)


def test_a_callback_is_traced_with_the_solve():
    jax = pytest.importorskip("jax")
    heard = []

    def solve_heard(A, b):
        def callback(num_steps, residual_norm):
            jax.debug.callback(lambda steps: heard.append(int(steps)), num_steps)

        return li.cg(A, b, callback=callback)

    A, b = conditioned(10).astype("float32"), rhs().astype("float32")
    solution = jax.jit(solve_heard)(jax.numpy.asarray(A), jax.numpy.asarray(b))
    jax.effects_barrier()
    assert sorted(heard) == list(range(1, int(solution.num_steps) + 1))


# Bad input


def a_system(n=3):
    return np.eye(n), np.ones(n)


def test_a_start_of_another_library_is_refused():
    torch = pytest.importorskip("torch")
    A, b = a_system()
    with pytest.raises(TypeError, match=r"all arrays must come from one library: `b` is .*`x0` is"):
        li.cg(A, b, x0=torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("x0", [np.ones(2), np.ones((3, 1)), np.ones(3, dtype="float32")])
def test_a_start_that_does_not_match_is_refused(x0):
    A, b = a_system()
    with pytest.raises(ValueError, match="`x0` must match `b` of dtype float64 and shape"):
        li.cg(A, b, x0=x0)


def test_a_start_that_is_not_finite_is_refused():
    A, b = a_system()
    with pytest.raises(ValueError, match="`x0` must be finite"):
        li.cg(A, b, x0=np.array([1.0, np.nan, 1.0]))


BAD = {
    "rtol": ({"rtol": -1.0}, ValueError, "`rtol` must be finite and >= 0"),
    "atol": ({"atol": np.nan}, ValueError, "`atol` must be finite and >= 0"),
    "no look": ({"check_every": 0}, ValueError, "`check_every` must be"),
    "half a look": ({"check_every": 1.5}, TypeError, "`check_every` must be"),
    "no step": ({"max_steps": 0}, ValueError, "`max_steps` must be"),
    "no whole step": ({"max_steps": 2.0}, TypeError, "`max_steps` must be"),
    "preconditioner of another shape": (
        {"preconditioner": np.eye(2)},
        ValueError,
        r"`preconditioner` must have shape \(3, 3\).*\(2, 2\)",
    ),
    "preconditioner a function": (
        {"preconditioner": lambda r: r},
        TypeError,
        r"`preconditioner` must .*FunctionOperator",
    ),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD.values(), ids=BAD)
def test_an_argument_out_of_range_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        li.cg(*a_system(), **arguments)


def test_a_preconditioner_of_another_dtype_or_library_is_refused():
    torch = pytest.importorskip("torch")
    A, b = a_system()
    for other in (np.eye(3, dtype="float32"), torch.eye(3, dtype=torch.float64)):
        with pytest.raises(TypeError, match=r"one library|nothing is promoted silently"):
            li.cg(A, b, preconditioner=other)


def test_reasons_are_told_in_words():
    A, b = conditioned(10), rhs()
    assert li.cg(A, b).message == "converged"
    assert li.cg(A, b, max_steps=1).message == "max_steps"
    assert li.cg(-A, b).message == "negative_curvature"
    assert li.cg(A, b, preconditioner=-np.eye(N)).message == "indefinite_preconditioner"


def test_a_compiled_solve_that_fails_goes_back_to_its_best_iterate(jax_backend):
    import jax

    A, b = map(jax_backend.asarray, (matrix("slightly"), rhs()))
    eager = li.cg(matrix("slightly"), rhs())
    compiled = jax.jit(li.cg)(A, b)
    assert eager.reason == int(compiled.reason) == Reason.NEGATIVE_CURVATURE
    assert int(compiled.num_steps) == int(eager.num_steps)
    assert relative_error(host(compiled.value), eager.value) < jax_backend.eps**0.5
    assert int(compiled.num_products) <= 2 * int(eager.num_products)
