"""Hypergradients and solvers under ``jax.jit`` and ``jax.vmap``, and what is compiled when."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import lowrank_inverse as li

jax = pytest.importorskip("jax")

import jax.numpy as jnp

from lowrank_inverse.bilevel.info import HypergradientInfo
from lowrank_inverse_jax import HessianOperator, hypergradient
from lowrank_inverse_jax.bilevel.hypergradient import Hypergradient
from tests.adapters.jax.jax_oracle import Counted, Problem, compilations, relative
from tests.adapters.shared.frameworks import Tree
from tests.adapters.shared.problem import N, inner, outer

pytestmark = pytest.mark.usefixtures("wide")

SOLVERS = {
    "cg": (li.CG(rtol=1e-6, damping=0.3), 0.3),
    "nystrom-cg": (li.NystromCG(rank=5, rtol=1e-6, damping=0.3), 0.3),
    "nystrom": (li.Nystrom(rank=N, damping=0.3), 0.3),
    "streamed": (li.Nystrom(rank=N, damping=0.3, memory="streamed", chunk_size=7), 0.3),
    "chunked": (li.Nystrom(rank=N, damping=0.3, memory="chunked", chunk_size=7), 0.3),
    "refined": (li.Nystrom(rank=5, damping=0.3, refine=20), 0.3),
    "neumann": (li.Neumann(num_terms=300, damping=0.3), 0.3),
    "exact": (li.Exact(damping=0.3), 0.3),
    "callable": (lambda A, b: jax.scipy.sparse.linalg.cg(A, b, tol=1e-9)[0], 0.0),
}
QUICK = ("cg", "nystrom-cg")

each_solver = pytest.mark.parametrize(
    ("solver", "damping"),
    [
        pytest.param(*case, id=name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name, case in SOLVERS.items()
    ],
)


def jitted(problem: Problem, **options: Any) -> Any:
    """Return the compiled hypergradient as a function of parameters and hyperparameters."""
    return jax.jit(lambda p, h: problem.hypergradient(params=p, hparams=h, chunk_size=8, **options))


# jit.


@each_solver
def test_under_jit_it_equals_the_eager_hypergradient_and_its_record(solver, damping):
    problem = Problem()
    eager = problem.hypergradient(solver=solver, rng=0)
    out = jitted(problem, solver=solver, rng=0)(problem.params, problem.hparams)
    assert isinstance(out, Hypergradient)
    assert isinstance(out.info, HypergradientInfo)
    assert jax.tree_util.tree_structure(out) == jax.tree_util.tree_structure(eager)
    for part in ("grads", "direct", "implicit", "ihvp"):
        assert relative(getattr(out, part), getattr(eager, part)) < 1e-9
    for field in ("num_products", "negative_curvature", "rank"):
        found, wanted = getattr(out.info, field), getattr(eager.info, field)
        assert found is wanted is None or int(found) == int(wanted)
    assert out.solution.message == eager.solution.message
    assert int(out.solution.num_steps) == int(eager.solution.num_steps)
    assert float(out.info.inner_grad_norm) == pytest.approx(float(eager.info.inner_grad_norm))


def test_results_and_records_are_pytrees_that_pass_through_jit():
    problem = Problem()
    hparams = {**problem.hparams, "unused": jnp.ones(2), "steps": 3}

    def losses_with_aux(params: Tree, hparams: Tree, x: Any, y: Any) -> Any:
        return inner(params, hparams, x, y), {"mean": jnp.mean(x)}

    def run(hparams: Tree) -> Any:
        return problem.hypergradient(
            inner_loss=losses_with_aux, outer_loss=losses_with_aux, hparams=hparams,
            has_aux=True, solver=li.Nystrom(rank=5, damping=1e-2), rng=0,
        )  # fmt: skip

    out = jax.jit(run)(hparams)
    assert out.info.hparams_without_path == ("['unused']",)
    assert out.grads["steps"] is None
    again = jax.jit(lambda out: out)(out)
    assert jax.tree_util.tree_structure(again) == jax.tree_util.tree_structure(out)
    assert again.info.hparams_without_path == ("['unused']",)
    assert set(again.aux[0]) == {"mean"}
    doubled = jax.tree_util.tree_map(lambda leaf: 2 * leaf, out.info)
    assert float(doubled.inner_grad_norm) == 2 * float(out.info.inner_grad_norm)
    assert int(doubled.rank) == 2 * int(out.info.rank)


def test_the_damping_may_be_traced():
    problem = Problem()
    oracle = problem.dense()
    solvers = (lambda d: li.CG(damping=d, rtol=1e-12), lambda d: li.Nystrom(rank=N, damping=d))
    run = jax.jit(
        lambda d: [problem.hypergradient(solver=solver(d), rng=0).grads for solver in solvers]
    )
    for damping in (0.1, 0.5):
        for grads in run(damping):
            assert relative(grads, oracle.at(oracle.ihvp(damping))) < 1e-8


def test_a_ridge_may_be_traced_and_goes_unchecked():
    problem = Problem()
    oracle = problem.dense()
    run = jax.jit(
        lambda r: [
            problem.hypergradient(solver=li.CG(rtol=1e-12), ridge=ridge).ihvp
            for ridge in (r, r * jnp.ones(N))
        ]
    )
    for ridge in (0.5, -0.1):
        assert all(relative(found, oracle.ihvp(ridge)) < 1e-8 for found in run(ridge))


def test_a_loss_that_is_not_finite_goes_unchecked_under_jit_and_is_reported():
    problem = Problem()
    run = jitted(
        problem, outer_loss=lambda p, h, x, y: jnp.sqrt(-1 - outer(p, h, x, y)), solver=li.CG()
    )
    out = run(problem.params, problem.hparams)
    assert out.solution.message == "nonfinite"
    assert not bool(out.solution.converged)
    assert np.isnan(float(out.info.relative_residual))


# Which columns.


@pytest.mark.slow
def test_a_key_may_be_traced_and_draws_the_columns_that_it_draws_outside():
    problem = Problem()
    for solver in (li.Nystrom(rank=5, damping=1e-2), li.NystromCG(rank=5, max_steps=1)):
        run = jax.jit(lambda key, solver=solver: problem.hypergradient(solver=solver, key=key))
        for seed in (3, 4):
            key = jax.random.key(seed)
            wanted = problem.hypergradient(solver=solver, key=key)
            assert relative(run(key).grads, wanted.grads) < 1e-9


@pytest.mark.parametrize(
    "memory",
    [
        "stored",
        pytest.param("chunked", marks=pytest.mark.slow),
        pytest.param("streamed", marks=pytest.mark.slow),
    ],
)
def test_indices_may_be_traced(memory):
    problem = Problem()

    def run(indices: Any) -> Any:
        solver = li.Nystrom(indices=indices, memory=memory, damping=1e-2)
        return problem.hypergradient(solver=solver).grads

    traced = jax.jit(run)
    for indices in ([4, 0, 2, 7, 9], [1, 3, 13, 5, 8]):
        assert relative(traced(jnp.asarray(indices)), run(indices)) < 1e-8
    assert traced._cache_size() == 1


def test_a_host_seed_draws_once_when_traced_the_columns_of_numpy():
    problem = Problem()
    indices = tuple(np.random.default_rng(7).choice(N, 5, replace=False).tolist())
    wanted = problem.hypergradient(solver=li.Nystrom(indices=indices, damping=1e-2)).grads
    solver = li.Nystrom(rank=5, sampling="uniform", damping=1e-2)
    run = jitted(problem, solver=solver, rng=np.random.default_rng(7))
    for _ in range(2):
        assert relative(run(problem.params, problem.hparams).grads, wanted) < 1e-9


# vmap.


def several(problem: Problem) -> Tree:
    """Three sets of hyperparameters, stacked."""
    return jax.tree_util.tree_map(
        lambda leaf: jnp.stack([leaf, 2 * leaf, leaf + 1]), problem.hparams
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver",
    [
        li.CG(rtol=1e-10),
        li.NystromCG(rank=5, rtol=1e-10),
        li.Nystrom(rank=5, damping=1e-2),
        li.Neumann(num_terms=5),
        li.Exact(),
        li.Nystrom(rank=5, memory="streamed", damping=1e-2),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_vmap_over_hparams_equals_a_loop(solver):
    problem = Problem()
    stacked = several(problem)

    def run(hparams: Tree) -> Any:
        return problem.hypergradient(hparams=hparams, solver=solver, rng=0)

    mapped = jax.jit(jax.vmap(run))(stacked)
    for i in range(3):
        out = run(jax.tree_util.tree_map(lambda leaf, i=i: leaf[i], stacked))
        found = jax.tree_util.tree_map(lambda leaf, i=i: leaf[i], mapped)
        assert relative(found.grads, out.grads) < 1e-8
        assert relative(found.ihvp, out.ihvp) < 1e-8
        assert abs(int(found.solution.num_steps) - int(out.solution.num_steps)) <= 1
        assert int(found.solution.reason) == int(out.solution.reason)


@pytest.mark.slow
def test_vmap_works_outside_jit_and_over_all_arguments():
    problem = Problem()

    def run(params: Tree, hparams: Tree, x: Any, key: Any) -> Any:
        return problem.hypergradient(
            params=params, hparams=hparams, inner_args=(x, problem.inner_args[1]), key=key,
            solver=li.Nystrom(rank=5, damping=0.3),
        ).grads  # fmt: skip

    single = (problem.params, problem.hparams, problem.inner_args[0])
    stacked = jax.tree_util.tree_map(lambda leaf: jnp.stack([leaf, 1.5 * leaf]), single)
    keys = jax.random.split(jax.random.key(0))
    mapped = jax.vmap(run)(*stacked, keys)
    for i in range(2):
        one, found = (
            jax.tree_util.tree_map(lambda leaf, i=i: leaf[i], tree) for tree in (stacked, mapped)
        )
        assert relative(found, run(*one, keys[i])) < 1e-9


# What is compiled when.


@pytest.mark.parametrize(
    "solver",
    [li.CG(), li.NystromCG(rank=5), li.Nystrom(rank=5, damping=1e-2)],
    ids=["cg", "nystrom-cg", "nystrom"],
)
def test_a_second_jitted_call_with_new_values_traces_and_compiles_nothing(solver):
    problem = Problem()
    losses = Counted(inner), Counted(outer)
    run = jitted(problem, inner_loss=losses[0], outer_loss=losses[1], solver=solver, rng=0)
    arguments = [
        jax.tree_util.tree_map(lambda leaf, c=c: c * leaf, (problem.params, problem.hparams))
        for c in (1.0, 1.1)
    ]
    with compilations() as first:
        before = run(*arguments[0])
    traces = [loss.calls for loss in losses]
    assert first
    assert min(traces) >= 1
    with compilations() as second:
        after = run(*arguments[1])
    assert second == []
    assert [loss.calls for loss in losses] == traces
    assert run._cache_size() == 1
    assert relative(after.grads, before.grads) > 1e-3


@pytest.mark.slow
def test_a_jitted_loop_with_warm_starts_compiles_once_without_and_once_with_a_state():
    problem = Problem()
    loss = Counted(inner)
    run = jax.jit(
        lambda h, state: problem.hypergradient(
            inner_loss=loss, hparams=h, solver=li.NystromCG(rank=5), rng=0, state=state
        )
    )
    state, hparams, traces = li.HypergradientState(), problem.hparams, []
    for _ in range(4):
        out = run(hparams, state)
        traces.append(loss.calls)
        state = out.state
        hparams = jax.tree_util.tree_map(lambda h, g: h - 1e-3 * g, hparams, out.grads)
    assert traces[0] < traces[1] == traces[2] == traces[3]


@pytest.mark.slow
def test_an_eager_state_starts_a_jitted_call_without_a_trace_of_its_own():
    problem = Problem()
    loss = Counted(inner)
    run = jax.jit(
        lambda state: problem.hypergradient(inner_loss=loss, solver=li.CG(), state=state).state
    )
    started = problem.hypergradient(solver=li.CG(), state=li.HypergradientState())
    state = run(started.state)
    traces = loss.calls
    run(state)
    assert loss.calls == traces


def fresh(n: int) -> tuple[Any, Any]:
    """Return a system of an order that no other test has."""
    rng = np.random.default_rng(n)
    X = rng.standard_normal((n, n))
    return jnp.asarray(X @ X.T + n * np.eye(n)), jnp.asarray(rng.standard_normal(n))


EAGER = {
    "cg": lambda A, b: li.cg(A, b, damping=0.5),
    "preconditioned cg": lambda A, b: li.solve(A, b, solver=li.NystromCG(rank=4), rng=0),
    "cg on a block": lambda A, b: li.cg(A, jnp.stack([b, 2 * b], axis=1)),
    "neumann": lambda A, b: li.neumann(A, b),
    "nystrom": lambda A, b: li.solve(A, b, solver=li.Nystrom(rank=4, damping=1e-2), rng=0),
}


@pytest.mark.parametrize(
    "solve",
    [
        pytest.param(solve, id=name, marks=[] if name in ("cg", "neumann") else [pytest.mark.slow])
        for name, solve in EAGER.items()
    ],
)
def test_eager_solves_do_not_compile_anew(solve):
    (A, b), other = fresh(17), fresh(18)
    other = other[0][:17, :17], other[1][:17]
    with compilations() as first:
        before = solve(A, b).value
    with compilations() as second:
        after = solve(*other).value
    assert first or solve is not EAGER["cg"]  # the others find some of its operations compiled
    assert second == []
    assert relative(after, before) > 1e-3


@pytest.mark.parametrize(
    "solver",
    [
        li.CG(),
        li.NystromCG(rank=5),
        pytest.param(li.Nystrom(rank=5, damping=1e-2), marks=pytest.mark.slow),
        pytest.param(li.Neumann(), marks=pytest.mark.slow),
        pytest.param(li.Exact(), marks=pytest.mark.slow),
    ],
    ids=lambda solver: type(solver).__name__,
)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jitted losses"])
def test_eager_hypergradients_do_not_compile_anew(solver, wrap):
    problem = Problem()
    losses = {"inner_loss": wrap(inner), "outer_loss": wrap(outer)}
    hparams = jax.tree_util.tree_map(lambda leaf: 1.1 * leaf, problem.hparams)
    problem.hypergradient(solver=solver, rng=0, **losses)
    with compilations() as second:
        problem.hypergradient(solver=solver, rng=0, hparams=hparams, **losses)
    assert second == []


# Arrays that a jitted function closes over are known, and yet all that is computed is traced.


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver",
    [
        li.CG(rtol=1e-12),
        li.Nystrom(rank=6, damping=0.1),
        li.NystromCG(rank=2, rtol=1e-12),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_arrays_closed_over_by_a_jitted_function_are_as_good_as_arguments(solver):
    A, b = fresh(6)
    damping = solver.damping
    wanted = np.linalg.solve(np.asarray(A) + damping * np.eye(6), np.asarray(b))
    x0 = jnp.ones(6)
    state = li.cg(A, b, max_steps=1)

    def solve(A: Any, b: Any) -> Any:
        return li.solve(A, b, solver=solver, rng=0, x0=state.value).value

    assert relative(jax.jit(lambda b: solve(A, b))(b), wanted) < 1e-9
    assert relative(jax.jit(lambda A: solve(A, b))(A), wanted) < 1e-9
    assert relative(jax.jit(lambda s: solve(A, b) * s)(1.0), wanted) < 1e-9
    if isinstance(solver, li.CG):
        found = jax.jit(lambda d: li.cg(A, b, damping=d, x0=x0, rtol=1e-12).value)(0.0)
        assert relative(found, wanted) < 1e-9


def test_params_hparams_ridge_and_state_may_be_closed_over():
    problem = Problem()
    state = problem.hypergradient(solver=li.CG()).state
    ridge = jnp.linspace(0.1, 1.0, N)
    solver = li.CG(rtol=1e-12)

    def run(scale: Any) -> Any:
        grads = problem.hypergradient(solver=solver, ridge=ridge, state=state).grads
        return jax.tree_util.tree_map(lambda leaf: scale * leaf, grads)

    assert relative(jax.jit(run)(1.0), run(1.0)) < 1e-9


def test_an_operator_made_outside_serves_inside_jit():
    problem = Problem()
    H = HessianOperator(problem.loss, problem.params, chunk_size=1)
    b = jnp.linspace(-1, 1, N)
    dense = problem.dense().hessian
    found = jax.jit(lambda b: li.solve(H, b, solver=li.Nystrom(rank=N, damping=0.3), rng=0).value)(
        b
    )
    wanted = np.linalg.solve(dense + 0.3 * np.eye(N), np.asarray(b))
    assert relative(found, wanted) < 1e-9
    prepared = li.Nystrom(rank=N, damping=0.3).prepare(H, rng=0)
    assert relative(jax.jit(lambda b: prepared @ b)(b), wanted) < 1e-9


def test_the_hypergradient_of_a_scalar_problem_may_be_taken_where_only_the_hparam_is_traced():
    @jax.jit
    def run(h: Any) -> Any:
        return hypergradient(
            lambda w, h: 0.5 * ((w - 3) ** 2 + h * w**2), lambda w, h: w, 3 / (1 + h), h,
            solver=li.CG(),
        ).grads  # fmt: skip

    for h in (1.0, 2.0):
        assert float(run(h)) == pytest.approx(-3 / (1 + h) ** 2, rel=1e-12)
