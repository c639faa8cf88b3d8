"""Data hyper-cleaning on scikit-learn's digits, by seven ways to invert the Hessian.

Half of the training labels are replaced by random ones. Every training example has a weight,
``sigmoid(w_i)``, and the weights are learned: the inner problem fits a softmax regression to the
weighted training set, the outer one lowers the loss on clean validation data. Its gradient by the
weights needs the inverse of the inner Hessian, and that is where the methods differ. All of them
may use about the same number of products with the Hessian.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from sklearn.metrics import roc_auc_score

import lowrank_inverse as li
from benchmarks.bilevel import cleaning
from benchmarks.bilevel.cleaning import Adam, fit, load_backend, load_problem
from benchmarks.harness.experiment import SEED, Option, Run, experiment
from benchmarks.harness.processes import Found
from benchmarks.harness.report import table

NUM_PRODUCTS = 20

SOLVERS: dict[str, Any] = {
    "identity": li.Identity(),
    "Neumann": li.Neumann(num_terms=NUM_PRODUCTS),
    "CG": li.CG(max_steps=NUM_PRODUCTS),
    "Nyström, Krylov": li.Nystrom(rank=NUM_PRODUCTS),
    "Nyström, uniform": li.Nystrom(rank=NUM_PRODUCTS, damping=1e-2, sampling="uniform"),
    "Nyström-CG, uniform": li.NystromCG(
        rank=NUM_PRODUCTS // 2, sampling="uniform", max_steps=NUM_PRODUCTS // 2
    ),
    "exact": li.Exact(),
}
BACKEND = Option("backend", "torch", "the framework", choices=["torch", "jax"])


def clean(method: str, backend: str, steps: int, seed: int) -> Found:
    """Run the outer loop with one solver."""
    problem, solver = load_problem(seed), SOLVERS[method]
    losses, adam = load_backend(backend, problem), Adam(cleaning.NUM_TRAIN)
    w = np.zeros(cleaning.NUM_TRAIN)
    theta = fit(losses, w)
    exact, _ = losses.hypergradient(theta, w, li.Exact(), seed)
    first, num_products = losses.hypergradient(theta, w, solver, seed)  # compilation is not timed
    length, norm = np.linalg.norm(first), np.linalg.norm(exact)
    seconds, reached = 0.0, [losses.outer(theta)]
    for step in range(steps):
        start = time.perf_counter()
        gradient, _ = losses.hypergradient(theta, w, solver, seed + step)
        seconds += (time.perf_counter() - start) / steps
        w = w - adam.step(gradient)
        theta = fit(losses, w, theta)
        reached.append(losses.outer(theta))
    return {
        "relative_error": float(np.linalg.norm(first - exact) / norm),
        "cosine": float(first @ exact / (length * norm)),
        "num_products": num_products,
        "seconds": seconds,
        "losses": reached,
        **judged(problem, theta, w),
    }


def minimum(backend: str, seed: int) -> Found:
    """Say where `minimize_bilevel` ends, and after what."""
    problem = load_problem(seed)
    found = load_backend(backend, problem).minimum()
    theta, w = (
        np.asarray(x.detach() if hasattr(x, "detach") else x) for x in (found.params, found.hparams)
    )
    return {
        "loss": found.value,
        "reason": found.reason,
        "evaluations": len(found.history),
        "products": found.products,
        **judged(problem, theta, w),
    }


def judged(problem: cleaning.Problem, theta: np.ndarray, w: np.ndarray) -> Found:
    """Say how good parameters and weights are."""
    weights = 1 / (1 + np.exp(-w))
    return {
        "accuracy": float(((problem.test_x @ theta).argmax(axis=1) == problem.test_y).mean()),
        "detection": float(roc_auc_score(~problem.corrupted, weights)),
        "weights": weights.tolist(),
    }


@experiment(
    *("hypercleaning", __doc__, BACKEND),
    *(Option("steps", 20, "outer steps", least=1), SEED),
    packages=("torch", "jax", "numpy"),
)
def main(run: Run) -> None:
    options = run.options
    if options.backend != "torch":
        run.name += f"-{options.backend}"
    shared = {"backend": options.backend, "steps": options.steps, "seed": options.seed}
    runs = run.each(clean, {name: {"method": name, **shared} for name in SOLVERS}, apart=False)
    best = {"backend": options.backend, "seed": options.seed}
    least = run.each(minimum, {"minimum": best}, apart=False)["minimum"]
    rows = [
        {
            "inverse": name,
            "relative error": f"{found['relative_error']:.1e}",
            "cosine": f"{found['cosine']:.4f}",
            "products": str(found["num_products"]),
            "ms": f"{1e3 * found['seconds']:.1f}",
            "validation loss": f"{found['losses'][-1]:.4f}",
            "test accuracy": f"{found['accuracy']:.3f}",
            "wrong labels found (AUC)": f"{found['detection']:.3f}",
        }
        for name, found in runs.items()
    ]
    rows.append(
        dict.fromkeys(rows[0], "")
        | {
            "inverse": "minimize_bilevel",
            "validation loss": f"{least['loss']:.4f}",
            "test accuracy": f"{least['accuracy']:.3f}",
            "wrong labels found (AUC)": f"{least['detection']:.3f}",
        }
    )
    run.publish(
        table(rows),
        f"Validation loss before cleaning: {runs['exact']['losses'][0]:.4f}; "
        f"after {options.steps} outer steps: as above;\nat the optimum, which minimize_bilevel "
        f"reaches in {least['evaluations']} evaluations with {least['products']} products: "
        f"{least['loss']:.4f}.\nError and cosine: of the first "
        "hypergradient, against the exact one; ms: each.",
        runs=runs,
        minimum=least,
    )
    draw(run, runs, load_problem(options.seed).corrupted)


def draw(run: Run, runs: dict[str, Found], corrupted: np.ndarray) -> None:
    """Draw the validation loss of every method, and the weights that the best one learned."""
    figure, ((left, right),) = run.figure(1, 2, 11, 4.2)
    for name, found in runs.items():
        style = {"color": "black", "linestyle": "--"} if name == "exact" else {}
        left.plot(found["losses"], label=name, **style)
    left.set(xlabel="outer step", ylabel="validation loss", title="Lower is better")
    best = min((n for n in runs if n != "exact"), key=lambda name: runs[name]["losses"][-1])
    weights, bins = np.asarray(runs[best]["weights"]), np.linspace(0, 1, 26)
    right.hist(weights[~corrupted], bins, alpha=0.7, label="correct label")
    right.hist(weights[corrupted], bins, alpha=0.7, label="wrong label")
    right.set(xlabel="learned weight", ylabel="training examples", title=f"Weights by {best}")
    for axis in (left, right):
        axis.legend()
    run.draw(figure)
