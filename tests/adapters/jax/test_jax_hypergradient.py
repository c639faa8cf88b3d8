"""Hypergradients of functions of pytrees: what jax has beyond the other framework."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import lowrank_inverse as li

jax = pytest.importorskip("jax")

import jax.numpy as jnp

from tests.adapters.jax.jax_oracle import Problem, relative
from tests.adapters.shared.frameworks import Tree
from tests.adapters.shared.problem import N, forward, inner, outer

pytestmark = pytest.mark.usefixtures("wide")


def jitted(problem: Problem, *, hparams: Any = None, **options: Any) -> Any:
    """Return the hypergradient by one compiled call."""
    run = jax.jit(lambda p, h: problem.hypergradient(params=p, hparams=h, chunk_size=8, **options))
    return run(problem.params, problem.hparams if hparams is None else hparams)


def test_the_cg_of_jax_is_a_solver():
    problem = Problem()
    oracle = problem.dense()

    def solver(matvec: Any, b: Any) -> Any:
        return jax.scipy.sparse.linalg.cg(matvec, b, tol=1e-12)[0]

    assert relative(jitted(problem, solver=solver).grads, oracle.at(oracle.ihvp())) < 1e-8


# Forms of parameters and hyperparameters.


@pytest.mark.slow
def test_leaves_that_are_no_arrays_of_floats_are_carried_and_come_back_as_none():
    problem = Problem()
    wanted = problem.hypergradient(solver=li.CG(rtol=1e-12))
    extra = {"steps": 5, "mask": jnp.asarray([1, 0]), "name": "x", "f": jnp.tanh, "none": None}
    seen: list[Tree] = []

    def watched(params: Tree, hparams: Tree, x: Any, y: Any) -> Any:
        seen.extend([params, hparams])
        return inner(params, hparams, x, y) * hparams["steps"] / params["steps"]

    out = problem.hypergradient(
        inner_loss=watched,
        params={**problem.params, **extra},
        hparams={**problem.hparams, **extra},
        solver=li.CG(rtol=1e-12),
    )
    assert seen
    for tree in seen:
        assert tree.keys() >= extra.keys()
        assert all(tree[name] is extra[name] for name in extra)
    for tree in (out.grads, out.direct, out.implicit, out.ihvp):
        assert tree.keys() >= extra.keys()
        assert all(tree[name] is None for name in extra)
    assert relative(out.grads, wanted.grads) < 1e-12
    assert relative(out.ihvp, wanted.ihvp) < 1e-12


def test_a_bare_float_is_a_hyperparameter():
    problem = Problem()
    wanted = problem.hypergradient(solver=li.CG(rtol=1e-12)).grads["log_decay"]
    weights, decay = problem.hparams["weights"], problem.hparams["log_decay"]
    found = jitted(
        problem,
        inner_loss=lambda p, h, x, y: inner(p, {"weights": weights, "log_decay": h}, x, y),
        outer_loss=lambda p, h, x, y: outer(p, {"weights": weights}, x, y),
        hparams=float(decay),
        solver=li.CG(rtol=1e-12),
    ).grads
    assert found.shape == ()
    assert float(found) == pytest.approx(float(wanted), rel=1e-12)


def test_arguments_of_the_losses_reach_them_and_default_to_none():
    problem = Problem()
    wanted = problem.hypergradient(solver=li.CG(rtol=1e-12))
    found = problem.hypergradient(
        inner_loss=lambda p, h: inner(p, h, *problem.inner_args),
        outer_loss=lambda p, h: outer(p, h, *problem.outer_args),
        inner_args=(),
        outer_args=(),
        solver=li.CG(rtol=1e-12),
    )
    assert relative(found.grads, wanted.grads) < 1e-14


def test_aux_of_both_losses_comes_back_as_they_return_it():
    problem = Problem()

    def inner_aux(params: Tree, hparams: Tree, x: Any, y: Any) -> Any:
        return inner(params, hparams, x, y), {"predictions": forward(params, x), "name": "inner"}

    def outer_aux(params: Tree, hparams: Tree, x: Any, y: Any) -> Any:
        return outer(params, hparams, x, y), None

    out = problem.hypergradient(
        inner_loss=inner_aux, outer_loss=outer_aux, has_aux=True, solver=li.CG(rtol=1e-12)
    )
    plain = problem.hypergradient(solver=li.CG(rtol=1e-12))
    assert plain.aux == ()
    assert relative(out.grads, plain.grads) < 1e-14
    inner_out, outer_out = out.aux
    assert inner_out["name"] == "inner"
    np.testing.assert_allclose(
        inner_out["predictions"], forward(problem.params, problem.inner_args[0]), rtol=1e-14
    )
    assert outer_out is None


# Hyperparameters without a path.


@pytest.mark.parametrize(
    "wrap", [jax.jit, pytest.param(jax.checkpoint, marks=pytest.mark.slow)], ids=["jit", "remat"]
)
def test_hparams_without_path_are_seen_through_what_wraps_the_losses(wrap):
    problem = Problem()
    out = problem.hypergradient(
        inner_loss=wrap(inner), outer_loss=wrap(outer), solver=li.CG(rtol=1e-12),
        hparams={**problem.hparams, "unused": jnp.ones((2, 3))},
    )  # fmt: skip
    assert out.info.hparams_without_path == ("['unused']",)
    np.testing.assert_array_equal(out.grads["unused"], np.zeros((2, 3)))


def test_an_offset_of_the_inner_loss_is_no_path():
    problem = Problem()
    out = problem.hypergradient(
        inner_loss=lambda p, h, x, y: inner(p, h, x, y) + jnp.sum(h["offset"]),
        hparams={**problem.hparams, "offset": jnp.ones(2)},
        solver=li.CG(),
    )
    assert out.info.hparams_without_path == ("['offset']",)
    np.testing.assert_array_equal(out.grads["offset"], [0.0, 0.0])


# Which columns.


@pytest.mark.slow
@pytest.mark.parametrize(
    "make",
    [jax.random.key, jax.random.PRNGKey],
    ids=["key", "PRNGKey"],
)
@pytest.mark.parametrize(
    "solver", [li.Nystrom(rank=5, damping=1e-2), li.NystromCG(rank=5, max_steps=1)]
)
def test_a_key_draws_distinct_columns_uniformly(solver, make):
    problem = Problem()
    found = problem.hypergradient(solver=solver, key=make(3))
    drawn = jax.random.choice(make(3), N, (5,), replace=False)
    assert len(set(np.asarray(drawn).tolist())) == 5
    chosen = type(solver)(**{**vars(solver), "indices": drawn})
    assert relative(found.grads, problem.hypergradient(solver=chosen).grads) == 0
    other = problem.hypergradient(solver=solver, key=make(4))
    assert relative(other.grads, found.grads) > 1e-6


def test_indices_of_the_caller_are_taken_whatever_the_key():
    problem = Problem()
    solver = li.Nystrom(indices=(4, 0, 2, 7, 9), damping=1e-2)
    wanted = problem.hypergradient(solver=solver).grads
    assert relative(problem.hypergradient(solver=solver, key=jax.random.key(3)).grads, wanted) == 0


# Errors.


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "params without floats": ({"params": {"a": 1}}, ValueError, "`params` must hold a floating"),
    "hparams without floats": ({"hparams": {"a": 1}}, ValueError, "`hparams` must hold a floating"),
    "complex hparams": (
        {"hparams": {"weights": np.ones(1, complex)}},
        TypeError,
        "`hparams` must be real",
    ),
    "inner loss an integer": (
        {"inner_loss": lambda p, h, x, y: jnp.asarray(3)},
        TypeError,
        "`inner_loss` must be real and floating-point",
    ),
    "inner loss a value": (
        {"inner_loss": np.float64(3.0)},
        TypeError,
        "`inner_loss` must be a function",
    ),
    "outer loss a list": (
        {"outer_loss": [outer, outer]},
        TypeError,
        "`outer_loss` must be a function",
    ),
    "aux not said": (
        {"inner_loss": lambda p, h, x, y: (inner(p, h, x, y), 1)},
        TypeError,
        "`inner_loss` must return a scalar",
    ),
    "aux not given": ({"has_aux": True}, TypeError, "`inner_loss` must return .*aux"),
    "key and rng": (
        {"solver": li.Nystrom(rank=2, damping=1e-2), "key": jax.random.PRNGKey(0), "rng": 0},
        ValueError,
        "one of `key` and `rng`",
    ),
    "key for cg": ({"key": jax.random.PRNGKey(0)}, TypeError, "`key` needs Nystrom or NystromCG"),
    "key and diagonal": (
        {
            "solver": li.Nystrom(rank=2, sampling="diagonal", damping=1e-2),
            "key": jax.random.PRNGKey(0),
        },
        ValueError,
        "`key` draws columns uniformly",
    ),
    "key and a rank that grows": (
        {"solver": li.NystromCG(rank="auto"), "key": jax.random.PRNGKey(0)},
        ValueError,
        "`key` needs a fixed number of columns",
    ),
}


@pytest.mark.parametrize(("options", "kind", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_by_name(options, kind, message):
    with pytest.raises(kind, match=message):
        Problem().hypergradient(**{"solver": li.CG(), **options})
