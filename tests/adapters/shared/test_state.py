"""A state carried through outer steps in both adapters: cost, files and diagnostics."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
from array_api_compat import array_namespace

import lowrank_inverse as li
from lowrank_inverse.bilevel.diagnostics import HypergradientWarning
from tests.adapters.shared.frameworks import flat, slow_in_jax
from tests.adapters.shared.problem import sigmoid

RIDGE, N, RANK, NUM_ROWS = 0.01, 12, 6, 30
SOLVER = li.NystromCG(sampling="uniform", rank=RANK, max_steps=4, rtol=1e-10)
rng = np.random.default_rng(0)
X = rng.standard_normal((NUM_ROWS, N)) * np.logspace(0, -1.5, N)
Y, TARGET = X @ np.ones(N), rng.standard_normal(N)
START = np.linspace(-1, 1, NUM_ROWS)


class Loop:
    """Weights of the rows learned by gradient descent, the inner problem solved in closed form."""

    def __init__(self, framework: Any) -> None:
        self.framework = framework
        self.x, self.y, self.target = map(framework.array, (X, Y, TARGET))

    def inner(self, theta: Any, h: Any) -> Any:
        xp = array_namespace(theta)
        return 0.5 * xp.mean(sigmoid(h) * (self.x @ theta - self.y) ** 2)

    def outer(self, theta: Any, h: Any) -> Any:
        return 0.5 * array_namespace(theta).sum((theta - self.target) ** 2)

    def step(self, h: np.ndarray, state: Any = None, *, away: float = 0.0, **options: Any) -> Any:
        weights = sigmoid(h)[:, None] / NUM_ROWS
        normal = X.T @ (weights * X) + RIDGE * np.eye(N)
        theta = np.linalg.solve(normal, X.T @ (weights[:, 0] * Y)) + away
        variables = self.framework.variables
        options = {"solver": SOLVER, "ridge": RIDGE, "rng": 0, "eager": True, **options}
        return self.framework.hypergradient(
            self.inner, self.outer, variables(theta), variables(h), state=state, **options
        )


def names(out: Any) -> set[str]:
    return {finding.name for finding in out.info.findings()}


@slow_in_jax
def test_an_outer_loop_pays_for_columns_once(framework):
    loop, h, state = Loop(framework), START, li.HypergradientState()
    for i in range(4):
        out = loop.step(h, state)
        h, state = h - 0.1 * flat(out.grads), out.state
        assert (int(out.info.recycled) > 0) == (i > 0)
        products = int(out.info.num_products)
        assert products <= 4 + 2 if i else products == RANK + 4 + 1
        assert float(out.info.relative_residual) < 0.05


@pytest.mark.parametrize("ridge", [RIDGE, np.linspace(0.01, 0.02, N)], ids=["number", "for each"])
def test_a_run_interrupted_and_resumed_has_the_same_trajectory_bit_for_bit(
    framework, ridge, tmp_path
):
    loop, h, state, trajectory = Loop(framework), START, li.HypergradientState(), []
    ridge = framework.array(ridge)
    for i in range(5):
        if i == 2:
            state.save(tmp_path / "state.npz")
            kept = h
        out = loop.step(h, state, ridge=ridge)
        h, state = h - 0.1 * flat(out.grads), out.state
        trajectory.append(h)
    h, state = kept, li.HypergradientState.load(tmp_path / "state.npz")
    for i in range(2, 5):
        out = loop.step(h, state, ridge=ridge)
        h, state = h - 0.1 * flat(out.grads), out.state
        assert np.array_equal(h, trajectory[i])


def test_a_good_hypergradient_has_nothing_to_warn_of(framework):
    out = Loop(framework).step(START, solver=li.CG())
    assert out.info.findings() == ()
    assert out.explain().endswith("nothing to warn of")
    assert "(converged)" in out.explain()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out.info.warn()


def test_an_inner_problem_far_from_its_minimum_is_reported(framework):
    out = Loop(framework).step(START, away=3.0, solver=li.CG(damping=1e-2))
    assert names(out) == {"not_stationary"}
    with pytest.warns(HypergradientWarning, match="Train the inner problem further"):
        out.info.warn()


def test_a_ridge_that_was_forgotten_is_reported(framework):
    out = Loop(framework).step(START, ridge=None, solver=li.CG(damping=RIDGE))
    assert "not_stationary" in names(out)
    assert "pass it as `ridge`" in out.explain()


def pair(framework: Any, inner: Any, outer: Any, theta: float) -> Any:
    """Return the hypergradient of two parameters and a number."""
    at = framework.variables(np.full(2, theta)), framework.variables(1.0)
    return framework.hypergradient(inner, outer, *at, solver=li.CG(), eager=True)


def test_the_estimated_step_is_that_of_newton_on_a_quadratic(framework):
    out = pair(
        framework,
        lambda w, h: 1.5 * array_namespace(w).sum((w - h) ** 2),
        lambda w, h: array_namespace(w).sum(w),
        2.0,
    )
    assert float(out.info.inner_step) == pytest.approx(np.sqrt(2) / np.sqrt(8))


def test_negative_curvature_and_unbounded_errors_are_reported(framework):
    out = pair(
        framework, lambda w, h: h * (w[0] ** 2 - w[1] ** 2), lambda w, h: (w[1] - 1) ** 2, 0.1
    )
    assert "negative_curvature" in names(out)
    assert np.isnan(float(out.info.error_bound))


def test_the_error_bound_holds_and_an_answer_that_it_does_not_support_is_reported(framework):
    loop = Loop(framework)
    exact = flat(loop.step(START, solver=li.CG(rtol=1e-13)).ihvp)
    outs = [loop.step(START, solver=li.CG(max_steps=k)) for k in (1, 6, 40)]
    for out in outs:
        q = flat(out.ihvp)
        error = np.linalg.norm(q - exact) / np.linalg.norm(q)
        assert 0 < error <= float(out.info.error_bound)
    assert "worse_than_identity" in names(outs[0])
    assert "Raise `max_steps` or the rank" in outs[0].explain()
    assert names(outs[-1]) == set()


def test_hyperparameters_without_a_path_are_reported(framework):
    loop = Loop(framework)
    out = framework.hypergradient(
        lambda theta, h: loop.inner(theta, h["w"]),
        loop.outer,
        framework.variables(np.zeros(N)),
        framework.variables({"idle": np.zeros(3), "w": START}),
        solver=li.CG(),
        ridge=RIDGE,
        eager=True,
    )
    assert "no_path" in names(out)
    assert "idle" in out.explain()
