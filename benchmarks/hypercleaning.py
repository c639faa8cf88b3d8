"""Data hyper-cleaning on scikit-learn's digits, by six ways to invert the Hessian.

Half of the training labels are replaced by random ones. Every training example has a weight,
``sigmoid(w_i)``, and the weights are learned: the inner problem fits a softmax regression to the
weighted training set, the outer one lowers the loss on clean validation data. Its gradient by the
weights needs the inverse of the inner Hessian, and that is where the methods differ. All of them
may use about the same number of products with the Hessian.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

import lowrank_inverse as li
from benchmarks._report import machine, publish, pyplot, table

NUM_TRAIN, NUM_VALIDATION, NUM_CLASSES = 1000, 300, 10
CORRUPTED = 0.5
RIDGE = 1e-3
NUM_PRODUCTS = 20
LEARNING_RATE = 0.2

SOLVERS: dict[str, Any] = {
    "identity": li.Identity(),
    "Neumann": li.Neumann(num_terms=NUM_PRODUCTS),
    "CG": li.CG(max_steps=NUM_PRODUCTS),
    "Nyström": li.Nystrom(rank=NUM_PRODUCTS, damping=1e-2),
    "Nyström-CG": li.NystromCG(rank=NUM_PRODUCTS // 2, max_steps=NUM_PRODUCTS // 2),
    "exact": li.Exact(),
}


@dataclass(frozen=True)
class Problem:
    """Digits, of whose training labels half are wrong."""

    train_x: np.ndarray
    train_y: np.ndarray
    corrupted: np.ndarray
    validation_x: np.ndarray
    validation_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


@dataclass
class Run:
    """What one method did."""

    relative_error: float = 0.0
    cosine: float = 0.0
    num_products: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    accuracy: float = 0.0
    detection: float = 0.0
    weights: list[float] = field(default_factory=list)


def load_problem(seed: int) -> Problem:
    """Split the digits and replace half of the training labels."""
    rng = np.random.default_rng(seed)
    images, labels = load_digits(return_X_y=True)
    order = rng.permutation(len(labels))
    x = np.hstack([images[order] / 16.0, np.ones((len(labels), 1))])
    y = labels[order].astype(np.int64)
    corrupted = np.zeros(NUM_TRAIN, dtype=bool)
    corrupted[rng.choice(NUM_TRAIN, int(CORRUPTED * NUM_TRAIN), replace=False)] = True
    noisy = y[:NUM_TRAIN].copy()
    noisy[corrupted] = (noisy[corrupted] + rng.integers(1, NUM_CLASSES, corrupted.sum())) % 10
    stop = NUM_TRAIN + NUM_VALIDATION
    return Problem(
        x[:NUM_TRAIN], noisy, corrupted, x[NUM_TRAIN:stop], y[NUM_TRAIN:stop], x[stop:], y[stop:]
    )


def load_backend(name: str, problem: Problem) -> Any:
    """Return the losses and hypergradients of the problem in one framework."""
    if name == "jax":
        from benchmarks._cleaning_jax import JaxCleaning

        return JaxCleaning(problem, RIDGE)
    from benchmarks._cleaning_torch import TorchCleaning

    return TorchCleaning(problem, RIDGE)


def fit(cleaning: Any, theta: np.ndarray, w: np.ndarray) -> np.ndarray:
    """Minimise the inner problem, ridge included, from `theta`."""

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = cleaning.inner(flat.reshape(theta.shape), w)
        return value + 0.5 * RIDGE * flat @ flat, gradient.reshape(-1) + RIDGE * flat

    options = {"maxiter": 1000, "maxcor": 20, "gtol": 1e-5, "ftol": 0.0}
    found = minimize(objective, theta.reshape(-1), jac=True, method="L-BFGS-B", options=options)
    return found.x.reshape(theta.shape)


class Adam:
    """The optimizer of the outer problem (Kingma and Ba, 2015), for either framework."""

    def __init__(self, size: int) -> None:
        self.mean, self.square, self.count = np.zeros(size), np.zeros(size), 0

    def step(self, gradient: np.ndarray) -> np.ndarray:
        """Return what to subtract."""
        self.count += 1
        self.mean += 0.1 * (gradient - self.mean)
        self.square += 0.001 * (gradient**2 - self.square)
        mean, square = self.mean / (1 - 0.9**self.count), self.square / (1 - 0.999**self.count)
        return LEARNING_RATE * mean / (np.sqrt(square) + 1e-8)


def clean(
    cleaning: Any, problem: Problem, solver: Any, num_steps: int, seed: int, progress: Any
) -> Run:
    """Run the outer loop with one solver."""
    run, adam = Run(), Adam(NUM_TRAIN)
    w = np.zeros(NUM_TRAIN)
    theta = fit(cleaning, np.zeros((problem.train_x.shape[1], NUM_CLASSES)), w)
    cleaning.hypergradient(theta, w, solver, seed)  # compilation is not timed
    for step in range(num_steps):
        start = time.perf_counter()
        gradient, num_products = cleaning.hypergradient(theta, w, solver, seed + step)
        run.seconds += (time.perf_counter() - start) / num_steps
        if step == 0:
            run.num_products = num_products
            exact, _ = cleaning.hypergradient(theta, w, li.Exact(), seed)
            norm = np.linalg.norm(exact)
            run.relative_error = float(np.linalg.norm(gradient - exact) / norm)
            run.cosine = float(gradient @ exact / (np.linalg.norm(gradient) * norm))
        run.losses.append(cleaning.outer(theta))
        w = w - adam.step(gradient)
        theta = fit(cleaning, theta, w)
        progress.update()
    run.losses.append(cleaning.outer(theta))
    run.accuracy = float(((problem.test_x @ theta).argmax(axis=1) == problem.test_y).mean())
    run.weights = (1 / (1 + np.exp(-w))).tolist()
    run.detection = float(roc_auc_score(~problem.corrupted, run.weights))
    return run


def draw(runs: dict[str, Run], corrupted: np.ndarray, path: Path) -> None:
    """Draw the validation loss of every method, and the weights that the best one learned."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for name, run in runs.items():
        style = {"color": "black", "linestyle": "--"} if name == "exact" else {}
        left.plot(run.losses, label=name, **style)
    left.set(xlabel="outer step", ylabel="validation loss", title="Lower is better")
    left.legend()
    best = min((name for name in runs if name != "exact"), key=lambda name: runs[name].losses[-1])
    weights = np.asarray(runs[best].weights)
    bins = np.linspace(0, 1, 26)
    right.hist(weights[~corrupted], bins, alpha=0.7, label="correct label")
    right.hist(weights[corrupted], bins, alpha=0.7, label="wrong label")
    right.set(xlabel="learned weight", ylabel="training examples", title=f"Weights by {best}")
    right.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(arguments: list[str]) -> int:
    """Run all methods, print the table, write JSON and the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks hypercleaning", description=__doc__)
    parser.add_argument("--backend", choices=["torch", "jax"], default="torch")
    parser.add_argument("--steps", type=int, default=20, help="outer steps (default: 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for results")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps must be at least 1; got {options.steps}")
    problem = load_problem(options.seed)
    cleaning = load_backend(options.backend, problem)
    runs: dict[str, Run] = {}
    with tqdm(
        total=len(SOLVERS) * options.steps, unit="step", desc="hyper-cleaning", mininterval=0.5
    ) as progress:
        for name, solver in SOLVERS.items():
            progress.set_postfix_str(name)
            runs[name] = clean(cleaning, problem, solver, options.steps, options.seed, progress)
    rows = [
        {
            "inverse": name,
            "relative error": f"{run.relative_error:.1e}",
            "cosine": f"{run.cosine:.4f}",
            "products": str(run.num_products),
            "ms": f"{1e3 * run.seconds:.1f}",
            "validation loss": f"{run.losses[-1]:.4f}",
            "test accuracy": f"{run.accuracy:.3f}",
            "wrong labels found (AUC)": f"{run.detection:.3f}",
        }
        for name, run in runs.items()
    ]
    start = next(iter(runs.values())).losses[0]
    text = (
        f"{table(rows)}\n\nValidation loss before cleaning: {start:.4f}; "
        f"after {options.steps} outer steps: as above.\nError and cosine: of the first "
        "hypergradient, against the exact one; ms: each."
    )
    about = machine(options.backend, "numpy", threads=cleaning.threads, seed=options.seed)
    results = {name: vars(run) for name, run in runs.items()}
    name = "hypercleaning" if options.backend == "torch" else f"hypercleaning-{options.backend}"
    publish(options.output, name, text, about, runs=results)
    picture = options.output / f"{name}.png"
    draw(runs, problem.corrupted, picture)
    print(f"Picture: {picture}")
    return 0
