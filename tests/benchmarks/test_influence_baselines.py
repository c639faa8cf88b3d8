"""The baselines, and the benchmark of a large model, in the smallest setting."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.nn.functional import cross_entropy

from benchmarks.influence import baselines, scale
from benchmarks.influence.methods import network

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(40, 4, generator=GENERATOR).double()
Y = torch.randint(0, 3, (40,), generator=GENERATOR)
TRAIN, QUERY = (X[:34], Y[:34]), (X[34:], Y[34:])


def model(seed):
    torch.manual_seed(seed)
    return network(4, 3, 3).double()


def rows(function, data):
    """Return the gradient of a function of output and label for each example, one by one."""
    one = model(1)
    found = []
    for x, y in zip(*data, strict=True):
        grads = torch.autograd.grad(function(one(x[None]), y[None]), list(one.parameters()))
        found.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(found)


def test_tracin_is_the_sum_of_gradient_products_over_checkpoints():
    products = rows(cross_entropy, QUERY) @ rows(cross_entropy, TRAIN).T
    found = baselines.tracin([model(1), model(1)], [0.5, 0.25], TRAIN, QUERY)
    assert torch.allclose(found, 0.75 * products, rtol=1e-10)


def test_trak_is_the_least_squares_solution_by_projected_gradients():
    def odds(output, target):
        p = output.softmax(1).gather(1, target[:, None])
        return (p.log() - (1 - p).log()).sum()

    found = baselines.trak([model(1)], TRAIN, QUERY, size=8, seed=5)
    assert found.shape == (6, 34)
    of_train, of_query = rows(odds, TRAIN), rows(odds, QUERY)
    with torch.no_grad():
        p = model(1)(TRAIN[0]).softmax(1).gather(1, TRAIN[1][:, None])[:, 0]
    generator = torch.Generator().manual_seed(5)
    projection = torch.randn(27, 8, generator=generator, dtype=torch.float64)
    of_train, of_query = of_train @ projection, of_query @ projection
    wanted = of_query @ torch.linalg.pinv(of_train) * (1 - p)
    assert torch.allclose(found, wanted, rtol=1e-8, atol=1e-10 * wanted.abs().max().item())


def test_the_benchmark_of_a_large_model_says_what_was_planned_and_used(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    images, labels = rng.random((90, 784), np.float32), rng.integers(0, 10, 90)
    monkeypatch.setattr(
        scale, "load_mnist", lambda folder: (images[:60], labels[:60], images[60:], labels[60:])
    )
    found = scale.write_problem(str(tmp_path / "p.npz"), "", 5, 50, 4, 1, 0)
    assert found["parameters"] == 784 * 5 + 5 + 50 + 10
    read = [scale.Batches(found["images"], 20) for _ in range(2)]
    sizes = [[len(y) for _, y in batches] for batches in read]
    assert sizes == [[20, 20, 10]] * 2  # read anew
    x = torch.cat([x for x, _ in read[0]])
    assert torch.allclose(x, torch.tensor(images[:50]), atol=0.5 / 255 + 1e-6)
    took = scale.measure(str(tmp_path / "p.npz"), found["images"], 5, 0.1, 1e-2, 1, 1)
    assert took["residual"] <= 1e-2 and took["products"] > 0
    assert set(took["plan"]["bytes"]) == {"data", "columns", "solve", "batch", "scores"}
