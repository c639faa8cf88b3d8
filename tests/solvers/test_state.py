"""What is kept from one solve to the next: the start, and the pairs."""

from __future__ import annotations

import numpy as np
import pytest

import lowrank_inverse as li
from lowrank_inverse.bilevel.implicit_gradient import implicit_gradient
from lowrank_inverse.bilevel.info import hypergradient_info
from lowrank_inverse.solvers.state import start
from tests.conftest import host
from tests.oracles import damped_solve, relative_error
from tests.problems import CountingOperator, N, indices, matrix, rhs, symmetric

K = tuple(indices(rank=10).tolist())
SOLVER = li.NystromCG(damping=1e-3, rtol=1e-8, indices=K, recycle=10)
G = rhs(seed=31)
NEW = li.HypergradientState()
RIDGES = {"no ridge": None, "one number": 0.02, "one for each": np.linspace(0.01, 0.5, N)}

each_ridge = pytest.mark.parametrize("ridge", RIDGES.values(), ids=RIDGES)


def drifting(step, speed=1e-4):
    """Return a matrix with a falling spectrum whose eigenvectors turn from step to step."""
    A = symmetric(np.logspace(1, -3, N))
    turn = np.random.default_rng(5).standard_normal((N, N))
    Q = np.linalg.qr(np.eye(N) + speed * step * (turn - turn.T))[0]
    return Q @ A @ Q.T


def outer_step(A, state=NEW, *, solver=SOLVER, b=G, **options):
    return implicit_gradient(
        A, b, lambda q: [q], [None], solver=solver, rng=0, state=state, **options
    )


def dense(A, damping, ridge, b=G):
    return damped_solve(
        A + np.diag(np.broadcast_to(0.0 if ridge is None else ridge, N)), damping, b
    )


def count(state):
    return int(np.sum(np.any(host(state.vectors) != 0, axis=0)))


@each_ridge
@pytest.mark.parametrize(
    "solver", [SOLVER, li.CG(damping=1e-3, rtol=1e-8)], ids=["NystromCG", "CG"]
)
def test_pairs_cost_nothing_and_the_answer_is_that_of_the_dense_inverse(solver, ridge):
    state, before = NEW, 0
    for step in range(6):
        A = CountingOperator(drifting(step))
        result = outer_step(A, state, solver=solver, ridge=ridge)
        state = result.state
        assert result.solution.num_products == A.num_products
        assert relative_error(result.solution.value, dense(A.A, 1e-3, ridge)) < 1e-4
        info = hypergradient_info(result, G, np.zeros(1), ())
        assert info.recycled == before
        before = count(state)
        columns = len(K) if step == 0 and solver is SOLVER else 0
        assert A.num_products == 1 + (step > 0) + int(result.solution.num_steps) + columns


@each_ridge
@pytest.mark.parametrize("solver", [SOLVER, li.CG(damping=1e-3)], ids=["NystromCG", "CG"])
def test_pairs_are_orthonormal_and_of_the_bare_hessian(solver, ridge):
    S, Y = outer_step(drifting(0), solver=solver, ridge=ridge).state[1:]
    found = np.any(S != 0, axis=0)
    assert found.any()
    assert relative_error(Y, drifting(0) @ S) < 1e-9
    assert relative_error(S.T @ S, np.diag(found.astype(float))) < 1e-6


def test_pairs_of_the_largest_ritz_values_are_kept():
    A = drifting(0)
    state = outer_step(A, solver=li.CG(damping=1e-3, rtol=1e-12, recycle=N)).state
    few = outer_step(A, solver=li.CG(damping=1e-3, rtol=1e-12, recycle=N), ridge=None).state
    values = np.diag(state.vectors.T @ state.products)
    assert np.all(np.diff(np.abs(values)) <= 1e-8 * abs(values[0]))
    assert relative_error(values[0], np.linalg.eigvalsh(A)[-1]) < 1e-8
    assert np.array_equal(few.vectors, state.vectors)


def test_a_new_damping_or_ridge_is_taken_into_account_at_once():
    A = drifting(0)
    solver = li.CG(damping=1e-3, rtol=1e-8)
    state = outer_step(A, ridge=RIDGES["one for each"], solver=solver).state
    state = state._replace(value=0 * G)  # only the pairs
    for ridge in (np.linspace(2.0, 0.01, N), 1e-4, None):
        recycled = outer_step(A, state, ridge=ridge, solver=solver)
        plain = outer_step(A, ridge=ridge, solver=solver)
        assert int(recycled.solution.num_steps) <= int(plain.solution.num_steps) // 2


def test_recycled_pairs_beat_a_warm_start_alone_and_that_beats_a_cold_one_at_equal_products():
    errors = {"cold": [], "warm": [], "recycled": []}
    solvers = {
        "cold": li.CG(damping=0.05, max_steps=7, rtol=1e-12, recycle=0),
        "warm": li.CG(damping=0.05, max_steps=6, rtol=1e-12, recycle=0),
        "recycled": li.CG(damping=0.05, max_steps=6, rtol=1e-12),
    }
    states = dict.fromkeys(solvers, NEW)
    for step in range(12):
        A = drifting(step)
        for name, solver in solvers.items():
            result = outer_step(A, states[name], solver=solver)
            states[name] = NEW if name == "cold" else result.state
            if step >= 4:
                errors[name].append(relative_error(result.solution.value, dense(A, 0.05, None)))
                assert result.solution.num_products == 8
    cold, warm, recycled = (np.mean(errors[name]) for name in ("cold", "warm", "recycled"))
    assert warm < cold / 2
    assert recycled < warm / 5
    assert recycled < cold / 10


