"""What is kept between outer steps: the start, the columns, and when they are made anew."""

from __future__ import annotations

import numpy as np
import pytest

import lowrank_inverse as li
from lowrank_inverse.bilevel.column_reuse import ReusedColumns
from lowrank_inverse.bilevel.implicit_gradient import implicit_gradient
from lowrank_inverse.bilevel.info import hypergradient_info
from lowrank_inverse.bilevel.state import next_state, start
from tests.conftest import host
from tests.oracles import damped_solve, relative_error
from tests.problems import CountingOperator, N, indices, matrix, rhs, symmetric

K = tuple(indices(rank=10).tolist())
SOLVER = li.NystromCG(damping=1e-3, rtol=1e-8, indices=K)
G = rhs(seed=31)
RIDGES = {"no ridge": None, "one number": 0.02, "one for each": np.linspace(0.01, 0.5, N)}

each_ridge = pytest.mark.parametrize("ridge", RIDGES.values(), ids=RIDGES)


def drifting(step, speed=1e-4):
    """Return a matrix with a falling spectrum whose eigenvectors turn from step to step."""
    A = symmetric(np.logspace(1, -3, N))
    turn = np.random.default_rng(5).standard_normal((N, N))
    Q = np.linalg.qr(np.eye(N) + speed * step * (turn - turn.T))[0]
    return Q @ A @ Q.T


def outer_step(A, state=None, *, solver=SOLVER, b=G, **options):
    return implicit_gradient(
        A, b, lambda q: [q], [None], solver=solver, rng=0, state=state, **options
    )


def dense(A, damping, ridge, b=G):
    return damped_solve(
        A + np.diag(np.broadcast_to(0.0 if ridge is None else ridge, N)), damping, b
    )


@each_ridge
def test_kept_columns_cost_nothing_and_the_answer_is_that_of_the_dense_inverse(ridge):
    state = None
    for step in range(6):
        A = CountingOperator(drifting(step))
        result = outer_step(A, state, ridge=ridge)
        state = result.state
        assert result.solution.num_products == A.num_products
        assert relative_error(result.solution.value, dense(A.A, 1e-3, ridge)) < 1e-4
        info = hypergradient_info(result, G, np.zeros(1), ())
        assert bool(info.refreshed) == (step == 0)
        assert A.num_products == 2 + int(result.solution.num_steps) + len(K) * (step == 0) - (
            step == 0
        )


@each_ridge
def test_the_columns_kept_are_those_of_the_bare_hessian(ridge):
    first = outer_step(drifting(0), ridge=ridge)
    assert relative_error(first.state.columns, drifting(0)[:, K]) < 1e-13
    second = outer_step(drifting(1), first.state, ridge=ridge)
    assert np.array_equal(second.state.columns, first.state.columns)
    assert np.array_equal(second.state.indices, K)


def test_a_new_damping_or_ridge_is_taken_into_account_at_once():
    A = drifting(0)
    state = outer_step(A, ridge=RIDGES["one for each"]).state
    state = state._replace(value=0 * G)  # only the columns
    for ridge in (np.linspace(2.0, 0.01, N), 1e-4, None):
        kept = outer_step(A, state, ridge=ridge)
        fresh = outer_step(A, ridge=ridge)
        assert not bool(kept.refreshed)
        assert abs(int(kept.solution.num_steps) - int(fresh.solution.num_steps)) <= 1


def test_kept_columns_beat_a_warm_start_alone_and_that_beats_a_cold_one_at_equal_products():
    errors = {"cold": [], "warm": [], "kept": []}
    solvers = {
        "cold": li.CG(damping=0.05, max_steps=7, rtol=1e-12),
        "warm": li.CG(damping=0.05, max_steps=6, rtol=1e-12),
        "kept": li.NystromCG(damping=0.05, max_steps=6, rtol=1e-12, indices=K),
    }
    states = dict.fromkeys(solvers)
    for step in range(12):
        A = drifting(step)
        for name, solver in solvers.items():
            result = outer_step(A, states[name], solver=solver)
            states[name] = None if name == "cold" else result.state
            if step > 0:
                errors[name].append(relative_error(result.solution.value, dense(A, 0.05, None)))
                assert result.solution.num_products == 8
    cold, warm, kept = (np.mean(errors[name]) for name in ("cold", "warm", "kept"))
    assert warm < cold / 2
    assert kept < warm / 5
    assert kept < cold / 10


