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
from tests.conftest import x64

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


SOLVERS = {
    "exact": (li.Exact(), 0.0),
    "cg": (li.CG(rtol=1e-13), 0.0),
    "cg, damped": (li.CG(rtol=1e-13, damping=0.3), 0.3),
    "nystrom-cg, damped": (li.NystromCG(rank=2, rtol=1e-13, damping=0.3), 0.3),
    "nystrom of rank n": (li.Nystrom(rank=N, damping=0.3), 0.3),
    "streamed": (li.Nystrom(rank=N, damping=0.3, memory="streamed"), 0.3),
    "neumann": (li.Neumann(num_terms=2000), 0.0),
    "callable": (lambda A, b: jax.scipy.sparse.linalg.cg(A, b, tol=1e-13)[0], 0.0),
}
QUICK = ("cg", "cg, damped", "nystrom of rank n")

each_solver = pytest.mark.parametrize(
    ("solver", "damping"),
    [
        pytest.param(*case, id=name, marks=[] if name in QUICK else [pytest.mark.slow])
        for name, case in SOLVERS.items()
    ],
)


@each_solver
def test_both_modes_give_the_derivative_of_the_theorem_by_hparams_and_args(solver, damping):
    train = implicit_minimizer(inner, solver=solver, rng=0)(newton)
    exact = Exact()

    @jax.jit
    def derivatives(h: Any, w: Any) -> Any:
        def value(h: Any, w: Any) -> Any:
            return cubes(train(jnp.zeros(N), h, w))

        return jax.grad(value, argnums=(0, 1))(h, w), jax.jacfwd(value, argnums=(0, 1))(h, w)

    tolerance = 1e-4 if isinstance(solver, li.Neumann) else 1e-9
    for found in derivatives(*point()):
        for one, wanted in zip(found, exact.gradients(damping), strict=True):
            assert relative(one, wanted) < tolerance


def test_the_value_is_what_the_function_returns():
    train = implicit_minimizer(inner, solver=li.CG())(newton)
    exact = Exact()
    plain, (found, _) = jax.jit(
        lambda h, w: (
            train(jnp.ones(N), h, w),
            jax.value_and_grad(lambda h: cubes(train(jnp.ones(N), h, w)))(h),
        )
    )(*point())
    assert relative(plain, exact.minimiser(exact.h, exact.w)) < 1e-12
    assert float(found) == pytest.approx(np.sum(exact.minimiser(exact.h, exact.w) ** 3))


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


def test_in_float32_it_is_right_to_rounding():
    with x64(False):
        h, w = point("float32")
        train = implicit_minimizer(inner, solver=li.CG())(newton)
        found = jax.jit(
            jax.grad(lambda h, w: cubes(train(jnp.zeros(N, "float32"), h, w)), argnums=(0, 1))
        )(h, w)
        assert all(part.dtype == jnp.float32 for part in found)
    for one, wanted in zip(found, Exact().gradients(), strict=True):
        assert relative(one, wanted) < 1e-5


@pytest.mark.slow
def test_it_works_outside_jit_too():
    train = implicit_minimizer(inner, solver=li.CG(rtol=1e-13))(newton)
    h, w = point()
    by_h, _ = Exact().gradients()
    assert relative(jax.grad(lambda h: cubes(train(jnp.zeros(N), h, w)))(h), by_h) < 1e-11


def test_the_derivative_by_the_start_is_zero():
    train = implicit_minimizer(inner, solver=li.CG())(newton)
    h, w = point()
    grad, tangent = jax.jit(
        lambda init: (
            jax.grad(lambda init: cubes(train(init, h, w)))(init),
            jax.jvp(lambda init: train(init, h, w), (init,), (init,))[1],
        )
    )(jnp.ones(N))
    np.testing.assert_array_equal(grad, np.zeros(N))
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


# Structures.


def tree_inner(params: Any, hparams: Any) -> Any:
    x = jnp.concatenate([params["x"][0], params["x"][1][None]])
    return inner(x, hparams["log_decay"], point()[1]) * hparams["power"]


