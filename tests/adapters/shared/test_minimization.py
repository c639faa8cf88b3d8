"""``minimize_bilevel`` in both frameworks, on a small softmax regression with weighted examples."""

from __future__ import annotations

import numpy as np
import pytest
from array_api_compat import array_namespace

import lowrank_inverse as li
from tests.adapters.shared.frameworks import FRAMEWORKS, flat, relative, slow_in_jax
from tests.conftest import x64

NUM_TRAIN, NUM_OUTER, NUM_FEATURES, NUM_CLASSES = 40, 30, 4, 3
RIDGE = 0.05


def data():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((NUM_TRAIN + NUM_OUTER, NUM_FEATURES))
    y = np.argmax(x @ rng.standard_normal((NUM_FEATURES, NUM_CLASSES)), axis=1)
    y[:NUM_TRAIN:3] = (y[:NUM_TRAIN:3] + 1) % NUM_CLASSES  # wrong labels
    labels = np.eye(NUM_CLASSES)[y]
    return x[:NUM_TRAIN], labels[:NUM_TRAIN], x[NUM_TRAIN:], labels[NUM_TRAIN:]


class Case:
    """The problem in one framework, and a call of ``minimize_bilevel``."""

    def __init__(self, framework, dtype=None):
        self.framework = framework
        arrays = [framework.array(part, dtype) for part in data()]
        self.train, self.outer_data = arrays[:2], arrays[2:]
        zeros = np.zeros((NUM_FEATURES, NUM_CLASSES))
        self.params = framework.variables({"z": zeros}, dtype)
        self.hparams = framework.variables({"w": np.full(NUM_TRAIN, -1.0)}, dtype)

    def losses(self, params, x, y):
        scores = x @ params["z"]
        xp = array_namespace(scores)
        top = xp.max(scores, axis=1, keepdims=True)
        total = xp.log(xp.sum(xp.exp(scores - top), axis=1)) + top[:, 0]
        return total - xp.sum(scores * y, axis=1)

    def inner(self, params, hparams):
        w = hparams["w"]
        xp = array_namespace(w)
        return xp.mean(self.losses(params, *self.train) / (1 + xp.exp(-w)))

    def outer(self, params, hparams):
        losses = self.losses(params, *self.outer_data)
        return array_namespace(losses).mean(losses)

    def minimize(self, **options):
        options = {"ridge": RIDGE} | options
        function = self.framework.adapter.minimize_bilevel
        if self.framework.name == "jax":
            return function(self.inner, self.outer, self.params, self.hparams, **options)
        closures = (
            lambda: self.inner(self.params, self.hparams),
            lambda: self.outer(self.params, self.hparams),
        )
        return function(*closures, self.params, self.hparams, **options)

    def optimizer(self, which, rate):
        if self.framework.name == "jax":
            optax = pytest.importorskip("optax")
            return optax.adam(rate) if which == "outer" else optax.sgd(rate)
        torch = self.framework.framework
        if which == "outer":
            return torch.optim.Adam(self.hparams.values(), rate)
        return torch.optim.SGD(self.params.values(), rate)


OPTIONS = {"tol": 1e-6, "max_evaluations": 60}


@pytest.fixture(scope="module")
def found():
    """The minimum by default in both frameworks, in float64."""
    results = {}
    for name, make in FRAMEWORKS.items():
        with x64(True):
            results[name] = Case(make()).minimize(**OPTIONS)
    return results


def test_trajectories_of_the_frameworks_are_one(found):
    ours, theirs = (found[name] for name in ("torch", "jax"))
    assert len(ours.history) == len(theirs.history)
    for one, other in zip(ours.history, theirs.history, strict=True):
        assert one.value == pytest.approx(other.value, rel=1e-10)
        assert abs(one.products - other.products) <= 1
        assert one.gradients == other.gradients
    assert relative(ours.hparams, theirs.hparams) <= 1e-8
    assert relative(ours.params, theirs.params) <= 1e-8
    assert ours.reason == theirs.reason == "converged"


@slow_in_jax
def test_the_minimum_is_stationary_by_a_hypergradient_that_is_exact(framework, found):
    case, result = Case(framework), found[framework.name]
    if framework.name == "torch":
        params, hparams = (framework.variables(t) for t in (result.params, result.hparams))
    else:
        params, hparams = result.params, result.hparams
    start = framework.hypergradient(
        case.inner, case.outer, case.params, case.hparams, solver=li.Exact(), ridge=RIDGE
    )
    end = framework.hypergradient(
        case.inner, case.outer, params, hparams, solver=li.Exact(), ridge=RIDGE
    )
    assert np.linalg.norm(flat(end.grads)) <= 1e-4 * np.linalg.norm(flat(start.grads))
    assert float(end.info.inner_grad_norm) <= 1e-5


