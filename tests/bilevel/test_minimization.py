"""The outer loop on problems of NumPy whose minimum is known from dense algebra."""

from __future__ import annotations

import numpy as np
import pytest

from lowrank_inverse.bilevel import evaluation
from lowrank_inverse.bilevel.evaluation import Differentiated, Evaluator, tolerant_solver
from lowrank_inverse.bilevel.implicit_gradient import implicit_gradient
from lowrank_inverse.bilevel.info import hypergradient_info
from lowrank_inverse.bilevel.minimization import check_bounds, minimize, seed_of
from lowrank_inverse.bilevel.minimum import REMEDIES
from lowrank_inverse.bilevel.quasi_newton import Scaling, lbfgs

N, P = 12, 5
EPS = np.finfo(float).eps


class Quadratic:
    """``f = <θ, A θ> / 2 - <θ, B φ + c>``, and ``g = |θ - t|² / 2 + |φ|² / 20``."""

    eps = EPS

    def __init__(self, seed=0, *, scale_inner=1.0, scale_outer=1.0):
        rng = np.random.default_rng(seed)
        Q = np.linalg.qr(rng.standard_normal((N, N)))[0]
        self.A = (Q * np.logspace(0, 2, N)) @ Q.T * scale_inner
        self.B, self.c = rng.standard_normal((N, P)), rng.standard_normal(N)
        self.B, self.c = 10 * scale_inner * self.B, scale_inner * self.c
        self.t, self.scale_outer = rng.standard_normal(N), scale_outer
        self.params, self.hparams = np.zeros(N), np.zeros(P)
        self.count = 0

    def gradient(self, theta, phi):
        return self.A @ theta - self.B @ phi - self.c

    def hessian(self, theta, phi):
        return self.A

    def mixed(self, theta, phi):
        return -self.B

    def inner(self, theta, phi):
        self.count += 1
        value = theta @ self.A @ theta / 2 - theta @ (self.B @ phi + self.c)
        return value, self.gradient(theta, phi)

    def outer(self, theta, phi):
        return self.scale_outer * (np.sum((theta - self.t) ** 2) / 2 + phi @ phi / 20)

    def outer_gradients(self, theta, phi):
        return self.scale_outer * (theta - self.t), self.scale_outer * phi / 10

    def differentiate(self, theta, phi, state, rtol):
        outer_grad, direct = self.outer_gradients(theta, phi)
        mixed, H = self.mixed(theta, phi), self.hessian(theta, phi)
        out = implicit_gradient(
            H,
            outer_grad,
            lambda q: [mixed.T @ q],
            [direct],
            solver=tolerant_solver(None, rtol),
            state=state,
        )
        info = hypergradient_info(out, outer_grad, self.gradient(theta, phi), (), theta)
        value = self.outer(theta, phi)
        return Differentiated(value, out.grads[0], out.solution.value, info, out.state, 0.0)

    def restore(self, theta, phi):
        return theta, phi

    def minimum(self, phi=None):
        """Return the hyperparameters of the minimum, and the outer loss there."""
        S, s = np.linalg.solve(self.A, self.B), np.linalg.solve(self.A, self.c)
        if phi is None:
            phi = np.linalg.solve(S.T @ S + np.eye(P) / 10, S.T @ (self.t - s))
        return phi, self.outer(S @ phi + s, phi)


def run(problem, **options):
    defaults = {
        "inner": None,
        "outer": None,
        "bounds": None,
        "tol": 1e-8,
        "max_evaluations": 60,
        "inner_steps": 500,
        "callback": None,
        "progress": False,
        "checkpoint": None,
        "seed": 0,
    }
    return minimize(problem, **(defaults | options))


def test_the_minimum_of_a_quadratic_problem_is_that_of_dense_algebra():
    problem = Quadratic()
    phi, value = problem.minimum()
    found = run(problem)
    assert found.reason == "converged" and found.converged
    assert np.linalg.norm(found.hparams - phi) <= 1e-6 * np.linalg.norm(phi)
    assert found.value == pytest.approx(value, rel=1e-12)
    assert np.linalg.norm(problem.gradient(found.params, found.hparams)) <= 1e-6
    assert found.gradients == problem.count
    assert found.products == sum(one.products for one in found.history)


