"""State over outer steps: the error of the inverse product along a real trajectory.

Data hyper-cleaning on scikit-learn's digits, as in the demo, driven by exact hypergradients. At
each outer step every method computes the inverse product at the same parameters, each with what it
kept of its own earlier steps, and all with the same number of products with the Hessian on the
average: what the first set of columns costs, the others may spend on further steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import lowrank_inverse as li
from benchmarks._report import machine, publish, table
from benchmarks.hypercleaning import NUM_CLASSES, NUM_TRAIN, RIDGE, Adam, fit, load_problem

NUM_PRODUCTS = 10
RANK = 20


def solvers(num_products: int, rank: int, num_steps: int) -> dict[str, tuple[Any, bool]]:
    """Return each method with whether it is given its state.

    CG confirms its answer by a product, and a start costs one too. The columns that are computed
    at first are paid for by a few steps less, or, with CG, a few more.
    """
    extra = -(-rank // num_steps)  # a first set of columns, spread over all outer steps
    tight: dict[str, Any] = {"rtol": 1e-12}
    return {
        "CG, cold": (li.CG(max_steps=num_products + extra - 1, **tight), False),
        "Nyström-CG, cold": (
            li.NystromCG(rank=num_products // 2, max_steps=num_products // 2 + extra - 1, **tight),
            False,
        ),
        "CG, warm start": (li.CG(max_steps=num_products + extra - 2, **tight), True),
        "Nyström-CG, columns kept": (
            li.NystromCG(rank=rank, max_steps=num_products - 2, **tight),
            True,
        ),
    }


def follow(seed: int, num_steps: int, progress: Any) -> dict[str, dict[str, Any]]:
    """Follow one trajectory; return errors, products and refreshes of every method."""
    from benchmarks._cleaning_torch import TorchCleaning

    problem = load_problem(seed)
    cleaning = TorchCleaning(problem, RIDGE)
    methods = solvers(NUM_PRODUCTS, RANK, num_steps)
    runs: dict[str, dict[str, Any]] = {
        name: {"errors": [], "products": [], "refreshed": []} for name in methods
    }
    states: dict[str, Any] = dict.fromkeys(methods)
    adam, w = Adam(NUM_TRAIN), np.zeros(NUM_TRAIN)
    theta = fit(cleaning, np.zeros((problem.train_x.shape[1], NUM_CLASSES)), w)
    for step in range(num_steps):
        exact = cleaning.differentiate(theta, w, li.Exact(), seed)
        wanted = exact.ihvp.numpy()
        for name, (solver, keeps) in methods.items():
            out = cleaning.differentiate(theta, w, solver, seed + step, states[name])
            states[name] = out.state if keeps else None
            error = np.linalg.norm(out.ihvp.numpy() - wanted) / np.linalg.norm(wanted)
            runs[name]["errors"].append(float(error))
            runs[name]["products"].append(int(out.info.num_products))
            runs[name]["refreshed"].append(bool(out.info.refreshed))
        w = w - adam.step(exact.grads.numpy())
        theta = fit(cleaning, theta, w)
        progress.update()
    return runs


def main(arguments: list[str]) -> int:
    """Follow the trajectories, print the table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks state", description=__doc__)
    parser.add_argument("--steps", type=int, default=40, help="outer steps (default: 40)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for results")
    options = parser.parse_args(arguments)
    if options.steps < 2 or options.seeds < 1:
        parser.error("--steps must be at least 2 and --seeds at least 1")
    runs = []
    with tqdm(total=options.seeds * options.steps, unit="step", desc="state") as progress:
        for seed in range(options.seeds):
            runs.append(follow(seed, options.steps, progress))
    rows, means = [], {}
    for name in runs[0]:
        later = np.array([run[name]["errors"][1:] for run in runs])
        means[name] = [float(x) for x in later.mean(axis=1)]
        rows.append(
            {
                "inverse product": name,
                "mean error": f"{later.mean():.1e}",
                "lowest seed": f"{min(means[name]):.1e}",
                "highest seed": f"{max(means[name]):.1e}",
                "median": f"{np.median(later):.1e}",
                "last step": f"{later[:, -1].mean():.1e}",
                "products a step": f"{np.mean([run[name]['products'] for run in runs]):.1f}",
                "sets of columns": f"{np.mean([sum(run[name]['refreshed']) for run in runs]):.1f}",
            }
        )
    text = (
        f"{table(rows)}\n\nRelative error of the inverse product against the exact one, over the "
        f"outer steps 2 to {options.steps},\nof {options.seeds} trajectories; "
        f"rank {RANK}, ridge {RIDGE}, outer learning rate 0.2 (Adam)."
    )
    about = machine("torch", "numpy", threads=1, seeds=f"0 to {options.seeds - 1}")
    publish(options.output, "state", text, about, means=means, runs=runs)
    return 0
