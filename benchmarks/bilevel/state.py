"""State over outer steps: the error of the inverse product along a real trajectory.

Data hyper-cleaning on scikit-learn's digits, as in the demo, driven by exact hypergradients. At
each outer step every method computes the inverse product at the same parameters, each with what it
kept of its own earlier steps, and all with the same number of products with the Hessian on the
average: what the first set of columns costs, the others may spend on further steps.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import lowrank_inverse as li
from benchmarks.bilevel.cleaning import (
    LEARNING_RATE,
    NUM_TRAIN,
    RIDGE,
    Adam,
    fit,
    load_backend,
    load_problem,
)
from benchmarks.harness.experiment import Option, Run, experiment, seeds
from benchmarks.harness.processes import Found
from benchmarks.harness.report import table

NUM_PRODUCTS = 10
RANK = 20


def solvers(num_products: int, rank: int, num_steps: int) -> dict[str, tuple[Any, bool]]:
    """Return each method with whether it is given its state.

    CG confirms its answer by a product, and a start costs one too. The columns that are computed
    at first are paid for by a few steps less, or, with CG, a few more.
    """
    extra = -(-rank // num_steps)  # a first set of columns, spread over all outer steps
    half = num_products // 2

    def nystrom(rank: int, steps: int) -> Any:
        return li.NystromCG(rank=rank, max_steps=steps, rtol=1e-12)

    return {
        "CG, cold": (li.CG(max_steps=num_products + extra - 1, rtol=1e-12), False),
        "Nyström-CG, cold": (nystrom(half, half + extra - 1), False),
        "CG, warm start": (li.CG(max_steps=num_products + extra - 2, rtol=1e-12), True),
        "Nyström-CG, columns kept": (nystrom(rank, num_products - 2), True),
    }


def follow(seed: int, steps: int) -> dict[str, Found]:
    """Follow one trajectory; return errors, products and refreshes of every method."""
    cleaning = load_backend("torch", load_problem(seed))
    methods = solvers(NUM_PRODUCTS, RANK, steps)
    runs: dict[str, Found] = {n: {"errors": [], "products": [], "refreshed": []} for n in methods}
    states: dict[str, Any] = dict.fromkeys(methods)
    adam, w = Adam(NUM_TRAIN), np.zeros(NUM_TRAIN)
    theta = fit(cleaning, w)
    for step in range(steps):
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
        theta = fit(cleaning, w, theta)
    return runs


@experiment(
    *("state", __doc__, Option("steps", 40, "outer steps", least=2), seeds(5)),
    packages=("torch", "numpy"),
)
def main(run: Run) -> None:
    steps, count = run.options.steps, run.options.seeds
    runs = run.repeated(follow, {"trajectory": {"steps": steps}}, apart=False)["trajectory"]
    rows, means = [], {}
    for name in runs[0]:
        later = np.array([found[name]["errors"][1:] for found in runs])
        means[name] = later.mean(axis=1).tolist()
        refreshed = [sum(found[name]["refreshed"]) for found in runs]
        rows.append(
            {
                "inverse product": name,
                "mean error": f"{later.mean():.1e}",
                "lowest seed": f"{min(means[name]):.1e}",
                "highest seed": f"{max(means[name]):.1e}",
                "median": f"{np.median(later):.1e}",
                "last step": f"{later[:, -1].mean():.1e}",
                "products a step": f"{np.mean([found[name]['products'] for found in runs]):.1f}",
                "sets of columns": f"{np.mean(refreshed):.1f}",
            }
        )
    run.publish(
        table(rows),
        f"Relative error of the inverse product against the exact one, over the outer steps 2 to "
        f"{steps},\nof {count} trajectories; rank {RANK}, ridge {RIDGE}, outer learning rate "
        f"{LEARNING_RATE} (Adam).",
        means=means,
        runs=runs,
    )
