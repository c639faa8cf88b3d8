"""Hypergradients through equinox and flax models and an optax training loop."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import lowrank_inverse as li

jax = pytest.importorskip("jax")

import jax.numpy as jnp

from lowrank_inverse_jax import HessianOperator, hypergradient, implicit_minimizer
from tests.adapters.jax.jax_oracle import Counted, Problem, dense, relative
from tests.adapters.shared.problem import data_term, inner, outer

pytestmark = pytest.mark.usefixtures("wide")

NUM_EXAMPLES = 5


def examples(seed: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    return (
        jnp.asarray(rng.standard_normal((NUM_EXAMPLES, 3))),
        jnp.asarray(rng.standard_normal((NUM_EXAMPLES, 2))),
    )


def weighted(predict: Any, params: Any, hparams: Any, seed: int) -> Any:
    """A fit with a weight for each example, and a decay."""
    x, y = examples(seed)
    errors = jnp.sum((predict(params, x) - y) ** 2, axis=1)
    squares = sum(jnp.sum(leaf**2) for leaf in jax.tree_util.tree_leaves(params))
    return jnp.mean(jax.nn.sigmoid(hparams["weights"]) * errors) + hparams["decay"] * squares


def mean_error(predict: Any, params: Any, seed: int) -> Any:
    x, y = examples(seed)
    return jnp.mean((predict(params, x) - y) ** 2)


def hparams() -> Any:
    return {"decay": jnp.asarray(1.5), "weights": jnp.linspace(-1, 1, NUM_EXAMPLES)}


# equinox.


def test_an_equinox_model_has_the_hypergradient_of_the_dense_formula():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(3, 2, width_size=4, depth=1, activation=jnp.tanh, key=jax.random.key(0))
    floats, rest = eqx.partition(model, eqx.is_inexact_array)

    def predict(floats: Any, x: Any) -> Any:
        return jax.vmap(eqx.combine(floats, rest))(x)

    oracle = dense(
        lambda params, h: weighted(predict, params, h, 0),
        lambda params, h: mean_error(predict, params, 1),
        floats,
        hparams(),
    )
    assert np.linalg.eigvalsh(oracle.hessian)[0] > 0

    def fit(model: Any, h: Any) -> Any:
        return weighted(predict, eqx.filter(model, eqx.is_inexact_array), h, 0)

    @eqx.filter_jit
    def run(model: Any, h: Any) -> Any:
        return hypergradient(
            fit,
            lambda model, h: jnp.mean((jax.vmap(model)(examples(1)[0]) - examples(1)[1]) ** 2),
            model,
            h,
            solver=li.NystromCG(rank=5, rtol=1e-12),
            rng=0,
        )

    out = run(model, hparams())
    assert relative(out.grads, oracle.at(oracle.ihvp())) < 1e-8
    assert isinstance(out.ihvp, eqx.nn.MLP)
    structures = [jax.tree_util.tree_structure(tree) for tree in (out.ihvp, floats)]
    assert structures[0] == structures[1]
    moved = eqx.apply_updates(model, out.ihvp)
    assert moved(jnp.ones(3)).shape == (2,)


def test_hyperparameters_may_be_an_equinox_model():
    eqx = pytest.importorskip("equinox")
    weigh = eqx.nn.MLP(2, "scalar", width_size=3, depth=1, key=jax.random.key(1))
    floats, rest = eqx.partition(weigh, eqx.is_inexact_array)
    params = {"w": jnp.full((3, 2), 0.3)}

    def fit(params: Any, weigh: Any) -> Any:
        x, y = examples(0)
        errors = (x @ params["w"] - y) ** 2
        weights = jax.nn.sigmoid(jax.vmap(weigh)(jax.lax.stop_gradient(errors)))
        return jnp.mean(weights * jnp.sum(errors, axis=1)) + 0.1 * jnp.sum(params["w"] ** 2)

    def validate(params: Any, weigh: Any) -> Any:
        return mean_error(lambda p, x: x @ p["w"], params, 1)

    out = eqx.filter_jit(
        lambda weigh: hypergradient(fit, validate, params, weigh, solver=li.CG(rtol=1e-12))
    )(weigh)
    oracle = dense(
        lambda params, floats: fit(params, eqx.combine(floats, rest)), validate, params, floats
    )
    assert isinstance(out.grads, eqx.nn.MLP)
    assert out.grads.activation is None
    assert relative(out.grads, oracle.at(oracle.ihvp())) < 1e-8
    assert out.info.hparams_without_path == ()
    eqx.apply_updates(weigh, out.grads)


# flax.


def test_a_flax_nnx_model_has_the_hypergradient_of_the_dense_formula():
    nnx = pytest.importorskip("flax.nnx")

    class Network(nnx.Module):
        def __init__(self, rngs: Any) -> None:
            self.first = nnx.Linear(3, 4, rngs=rngs, param_dtype=jnp.float64)
            self.dropout = nnx.Dropout(0.5, rngs=rngs, deterministic=True)
            self.second = nnx.Linear(4, 2, rngs=rngs, param_dtype=jnp.float64)

        def __call__(self, x: Any) -> Any:
            return self.second(self.dropout(jnp.tanh(self.first(x))))

    graph, params, rest = nnx.split(Network(nnx.Rngs(0)), nnx.Param, ...)

    def predict(params: Any, x: Any) -> Any:
        return nnx.merge(graph, params, rest)(x)

    def fit(params: Any, h: Any) -> Any:
        return weighted(predict, params, h, 0)

    def validate(params: Any, h: Any) -> Any:
        return mean_error(predict, params, 1)

    oracle = dense(fit, validate, params, hparams())
    assert np.linalg.eigvalsh(oracle.hessian)[0] > 0

    @jax.jit
    def run(params: Any, h: Any) -> Any:
        return hypergradient(fit, validate, params, h, solver=li.CG(damping=0.1, rtol=1e-12))

    out = run(params, hparams())
    assert relative(out.grads, oracle.at(oracle.ihvp(0.1))) < 1e-8
    structures = [jax.tree_util.tree_structure(tree) for tree in (out.ihvp, params)]
    assert structures[0] == structures[1]
    nnx.merge(graph, out.ihvp, rest)

    # With the random state of the dropout among the parameters: keys and counts have no rows.
    state = nnx.state(Network(nnx.Rngs(0)))

    def fit_whole(state: Any, h: Any) -> Any:
        only = nnx.filter_state(state, nnx.Param)
        return weighted(lambda _, x: nnx.merge(graph, state)(x), only, h, 0)

    def row_sums(state: Any) -> Any:
        H = HessianOperator(lambda state: fit_whole(state, hparams()), state)
        assert H.shape == oracle.hessian.shape
        return H @ jnp.ones(H.shape[0])

    assert relative(jax.jit(row_sums)(state), oracle.hessian.sum(axis=1)) < 1e-9


# optax.


@pytest.mark.slow
def test_a_bilevel_loop_of_optax_optimizers_learns_the_hyperparameters():
    optax = pytest.importorskip("optax")
    problem = Problem()
    (x, y), clean = problem.inner_args, problem.outer_args
    fit, validate = Counted(inner), Counted(outer)
    training, tuning = optax.adam(0.1), optax.adam(0.1)

    @jax.jit
    def outer_step(params: Any, hparams: Any, states: Any, warm: Any) -> Any:
        def inner_step(carry: Any, _: Any) -> Any:
            params, state = carry
            grads = jax.grad(inner)(params, hparams, x, y)
            updates, state = training.update(grads, state)
            return (optax.apply_updates(params, updates), state), None

        (params, training_state), _ = jax.lax.scan(inner_step, (params, states[0]), length=20)
        out = hypergradient(
            fit,
            validate,
            params,
            hparams,
            inner_args=(x, y),
            outer_args=clean,
            solver=li.CG(damping=1e-3),
            state=warm,
        )
        updates, tuning_state = tuning.update(out.grads, states[1])
        hparams = optax.apply_updates(hparams, updates)
        return params, hparams, (training_state, tuning_state), out

    params, hparams = problem.params, problem.hparams
    states = (training.init(params), tuning.init(hparams))
    warm = li.HypergradientState()
    values, steps, traces = [], [], []
    for _ in range(15):
        params, hparams, states, out = outer_step(params, hparams, states, warm)
        warm = out.state
        values.append(float(outer(params, hparams, *clean)))
        steps.append(int(out.solution.num_steps))
        traces.append(fit.calls)
        assert bool(out.solution.converged)
    assert values[-1] < 0.9 * values[0]
    assert min(steps[2:]) < steps[0]  # warm starts
    assert traces[0] < traces[1]
    assert traces[1] == traces[-1]  # compiled once without a state, once with one


def test_an_optax_optimizer_descends_along_the_gradient_of_an_implicit_minimizer():
    optax = pytest.importorskip("optax")
    problem = Problem()
    (x, y), clean = problem.inner_args, problem.outer_args
    training, tuning = optax.sgd(0.1, momentum=0.9), optax.sgd(0.5)

    def fit(params: Any, hparams: Any) -> Any:
        return data_term(params, hparams, x, y) + 0.5 * sum(
            jnp.sum(leaf**2) for leaf in jax.tree_util.tree_leaves(params)
        )

    @implicit_minimizer(fit, solver=li.CG())
    def train(init: Any, hparams: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            params, state = carry
            updates, state = training.update(jax.grad(fit)(params, hparams), state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (init, training.init(init)), length=100)[0][0]

    def validate(hparams: Any) -> Any:
        return outer(train(problem.params, hparams), hparams, *clean)

    @jax.jit
    def step(hparams: Any, state: Any) -> Any:
        value, grads = jax.value_and_grad(validate)(hparams)
        updates, state = tuning.update(grads, state)
        return value, optax.apply_updates(hparams, updates), state

    hparams = {"weights": problem.hparams["weights"]}
    state, values = tuning.init(hparams), []
    for _ in range(10):
        value, hparams, state = step(hparams, state)
        values.append(float(value))
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0] - 0.005