def test_losses_add_up_as_the_columns_age_and_fresh_ones_are_computed_once_they_pay():
    solver = li.NystromCG(damping=1e-3, max_steps=5, rtol=1e-12, indices=K)
    state, refreshed, worst = None, [], 0.0
    for step in range(40):
        before = 0.0 if state is None else float(state.excess)
        result = outer_step(drifting(step, 0.02), state, solver=solver)
        state = result.state
        refreshed.append(bool(result.refreshed))
        assert refreshed[-1] == (step == 0 or before >= len(K))
        assert (float(state.excess) == 0) if refreshed[-1] else (float(state.excess) >= 0)
        worst = max(worst, float(state.excess))
    assert 2 <= sum(refreshed) <= 20
    assert worst < len(K) + 5  # a step cannot lose more than it took


def test_columns_of_a_fixed_matrix_are_never_made_anew():
    state = None
    for step in range(30):
        b = G + 0.3 * rhs(seed=100 + step)
        result = outer_step(drifting(0), state, b=b)
        state = result.state
        assert bool(result.refreshed) == (step == 0)


def solution(value, residual_norm, num_steps, reason=li.Reason.MAX_STEPS):
    value, steps = np.asarray(value), np.asarray(num_steps, dtype=np.int32)
    return li.Solution(
        value,
        np.asarray(residual_norm),
        steps,
        9,
        np.asarray(False),
        0 * steps + int(reason),
        initial_residual_norm=np.asarray(1.0),
    )


def test_the_losses_are_the_steps_beyond_what_fresh_columns_would_have_taken():
    fresh = ReusedColumns(np.eye(4)[:, :2], np.array([0, 1]), 2, True)
    kept = fresh._replace(refreshed=False, num_products=0)
    state = None
    # The rate is that of the slowest of the first three solves: 1e-3 in 3 steps.
    for factor, residual_norm, num_steps in ((fresh, 1e-8, 4), (kept, 1e-3, 3), (kept, 1e-6, 3)):
        state = next_state(state, solution(np.ones(4), residual_norm, num_steps), factor)
        assert float(state.excess) == 0
    assert float(state.rate) == pytest.approx(np.log(10.0))
    slower = next_state(state, solution(np.ones(4), 1e-3, 5), kept)
    assert float(slower.rate) == float(state.rate)
    assert float(slower.excess) == pytest.approx(5 - 3)
    worse = next_state(slower, solution(np.ones(4), 10.0, 5), kept)  # a residual that rose
    assert float(worse.excess) == pytest.approx(2 + 5)
    lucky = next_state(slower, solution(np.ones(4), 1e-4, 3), kept)
    assert float(lucky.excess) == pytest.approx(2 - 1)
    assert float(next_state(state, solution(np.ones(4), 1e-9, 2), kept).excess) == 0
    idle = next_state(slower, solution(np.ones(4), 1.0, 0), kept)
    assert float(idle.excess) == float(slower.excess)


def test_columns_that_are_of_no_more_use_at_once_are_not_taken_for_slow_ones():
    fresh = ReusedColumns(np.eye(4)[:, :2], np.array([0, 1]), 2, True)
    kept = fresh._replace(refreshed=False, num_products=0)
    state, factor = None, fresh
    for residual_norm in (1e-4, 1.0, 1.0, 1.0):
        state = next_state(state, solution(np.ones(4), residual_norm, 4), factor)
        factor = kept
    assert float(state.rate) == pytest.approx(np.log(10.0) / 4)
    assert float(state.excess) == 4


