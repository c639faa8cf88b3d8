"""Influence against the truth: a logistic regression on scikit-learn's digits, trained again
without each of its training images.

Every one of the 1 437 trainings ends at a gradient of 1e-12, so that what is compared with is the
true change of the loss of each of the 360 test images. The picture shows the training images that
helped and harmed a few test images the most.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.linalg import cho_factor, cho_solve
from sklearn.datasets import load_digits
from torch import nn
from tqdm import tqdm

import lowrank_inverse as li
from benchmarks._report import machine, publish, pyplot, table
from lowrank_inverse.influence.metrics import leave_one_out
from lowrank_inverse_torch import InfluenceFunction

NUM_TRAIN, NUM_CLASSES = 1437, 10
GRADIENT_NORM = 1e-12
NUM_PICTURES, NUM_SHOWN = 4, 5


class Digits(NamedTuple):
    """Images with a column of ones, and labels."""

    train_x: np.ndarray
    train_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


def load_problem(seed: int) -> Digits:
    """Split the digits."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x, y = np.hstack([images[order] / 16, np.ones((len(order), 1))]), labels[order]
    return Digits(x[:NUM_TRAIN], y[:NUM_TRAIN], x[NUM_TRAIN:], y[NUM_TRAIN:])


def probabilities(x: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Softmax of the linear scores."""
    z = x @ theta
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def losses(x: np.ndarray, y: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Cross-entropy of each example."""
    return -np.log(probabilities(x, theta)[np.arange(len(y)), y])


class Trainer:
    """``1 / n * sum_i w_i loss_i + l2 / 2 * sum(theta ** 2)``, minimised to the end."""

    def __init__(self, x: np.ndarray, y: np.ndarray, l2: float) -> None:
        self.x, self.l2 = x, l2
        self.labels = np.eye(NUM_CLASSES)[y]

    def gradient(self, theta: np.ndarray, w: np.ndarray) -> np.ndarray:
        errors = probabilities(self.x, theta) - self.labels
        return self.x.T @ (w[:, None] * errors) / len(w) + self.l2 * theta

    def hessian(self, theta: np.ndarray, w: np.ndarray) -> np.ndarray:
        p = probabilities(self.x, theta)
        d = self.x.shape[1]
        H = np.empty((d, NUM_CLASSES, d, NUM_CLASSES))
        for a in range(NUM_CLASSES):
            for b in range(NUM_CLASSES):
                weight = w * p[:, a] * ((a == b) - p[:, b]) / len(w)
                H[:, a, :, b] = self.x.T @ (weight[:, None] * self.x)
        return H.reshape(d * NUM_CLASSES, -1) + self.l2 * np.eye(d * NUM_CLASSES)

    def fit(self) -> np.ndarray:
        """Train on all examples by Newton's method."""
        theta = np.zeros((self.x.shape[1], NUM_CLASSES))
        w = np.ones(len(self.x))
        for _ in range(50):
            gradient = self.gradient(theta, w)
            self.factor = cho_factor(self.hessian(theta, w))
            if np.linalg.norm(gradient) < GRADIENT_NORM:
                return theta
            theta = theta - cho_solve(self.factor, gradient.reshape(-1)).reshape(theta.shape)
        raise RuntimeError("Newton's method did not converge")

    def fit_without(self, i: int, theta: np.ndarray) -> np.ndarray:
        """Train without example `i`: Newton's method with the Hessian of all examples."""
        w = np.ones(len(self.x))
        w[i] = 0
        for _ in range(200):
            gradient = self.gradient(theta, w)
            if np.linalg.norm(gradient) < GRADIENT_NORM:
                return theta
            theta = theta - cho_solve(self.factor, gradient.reshape(-1)).reshape(theta.shape)
        raise RuntimeError(f"training without example {i} did not converge")


def influence_function(digits: Digits, theta: np.ndarray, l2: float) -> InfluenceFunction:
    """Return the influence function of the trained regression."""
    model = nn.Linear(theta.shape[0], NUM_CLASSES, bias=False).double()
    model.weight.data = torch.tensor(theta.T).contiguous()

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(output, target, reduction="none")

    train = torch.tensor(digits.train_x), torch.tensor(digits.train_y)
    return InfluenceFunction(model, loss, train, ridge=l2, solver=li.NystromCG(rank=50), rng=0)


def draw(digits: Digits, scores: np.ndarray, queries: np.ndarray, path: Path) -> None:
    """Draw each query with the training images that helped and harmed it the most."""
    plt = pyplot()
    size = 2 * NUM_SHOWN + 1
    figure, axes = plt.subplots(
        len(queries),
        size,
        figsize=(size, 1.25 * len(queries) + 0.3),
        layout="constrained",
        squeeze=False,
    )

    def show(axis: Any, x: np.ndarray, label: int, color: str) -> None:
        axis.imshow(x[:-1].reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
        axis.set_xlabel(str(label), labelpad=1)
        for side in axis.spines.values():
            side.set(color=color, linewidth=2.5)

    for row, q in zip(axes, queries, strict=True):
        order = np.argsort(scores[q])
        show(row[0], digits.test_x[q], digits.test_y[q], "black")
        for axis, i in zip(row[1:], [*order[::-1][:NUM_SHOWN], *order[:NUM_SHOWN]], strict=True):
            color = "tab:green" if scores[q, i] > 0 else "tab:red"
            show(axis, digits.train_x[i], digits.train_y[i], color)
    axes[0, 0].set_title("query", fontsize=10)
    axes[0, 1 + NUM_SHOWN // 2].set_title("most helpful", fontsize=10)
    axes[0, 1 + NUM_SHOWN + NUM_SHOWN // 2].set_title("most harmful", fontsize=10)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: list[str]) -> int:
    """Train without each image, compare, print the table, write JSON and the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks leaveoneout", description=__doc__)
    parser.add_argument("--l2", type=float, default=0.01)
    parser.add_argument("--removals", type=int, default=NUM_TRAIN, help="images (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for results")
    options = parser.parse_args(arguments)
    if not 2 <= options.removals <= NUM_TRAIN:
        parser.error(f"--removals must be from 2 to {NUM_TRAIN}; got {options.removals}")
    torch.set_num_threads(1)
    digits = load_problem(options.seed)
    trainer = Trainer(digits.train_x, digits.train_y, options.l2)
    theta = trainer.fit()
    before = losses(digits.test_x, digits.test_y, theta)

    start = time.process_time()
    influence = influence_function(digits, theta, options.l2)
    scores = influence.scores((torch.tensor(digits.test_x), torch.tensor(digits.test_y))).numpy()
    seconds = time.process_time() - start
    removed = np.random.default_rng(options.seed).permutation(NUM_TRAIN)[: options.removals]
    start = time.process_time()
    actual = np.stack(
        [
            losses(digits.test_x, digits.test_y, trainer.fit_without(int(i), theta)) - before
            for i in tqdm(removed, desc="training without each image", mininterval=0.5)
        ],
        axis=1,
    )
    again = time.process_time() - start
    gradients = trainer_gradients(digits, theta)
    found = {
        "influence": leave_one_out(scores[:, removed] / NUM_TRAIN, actual),
        "gradient product": leave_one_out(gradients[:, removed] / NUM_TRAIN, actual),
    }
    rows = [
        {
            "prediction": name,
            "Pearson": f"{one.pearson:.6f}",
            "Spearman": f"{one.spearman:.6f}",
            "slope": f"{one.slope:.4f}",
            "relative error": f"{one.relative_error:.4f}",
        }
        for name, one in found.items()
    ]
    text = (
        f"{table(rows)}\n\n{len(before)} test images × {options.removals} trainings without one of "
        f"{NUM_TRAIN} images; l2 = {options.l2:g}.\nCPU seconds: {seconds:.1f} for all scores, "
        f"{again:.1f} for the trainings. Largest relative residual: "
        f"{influence.info.relative_residual.max():.1e}."
    )
    about = machine("torch", "numpy", threads=1, seed=options.seed)
    results = {name: one._asdict() for name, one in found.items()}
    publish(options.output, "leaveoneout", text, about, l2=options.l2, agreement=results)
    picture = options.output / "leaveoneout.png"
    draw(digits, scores, np.argsort(-before)[:NUM_PICTURES], picture)
    print(f"Picture: {picture}")
    return 0


def trainer_gradients(digits: Digits, theta: np.ndarray) -> np.ndarray:
    """Inner products of the gradients of test and training examples: no inverse at all."""

    def errors(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return probabilities(x, theta) - np.eye(NUM_CLASSES)[y]

    by_features = digits.test_x @ digits.train_x.T
    by_classes = errors(digits.test_x, digits.test_y) @ errors(digits.train_x, digits.train_y).T
    return by_features * by_classes