def test_suboptimality_falls_by_a_thousand_between_few_evaluations():
    problem = Quadratic()
    least = problem.minimum()[1]
    values = [one.value for one in run(problem).history]
    assert len(values) <= 40
    assert min(values[:20]) - least <= 1e-3 * (values[4] - least)


def test_scales_of_the_losses_change_nothing_but_the_scale_of_the_answer():
    plain = run(Quadratic(), tol=1e-5).history
    scaled = run(Quadratic(scale_inner=2.0**30, scale_outer=2.0**-24), tol=1e-5).history
    assert len(plain) == len(scaled)
    for one, other in zip(plain, scaled, strict=True):
        assert other.value == pytest.approx(2.0**-24 * one.value, rel=1e-12)
        assert other.products == one.products
        assert other.gradients == one.gradients


def test_the_error_of_the_inner_solve_is_taken_off_to_first_order(monkeypatch):
    problem = Quadratic(1)
    phi = np.ones(P)
    exact = problem.minimum(phi)[1]
    rng = np.random.default_rng(0)
    theta = np.linalg.solve(problem.A, problem.B @ phi + problem.c)
    error = 1e-3 * rng.standard_normal(N)
    problem.params = theta + error
    evaluate = Evaluator(problem, None, 0, 0)  # no inner step
    evaluate.length, evaluate.curvature = 1.0, 1e9  # any start is near enough
    monkeypatch.setattr(evaluation, "LINEAR_ACCURACY", 1e-12)
    record = evaluate(phi)[0]
    assert not record.rejected and record.gradients == 1
    assert abs(record.value - record.correction - exact) > 1e-5
    # What is left is the quadratic form of the outer loss.
    assert abs(record.value - exact) == pytest.approx(error @ error / 2, rel=1e-6)


def test_bounds_hold_at_every_evaluation_and_are_told():
    problem = Quadratic()
    free = problem.minimum()[0]
    lower, upper = np.full(P, -np.inf), np.where(free > 0, free / 2, np.inf)
    seen = []
    found = run(
        problem,
        bounds=check_bounds(lower, upper),
        callback=lambda record, params, hparams: seen.append(hparams),
    )
    assert found.converged
    assert all(np.all(phi <= upper) for phi in seen)
    active = found.hparams == upper
    assert active.any()
    assert found.num_at_bounds == active.sum()
    assert "at their bounds" in found.explain()
    # Stationary in the others: the reduced problem solved by dense algebra.
    S, s = np.linalg.solve(problem.A, problem.B), np.linalg.solve(problem.A, problem.c)
    gradient = S.T @ (S @ found.hparams + s - problem.t) + found.hparams / 10
    scale = np.linalg.norm(S.T @ (s - problem.t))
    assert np.linalg.norm(gradient[~active]) <= 1e-6 * scale
    assert np.all(gradient[active] < 0)


@pytest.mark.parametrize("stop", [1, 4, 9])
def test_an_interrupted_call_goes_on_bit_for_bit(tmp_path, stop):
    whole = run(Quadratic())

    def interrupt(record, params, hparams):
        interrupt.count += 1
        if interrupt.count == stop:
            raise KeyboardInterrupt

    interrupt.count = 0
    with pytest.raises(KeyboardInterrupt):
        run(Quadratic(), checkpoint=tmp_path, callback=interrupt)
    problem = Quadratic()
    resumed = run(problem, checkpoint=tmp_path)
    # One more, which looks whether it is the same problem.
    assert problem.count == 1 + sum(one.gradients for one in whole.history[stop:])
    assert repr(resumed.history) == repr(whole.history)
    assert np.array_equal(resumed.hparams, whole.hparams)
    assert np.array_equal(resumed.params, whole.params)
    again = run(Quadratic(), checkpoint=tmp_path)  # of a call that ended
    assert np.array_equal(again.params, whole.params)