@pytest.mark.parametrize("reason", [li.Reason.NONFINITE, li.Reason.INDEFINITE_PRECONDITIONER])
def test_columns_that_break_a_solve_are_made_anew(reason):
    factor = ReusedColumns(np.eye(4)[:, :2], np.array([0, 1]), 0, False)
    state = next_state(None, solution(np.ones(4), 0.5, 1, reason), factor)
    assert float(state.excess) == 2


def test_a_solution_that_is_not_finite_is_no_start():
    state = next_state(None, solution([1.0, np.nan], np.nan, 1, li.Reason.NONFINITE))
    assert np.array_equal(state.value, np.zeros(2))
    assert state.columns is None


def test_the_first_rate_is_taken_from_the_first_solve_that_takes_a_step():
    A = drifting(0)
    exact = li.HypergradientState(dense(A, 1e-3, None).astype(np.float64))
    idle = outer_step(A, exact).state
    assert float(idle.rate) == 0
    state = outer_step(A, idle, b=rhs(seed=77)).state
    assert float(state.rate) > 0
    assert float(state.excess) == 0


def test_columns_of_another_rank_are_not_kept():
    state = outer_step(drifting(0)).state
    other = li.NystromCG(damping=1e-3, indices=K[:4])
    result = outer_step(drifting(0), state, solver=other)
    assert bool(result.refreshed)
    assert result.state.columns.shape == (N, 4)


@pytest.mark.parametrize("ridge", [None, RIDGES["one for each"]], ids=["no ridge", "for each"])
@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 10, "sampling": "diagonal"},
        {"rank": 10, "sampling": "rpcholesky"},
        {"rank": "auto", "sampling": "greedy"},
    ],
    ids=["diagonal", "rpcholesky", "auto"],
)
def test_columns_are_kept_however_they_were_chosen(settings, ridge):
    solver = li.NystromCG(damping=0.05, rtol=1e-8, **settings)
    first = outer_step(drifting(0), solver=solver, ridge=ridge)
    second = outer_step(drifting(1), first.state, solver=solver, ridge=ridge)
    assert not second.refreshed
    assert second.inverse.num_products == 0
    assert np.array_equal(second.state.indices, first.state.indices)
    assert relative_error(second.solution.value, dense(drifting(1), 0.05, ridge)) < 1e-6


@pytest.mark.parametrize("ridge", [None, RIDGES["one for each"]], ids=["no ridge", "for each"])
def test_a_gaussian_sketch_is_made_anew_at_each_call(ridge):
    solver = li.NystromCG(rank=10, damping=0.05, rtol=1e-8, sampling="gaussian")
    state = None
    for step in range(2):
        result = outer_step(drifting(step), state, solver=solver, ridge=ridge)
        state = result.state
        assert result.refreshed
        assert state.columns is None
    assert relative_error(result.solution.value, dense(drifting(1), 0.05, ridge)) < 1e-6


def test_the_state_may_go_from_one_solver_to_another():
    first = outer_step(drifting(0)).state
    cg = outer_step(drifting(0), first, solver=li.CG(damping=1e-3, rtol=1e-8))
    assert int(cg.solution.num_steps) <= 2
    assert cg.state.columns is None
    back = outer_step(drifting(0), cg.state)
    assert int(back.solution.num_steps) == 0
    assert bool(back.refreshed)


def test_a_right_hand_side_of_zero_has_the_solution_zero_wherever_the_state_lies():
    state = outer_step(drifting(0)).state
    result = outer_step(drifting(1), state, b=0 * G)
    assert not result.solution.value.any()
    assert result.solution.message == "converged"


def test_a_start_beyond_all_bounds_is_none():
    state = outer_step(drifting(0)).state
    result = outer_step(drifting(0), state._replace(value=np.full(N, 1e308)))
    assert relative_error(result.solution.value, dense(drifting(0), 1e-3, None)) < 1e-4


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_the_scale_of_matrix_and_right_hand_side_changes_nothing_but_that_of_the_answer(scale):
    solver = li.NystromCG(damping=1e-3, max_steps=4, indices=K)
    scaled = li.NystromCG(damping=1e-3 * scale, max_steps=4, indices=K)
    plain, other = None, None
    for step in range(4):
        plain = outer_step(drifting(step), plain, solver=solver).state
        other = outer_step(scale * drifting(step), other, solver=scaled, b=G * scale**2).state
        assert relative_error(other.value, plain.value * scale) < 1e-8
        assert float(other.excess) == pytest.approx(float(plain.excess), rel=1e-5, abs=1e-6)


