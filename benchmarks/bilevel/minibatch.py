"""What it costs not to freeze the operator: a fresh minibatch in each product.

Data hyper-cleaning on scikit-learn's digits with all weights equal. The inverse product is
computed by conjugate gradients with the Hessian of the whole training set, of one minibatch for the
length of the solve, of the mean of several minibatches, and of a fresh minibatch in each product.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import lowrank_inverse as li
from benchmarks.bilevel.cleaning import NUM_TRAIN, RIDGE, fit, load_backend, load_problem
from benchmarks.harness.experiment import Option, Run, experiment, seeds
from benchmarks.harness.report import table

BATCH = 100
SOLVER = li.CG(damping=RIDGE, max_steps=20)


def measure(seed: int, draws: int) -> dict[str, list[tuple[float, float]]]:
    """Return cosine and relative error of each way, for each draw of batches."""
    import torch
    from torch.nn.functional import cross_entropy

    from lowrank_inverse_torch import HessianOperator

    cleaning = load_backend("torch", load_problem(seed))
    theta = torch.from_numpy(fit(cleaning, np.zeros(NUM_TRAIN))).requires_grad_()
    rng = np.random.default_rng(seed)

    def loss(rows: Any) -> Any:
        return lambda: 0.5 * cross_entropy(cleaning.x[rows] @ theta, cleaning.y[rows])

    def batch() -> Any:
        return torch.from_numpy(rng.choice(NUM_TRAIN, BATCH, replace=False))

    def several(count: int) -> Any:
        return HessianOperator([loss(batch()) for _ in range(count)], theta)

    outer = cross_entropy(cleaning.outer_x @ theta, cleaning.outer_y)
    b = torch.autograd.grad(outer, theta)[0].reshape(-1)
    whole = HessianOperator(loss(slice(None)), theta)
    exact = li.solve(whole, b, solver=li.Exact(damping=RIDGE)).value
    fresh = li.FunctionOperator(
        lambda v: HessianOperator(loss(batch()), theta) @ v, b.shape[0], like=b
    )
    ways: dict[str, tuple[int, Any]] = {
        "whole training set": (1, lambda: whole),
        "mean of 10 minibatches, frozen": (draws, lambda: several(10)),
        "mean of 4 minibatches, frozen": (draws, lambda: several(4)),
        "one minibatch, frozen": (draws, lambda: several(1)),
        "a fresh minibatch in each product": (draws, lambda: fresh),
    }
    found: dict[str, list[tuple[float, float]]] = {}
    for name, (count, make) in ways.items():
        solutions = [li.solve(make(), b, solver=SOLVER).value for _ in range(count)]
        found[name] = [
            (float(q @ exact / (q.norm() * exact.norm())), float((q - exact).norm() / exact.norm()))
            for q in solutions
        ]
    return found


@experiment(
    *("minibatch", __doc__, seeds(5)),
    Option("draws", 10, "of batches, for each seed", least=1),
    packages=("torch", "numpy"),
)
def main(run: Run) -> None:
    count, draws = run.options.seeds, run.options.draws
    runs = run.repeated(measure, {"errors": {"draws": draws}}, apart=False)["errors"]
    rows = []
    for name in runs[0]:
        cosines, errors = np.array([pair for found in runs for pair in found[name]]).T
        rows.append(
            {
                "Hessian of": name,
                "cosine, mean": f"{cosines.mean():.3f}",
                "worst": f"{cosines.min():.3f}",
                "relative error, mean": f"{errors.mean():.2f}",
                "worst ": f"{errors.max():.2f}",
            }
        )
    run.publish(
        table(rows),
        f"Inverse product by {SOLVER.max_steps} steps of CG against the exact one of the whole "
        f"training set;\nminibatches of {BATCH} of {NUM_TRAIN} examples, {count} seeds, {draws} "
        "draws each.",
        runs=runs,
    )