def test_pairs_of_a_matrix_that_has_nothing_to_do_with_the_new_one_are_dropped():
    rng = np.random.default_rng(3)
    A, B = (symmetric(np.logspace(1, -3, 200), seed=seed) for seed in (1, 2))
    b = rng.standard_normal(200)
    solver = li.CG(damping=1e-2, rtol=1e-6, max_steps=30)
    state = outer_step(A, solver=solver, b=b).state
    moved = outer_step(B, state, solver=solver, b=b).state
    fresh = outer_step(B, solver=solver, b=b).state
    again = outer_step(B, moved._replace(value=0 * b), solver=solver, b=b).solution
    best = outer_step(B, fresh._replace(value=0 * b), solver=solver, b=b).solution
    assert int(again.num_steps) <= int(best.num_steps) + 2


def test_negative_curvature_is_reported_though_pairs_precondition():
    A = drifting(0) - 0.5 * np.eye(N)
    state = outer_step(A + np.eye(N)).state
    result = outer_step(A, state)
    assert result.solution.message == "negative_curvature"


@pytest.mark.parametrize("ridge", [None, RIDGES["one for each"]], ids=["no ridge", "for each"])
@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 10, "sampling": "diagonal"},
        {"rank": 10, "sampling": "rpcholesky"},
        {"rank": "auto", "sampling": "greedy"},
        {"rank": 10, "sampling": "gaussian"},
        {"rank": 10, "sampling": "krylov"},
    ],
    ids=lambda settings: settings["sampling"],
)
def test_columns_are_computed_in_the_first_solve_alone_however_they_were_chosen(settings, ridge):
    solver = li.NystromCG(damping=0.05, rtol=1e-8, **settings)
    first = outer_step(drifting(0), solver=solver, ridge=ridge)
    assert first.inverse.num_products > 0
    second = outer_step(drifting(1), first.state, solver=solver, ridge=ridge)
    assert second.inverse.num_products == 0
    assert second.recycled == count(first.state)
    assert relative_error(second.solution.value, dense(drifting(1), 0.05, ridge)) < 1e-6


def test_the_state_may_go_from_one_solver_to_another():
    first = outer_step(drifting(0)).state
    cg = outer_step(drifting(0), first, solver=li.CG(damping=1e-3, rtol=1e-8, recycle=0))
    assert int(cg.solution.num_steps) <= 2
    assert cg.state.vectors is None
    back = outer_step(drifting(0), cg.state)
    assert int(back.solution.num_steps) == 0


def test_solve_goes_on_from_the_solution_before():
    solver = li.CG(damping=1e-3, rtol=1e-8)
    state = li.HypergradientState()
    steps = []
    for step in range(4):
        solution = li.solve(drifting(step), G, solver=solver, state=state)
        assert relative_error(solution.value, dense(drifting(step), 1e-3, None)) < 1e-4
        state = solution if step % 2 else solution.state
        steps.append(int(solution.num_steps))
    assert max(steps[1:]) < steps[0]
    assert li.solve(drifting(0), G, solver=solver).state is None


def test_without_a_state_no_pairs_are_kept():
    result = outer_step(drifting(0), None)
    assert result.state.vectors is result.state.products is result.recycled is None
    following = outer_step(drifting(0), result.state)
    assert following.recycled == 0
    assert count(following.state) > 0


def test_a_solution_that_is_not_finite_is_no_start():
    A = li.FunctionOperator(lambda v: np.full_like(v, np.nan), N)
    state = outer_step(A, solver=li.CG()).state
    assert np.array_equal(state.value, np.zeros(N))
    assert not state.vectors.any() and not state.products.any()


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
    plain, other = NEW, NEW
    for step in range(4):
        plain = outer_step(drifting(step), plain, solver=solver).state
        other = outer_step(scale * drifting(step), other, solver=scaled, b=G * scale**2).state
        assert relative_error(other.value, plain.value * scale) < 1e-8


# Every library.


def two_steps(A, B, b):
    solver = li.NystromCG(damping=0.01, rtol=1e-6, max_steps=20, indices=K)
    first = outer_step(A, solver=solver, b=b)
    second = outer_step(B, first.state, solver=solver, b=b)
    return second.solution.value, second.state


def test_every_library_keeps_the_same_state(backend):
    value, state = backend.run(two_steps, drifting(0), drifting(1), G)
    wanted, by_numpy = two_steps(drifting(0), drifting(1), G)
    tolerance = 1e-2 if backend.dtype == "float32" else 1e-8
    assert relative_error(value, wanted) < tolerance
    assert value.dtype == state.vectors.dtype == state.products.dtype == backend.dtype
    found, expected = (
        np.linalg.norm(host(x.vectors).T @ host(x.products), 2) for x in (state, by_numpy)
    )
    assert found == pytest.approx(expected, rel=10 * tolerance)


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

    whole, _ = run(range(8), NEW)
    half, state = run(range(3), NEW)
    state.save(tmp_path / "state.npz")
    rest, _ = run(range(3, 8), li.HypergradientState.load(tmp_path / "state.npz"))
    assert all(np.array_equal(a, b) for a, b in zip(whole, half + rest, strict=True))


def test_a_state_without_pairs_is_written_as_such(tmp_path):
    state = outer_step(drifting(0), solver=li.CG(damping=1e-3, recycle=0)).state
    state.save(tmp_path / "state.npz")
    read = li.HypergradientState.load(tmp_path / "state.npz")
    assert np.array_equal(read.value, state.value)
    assert read.vectors is read.products is None


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
