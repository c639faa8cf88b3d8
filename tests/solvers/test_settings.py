"""The settings of the solvers, and the inverses that they prepare."""

from __future__ import annotations

import dataclasses
import functools
import pickle

import numpy as np
import pytest

import lowrank_inverse as li
from lowrank_inverse import Reason
from tests.conftest import host
from tests.oracles import damped_solve, norm, nystrom, relative_error, residual_norm
from tests.problems import (
    INDEFINITE,
    PSD,
    RANK,
    WIDTH,
    CountingOperator,
    N,
    conditioned,
    indices,
    largest,
    matrix,
    rhs,
    symmetric,
)

K = tuple(indices().tolist())
DAMPING = 0.0625
EVERY = [
    li.Nystrom(damping=DAMPING, indices=K),
    li.Nystrom(damping=DAMPING, indices=K, chunk_size=3),
    li.Nystrom(damping=DAMPING, indices=K, memory="chunked"),
    li.Nystrom(damping=DAMPING, indices=K, memory="chunked", chunk_size=3),
    li.Nystrom(damping=DAMPING, indices=K, memory="streamed"),
    li.Nystrom(damping=DAMPING, indices=K, memory="streamed", chunk_size=3),
    li.Nystrom(damping=DAMPING, indices=K, refine=1),
    li.Nystrom(damping=DAMPING, indices=K, refine=4),
    li.Nystrom(damping=DAMPING, indices=K, refine=2, memory="chunked", chunk_size=3),
    li.Nystrom(damping=DAMPING, indices=K, refine=2, memory="streamed"),
    li.Nystrom(damping=DAMPING, indices=K, refine=30, memory="streamed"),
    li.NystromCG(damping=DAMPING, indices=K),
    li.NystromCG(damping=DAMPING, indices=K, rtol=1e-9, max_steps=5),
    li.CG(damping=DAMPING),
    li.CG(damping=DAMPING, rtol=1e-9, max_steps=5),
    li.Neumann(damping=DAMPING),
    li.Neumann(damping=DAMPING, num_terms=4, step_size=0.5),
    li.Exact(damping=DAMPING),
    li.Identity(),
    li.Identity(scale=0.5),
]


def name_of(solver):
    changed = [
        f"{field.name}={getattr(solver, field.name)}"
        for field in dataclasses.fields(solver)
        if field.name not in ("indices", "damping") and getattr(solver, field.name) != field.default
    ]
    return "-".join([type(solver).__name__, *changed])


every_solver = pytest.mark.parametrize("solver", EVERY, ids=name_of)


@functools.cache
def solving(solver):
    return lambda A, b: solver.prepare(A).solve(b)


# Each setting against its dense meaning


@pytest.mark.parametrize("memory", ["stored", "chunked", "streamed"])
def test_nystrom_solves_with_the_damped_approximation(backend, memory):
    solver = li.Nystrom(damping=DAMPING, indices=K, memory=memory, chunk_size=3)
    A, b = backend.seen(matrix("linear")), backend.seen(rhs(width=WIDTH))
    solution = backend.run(solving(solver), matrix("linear"), rhs(width=WIDTH))
    expected = damped_solve(nystrom(A, K), DAMPING, b)
    assert relative_error(solution.value, expected) < 1e3 * backend.eps
    assert relative_error(solution.residual_norm, residual_norm(A, DAMPING, expected, b)) < 1e-4
    assert np.all(solution.reason == Reason.DIRECT)
    assert not np.any(solution.converged)
    assert not np.any(solution.num_steps)


def test_nystrom_says_where_its_answer_meets_the_tolerance(library):
    A, b = matrix("linear"), rhs(width=WIDTH)
    solution = library.run(solving(li.Nystrom(rank=N, damping=DAMPING)), A, b)
    true = residual_norm(library.seen(A), DAMPING, solution.value, library.seen(b))
    assert np.all(true < (1e-4 if library.is_narrow else 1e-5) * norm(b))
    assert np.all(solution.converged) or library.is_narrow
    np.testing.assert_array_equal(
        solution.reason, np.where(solution.converged, Reason.CONVERGED, Reason.DIRECT)
    )


