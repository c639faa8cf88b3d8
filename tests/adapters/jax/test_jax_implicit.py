"""Derivatives of minimisers by the transformations of jax that the other framework lacks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import lowrank_inverse as li

jax = pytest.importorskip("jax")

import jax.numpy as jnp

from lowrank_inverse_jax import implicit_minimizer
from tests.adapters.jax.jax_oracle import Counted, compilations, relative
from tests.adapters.shared.test_implicit import (
    LOG_DECAY,
    SOLVERS,
    WEIGHTS,
    A,
    N,
    Y,
    cubes,
    fit,
    minimiser,
    newton_step,
    theorem,
)

pytestmark = pytest.mark.usefixtures("wide")

TIGHT = li.CG(rtol=1e-13)


def inner(x: Any, h: Any, w: Any) -> Any:
    return fit(x, h, w, jnp.asarray(A), jnp.asarray(Y))


def newton(init: Any, h: Any, w: Any) -> Any:
    """Minimise in a while loop, which cannot be differentiated in reverse mode."""

    def step(state: Any) -> Any:
        return state[0] + 1, newton_step(state[1], h, w, jnp.asarray(A), jnp.asarray(Y))

    return jax.lax.while_loop(lambda state: state[0] < 10, step, (0, init))[1]


def point() -> tuple[Any, Any]:
    return jnp.asarray(LOG_DECAY), jnp.asarray(WEIGHTS)


def by_h() -> np.ndarray:
    return theorem(minimiser())[0]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == "cg, damped" else [pytest.mark.slow])
        for name in SOLVERS
    ],
)
def test_both_modes_give_the_derivative_of_the_theorem_by_hparams_and_args(name):
    train = implicit_minimizer(inner, solver=SOLVERS[name], rng=0)(newton)

    @jax.jit
    def derivatives(h: Any, w: Any) -> Any:
        def value(h: Any, w: Any) -> Any:
            return cubes(train(jnp.zeros(N), h, w))

        return jax.grad(value, argnums=(0, 1))(h, w), jax.jacfwd(value, argnums=(0, 1))(h, w)

    wanted = theorem(minimiser(), getattr(SOLVERS[name], "damping", 0.0))
    for found in derivatives(*point()):
        assert all(relative(*pair) < 1e-9 for pair in zip(found, wanted, strict=True))


@pytest.mark.slow
def test_a_long_neumann_series_comes_close():
    train = implicit_minimizer(inner, solver=li.Neumann(num_terms=2000))(newton)
    h, w = point()
    found = jax.jit(jax.grad(lambda h: cubes(train(jnp.zeros(N), h, w))))(h)
    assert relative(found, by_h()) < 1e-4


@pytest.mark.slow
def test_jacobians_of_both_modes_and_jvp_agree_with_differences_of_the_problem_solved_anew():
    train = implicit_minimizer(inner, solver=TIGHT)(newton)
    h, w = point()

    def minimum(h: Any) -> Any:
        return train(jnp.zeros(N), h, w)

    direction = jnp.linspace(1, 2, N)
    reverse, forward, along = jax.jit(
        lambda h: (
            jax.jacrev(minimum)(h),
            jax.jacfwd(minimum)(h),
            jax.jvp(minimum, (h,), (direction,))[1],
        )
    )(h)
    steps = 1e-5 * np.eye(N)
    columns = [minimiser(LOG_DECAY + e) - minimiser(LOG_DECAY - e) for e in steps]
    differences = np.stack(columns, axis=1) / 2e-5
    assert relative(reverse, differences) < 1e-8
    assert relative(forward, differences) < 1e-8
    assert relative(along, differences @ np.asarray(direction)) < 1e-8


def test_the_tangent_of_the_start_is_zero():
    train = implicit_minimizer(inner, solver=li.CG())(newton)
    h, w = point()
    ones = jnp.ones(N)
    tangent = jax.jit(lambda init: jax.jvp(lambda x: train(x, h, w), (init,), (init,))[1])(ones)
    np.testing.assert_array_equal(tangent, np.zeros(N))


@pytest.mark.slow
def test_vmap_inside_and_outside_of_both_modes_equals_a_loop():
    train = implicit_minimizer(inner, solver=li.CG(rtol=1e-12))(newton)
    h, w = point()
    several = jnp.stack([h, 2 * h, h - 1])

    def value(h: Any) -> Any:
        return cubes(train(jnp.zeros(N), h, w))

    inside, outside, forward = jax.jit(
        lambda several: (
            jax.vmap(jax.grad(value))(several),
            jax.grad(lambda s: jax.vmap(value)(s).sum())(several),
            jax.vmap(jax.jacfwd(value))(several),
        )
    )(several)
    loop = jax.jit(jax.grad(value))
    wanted = np.stack([loop(one) for one in several])
    assert all(relative(found, wanted) < 1e-9 for found in (inside, outside, forward))


@pytest.mark.slow
def test_it_may_be_differentiated_twice():
    h, w = point()

    def solved(h: Any) -> Any:
        return cubes(
            jax.lax.scan(
                lambda x, _: (newton_step(x, h, w, jnp.asarray(A), jnp.asarray(Y)), None),
                jnp.zeros(N),
                length=12,
            )[0]
        )

    train = implicit_minimizer(inner, solver=TIGHT)(newton)
    found, wanted = jax.jit(
        lambda h: (
            jax.jacfwd(jax.grad(lambda h: cubes(train(jnp.zeros(N), h, w))))(h),
            jax.hessian(solved)(h),
        )
    )(h)
    assert relative(found, wanted) < 1e-9


def test_a_second_jitted_call_compiles_nothing():
    loss = Counted(inner)
    train = implicit_minimizer(loss, solver=li.CG())(newton)
    run = jax.jit(jax.grad(lambda h, w: cubes(train(jnp.zeros(N), h, w))))
    h, w = point()
    before = run(h, w)
    traces, other = loss.calls, (h + 1, w * 2)
    assert traces > 0
    with compilations() as second:
        after = run(*other)
    assert second == []
    assert loss.calls == traces
    assert relative(after, before) > 1e-2


def test_none_may_be_among_the_parameters():
    h, w = point()
    trained = implicit_minimizer(lambda p, h: inner(p["x"], h, w), solver=TIGHT)(
        lambda init, h: {"x": newton(init["x"], h, w), "bias": None}
    )
    init = {"x": jnp.zeros(N), "bias": None}
    found = jax.jit(jax.grad(lambda h: cubes(trained(init, h)["x"])))(h)
    assert relative(found, by_h()) < 1e-11


def test_a_random_key_may_be_among_the_arguments():
    h, w = point()
    trained = implicit_minimizer(lambda x, h, key: inner(x, h, w), solver=TIGHT)(
        lambda init, h, key: newton(init + jax.random.normal(key, (N,)), h, w)
    )
    key = jax.random.key(0)
    found = jax.jit(jax.grad(lambda h: cubes(trained(jnp.zeros(N), h, key))))(h)
    assert relative(found, by_h()) < 1e-9


def test_an_optax_loop_trains_inside():
    optax = pytest.importorskip("optax")
    optimizer = optax.adam(0.05)

    @implicit_minimizer(inner, solver=li.CG(rtol=1e-12))
    def train(init: Any, h: Any, w: Any) -> Any:
        def step(carry: Any, _: Any) -> Any:
            x, state = carry
            updates, state = optimizer.update(jax.grad(inner)(x, h, w), state)
            return (optax.apply_updates(x, updates), state), None

        return jax.lax.scan(step, (init, optimizer.init(init)), length=2000)[0][0]

    x, found = jax.jit(
        lambda h, w: (
            train(jnp.zeros(N), h, w),
            jax.grad(lambda h, w: cubes(train(jnp.zeros(N), h, w)), argnums=(0, 1))(h, w),
        )
    )(*point())
    assert relative(x, minimiser()) < 1e-6
    for one, wanted in zip(found, theorem(minimiser()), strict=True):
        assert relative(one, wanted) < 1e-5


def test_a_loss_of_integers_is_refused_by_name():
    train = implicit_minimizer(lambda x, h, w: jnp.asarray(3), solver=li.CG())(newton)
    with pytest.raises(TypeError, match="`inner_loss` must be real"):
        jax.grad(lambda h: cubes(train(jnp.zeros(N), h, point()[1])))(point()[0])
