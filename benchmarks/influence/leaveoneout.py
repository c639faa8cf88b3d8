"""Influence against the truth: a logistic regression on scikit-learn's digits, trained again
without each of its training images.

Every one of the 1 437 trainings ends at a gradient of 1e-12, so that what is compared with is the
true change of the loss of each of the 360 test images. The picture shows the training images that
helped and harmed a few test images the most.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.linalg import cho_factor, cho_solve
from torch import nn
from tqdm import tqdm

import lowrank_inverse as li
from benchmarks.data.digits import shuffled, with_ones
from benchmarks.harness.experiment import SEED, Option, Run, experiment
from benchmarks.harness.processes import Found
from benchmarks.harness.report import table
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
    x, y = shuffled(np.random.default_rng(seed))
    x = with_ones(x)
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
        theta, w = np.zeros((self.x.shape[1], NUM_CLASSES)), np.ones(len(self.x))
        for _ in range(50):
            self.factor = cho_factor(self.hessian(theta, w))
            if np.linalg.norm(self.gradient(theta, w)) < GRADIENT_NORM:
                return theta
            theta = self._step(theta, w)
        raise RuntimeError("Newton's method did not converge")

    def fit_without(self, i: int, theta: np.ndarray) -> np.ndarray:
        """Train without example `i`: Newton's method with the Hessian of all examples."""
        w = np.ones(len(self.x))
        w[i] = 0
        for _ in range(200):
            if np.linalg.norm(self.gradient(theta, w)) < GRADIENT_NORM:
                return theta
            theta = self._step(theta, w)
        raise RuntimeError(f"training without example {i} did not converge")

    def _step(self, theta: np.ndarray, w: np.ndarray) -> np.ndarray:
        gradient = self.gradient(theta, w).reshape(-1)
        return theta - cho_solve(self.factor, gradient).reshape(theta.shape)


def influence_function(digits: Digits, theta: np.ndarray, l2: float) -> InfluenceFunction:
    """Return the influence function of the trained regression."""
    model = nn.Linear(theta.shape[0], NUM_CLASSES, bias=False).double()
    model.weight.data = torch.tensor(theta.T).contiguous()
    loss = partial(nn.functional.cross_entropy, reduction="none")
    train = torch.tensor(digits.train_x), torch.tensor(digits.train_y)
    return InfluenceFunction(model, loss, train, ridge=l2, solver=li.NystromCG(rank=50), rng=0)


def gradient_products(digits: Digits, theta: np.ndarray) -> np.ndarray:
    """Inner products of the gradients of test and training examples: no inverse at all."""

    def errors(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return probabilities(x, theta) - np.eye(NUM_CLASSES)[y]

    by_features = digits.test_x @ digits.train_x.T
    by_classes = errors(digits.test_x, digits.test_y) @ errors(digits.train_x, digits.train_y).T
    return by_features * by_classes


def measure(l2: float, removals: int, seed: int) -> Found:
    """Train without each image and compare."""
    torch.set_num_threads(1)
    digits = load_problem(seed)
    trainer = Trainer(digits.train_x, digits.train_y, l2)
    theta = trainer.fit()
    before = losses(digits.test_x, digits.test_y, theta)
    start = time.process_time()
    influence = influence_function(digits, theta, l2)
    scores = influence.scores((torch.tensor(digits.test_x), torch.tensor(digits.test_y))).numpy()
    scored = time.process_time()
    removed = np.random.default_rng(seed).permutation(NUM_TRAIN)[:removals]
    changes = [
        losses(digits.test_x, digits.test_y, trainer.fit_without(int(i), theta)) - before
        for i in tqdm(removed, desc="training without each image", mininterval=0.5)
    ]
    trained = time.process_time()
    actual, gradients = np.stack(changes, axis=1), gradient_products(digits, theta)
    order = np.argsort(scores, axis=1)
    queries = np.argsort(-before)[:NUM_PICTURES]
    extremes = np.hstack([order[queries, ::-1][:, :NUM_SHOWN], order[queries, :NUM_SHOWN]])
    return {
        "agreement": {
            name: leave_one_out(found[:, removed] / NUM_TRAIN, actual)._asdict()
            for name, found in (("influence", scores), ("gradient product", gradients))
        },
        "seconds": scored - start,
        "training": trained - scored,
        "residual": float(influence.info.relative_residual.max()),
        "pictures": {
            str(q): [[int(i), float(scores[q, i])] for i in row]
            for q, row in zip(queries, extremes, strict=True)
        },
    }


@experiment(
    *("leaveoneout", __doc__),
    Option("l2", 0.01, "the ridge of the regression"),
    Option("removals", NUM_TRAIN, "images", least=2),
    SEED,
    packages=("torch", "numpy"),
)
def main(run: Run) -> None:
    l2, seed = run.options.l2, run.options.seed
    removals = min(run.options.removals, NUM_TRAIN)
    settings = {"l2": l2, "removals": removals, "seed": seed}
    found = run.each(measure, {"all": settings}, apart=False)["all"]
    digits = load_problem(seed)
    rows = [
        {
            "prediction": name,
            "Pearson": f"{one['pearson']:.6f}",
            "Spearman": f"{one['spearman']:.6f}",
            "slope": f"{one['slope']:.4f}",
            "relative error": f"{one['relative_error']:.4f}",
        }
        for name, one in found["agreement"].items()
    ]
    run.publish(
        table(rows),
        f"{len(digits.test_y)} test images × {removals} trainings without one of {NUM_TRAIN} "
        f"images; l2 = {l2:g}.\nCPU seconds: {found['seconds']:.1f} for all scores, "
        f"{found['training']:.1f} for the trainings. Largest relative residual: "
        f"{found['residual']:.1e}.",
        l2=l2,
        agreement=found["agreement"],
    )
    draw(run, digits, found["pictures"])


def draw(run: Run, digits: Digits, pictures: dict[str, list[tuple[int, float]]]) -> None:
    """Draw each query with the training images that helped and harmed it the most."""
    size = 2 * NUM_SHOWN + 1
    figure, axes = run.figure(len(pictures), size, size, 1.25 * len(pictures) + 0.3)

    def show(axis: Any, x: np.ndarray, label: int, color: str) -> None:
        axis.imshow(x[:-1].reshape(8, 8), cmap="gray_r", vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
        axis.set_xlabel(str(label), labelpad=1)
        for side in axis.spines.values():
            side.set(color=color, linewidth=2.5)

    for row, (query, images) in zip(axes, pictures.items(), strict=True):
        show(row[0], digits.test_x[int(query)], digits.test_y[int(query)], "black")
        for axis, (i, score) in zip(row[1:], images, strict=True):
            color = "tab:green" if score > 0 else "tab:red"
            show(axis, digits.train_x[i], digits.train_y[i], color)
    for column, title in enumerate(("most helpful", "most harmful")):
        axes[0, 1 + NUM_SHOWN // 2 + column * NUM_SHOWN].set_title(title, fontsize=10)
    axes[0, 0].set_title("query", fontsize=10)
    run.draw(figure)