# Every library.


def two_steps(A, B, b):
    first = outer_step(A, solver=li.NystromCG(damping=0.01, max_steps=4, indices=K), b=b)
    second = outer_step(
        B, first.state, solver=li.NystromCG(damping=0.01, max_steps=4, indices=K), b=b
    )
    return second.solution.value, second.state


def test_every_library_keeps_the_same_state(backend):
    value, state = backend.run(two_steps, drifting(0), drifting(1), G)
    wanted, by_numpy = two_steps(drifting(0), drifting(1), G)
    tolerance = 1e-2 if backend.dtype == "float32" else 1e-8
    assert relative_error(value, wanted) < tolerance
    assert value.dtype == state.columns.dtype == backend.dtype
    assert np.array_equal(state.indices, by_numpy.indices)
    assert float(state.excess) == pytest.approx(float(by_numpy.excess), abs=20 * tolerance)


def test_a_state_written_and_read_continues_bit_for_bit(library, tmp_path):
    solver = li.NystromCG(damping=0.01, max_steps=3, indices=K)

    def run(steps, state):
        values = []
        for step in steps:
            A, b = library.asarray(drifting(step, 0.05)), library.asarray(G)
            result = outer_step(A, state, solver=solver, b=b)
            state = result.state
            values.append(host(result.solution.value))
        return values, state

    whole, _ = run(range(8), None)
    half, state = run(range(3), None)
    state.save(tmp_path / "state.npz")
    rest, _ = run(range(3, 8), li.HypergradientState.load(tmp_path / "state.npz"))
    assert all(np.array_equal(a, b) for a, b in zip(whole, half + rest, strict=True))


def test_a_state_of_cg_is_written_without_columns(tmp_path):
    state = outer_step(drifting(0), solver=li.CG(damping=1e-3)).state
    state.save(tmp_path / "state.npz")
    read = li.HypergradientState.load(tmp_path / "state.npz")
    assert np.array_equal(read.value, state.value)
    assert read.columns is read.indices is read.rate is read.excess is read.age is None


# Errors.


def test_a_file_that_holds_something_else_is_refused(tmp_path):
    with open(tmp_path / "other.npz", "wb") as file:
        np.savez(file, weights=np.ones(3))
    with pytest.raises(ValueError, match=r"`path` must be .*save; .*holds weights"):
        li.HypergradientState.load(tmp_path / "other.npz")


def test_a_state_read_in_another_precision_is_refused(tmp_path):
    torch = pytest.importorskip("torch", reason="needs two libraries")
    state = outer_step(drifting(0), solver=li.CG(damping=1e-3)).state
    A, b = torch.tensor(drifting(0), dtype=torch.float32), torch.tensor(G, dtype=torch.float32)
    with pytest.raises((ValueError, TypeError), match="`state`"):
        outer_step(A, state, b=b)


@pytest.mark.parametrize("state", [3, np.ones(N), "state.npz"], ids=["int", "array", "path"])
def test_what_is_no_state_is_refused(state):
    with pytest.raises(TypeError, match="`state` must be a HypergradientState"):
        start(state, G)


def test_a_state_of_another_size_is_refused():
    state = outer_step(matrix("linear"), solver=SOLVER).state
    with pytest.raises(ValueError, match=r"`state` must come from .* shape \(12,"):
        outer_step(np.eye(12), state, b=np.ones(12), solver=li.CG())
    small = li.NystromCG(rank=4, damping=0.1)
    with pytest.raises(ValueError, match="`state` must come from a system"):
        outer_step(np.eye(12), state, b=np.ones(12), solver=small, ridge=np.ones(12))
