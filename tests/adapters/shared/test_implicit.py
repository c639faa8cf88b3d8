"""Minimisers of both adapters, differentiated by the implicit function theorem."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from array_api_compat import array_namespace

import lowrank_inverse as li
from tests.adapters.shared.frameworks import each, relative, slow_in_jax
from tests.conftest import host

NUM_ROWS, N = 7, 4
EXACT = li.CG(rtol=1e-13)
rng = np.random.default_rng(0)
A = rng.standard_normal((NUM_ROWS, N)).astype(np.float32).astype(float)
Y = rng.standard_normal(NUM_ROWS).astype(np.float32).astype(float)
LOG_DECAY, WEIGHTS = np.linspace(-0.5, 0.4, N), np.linspace(0.5, 1.5, NUM_ROWS)
ELSEWHERE = np.linspace(0.3, -0.6, N)
"""No minimum."""


def fit(x: Any, h: Any, w: Any, A: Any, y: Any) -> Any:
    """Weighted least squares with a decay for each coefficient, and a term that is no square."""
    xp = array_namespace(x)
    squares = 0.5 * xp.sum(w * (A @ x - y) ** 2) + 0.5 * xp.sum(xp.exp(h) * x**2)
    return squares + xp.sum(x**4) / 12


def newton_step(x: Any, h: Any, w: Any, A: Any, y: Any) -> Any:
    xp = array_namespace(x)
    slope = A.T @ (w * (A @ x - y)) + xp.exp(h) * x + x**3 / 3
    curvature = (A.T * w) @ A + xp.eye(N, dtype=A.dtype) * (xp.exp(h) + x**2)
    return x - xp.linalg.solve(curvature, slope)


def cubes(x: Any) -> Any:
    return array_namespace(x).sum(x**3)


class Problem(NamedTuple):
    """The data in the arrays of a framework."""

    framework: Any
    A: Any
    y: Any

    @classmethod
    def of(cls, framework: Any, dtype: str = "float64") -> Problem:
        return cls(framework, framework.array(A, dtype), framework.array(Y, dtype))

    def inner(self, x: Any, h: Any, w: Any) -> Any:
        return fit(x, h, w, self.A, self.y)

    def train(self, init: Any, h: Any, w: Any) -> Any:
        """Minimise to the last digit."""
        x = 0 * self.A[0]
        for _ in range(8):
            x = newton_step(x, h, w, self.A, self.y)
        return x

    def minimizer(self, train: Any = None, inner: Any = None, **options: Any) -> Any:
        options = {"solver": EXACT, **options}
        wrap = self.framework.adapter.implicit_minimizer(inner or self.inner, **options)
        return wrap(train or self.train)

    def gradients(self, minimizer: Any, dtype: str = "float64") -> tuple[Any, Any]:
        """Return the derivatives of the sum of cubes by the decays and by the weights."""
        start = self.framework.array(np.zeros(N), dtype)
        at = self.framework.array(LOG_DECAY, dtype), self.framework.array(WEIGHTS, dtype)
        return self.framework.gradients(lambda h, w: cubes(minimizer(start, h, w)), *at)


def minimiser(h: np.ndarray = LOG_DECAY, w: np.ndarray = WEIGHTS) -> np.ndarray:
    x = np.zeros(N)
    for _ in range(10):
        x = newton_step(x, h, w, A, Y)
    return x


def theorem(x: np.ndarray, damping: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Return the derivatives of the sum of cubes at `x` by the formula, dense."""
    H = (A.T * WEIGHTS) @ A + np.diag(np.exp(LOG_DECAY) + x**2 + damping)
    q = np.linalg.solve(H, 3 * x**2)
    return -np.exp(LOG_DECAY) * x * q, -(A @ x - Y) * (A @ q)


SOLVERS = {
    "exact": li.Exact(),
    "cg": EXACT,
    "cg, damped": li.CG(rtol=1e-13, damping=0.3),
    "nystrom-cg, damped": li.NystromCG(sampling="uniform", rank=2, rtol=1e-13, damping=0.3),
    "nystrom of rank n": li.Nystrom(rank=N, damping=0.3),
    "streamed": li.Nystrom(rank=N, damping=0.3, memory="streamed"),
    "callable": lambda matvec, b: (
        li.cg(li.FunctionOperator(matvec, N, like=b), b, rtol=1e-13).value
    ),
}


