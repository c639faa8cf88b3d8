"""Influence functions of functions of pytrees: what jax has beyond the other framework."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp

import lowrank_inverse as li
from lowrank_inverse_jax import InfluenceFunction
from tests.adapters.shared.frameworks import Jax
from tests.adapters.shared.test_influence import (
    DAMPING,
    Problem,
    assert_close,
    cross_entropy,
    expected,
    outputs,
)

pytestmark = pytest.mark.usefixtures("wide")


def loss(params: Any, batch: Any) -> jax.Array:
    return cross_entropy(outputs(params, batch["x"]), batch["y"])


def data() -> tuple[Any, Any, Any]:
    """Return the shared problem with batches that are dicts, and a leaf that is no array."""
    problem = Problem(Jax())
    train, query = (dict(zip("xy", part, strict=True)) for part in (problem.train, problem.query))
    return {**problem.params, "activation": "tanh"}, train, query


@pytest.mark.slow
@pytest.mark.parametrize("curvature", ["hessian", "empirical_fisher"])
def test_without_outputs_the_loss_takes_parameters_and_batch(curvature):
    params, train, query = data()
    solver = li.CG(rtol=1e-12, damping=DAMPING)
    influence = InfluenceFunction(loss, params, train, curvature=curvature, solver=solver, rng=0)
    assert_close(influence.scores(query), expected(curvature))


def test_gauss_newton_needs_outputs():
    params, train, _ = data()
    with pytest.raises(ValueError, match="needs `outputs`, a function"):
        InfluenceFunction(loss, params, train)


BAD: dict[str, tuple[Any, dict[str, Any], str]] = {
    "loss": ({}, {"function": 3}, "`loss` must be a function"),
    "outputs": ({}, {"outputs": 3}, "`outputs` must be a function"),
    "labels": (
        {"y": np.full(14, 3)},
        {"function": lambda p, b: jnp.take(outputs(p, b["x"])[0], b["y"], mode="fill")},
        "example 0 of `train`",
    ),
    "a word": ("digits", {}, "must be a pytree of arrays"),
    "no rows": ({"x": np.ones((0, 4)), "y": np.ones((0, 3))}, {}, "at least one example"),
}


@pytest.mark.parametrize(("change", "options", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_named(change, options, message):
    params, train, _ = data()
    options = {"function": loss, "curvature": "hessian", **options}
    changed = {**train, **change} if isinstance(change, dict) else change
    with pytest.raises((TypeError, ValueError), match=message):
        InfluenceFunction(options.pop("function"), params, changed, **options)