def test_a_checkpoint_of_another_minimisation_is_refused(tmp_path):
    run(Quadratic(), checkpoint=tmp_path, max_evaluations=3)
    with pytest.raises(ValueError, match=r"holds another minimisation: the inner loss was"):
        run(Quadratic(2), checkpoint=tmp_path)
    other = Quadratic()
    other.hparams = np.ones(P)
    with pytest.raises(ValueError, match=r"evaluation 0 there has other hyperparameters"):
        run(other, checkpoint=tmp_path)


class Barrier(Quadratic):
    """The outer loss is NaN where a hyperparameter is below -0.3, as it is at the minimum."""

    def outer(self, theta, phi):
        return super().outer(theta, phi) if np.all(phi >= -0.3) else np.nan


def test_steps_to_where_the_loss_is_nan_are_rejected_and_told():
    problem = Barrier()
    assert np.any(Quadratic().minimum()[0] < -0.3)
    found = run(problem)
    rejected = [one for one in found.history if one.rejected]
    assert rejected
    assert all(one.rejected == "nonfinite" and np.isnan(one.value) for one in rejected)
    assert found.value < found.history[0].value
    assert np.all(found.hparams >= -0.3)
    assert "rejected" in found.explain() or found.reason == "nonfinite"


class Descent:
    """Gradient descent, as an optimizer of a framework would be."""

    def __init__(self, rate):
        self.rate, self.resets = rate, 0

    def reset(self):
        self.resets += 1

    def __call__(self, x, gradient):
        return x - self.rate * gradient


def test_an_optimizer_takes_outer_steps_and_half_of_those_that_are_rejected():
    problem = Quadratic()
    found = run(Barrier(), outer=Descent(0.02), max_evaluations=20)
    assert found.reason == "max_evaluations"
    assert any(one.rejected for one in found.history)
    assert found.value < found.history[0].value
    S = np.linalg.solve(problem.A, problem.B)
    rate = 1 / np.linalg.norm(S.T @ S + np.eye(P) / 10, 2)
    values = [one.value for one in run(problem, outer=Descent(rate), max_evaluations=8).history]
    assert values == sorted(values, reverse=True)


def test_an_optimizer_takes_inner_steps_and_starts_afresh_each_time():
    problem, descent = Quadratic(), Descent(0.015)
    found = run(problem, inner=descent, inner_steps=1500, tol=1e-3)
    assert found.converged
    assert descent.resets >= len(found.history)
    assert found.value == pytest.approx(problem.minimum()[1], rel=1e-3)


def test_a_training_function_is_given_a_generator_of_its_evaluation():
    drawn = []

    def train(theta, phi, rng):
        drawn.append(rng.integers(1 << 30))
        return np.linalg.solve(problem.A, problem.B @ phi + problem.c)

    problem = Quadratic()
    first = run(problem, inner=train, seed=3)
    numbers, drawn = drawn, []
    second = run(problem, inner=train, seed=3)
    assert drawn == numbers and len(set(drawn)) == len(drawn)
    assert repr(first.history) == repr(second.history)
    assert first.value == pytest.approx(problem.minimum()[1], rel=1e-10)


def test_flat_outer_losses_are_told():
    class Flat(Quadratic):
        def outer_gradients(self, theta, phi):
            return 0 * theta, 0 * phi

    found = run(Flat())
    assert found.reason == "flat" and len(found.history) == 1
    assert "saturated" in found.explain()


def test_a_gradient_that_is_small_beside_the_hyperparameters_is_none_of_zero():
    plain, tiny = run(Quadratic(), tol=1e-4), run(Quadratic(scale_outer=2.0**-100), tol=1e-4)
    assert tiny.reason == "converged"
    assert np.allclose(tiny.hparams, plain.hparams, rtol=1e-6)


def test_an_inner_loss_without_a_minimum_is_told():
    class Falling(Quadratic):
        def __init__(self):
            super().__init__()
            self.A = 0 * self.A

    found = run(Falling(), inner_steps=50)
    assert found.reason in ("inner_unsolved", "indefinite")
    assert len(found.history) == 1
    assert "`ridge`" in found.explain()


