"""Bilevel solvers of the literature, and the experiment that shows ours beside them."""

from __future__ import annotations

import numpy as np
import pytest

jax = pytest.importorskip("jax")

from benchmarks.bilevel import mnist_cleaning, optimum, stochastic
from tests.benchmarks.conftest import text, written
from tests.conftest import assert_picture

NUM_TRAIN, NUM_FEATURES = 256, 16


@pytest.fixture
def images(monkeypatch):
    """Images of another kind in the place of MNIST's."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2 * NUM_TRAIN, NUM_FEATURES)).astype(np.float32)
    x[:, 3] = 1.0  # a pixel that never changes
    y = np.argmax(x @ rng.standard_normal((NUM_FEATURES, 10)), axis=1)
    monkeypatch.setattr(mnist_cleaning, "load_mnist", lambda _: (x, y, x, y))


def test_the_problem_is_that_of_the_benchmark(images):
    data = mnist_cleaning.load_cleaning("", 0.5, NUM_TRAIN, 0)
    clean = mnist_cleaning.load_cleaning("", 0.0, NUM_TRAIN, 0)
    assert len(data.x) == NUM_TRAIN and len(data.outer_x) == NUM_TRAIN // 4
    deviation = np.std(data.x, axis=0)
    assert np.allclose(np.delete(deviation, 3), 1, atol=1e-5) and deviation[3] == 0
    assert np.array_equal(data.outer_y, clean.outer_y)
    # Of the half that is drawn anew, a tenth is as it was.
    assert np.mean(np.asarray(data.y) != np.asarray(clean.y)) == pytest.approx(0.45, abs=0.1)
    w, z = data.start
    assert np.all(np.asarray(w) == -2) and not np.any(np.asarray(z))


@pytest.mark.slow
def test_derivatives_on_a_batch_are_those_of_the_losses(images):
    data = mnist_cleaning.load_cleaning("", 0.5, NUM_TRAIN, 0)
    batch = stochastic.Batch(data, jax.random.key(1))
    rng = np.random.default_rng(0)
    w = jax.numpy.asarray(rng.standard_normal(NUM_TRAIN), "float32")
    z, v = (jax.numpy.asarray(rng.standard_normal(data.start[1].size), "float32") for _ in "zv")
    rows = slice(int(batch.at), int(batch.at) + stochastic.BATCH)

    def inner(z, w):
        loss = mnist_cleaning.inner_loss(z, w[rows], data.x[rows], data.y[rows])
        return loss + 0.2 * z @ z

    def along(w):
        return jax.grad(inner)(z, w) @ v

    assert np.allclose(batch.gradient(z, w), jax.grad(inner)(z, w), atol=1e-5)
    product = jax.grad(lambda z: jax.grad(inner)(z, w) @ v)(z)
    assert np.allclose(batch.product(z, w, v), product, atol=1e-4)
    change = batch.add(w, batch.cross(z, w, v)) - w
    assert np.allclose(change, jax.grad(along)(w), atol=1e-5)


@pytest.mark.slow
def test_every_solver_comes_nearer_to_the_optimum(images, tmp_path):
    options = ["--quick", "--examples", str(NUM_TRAIN), "--budget", "0.5"]
    methods = ["--methods", *optimum.NAMES]  # compilation takes most of the time
    assert optimum.main([*options, *methods, "--output", str(tmp_path)]) == 0
    results = written(tmp_path, "bilevel")
    least = results["optima"]["0.5"]
    ours = results["runs"]["minimize_bilevel, 0.5"]
    end, whole = ours["values"][ours["ends"]] - least, ours["values"][0] - least
    assert end <= 1e-2 * whole  # there are several minima
    for name in optimum.NAMES:
        found = results["runs"][f"{name}, 0.5"]
        assert found["values"][0] == pytest.approx(ours["values"][0], rel=1e-4)
        assert min(found["values"]) < found["values"][0]
        assert found["seconds"] == sorted(found["seconds"])
    assert "above the optimum" in text(tmp_path, "bilevel")
    assert_picture(tmp_path / "bilevel.png")
