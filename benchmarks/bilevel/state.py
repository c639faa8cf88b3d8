"""State over outer steps: the error of the inverse product along a real trajectory.

Data hyper-cleaning on scikit-learn's digits, as in the demo, driven by exact hypergradients. At
each outer step every method computes the inverse product at the same parameters, each with what it
kept of its own earlier steps. What those that recycle spend on the first step beyond the usual, the
others may spend on further steps, so that they have no fewer products on the average.
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

NUM_PRODUCTS = 11
FIRST = 20
"""Products that those that recycle spend on the first outer step beyond the usual."""
RECYCLED = (20, 60)


def methods(num_products: int, num_steps: int) -> dict[str, tuple[Any, Any, bool]]:
    """Return each at the first outer step and at the later ones, and whether it has its state.

    A product confirms an answer, and a start costs one.
    """

    def cg(products: int, recycle: int = 0) -> Any:
        return li.CG(max_steps=products - 2, recycle=recycle, rtol=1e-12)

    plain = num_products + -(-FIRST // num_steps)  # no fewer than the others on the average
    half = plain // 2
    columns = li.NystromCG(rank=half, sampling="uniform", max_steps=plain - 1 - half, rtol=1e-12)
    found = {
        "CG, cold": (cg(plain + 1), cg(plain + 1), False),
        "Nyström-CG, cold": (columns, columns, False),
        "CG, warm start": (cg(plain), cg(plain), True),
    }
    for recycle in RECYCLED:
        first = cg(num_products + FIRST, recycle)
        found[f"CG, {recycle} pairs recycled"] = (first, cg(num_products, recycle), True)
    return found


def follow(seed: int, steps: int, products: int) -> dict[str, Found]:
    """Follow one trajectory; return errors, products and recycled pairs of every method."""
    cleaning = load_backend("torch", load_problem(seed))
    solvers = methods(products, steps)
    runs: dict[str, Found] = {n: {"errors": [], "products": [], "recycled": []} for n in solvers}
    states = {name: li.HypergradientState() if solvers[name][2] else None for name in solvers}
    adam, w = Adam(NUM_TRAIN), np.zeros(NUM_TRAIN)
    theta = fit(cleaning, w)
    for step in range(steps):
        exact = cleaning.differentiate(theta, w, li.Exact(), seed)
        wanted = exact.ihvp.numpy()
        for name, (first, later, keeps) in solvers.items():
            solver = later if step else first
            out = cleaning.differentiate(theta, w, solver, seed + step, states[name])
            states[name] = out.state if keeps else None
            error = np.linalg.norm(out.ihvp.numpy() - wanted) / np.linalg.norm(wanted)
            runs[name]["errors"].append(float(error))
            runs[name]["products"].append(int(out.info.num_products))
            runs[name]["recycled"].append(int(out.info.recycled or 0))
        w = w - adam.step(exact.grads.numpy())
        theta = fit(cleaning, w, theta)
    return runs


@experiment(
    *("state", __doc__, Option("steps", 40, "outer steps", least=2), seeds(5)),
    Option("products", NUM_PRODUCTS, "in each outer step", least=4),
    packages=("torch", "numpy"),
)
def main(run: Run) -> None:
    steps, count = run.options.steps, run.options.seeds
    settings = {"steps": steps, "products": run.options.products}
    runs = run.repeated(follow, {"trajectory": settings}, apart=False)["trajectory"]
    rows, means = [], {}
    for name in runs[0]:
        later = np.array([found[name]["errors"][1:] for found in runs])
        means[name] = later.mean(axis=1).tolist()
        recycled = [found[name]["recycled"] for found in runs]
        rows.append(
            {
                "inverse product": name,
                "mean error": f"{later.mean():.1e}",
                "lowest seed": f"{min(means[name]):.1e}",
                "highest seed": f"{max(means[name]):.1e}",
                "median": f"{np.median(later):.1e}",
                "last step": f"{later[:, -1].mean():.1e}",
                "products a step": f"{np.mean([found[name]['products'] for found in runs]):.1f}",
                "pairs recycled": f"{np.mean(recycled):.1f}",
            }
        )
    run.publish(
        table(rows),
        f"Relative error of the inverse product against the exact one, over the outer steps 2 to "
        f"{steps},\nof {count} trajectories; ridge {RIDGE}, outer learning rate "
        f"{LEARNING_RATE} (Adam).",
        means=means,
        runs=runs,
    )