@pytest.mark.filterwarnings("ignore::lowrank_inverse.bilevel.diagnostics.HypergradientWarning")
@each("solver", SOLVERS, quick=("cg, damped", "nystrom of rank n"))
def test_it_is_the_dense_implicit_formula_wherever_training_ended(framework, solver):
    problem = Problem.of(framework)
    found = problem.gradients(
        problem.minimizer(lambda *_: framework.array(ELSEWHERE), solver=solver, rng=0)
    )
    for one, wanted in zip(found, theorem(ELSEWHERE, getattr(solver, "damping", 0.0)), strict=True):
        assert relative(one, wanted) < 1e-9


def test_at_the_minimum_it_equals_differences_of_the_problem_solved_anew(framework):
    found = Problem.of(framework).gradients(Problem.of(framework).minimizer())

    def differences(value: Any, at: np.ndarray) -> np.ndarray:
        return np.array([value(at + e) - value(at - e) for e in 1e-5 * np.eye(at.size)]) / 2e-5

    assert relative(found[0], differences(lambda h: cubes(minimiser(h)), LOG_DECAY)) < 1e-8
    by_w = differences(lambda w: cubes(minimiser(w=w)), WEIGHTS)
    assert relative(found[1], by_w) < 1e-8


@slow_in_jax
def test_it_is_the_hypergradient_of_the_same_losses(framework):
    problem, weights = Problem.of(framework), framework.array(WEIGHTS)
    out = framework.hypergradient(
        lambda x, h: problem.inner(x, h, weights),
        lambda x, h: cubes(x),
        framework.variables(minimiser()),
        framework.variables(LOG_DECAY),
        solver=EXACT,
        eager=True,
    )
    assert relative(problem.gradients(problem.minimizer())[0], out.grads) < 1e-12


def test_in_float32_it_is_right_to_rounding(framework):
    with framework.narrow():
        problem = Problem.of(framework, "float32")
        found = problem.gradients(problem.minimizer(solver=li.CG()), "float32")
    assert all(framework.dtype_of(part) == "float32" for part in found)
    for one, wanted in zip(found, theorem(minimiser()), strict=True):
        assert relative(one, wanted) < 1e-5


def test_hparams_may_have_another_dtype_than_the_parameters(framework):
    problem = Problem.of(framework)
    found = problem.gradients(problem.minimizer(lambda *_: framework.array(minimiser())), "float32")
    assert all(framework.dtype_of(part) == "float32" for part in found)
    assert relative(found[0], theorem(minimiser())[0]) < 1e-5


def test_the_value_is_that_of_the_function_with_its_name_and_docstring(framework):
    problem = Problem.of(framework)

    def fitted(init: Any, h: Any, w: Any) -> Any:
        """Fit."""
        return problem.train(init, h, w)

    minimizer = problem.minimizer(fitted)
    found = minimizer(None, framework.array(LOG_DECAY), framework.array(WEIGHTS))
    assert relative(host(found), minimiser()) < 1e-12
    assert (minimizer.__name__, minimizer.__doc__) == ("fitted", "Fit.")


def test_the_derivative_by_the_start_is_zero(framework):
    problem, w = Problem.of(framework), framework.array(WEIGHTS)
    minimizer = problem.minimizer()
    by_start, by_h = framework.gradients(
        lambda init, h: cubes(minimizer(init, h, w)) + 0 * cubes(init),
        framework.array(np.ones(N)),
        framework.array(LOG_DECAY),
    )
    assert not host(by_start).any()
    assert host(by_h).any()


