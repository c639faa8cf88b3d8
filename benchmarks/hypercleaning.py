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
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch.nn.functional import cross_entropy
from tqdm import tqdm

import lowrank_inverse as li
from benchmarks._report import machine, publish, table
from lowrank_inverse_torch import hypergradient

NUM_TRAIN, NUM_VALIDATION, NUM_CLASSES = 1000, 300, 10
CORRUPTED = 0.5
RIDGE = 1e-3
NUM_PRODUCTS = 20
OUTER_LEARNING_RATE = 0.2

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
    """Digits with labels of which half are wrong, as tensors."""

    train_x: torch.Tensor
    train_y: torch.Tensor
    corrupted: np.ndarray
    validation_x: torch.Tensor
    validation_y: torch.Tensor
    test_x: torch.Tensor
    test_y: torch.Tensor


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


class Cleaning:
    """The bilevel problem: parameters ``theta`` of the model, ``w`` of the weights."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        features = problem.train_x.shape[1]
        self.theta = torch.zeros(features, NUM_CLASSES, dtype=torch.float64, requires_grad=True)
        self.w = torch.zeros(NUM_TRAIN, dtype=torch.float64, requires_grad=True)

    def inner_loss(self) -> torch.Tensor:
        """Weighted training loss, without the ridge."""
        losses = cross_entropy(
            self.problem.train_x @ self.theta, self.problem.train_y, reduction="none"
        )
        return (torch.sigmoid(self.w) * losses).mean()

    def outer_loss(self) -> torch.Tensor:
        """Loss on the validation set."""
        return cross_entropy(self.problem.validation_x @ self.theta, self.problem.validation_y)

    def fit(self) -> None:
        """Minimise the inner problem from where it stands."""
        optimizer = torch.optim.LBFGS(
            [self.theta],
            max_iter=500,
            tolerance_grad=1e-7,
            tolerance_change=0,
            history_size=20,
            line_search_fn="strong_wolfe",
        )

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = self.inner_loss() + 0.5 * RIDGE * (self.theta**2).sum()
            loss.backward(inputs=[self.theta])
            return loss

        optimizer.step(closure)

    def hypergradient(self, solver: Any, seed: int) -> Any:
        """Differentiate the outer loss by the weights."""
        return hypergradient(
            self.inner_loss,
            self.outer_loss,
            self.theta,
            self.w,
            solver=solver,
            ridge=RIDGE,
            rng=seed,
            accumulate_grad=False,
            chunk_size=50,
        )


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
    xs, ys = torch.from_numpy(x), torch.from_numpy(y)
    return Problem(
        xs[:NUM_TRAIN],
        torch.from_numpy(noisy),
        corrupted,
        xs[NUM_TRAIN:stop],
        ys[NUM_TRAIN:stop],
        xs[stop:],
        ys[stop:],
    )


def clean(problem: Problem, solver: Any, num_steps: int, seed: int, progress: Any) -> Run:
    """Run the outer loop with one solver."""
    cleaning, run = Cleaning(problem), Run()
    optimizer = torch.optim.Adam([cleaning.w], lr=OUTER_LEARNING_RATE)
    cleaning.fit()
    for step in range(num_steps):
        start = time.perf_counter()
        out = cleaning.hypergradient(solver, seed + step)
        run.seconds += (time.perf_counter() - start) / num_steps
        if step == 0:
            run.num_products = int(out.info.num_products)
            exact = cleaning.hypergradient(li.Exact(), seed).grads
            run.relative_error = float((out.grads - exact).norm() / exact.norm())
            run.cosine = float(torch.cosine_similarity(out.grads, exact, dim=0))
        run.losses.append(cleaning.outer_loss().item())
        cleaning.w.grad = out.grads
        optimizer.step()
        cleaning.fit()
        progress.update()
    run.losses.append(cleaning.outer_loss().item())
    with torch.no_grad():
        predicted = (problem.test_x @ cleaning.theta).argmax(dim=1)
        run.accuracy = float((predicted == problem.test_y).double().mean())
        run.weights = torch.sigmoid(cleaning.w).tolist()
    run.detection = float(roc_auc_score(~problem.corrupted, run.weights))
    return run


def draw(runs: dict[str, Run], corrupted: np.ndarray, path: Path) -> None:
    """Draw the validation loss of every method, and the weights that the best one learned."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

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
    parser.add_argument("--backend", choices=["torch"], default="torch")
    parser.add_argument("--steps", type=int, default=30, help="outer steps (default: 30)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for results")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps must be at least 1; got {options.steps}")
    problem = load_problem(options.seed)
    runs: dict[str, Run] = {}
    with tqdm(
        total=len(SOLVERS) * options.steps, unit="step", desc="hyper-cleaning", mininterval=0.5
    ) as progress:
        for name, solver in SOLVERS.items():
            progress.set_postfix_str(name)
            runs[name] = clean(problem, solver, options.steps, options.seed, progress)
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
    about = machine("torch", "numpy", threads=torch.get_num_threads(), seed=options.seed)
    results = {name: vars(run) for name, run in runs.items()}
    publish(options.output, "hypercleaning", text, about, runs=results)
    draw(runs, problem.corrupted, options.output / "hypercleaning.png")
    print(f"Picture: {options.output / 'hypercleaning.png'}")
    return 0