@pytest.mark.parametrize("name", PSD)
def test_exact_is_the_dense_inverse(backend, name):
    damping = float(backend.seen(0.01 * largest(name)))
    A, b = backend.seen(matrix(name)), backend.seen(rhs(width=WIDTH))
    solution = backend.run(exactly, matrix(name), rhs(width=WIDTH), damping)
    assert relative_error(solution.value, damped_solve(A, damping, b)) < 1e3 * backend.eps
    assert np.all(solution.converged) or backend.is_narrow


def exactly(A, b, damping):
    return li.Exact(damping=damping).prepare(A).solve(b)


@pytest.mark.parametrize("name", INDEFINITE)
def test_exact_inverts_indefinite_matrices_and_says_so(library, name):
    inverse = li.Exact().prepare(library.asarray(matrix(name)))
    solution = host(inverse.solve(library.asarray(rhs())))
    expected = damped_solve(library.seen(matrix(name)), 0, library.seen(rhs()))
    assert relative_error(solution.value, expected) < 1e4 * library.eps
    assert bool(inverse.negative_curvature)
    assert inverse.rank == N


def test_exact_is_the_pseudo_inverse_of_a_singular_matrix(library):
    A = matrix("low rank")
    inverse = li.Exact().prepare(library.asarray(A))
    found = host(inverse @ library.asarray(rhs()))
    expected = np.linalg.pinv(A, rcond=1e-5, hermitian=True) @ rhs()
    assert relative_error(found, expected) < 1e3 * library.eps
    assert inverse.rank == N // 3
    assert not inverse.negative_curvature


@pytest.mark.parametrize("n", [24, 200])
@pytest.mark.parametrize("share", [1e-4, 1e-5, 3e-6])
def test_exact_honours_a_small_positive_damping_in_float32(n, share):
    A = symmetric(np.where(np.arange(n) < 3, 1.0, 0.0)).astype("float32")
    b = rhs(n).astype("float32")
    found = li.Exact(damping=share).prepare(A) @ b
    # The rounding of A in float32 moves its eigenvalues by about 1e-7.
    exact = np.linalg.solve(A.astype(np.float64) + share * np.eye(n), b)
    assert relative_error(found, exact) < 10 * np.finfo("float32").eps / share


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_identity_is_a_multiple_of_the_right_hand_side(backend, scale):
    A, b = backend.seen(matrix("linear")), backend.seen(rhs(width=WIDTH))
    solution = backend.run(solving(li.Identity(scale=scale)), matrix("linear"), rhs(width=WIDTH))
    np.testing.assert_array_equal(solution.value, scale * b)
    assert relative_error(solution.residual_norm, norm(b - scale * A @ b)) < 1e-5


def test_cg_and_neumann_settings_pass_every_parameter_on():
    A, b = matrix("linear"), rhs(width=WIDTH)
    for solver, expected in (
        (
            li.CG(damping=0.1, rtol=1e-3, atol=1e-2, max_steps=7),
            li.cg(A, b, damping=0.1, rtol=1e-3, atol=1e-2, max_steps=7),
        ),
        (li.CG(damping=0.1, rtol=1e-3), li.cg(A, b, damping=0.1, rtol=1e-3)),
        (li.CG(atol=0.5), li.cg(A, b, atol=0.5)),
        (li.CG(max_steps=2), li.cg(A, b, max_steps=2)),
        (
            li.Neumann(damping=0.1, num_terms=7, step_size=0.3),
            li.neumann(A, b, damping=0.1, num_terms=7, step_size=0.3),
        ),
        (li.Neumann(), li.neumann(A, b)),
    ):
        found = solver.prepare(A).solve(b)
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["linear", "polynomial", "network", "low rank"])
def test_nystrom_cg_gives_the_dense_solution(backend, name):
    damping = 0.01 * largest(name)
    solution = backend.run(by_nystrom_cg, matrix(name), rhs(width=WIDTH), damping)
    A, b = backend.seen(matrix(name)), backend.seen(rhs(width=WIDTH))
    assert np.all(solution.converged)
    damping = float(backend.seen(damping))
    assert np.all(residual_norm(A, damping, solution.value, b) <= 1.1e-5 * norm(b))
    assert relative_error(solution.value, damped_solve(A, damping, b)) < 1e-3