@slow_in_jax
def test_the_outer_loss_is_lower_than_by_a_descent_of_many_steps(framework, found):
    case = Case(framework)
    by_adam = case.minimize(outer=case.optimizer("outer", 0.3), max_evaluations=15)
    assert by_adam.reason == "max_evaluations"
    values = [one.value for one in by_adam.history]
    assert values[-1] < values[0]
    assert found[framework.name].value < min(values)


@slow_in_jax
def test_an_inner_optimizer_and_bounds(framework):
    case = Case(framework)
    upper = {"w": framework.array(np.full(NUM_TRAIN, 1.0))}
    result = case.minimize(
        inner=case.optimizer("inner", 2.0), bounds=(-2.0, upper), tol=1e-3, inner_steps=300
    )
    w = flat(result.hparams)
    assert w.min() >= -2 and w.max() <= 1
    assert result.num_at_bounds == np.sum((w == -2) | (w == 1)) > 0
    assert result.history[-1].inner_step < 0.1


@slow_in_jax
def test_a_training_function_of_the_user_and_a_low_rank_solver(framework, found):
    case, seeds = Case(framework), []

    if framework.name == "jax":
        jax = framework.framework
        gradient = jax.grad(lambda z, hparams: case.inner({"z": z}, hparams))

        @jax.jit
        def run(params, hparams):
            z = jax.lax.fori_loop(
                *(0, 100),
                lambda _, z: z - (gradient(z, hparams) + RIDGE * z),
                params["z"],
            )
            return {"z": z}

        def train(params, hparams, rng):
            seeds.append(int(rng.integers(1 << 30)))
            return run(params, hparams)
    else:
        torch, z = framework.framework, case.params["z"]

        def train(rng):
            seeds.append(int(rng.integers(1 << 30)))
            for _ in range(100):
                (slope,) = torch.autograd.grad(case.inner(case.params, case.hparams), z)
                with torch.no_grad():
                    z.sub_(slope + RIDGE * z)

    solver = li.NystromCG(rank=5, max_steps=30)
    result = case.minimize(inner=train, solver=solver, tol=1e-2)
    assert result.converged
    assert len(set(seeds)) == len(seeds) == len(result.history)
    assert result.value == pytest.approx(found[framework.name].value, rel=0.05)


@slow_in_jax
def test_an_interrupted_call_goes_on_bit_for_bit_by_any_optimizer(framework, tmp_path):
    def call(outer, **options):
        case = Case(framework)
        given = case.optimizer("outer", 0.3) if outer == "adam" else outer
        return case.minimize(outer=given, max_evaluations=7, **options)

    for outer in ("lbfgs", "adam") if framework.name == "torch" else ("lbfgs",):
        whole, folder = call(outer), tmp_path / outer
        least = whole.history[3].value
        part = call(
            outer, checkpoint=folder, callback=lambda record, *_, least=least: record.value <= least
        )
        assert part.reason == "callback" and len(part.history) == 4
        resumed = call(outer, checkpoint=folder)
        assert repr(resumed.history) == repr(whole.history)
        assert np.array_equal(flat(resumed.hparams), flat(whole.hparams))
        assert np.array_equal(flat(resumed.params), flat(whole.params))


@slow_in_jax
def test_single_precision_reaches_what_it_can(framework, found):
    with framework.narrow():
        result = Case(framework, "float32").minimize(tol=1e-4)
    assert result.converged
    assert result.value == pytest.approx(found[framework.name].value, rel=1e-4)


@slow_in_jax
def test_nan_in_the_data_ends_with_its_reason(framework):
    case = Case(framework)
    x = data()[0]
    x[3, 1] = np.nan
    case.train[0] = framework.array(x)
    result = case.minimize()
    assert result.reason == "nonfinite" and len(result.history) == 1
    assert np.all(flat(result.hparams) == -1)


def test_kinds_of_optimizers_that_are_not_known_are_refused(framework):
    case = Case(framework)
    with pytest.raises(TypeError, match='`inner` must be "lbfgs", an optimizer of'):
        case.minimize(inner="newton")
    with pytest.raises(TypeError, match='`outer` must be "lbfgs" or an optimizer of'):
        case.minimize(outer="newton")
    with pytest.raises(ValueError, match="`bounds` must be a pair"):
        case.minimize(bounds=(1.0, 0.0))