def test_parameters_and_hparams_may_be_pytrees_with_integers_among_them():
    def train(init: Any, hparams: Any) -> Any:
        x = newton(jnp.zeros(N), hparams["log_decay"], point()[1])
        return {"x": (x[:-1], x[-1]), "steps": init["steps"] + 3, "mask": jnp.asarray([True])}

    trained = implicit_minimizer(tree_inner, solver=li.CG(rtol=1e-13))(train)
    init = {"x": (jnp.zeros(N - 1), jnp.zeros(())), "steps": 4, "mask": jnp.asarray([False])}
    h = point()[0]

    def value(h: Any) -> Any:
        params = trained(init, {"log_decay": h, "power": 2})
        return cubes(params["x"][0]) + params["x"][1] ** 3 + 0 * params["steps"]

    assert int(trained(init, {"log_decay": h, "power": 2})["steps"]) == 7
    reverse, forward = jax.jit(lambda h: (jax.grad(value)(h), jax.jacfwd(value)(h)))(h)
    assert relative(reverse, Exact().gradients()[0]) < 1e-11
    assert relative(forward, Exact().gradients()[0]) < 1e-11


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


def test_hparams_may_have_another_dtype_than_the_parameters():
    trained = implicit_minimizer(inner, solver=li.CG(rtol=1e-13))(newton)
    h, w = point()
    found = jax.jit(jax.grad(lambda h: cubes(trained(jnp.zeros(N), h, w))))(h.astype(jnp.float32))
    assert found.dtype == jnp.float32
    assert relative(found, Exact().gradients()[0]) < 1e-6


def test_a_scalar_problem_has_the_textbook_answer():
    @implicit_minimizer(lambda w, h: 0.5 * ((w - 3) ** 2 + h * w**2), solver=li.CG())
    def train(init: Any, h: Any) -> Any:
        return 3 / (1 + h)

    assert float(jax.grad(lambda h: train(0.0, h))(1.0)) == pytest.approx(-0.75, rel=1e-12)


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


# Settings and errors.


def test_seeds_reproduce_and_differ():
    h, w = point()

    def run(rng: Any) -> Any:
        train = implicit_minimizer(inner, solver=li.Nystrom(rank=2, damping=0.1), rng=rng)(newton)
        return jax.jit(jax.grad(lambda h: cubes(train(jnp.zeros(N), h, w))))(h)

    first = run(0)
    assert relative(run(np.random.default_rng(0)), first) == 0
    assert relative(run(1), first) > 1e-3


def test_it_keeps_name_and_docstring():
    @implicit_minimizer(inner, solver=li.CG())
    def train(init: Any, h: Any, w: Any) -> Any:
        """Train."""
        return newton(init, h, w)

    assert train.__name__ == "train"
    assert train.__doc__ == "Train."


def test_what_is_no_solver_is_refused_at_once():
    for solver in (3, li.CG):
        with pytest.raises(TypeError, match="`solver` must be settings"):
            implicit_minimizer(inner, solver=solver)


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "a vector": (lambda x, h, w: x, ValueError, r"`inner_loss` must return a scalar; got shape"),
    "an integer": (lambda x, h, w: jnp.asarray(3), TypeError, "`inner_loss` must be real"),
    "no function": (3.0, TypeError, "`inner_loss` must be a function"),
}


@pytest.mark.parametrize(("loss", "kind", "message"), BAD.values(), ids=BAD)
def test_an_inner_loss_that_cannot_be_differentiated_is_refused_by_name(loss, kind, message):
    h, w = point()
    with pytest.raises(kind, match=message):
        train = implicit_minimizer(loss, solver=li.CG())(newton)
        jax.grad(lambda h: cubes(train(jnp.zeros(N), h, w)))(h)


def test_minimisers_without_an_array_of_floats_are_refused():
    train = implicit_minimizer(inner, solver=li.CG())(lambda init, h, w: 3)
    h, w = point()
    with pytest.raises(ValueError, match="must hold a floating-point array"):
        jax.grad(lambda h: train(0, h, w) * h[0])(h)