def by_nystrom_cg(A, b, damping):
    return li.NystromCG(damping=damping, indices=K).prepare(A).solve(b)


@pytest.mark.parametrize("name", ["exponential", "network", "geometric"])
def test_nystrom_cg_takes_fewer_steps_than_cg_and_fewer_with_rank(name):
    A, b, damping = matrix(name), rhs(), 1e-4 * largest(name)
    steps = [int(li.CG(damping=damping).prepare(A).solve(b).num_steps)]
    for rank in (4, 12, N):
        solution = li.NystromCG(rank=rank, damping=damping).prepare(A, rng=0).solve(b)
        assert solution.converged
        steps.append(int(solution.num_steps))
    assert steps[1] <= steps[0]
    assert steps[2] < steps[0]
    assert steps[3] <= 3


def test_a_matrix_of_low_rank_takes_nystrom_cg_two_steps_from_enough_columns():
    A = matrix("low rank")
    solution = li.NystromCG(rank=N // 2, damping=1e-3, rtol=1e-8).prepare(A, rng=0).solve(rhs())
    assert solution.converged
    assert solution.num_steps <= 2


def test_nystrom_cg_solves_without_damping():
    A = conditioned(1e4)
    solution = li.NystromCG(rank=RANK).prepare(A, rng=0).solve(rhs())
    assert solution.converged
    assert relative_error(solution.value, damped_solve(A, 0, rhs())) < 1e-2


@pytest.mark.parametrize("seed", range(5))
def test_nystrom_cg_on_a_slightly_indefinite_matrix_never_lies(seed):
    A = matrix("slightly", seed=seed)
    for damping in (0.0, 0.05):
        inverse = li.NystromCG(rank=RANK, damping=damping).prepare(A, rng=seed)
        solution = inverse.solve(rhs())
        true = residual_norm(A, damping, solution.value, rhs())
        assert solution.residual_norm == pytest.approx(float(true), rel=1e-6)
        assert bool(solution.converged) == (true <= 1e-5 * norm(rhs()))
        assert bool(solution.converged) == (damping > 0)


# Refinement


def test_refinement_is_preconditioned_cg_from_zero():
    A, b = matrix("linear"), rhs(width=WIDTH)
    inverse = li.nystrom(A, indices=K).inverse(DAMPING)
    for refine in (1, 2, 5):
        solver = li.Nystrom(damping=DAMPING, indices=K, refine=refine)
        expected = li.cg(
            A, b, damping=DAMPING, preconditioner=inverse, block_size=1, max_steps=refine + 1
        )
        np.testing.assert_array_equal(solver.prepare(A).solve(b).value, expected.value)


@pytest.mark.parametrize("name", ["linear", "polynomial", "exponential"])
def test_the_error_falls_with_every_step_of_refinement(name):
    A, b, damping = matrix(name), rhs(), 1e-2
    exact = damped_solve(A, damping, b)

    def energy(x):
        e = (x - exact).astype(np.float64)
        return np.sqrt(e @ A @ e + damping * e @ e)

    errors = []
    for refine in range(6):
        solver = li.Nystrom(damping=damping, indices=K, refine=refine)
        errors.append(energy(solver.prepare(A).solve(b).value))
    assert np.all(np.diff(errors) < 0)
    assert errors[-1] < 0.2 * errors[0]


def test_refinement_stops_where_the_tolerance_is_met():
    solver = li.Nystrom(rank=N, damping=DAMPING, refine=20)
    solution = solver.prepare(matrix("linear"), rng=0).solve(rhs())
    assert solution.converged
    assert solution.num_steps <= 2


@pytest.mark.parametrize("memory", ["stored", "chunked", "streamed"])
def test_a_refined_inverse_applies_what_it_solves(memory):
    solver = li.Nystrom(damping=DAMPING, indices=K, refine=2, memory=memory)
    inverse = solver.prepare(matrix("linear"))
    np.testing.assert_array_equal(inverse @ rhs(), inverse.solve(rhs()).value)


# Costs


@every_solver
@pytest.mark.parametrize("width", [None, WIDTH])
@pytest.mark.parametrize("name", ["linear", "low rank"])
def test_num_products_is_what_the_operator_counted(solver, width, name):
    A = CountingOperator(matrix(name))
    inverse = solver.prepare(A)
    assert inverse.num_products == A.num_products
    solution = inverse.solve(rhs(width=width))
    assert inverse.num_products + solution.num_products == A.num_products
    again = inverse.solve(rhs(width=width))
    assert inverse.num_products + 2 * again.num_products == A.num_products


@every_solver
def test_num_products_of_a_zero_right_hand_side_is_what_the_operator_counted(solver):
    A = CountingOperator(matrix("linear"))
    inverse = solver.prepare(A)
    solution = inverse.solve(np.zeros(N))
    assert inverse.num_products + solution.num_products == A.num_products
    assert not np.any(solution.value)
    assert solution.converged


def test_a_chunk_size_bounds_the_columns_computed_at_a_time():
    for memory, default in (("stored", RANK), ("chunked", 1), ("streamed", 1)):
        for chunk_size, width in ((None, default), (3, 3)):
            A = CountingOperator(matrix("linear"))
            li.Nystrom(indices=K, memory=memory, chunk_size=chunk_size, damping=1e-2).prepare(A)
            assert max(A.widths) == width


# The prepared inverse


@every_solver
def test_the_inverse_is_an_operator_and_a_preconditioner(solver, library):
    A, b = library.asarray(matrix("linear")), library.asarray(rhs())
    inverse = solver.prepare(A)
    assert tuple(inverse.shape) == (N, N)
    found = inverse @ b
    assert type(found) is type(b)
    assert found.dtype == b.dtype == inverse.dtype
    np.testing.assert_array_equal(host(found), host(inverse.solve(b).value))


def test_every_fixed_inverse_preconditions_cg():
    A, b = matrix("exponential"), rhs()
    plain = li.cg(A, b, damping=DAMPING)
    for solver in (EVERY[0], EVERY[2], EVERY[4], li.Exact(damping=DAMPING), li.Identity()):
        solution = li.cg(A, b, damping=DAMPING, preconditioner=solver.prepare(A))
        assert solution.converged
        assert solution.num_steps <= plain.num_steps


@every_solver
def test_the_inverse_says_its_rank_and_the_curvature_it_met(solver):
    for name, negative in (("linear", False), ("half", True)):
        inverse = solver.prepare(matrix(name))
        if type(solver) in (li.Nystrom, li.NystromCG, li.Exact):
            assert bool(inverse.negative_curvature) is negative
            assert 0 < inverse.rank <= N
        else:
            assert inverse.negative_curvature is None
            assert inverse.rank is None


@pytest.mark.parametrize(
    ("solver", "printed"),
    [
        (li.CG(), "num_products=0)"),
        (li.Identity(), "num_products=0)"),
        (li.Nystrom(rank=3, damping=0.1), "rank=3, num_products=3, negative_curvature=False)"),
        (li.NystromCG(rank=3, damping=0.1), "rank=3, num_products=3, negative_curvature=False)"),
        (li.Exact(damping=0.1), f"rank={N}, num_products={N}, negative_curvature=False)"),
    ],
)
def test_the_inverse_prints_its_size_rank_and_cost(solver, printed):
    inverse = solver.prepare(matrix("linear"))
    assert repr(inverse) == f"PreparedInverse(n={N}, dtype=float64, {printed}"


def test_nystrom_inverses_are_offered_to_certify():
    for solver in EVERY:
        offered = solver.prepare(matrix("linear")).nystrom_inverse
        assert (offered is not None) == isinstance(solver, (li.Nystrom, li.NystromCG))
    assert li.NystromCG(indices=K).prepare(matrix("linear")).nystrom_inverse is None


def test_a_negative_quadratic_form_of_a_direct_answer_is_reported():
    A = -np.eye(3)
    solution = li.Identity().prepare(A).solve(np.ones(3))
    assert solution.reason == Reason.NEGATIVE_CURVATURE


def test_seeds_choose_the_columns():
    A, b = matrix("exponential"), rhs()
    for solver in (li.Nystrom(rank=4, damping=1e-2), li.NystromCG(rank=4, damping=1e-3)):
        first, again, other = (solver.prepare(A, rng=seed) @ b for seed in (0, 0, 1))
        np.testing.assert_array_equal(first, again)
        assert relative_error(other, first) > 1e-12
        generator = np.random.default_rng(0)
        np.testing.assert_array_equal(solver.prepare(A, rng=generator) @ b, first)


@pytest.mark.parametrize("sampling", ["uniform", "diagonal", "diagonal_squared"])
def test_the_sampling_is_passed_on(sampling):
    A = matrix("exponential")
    found = li.Nystrom(rank=4, sampling=sampling, damping=1e-2).prepare(A, rng=3) @ rhs()
    approx = li.nystrom(A, 4, sampling=sampling, rng=3)
    np.testing.assert_array_equal(found, approx.inverse(1e-2) @ rhs())


# Settings


def test_defaults_are_those_documented():
    nystrom = (20, 0.0, "auto", "stored", None, 0, None, None, None)
    assert dataclasses.astuple(li.Nystrom()) == nystrom
    nystrom_cg = (20, 0.0, "auto", 1e-5, 0.0, None, None, 1, None, None, None, 32, 20)
    assert dataclasses.astuple(li.NystromCG()) == nystrom_cg
    assert dataclasses.astuple(li.CG()) == (0.0, 1e-5, 0.0, None, 1, None, None, 32, 20)
    assert dataclasses.astuple(li.Neumann()) == (0.0, 1e-5, 10, None)
    assert dataclasses.astuple(li.Exact()) == (0.0,)
    assert dataclasses.astuple(li.Identity()) == (1.0,)


@every_solver
def test_settings_are_frozen_hashable_comparable_and_survive_pickling(solver):
    with pytest.raises(dataclasses.FrozenInstanceError):
        solver.damping = 1.0
    twin = dataclasses.replace(solver)
    assert twin == solver and twin is not solver
    assert hash(twin) == hash(solver)
    assert len({solver, twin}) == 1
    assert pickle.loads(pickle.dumps(solver)) == solver
    assert repr(solver).startswith(type(solver).__name__ + "(")


def test_indices_given_as_a_list_or_an_array_make_settings_hashable_too(eager):
    expected = li.Nystrom(indices=(0, 1, 2), damping=1e-2)
    for given in ([0, 1, 2], range(3), np.arange(3), eager.asarray(np.arange(3))):
        assert li.Nystrom(indices=given, damping=1e-2) == expected
        assert hash(li.Nystrom(indices=given, damping=1e-2)) == hash(expected)


# Bad input


BAD_SETTINGS = [
    (li.Nystrom, {"rank": 0}, ValueError, "`rank` must be at least 1; got 0"),
    (li.Nystrom, {"rank": -1}, ValueError, "`rank` must be at least 1"),
    (li.Nystrom, {"rank": 2.0}, TypeError, "`rank` must be a whole number"),
    (li.Nystrom, {"damping": -1.0}, ValueError, "`damping` must be finite and >= 0"),
    (li.Nystrom, {"damping": np.nan}, ValueError, "`damping` must be finite and >= 0"),
    (li.Nystrom, {"damping": "1"}, TypeError, "`damping` must be a real number"),
    (li.Nystrom, {"sampling": "best"}, ValueError, "`sampling` must be one of"),
    (li.Nystrom, {"memory": "disk"}, ValueError, "`memory` must be 'stored'"),
    (li.Nystrom, {"chunk_size": 0}, ValueError, "`chunk_size` must be at least 1"),
    (li.Nystrom, {"refine": -1}, ValueError, "`refine` must be"),
    (li.Nystrom, {"refine": 0.5}, TypeError, "`refine` must be a whole number"),
    (li.Nystrom, {"indices": [0.5, 2]}, TypeError, "`indices` must be .*integers"),
    (li.Nystrom, {"indices": "12"}, TypeError, "`indices` must be .*integers"),
    (li.NystromCG, {"rank": 0}, ValueError, "`rank` must be at least 1"),
    (li.NystromCG, {"damping": -1.0}, ValueError, "`damping` must be finite and >= 0"),
    (li.NystromCG, {"rtol": -1.0}, ValueError, "`rtol` must be finite and >= 0"),
    (li.NystromCG, {"max_steps": 0}, ValueError, "`max_steps` must be at least 1"),
    (li.NystromCG, {"sampling": "best"}, ValueError, "`sampling` must be one of"),
    (li.NystromCG, {"indices": [0.5]}, TypeError, "`indices` must be .*integers"),
    (li.CG, {"damping": -1.0}, ValueError, "`damping` must be finite and >= 0"),
    (li.CG, {"rtol": np.inf}, ValueError, "`rtol` must be finite and >= 0"),
    (li.CG, {"atol": -1.0}, ValueError, "`atol` must be finite and >= 0"),
    (li.CG, {"max_steps": 1.5}, TypeError, "`max_steps` must be a whole number"),
    (li.Neumann, {"damping": -1.0}, ValueError, "`damping` must be finite and >= 0"),
    (li.Neumann, {"num_terms": 0}, ValueError, "`num_terms` must be at least 1"),
    (li.Neumann, {"step_size": 0.0}, ValueError, "`step_size` must be finite and > 0"),
    (li.Exact, {"damping": -1.0}, ValueError, "`damping` must be finite and >= 0"),
    (li.Identity, {"scale": 0.0}, ValueError, "`scale` must be finite and > 0"),
    (li.Identity, {"scale": None}, TypeError, "`scale` must be a real number"),
]


@pytest.mark.parametrize(("make", "options", "error", "message"), BAD_SETTINGS)
def test_settings_out_of_range_are_refused_when_they_are_made(make, options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


@pytest.mark.parametrize("kind", [li.Nystrom, li.NystromCG])
def test_indices_beyond_the_matrix_are_refused_when_it_is_known(kind):
    assert kind(rank=4, damping=0.1).prepare(np.eye(3)).rank == 3  # a rank beyond n is n
    with pytest.raises(ValueError, match=r"`indices` must lie in 0 … 2"):
        kind(indices=[3], damping=0.1).prepare(np.eye(3))
    with pytest.raises(ValueError, match="`indices` must be distinct"):
        kind(indices=[1, 1], damping=0.1).prepare(np.eye(3))


@pytest.mark.parametrize("memory", ["stored", "chunked", "streamed"])
def test_nystrom_refuses_to_invert_without_damping(memory):
    with pytest.raises(ValueError, match=r"`damping` must be finite and > 0; .*low-rank"):
        li.Nystrom(damping=0.0, memory=memory).prepare(matrix("linear"))


@every_solver
@pytest.mark.parametrize(
    ("b", "error", "message"),
    [
        (np.ones(N + 1), ValueError, f"must have {N} rows"),
        (np.full(N, np.nan), ValueError, "`b` must be finite"),
        (np.ones(N, dtype="float32"), TypeError, "nothing is promoted silently"),
        (np.ones(N, dtype=int), TypeError, "must have a real floating dtype"),
        ([1.0] * N, TypeError, "must be an array"),
    ],
    ids=["rows", "nan", "dtype", "integers", "list"],
)
def test_a_right_hand_side_that_does_not_fit_is_refused(solver, b, error, message):
    with pytest.raises(error, match=message):
        solver.prepare(matrix("linear")).solve(b)


@every_solver
def test_a_right_hand_side_of_another_library_is_refused(solver):
    torch = pytest.importorskip("torch")
    inverse = solver.prepare(matrix("linear"))
    for apply in (inverse.solve, inverse.__matmul__):
        with pytest.raises(TypeError, match=r"one library|nothing is promoted silently"):
            apply(torch.ones(N, dtype=torch.float64))


def test_exact_refuses_columns_that_are_not_finite():
    A = np.eye(3)
    A[1, 1] = np.nan
    with pytest.raises(ValueError, match="`columns of A` must be finite"):
        li.Exact().prepare(A)
