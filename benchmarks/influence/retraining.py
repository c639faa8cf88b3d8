"""Small networks, trained again without some of their images: what influence is to predict."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.data.cifar import load_cifar, shrink
from benchmarks.data.digits import shuffled
from benchmarks.data.mnist import load_mnist
from benchmarks.harness.processes import Found

NUM_QUERY = 30
SIDE = 16
"""Of CIFAR-10's images, which are shrunk."""
LIMIT = 150
"""Of steps of L-BFGS."""


def _convolutions() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Tanh()),
        *(nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(16 * 16, 10)),
    )


def _perceptron(inputs: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 32), nn.Tanh(), nn.Linear(32, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "digits regression": lambda: nn.Linear(64, 10),
    "digits MLP": lambda: _perceptron(64),
    "MNIST MLP": lambda: _perceptron(784),
    "CIFAR-10 CNN": _convolutions,
}
DECAY = {"digits regression": 1e-2, "digits MLP": 1e-3, "MNIST MLP": 1e-3, "CIFAR-10 CNN": 3e-3}
"""Weight decay: large enough that a network trained again goes to the minimum nearby."""


def images(name: str, data_dir: Path, num: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Draw `num` images and labels."""
    if name.startswith("digits"):
        x, y = shuffled(rng)
    elif name.startswith("MNIST"):
        x, y = load_mnist(data_dir)[:2]
    else:
        data = load_cifar(data_dir)
        x, y = data.test_images, data.test_labels
    order = rng.permutation(len(y))[:num]
    x, y = x[order], y[order].astype(np.int64)
    if name.startswith("CIFAR"):
        x = shrink(x, SIDE).transpose(0, 3, 1, 2) / 127.5 - 1.0
    return torch.tensor(np.ascontiguousarray(x), dtype=torch.float64), torch.tensor(y)


def fit(model: nn.Module, x: Tensor, y: Tensor, weights: Tensor, decay: float) -> float:
    """Minimise ``sum_i w_i loss_i + decay / 2 * sum(params ** 2)``; return the gradient's norm."""
    params = list(model.parameters())
    optimizer = torch.optim.LBFGS(
        params,
        max_iter=LIMIT,
        history_size=30,
        tolerance_grad=1e-8,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def objective() -> Tensor:
        optimizer.zero_grad()
        losses = cross_entropy(model(x), y, reduction="none")
        value = weights @ losses + decay / 2 * sum((p**2).sum() for p in params)
        value.backward()
        return value

    optimizer.step(objective)
    objective()
    return float(torch.cat([p.grad.reshape(-1) for p in params if p.grad is not None]).norm())


def write_truth(
    path: str, name: str, num_train: int, halves: int, removals: int, data_dir: str, seed: int
) -> Found:
    """Train on all images, on random halves of them, and without single ones; write all that."""
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    x, y = images(name, Path(data_dir), num_train + NUM_QUERY, rng)
    train, query = (x[:num_train], y[:num_train]), (x[num_train:], y[num_train:])
    decay, every = DECAY[name], torch.ones(num_train, dtype=torch.float64) / num_train

    torch.manual_seed(seed)
    model = NETWORKS[name]().double()
    start = {key: value.clone() for key, value in model.state_dict().items()}

    def query_losses() -> np.ndarray:
        with torch.no_grad():
            return cross_entropy(model(query[0]), query[1], reduction="none").numpy()

    norm = fit(model, *train, every, decay)
    before, optimum = query_losses(), {k: v.clone() for k, v in model.state_dict().items()}
    subsets = np.zeros((halves, num_train), dtype=bool)
    losses = []
    for subset in subsets:
        subset[rng.permutation(num_train)[: num_train // 2]] = True
        model.load_state_dict(start)
        fit(model, *train, torch.tensor(subset * (2 / num_train)), decay)
        losses.append(query_losses())
    removed, changes = rng.permutation(num_train)[:removals], []
    for i in removed:
        model.load_state_dict(optimum)
        weights = every.clone()
        weights[i] = 0
        fit(model, *train, weights, decay)
        changes.append(query_losses() - before)
    arrays = {f"p_{key}": value.numpy() for key, value in optimum.items()}
    arrays |= {"x_train": train[0].numpy(), "y_train": train[1].numpy()}
    arrays |= {"x_query": query[0].numpy(), "y_query": query[1].numpy()}
    truth = {"subsets": subsets, "losses": np.stack(losses)}
    truth |= {"removed": removed, "changes": np.stack(changes, axis=1)}
    np.savez(path, **arrays, **truth)
    size = sum(value.numel() for value in optimum.values())
    return {"parameters": size, "gradient": norm, "loss": float(before.mean())}