def test_parameters_and_hparams_may_be_trees_with_integers_among_them(framework):
    problem, w = Problem.of(framework), framework.array(WEIGHTS)
    xp = array_namespace(w)

    def joined(params: Any) -> Any:
        return xp.concat([params["x"][0], xp.reshape(params["x"][1], (1,))])

    def train(init: Any, h: Any) -> Any:
        x = problem.train(None, h["log_decay"], w)
        return {"steps": init["steps"] + 3, "x": (x[:-1], x[-1])}

    minimizer = problem.minimizer(
        train, lambda p, h: h["power"] * problem.inner(joined(p), h["log_decay"], w)
    )

    def value(h: Any) -> Any:
        params = minimizer({"steps": 4}, {"log_decay": h, "power": 2})
        return cubes(joined(params)) + 0 * params["steps"]

    h = framework.array(LOG_DECAY)
    assert int(minimizer({"steps": 4}, {"log_decay": h, "power": 2})["steps"]) == 7
    assert relative(framework.gradients(value, h)[0], theorem(minimiser())[0]) < 1e-11


def test_a_scalar_problem_has_the_textbook_answer(framework):
    wrap = framework.adapter.implicit_minimizer(
        lambda w, h: 0.5 * ((w - 3) ** 2 + h * w**2), solver=li.CG()
    )
    train = wrap(lambda init, h: 3 / (1 + h))
    (found,) = framework.gradients(lambda h: train(0.0, h), framework.array(1.0))
    assert float(found) == pytest.approx(-0.75, rel=1e-12)


@slow_in_jax
def test_vmap_over_hparams_equals_a_loop(framework):
    problem, w = Problem.of(framework), framework.array(WEIGHTS)
    minimizer = problem.minimizer()

    def gradient(h: Any) -> Any:
        return framework.gradients(lambda h: cubes(minimizer(None, h, w)), h)[0]

    several = framework.array(np.stack([LOG_DECAY, 2 * LOG_DECAY, LOG_DECAY - 1]))
    found = host(framework.vmap(gradient)(several))
    wanted = [host(gradient(h)) for h in several]
    assert relative(found, np.stack(wanted)) < 1e-9
    assert relative(wanted[0], theorem(minimiser())[0]) < 1e-9


def drawn(framework: Any, rng: Any) -> Any:
    problem = Problem.of(framework)
    solver = li.Nystrom(sampling="uniform", rank=2, damping=0.1)
    return host(problem.gradients(problem.minimizer(solver=solver, rng=rng))[0])


@pytest.mark.filterwarnings("ignore::lowrank_inverse.bilevel.diagnostics.HypergradientWarning")
def test_seeds_reproduce_and_differ(framework):
    first = drawn(framework, 0)
    assert np.array_equal(drawn(framework, 0), first)
    assert relative(drawn(framework, 1), first) > 1e-3


@pytest.mark.filterwarnings("ignore::lowrank_inverse.bilevel.diagnostics.HypergradientWarning")
@slow_in_jax
def test_a_generator_draws_what_its_seed_draws(framework):
    assert np.array_equal(drawn(framework, np.random.default_rng(0)), drawn(framework, 0))


@pytest.mark.parametrize("solver", [3, li.CG])
def test_what_is_no_solver_is_refused_at_once(framework, solver):
    with pytest.raises(TypeError, match="`solver` must be settings"):
        Problem.of(framework).minimizer(solver=solver)


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "a vector": (lambda x, h, w: x * h, ValueError, r"`inner_loss` must .*scalar; got shape \(4,"),
    "no function": (3.0, TypeError, "`inner_loss` must be a function"),
}


@pytest.mark.parametrize(("loss", "kind", "message"), BAD.values(), ids=BAD)
def test_an_inner_loss_that_cannot_be_differentiated_is_refused(framework, loss, kind, message):
    problem = Problem.of(framework)
    with pytest.raises(kind, match=message):
        problem.gradients(problem.minimizer(inner=loss))


def test_minimisers_without_an_array_of_floats_are_refused(framework):
    problem = Problem.of(framework)
    minimizer = problem.minimizer(lambda init, h, w: 3)
    with pytest.raises(ValueError, match=r"must (hold|return) a floating-point"):
        framework.gradients(
            lambda h: minimizer(None, h, framework.array(WEIGHTS)) * cubes(h),
            framework.array(LOG_DECAY),
        )
