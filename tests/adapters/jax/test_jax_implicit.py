"""Derivatives of minimisers against the implicit function theorem in NumPy and differences."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import lowrank_inverse as li

jax = pytest.importorskip("jax")

import jax.numpy as jnp

from lowrank_inverse_jax import implicit_minimizer
from tests.adapters.jax.jax_oracle import Counted, compilations, relative

pytestmark = pytest.mark.usefixtures("wide")

NUM_ROWS, N = 7, 4


def data(dtype: str = "float64") -> tuple[Any, Any]:
    rng = np.random.default_rng(0)
    numbers = rng.standard_normal((NUM_ROWS, N)), rng.standard_normal(NUM_ROWS)
    return tuple(jnp.asarray(x.astype(np.float32), dtype) for x in numbers)


def point(dtype: str = "float64") -> tuple[Any, Any]:
    """Return logarithms of the decay of each coefficient, and weights of the rows."""
    log_decay = np.linspace(-0.5, 0.4, N, dtype=np.float32)
    weights = np.linspace(0.5, 1.5, NUM_ROWS, dtype=np.float32)
    return jnp.asarray(log_decay, dtype), jnp.asarray(weights, dtype)


def inner(x: Any, log_decay: Any, weights: Any) -> Any:
    """Weighted least squares with a decay for each coefficient."""
    A, y = data(x.dtype)
    return 0.5 * (weights * (A @ x - y) ** 2).sum() + 0.5 * (jnp.exp(log_decay) * x**2).sum()


def newton(init: Any, log_decay: Any, weights: Any) -> Any:
    """Minimise in a while loop, which cannot be differentiated in reverse mode."""
    A, y = data(init.dtype)

    def step(state: Any) -> Any:
        count, x = state
        gradient = A.T @ (weights * (A @ x - y)) + jnp.exp(log_decay) * x
        hessian = (A.T * weights) @ A + jnp.diag(jnp.exp(log_decay))
        return count + 1, x - jnp.linalg.solve(hessian, gradient)

    return jax.lax.while_loop(lambda state: state[0] < 3, step, (0, init))[1]


def cubes(x: Any) -> Any:
    return jnp.sum(x**3)


class Exact:
    """The same problem in NumPy: the minimiser, and the theorem written out."""

    def __init__(self) -> None:
        self.A, self.y = (np.asarray(part, np.float64) for part in data("float32"))
        self.h, self.w = (np.asarray(part, np.float64) for part in point("float32"))

    def hessian(self, h: np.ndarray, w: np.ndarray) -> np.ndarray:
        return (self.A.T * w) @ self.A + np.diag(np.exp(h))

    def minimiser(self, h: np.ndarray, w: np.ndarray) -> np.ndarray:
        return np.linalg.solve(self.hessian(h, w), self.A.T @ (w * self.y))

    def jacobians(self, damping: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """Return the derivatives of the minimiser by `h` and by `w`."""
        x = self.minimiser(self.h, self.w)
        inverse = np.linalg.inv(self.hessian(self.h, self.w) + damping * np.eye(N))
        by_w = self.A.T * (self.A @ x - self.y)
        return -inverse * (np.exp(self.h) * x), -inverse @ by_w

    def gradients(self, damping: float = 0.0) -> list[np.ndarray]:
        """Return the derivatives of the sum of cubes."""
        x = self.minimiser(self.h, self.w)
        return [3 * x**2 @ jacobian for jacobian in self.jacobians(damping)]


def test_jacobians_of_both_modes_and_jvp_agree_with_differences_of_the_problem_solved_anew():
    exact = Exact()
    train = implicit_minimizer(inner, solver=li.CG(rtol=1e-13))(newton)
    h, w = point()

    def minimiser(h: Any) -> Any:
        return train(jnp.zeros(N), h, w)

    direction = jnp.linspace(1, 2, N)
    reverse, forward, along = jax.jit(
        lambda h: (
            jax.jacrev(minimiser)(h),
            jax.jacfwd(minimiser)(h),
            jax.jvp(minimiser, (h,), (direction,))[1],
        )
    )(h)
    step = 1e-5
    differences = np.stack(
        [
            (exact.minimiser(exact.h + e, exact.w) - exact.minimiser(exact.h - e, exact.w))
            / (2 * step)
            for e in step * np.eye(N)
        ],
        axis=1,
    )
    assert relative(reverse, differences) < 1e-8
    assert relative(forward, differences) < 1e-8
    assert relative(along, differences @ np.asarray(direction)) < 1e-8
    assert relative(reverse, exact.jacobians()[0]) < 1e-11


def test_the_tangent_of_the_start_is_zero():
    train = implicit_minimizer(inner, solver=li.CG())(newton)
    h, w = point()
    ones = jnp.ones(N)
    tangent = jax.jit(lambda init: jax.jvp(lambda x: train(x, h, w), (init,), (init,))[1])(ones)
    np.testing.assert_array_equal(tangent, np.zeros(N))


def test_vmap_over_hparams_equals_a_loop():
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
    assert relative(wanted[0], Exact().gradients()[0]) < 1e-9


def test_it_may_be_differentiated_twice():
    h, w = point()
    A, y = data()

    def solved(h: Any) -> Any:
        return cubes(jnp.linalg.solve((A.T * w) @ A + jnp.diag(jnp.exp(h)), A.T @ (w * y)))

    train = implicit_minimizer(inner, solver=li.CG(rtol=1e-13))(newton)
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
    def train(init: Any, hparams: Any) -> Any:
        return {"x": newton(init["x"], hparams, point()[1]), "bias": None}

    def loss(params: Any, h: Any) -> Any:
        return inner(params["x"], h, point()[1])

    trained = implicit_minimizer(loss, solver=li.CG(rtol=1e-13))(train)
    init = {"x": jnp.zeros(N), "bias": None}
    found = jax.jit(jax.grad(lambda h: cubes(trained(init, h)["x"])))(point()[0])
    assert relative(found, Exact().gradients()[0]) < 1e-11


def test_a_random_key_may_be_among_the_arguments():
    trained = implicit_minimizer(
        lambda x, h, key: inner(x, h, point()[1]), solver=li.CG(rtol=1e-13)
    )(lambda init, h, key: newton(init + jax.random.normal(key, (N,)), h, point()[1]))
    key = jax.random.key(0)
    found = jax.jit(jax.grad(lambda h: cubes(trained(jnp.zeros(N), h, key))))(point()[0])
    assert relative(found, Exact().gradients()[0]) < 1e-9


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

    exact = Exact()
    x, found = jax.jit(
        lambda h, w: (
            train(jnp.zeros(N), h, w),
            jax.grad(lambda h, w: cubes(train(jnp.zeros(N), h, w)), argnums=(0, 1))(h, w),
        )
    )(*point())
    assert relative(x, exact.minimiser(exact.h, exact.w)) < 1e-6
    for one, wanted in zip(found, exact.gradients(), strict=True):
        assert relative(one, wanted) < 1e-5


def test_a_loss_of_integers_is_refused_by_name():
    train = implicit_minimizer(lambda x, h, w: jnp.asarray(3), solver=li.CG())(newton)
    with pytest.raises(TypeError, match="`inner_loss` must be real"):
        jax.grad(lambda h: cubes(train(jnp.zeros(N), h, point()[1])))(point()[0])
