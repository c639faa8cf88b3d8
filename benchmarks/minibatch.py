"""What it costs not to freeze the operator: a fresh minibatch in each product.

Data hyper-cleaning on scikit-learn's digits with all weights equal. The inverse product is
computed by conjugate gradients with the Hessian of the whole training set, of one minibatch for the
length of the solve, of the mean of several minibatches, and of a fresh minibatch in each product.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import lowrank_inverse as li
from benchmarks._report import machine, publish, table
from benchmarks.hypercleaning import NUM_CLASSES, NUM_TRAIN, RIDGE, fit, load_problem

BATCH = 100
SOLVER = li.CG(damping=RIDGE, max_steps=20)


def measure(seed: int, num_draws: int) -> dict[str, list[tuple[float, float]]]:
    """Return cosine and relative error of each way, for each draw of batches."""
    import torch
    from torch.nn.functional import cross_entropy

    from benchmarks._cleaning_torch import TorchCleaning
    from lowrank_inverse_torch import HessianOperator

    problem = load_problem(seed)
    cleaning = TorchCleaning(problem, RIDGE)
    w = np.zeros(NUM_TRAIN)
    theta = torch.from_numpy(
        fit(cleaning, np.zeros((problem.train_x.shape[1], NUM_CLASSES)), w)
    ).requires_grad_()

    def loss(rows: Any) -> Any:
        return lambda: 0.5 * cross_entropy(cleaning.x[rows] @ theta, cleaning.y[rows])

    x, y = cleaning.validation
    b = torch.autograd.grad(cross_entropy(x @ theta, y), theta)[0].reshape(-1)
    whole = HessianOperator(loss(slice(None)), theta)
    exact = li.solve(whole, b, solver=li.Exact(damping=RIDGE)).value
    rng = np.random.default_rng(seed)

    def batch() -> Any:
        return torch.from_numpy(rng.choice(NUM_TRAIN, BATCH, replace=False))

    def several(count: int) -> Any:
        return HessianOperator([loss(batch()) for _ in range(count)], theta)

    def fresh() -> Any:
        return li.FunctionOperator(
            lambda v: HessianOperator(loss(batch()), theta) @ v, b.shape[0], like=b
        )

    ways: dict[str, Callable[[], Any]] = {
        "whole training set": lambda: whole,
        "mean of 10 minibatches, frozen": lambda: several(10),
        "mean of 4 minibatches, frozen": lambda: several(4),
        "one minibatch, frozen": lambda: several(1),
        "a fresh minibatch in each product": fresh,
    }
    found: dict[str, list[tuple[float, float]]] = {}
    for name, make in ways.items():
        found[name] = []
        for _ in range(1 if make() is whole else num_draws):
            q = li.solve(make(), b, solver=SOLVER).value
            cosine = float(q @ exact / (q.norm() * exact.norm()))
            found[name].append((cosine, float((q - exact).norm() / exact.norm())))
    return found


def main(arguments: list[str]) -> int:
    """Measure, print the table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks minibatch", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--draws", type=int, default=10, help="of batches, for each seed")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for results")
    options = parser.parse_args(arguments)
    if options.seeds < 1 or options.draws < 1:
        parser.error("--seeds and --draws must be at least 1")
    runs = [measure(seed, options.draws) for seed in range(options.seeds)]
    rows = []
    for name in runs[0]:
        pairs = np.array([pair for run in runs for pair in run[name]])
        rows.append(
            {
                "Hessian of": name,
                "cosine, mean": f"{pairs[:, 0].mean():.3f}",
                "worst": f"{pairs[:, 0].min():.3f}",
                "relative error, mean": f"{pairs[:, 1].mean():.2f}",
                "worst ": f"{pairs[:, 1].max():.2f}",
            }
        )
    text = (
        f"{table(rows)}\n\nInverse product by {SOLVER.max_steps} steps of CG against the exact one "
        f"of the whole training set;\nminibatches of {BATCH} of {NUM_TRAIN} examples, "
        f"{options.seeds} seeds, {options.draws} draws each."
    )
    about = machine("torch", "numpy", threads=1, seeds=f"0 to {options.seeds - 1}")
    publish(options.output, "minibatch", text, about, runs=runs)
    return 0