def test_a_start_at_the_inner_minimum_is_as_good_as_any_in_single_precision():
    class Single(Quadratic):
        eps = np.finfo(np.float32).eps

        def gradient(self, theta, phi):
            A, B, c = (x.astype(np.float32) for x in (self.A, self.B, self.c))
            terms = A @ theta.astype(np.float32) - B @ phi.astype(np.float32) - c
            return terms.astype(np.float64)

    problem = Single()
    problem.params = np.linalg.solve(problem.A, problem.B @ problem.hparams + problem.c)
    found = run(problem)
    assert found.converged
    assert found.value == pytest.approx(problem.minimum()[1], rel=1e-4)


def test_nan_in_the_data_is_told():
    problem = Quadratic()
    problem.c[3] = np.nan
    found = run(problem)
    assert found.reason == "nonfinite" and "NaN in the data" in found.explain()
    assert np.array_equal(found.hparams, problem.hparams)


def test_a_saddle_of_the_inner_loss_is_told():
    class Saddle(Quadratic):
        """At θ = 0 the gradient vanishes, and L-BFGS has nowhere to go."""

        def __init__(self):
            super().__init__()
            self.A = self.A - 50 * np.eye(N)
            self.c = 0 * self.c

    found = run(Saddle())
    assert found.reason == "indefinite" and "saddle" in found.explain()


def test_evaluations_used_up_and_a_callback_end_it():
    used = run(Quadratic(), max_evaluations=4)
    assert used.reason == "max_evaluations" and len(used.history) == 4
    assert "Raise `max_evaluations`" in used.explain()
    asked = run(Quadratic(), callback=lambda record, *_: record.value < 6)
    assert asked.reason in ("callback", "converged")
    assert run(Quadratic(), callback=lambda *_: True).reason == "callback"


def test_a_tolerance_below_the_precision_ends_with_it():
    class Single(Quadratic):
        """Values and gradients rounded to float32."""

        eps = float(np.finfo(np.float32).eps)

        def inner(self, theta, phi):
            value, gradient = super().inner(theta, phi)
            return float(np.float32(value)), gradient.astype(np.float32).astype(float)

        def outer(self, theta, phi):
            return float(np.float32(super().outer(theta, phi)))

    problem = Single()
    found = run(problem, tol=0.0, max_evaluations=200)
    assert found.reason == "precision" and found.converged
    # Values alone would leave the root of the rounding in the hyperparameters.
    phi, value = problem.minimum()
    assert np.linalg.norm(found.hparams - phi) <= 20 * Single.eps**0.75 * np.linalg.norm(phi)
    assert found.value == pytest.approx(value, rel=10 * Single.eps)


def test_a_record_is_printed_for_a_person():
    found = run(Quadratic())
    assert repr(found).startswith("BilevelMinimum: converged\n  outer loss")
    assert "products with the Hessian" in found.explain()
    assert all(meaning for meaning, _ in REMEDIES.values())


def test_lbfgs_takes_differences_below_the_rounding_from_gradients():
    rng = np.random.default_rng(0)
    A = np.diag(np.logspace(0, 1, N))
    x = rng.standard_normal(N)
    seen = []

    def function(y):
        seen.append(y)
        return 1e8 + (y - x) @ A @ (y - x) / 2, A @ (y - x)  # values without a digit left

    start = np.zeros(N)
    lbfgs(function, start, function(start), scaling=Scaling(1.0), rounding=1e-6)
    assert np.linalg.norm(seen[-1] - x) <= 1e-8 * np.linalg.norm(x)


def test_a_scaling_is_what_it_says():
    U = np.linalg.qr(np.random.default_rng(0).standard_normal((N, 3)))[0]
    scaling = Scaling(2.0, U, np.array([1.0, 2.0, -0.5]))
    T = 2 * (np.eye(N) + (U * [1.0, 2.0, -0.5]) @ U.T)
    z = np.arange(N, dtype=float)
    assert np.allclose(scaling(z), T @ z, rtol=1e-14)


def test_bounds_out_of_order_and_seeds():
    with pytest.raises(ValueError, match="hyperparameter 1 they are 3 and 2"):
        check_bounds(np.array([0.0, 3.0]), np.array([1.0, 2.0]))
    assert seed_of(7) == 7
    assert seed_of(np.random.default_rng(1)) == seed_of(np.random.default_rng(1))
