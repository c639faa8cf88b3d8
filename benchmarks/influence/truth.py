"""Influence against training again: ours beside other libraries, by accuracy, time and memory.

Networks on digits, MNIST and CIFAR-10, trained to the minimum by L-BFGS with weight decay, then
again on random halves of the images (from the same start) and without single images (from the
minimum). The linear datamodelling score (LDS) is the rank correlation of the sums of the scores in
a half with the loss after training on it; that for leaving one out compares the change of the loss
with the score of the image. All in float64; each method runs in float32, on one thread, in a
process of its own, with the weight decay for damping. Ours with the Hessian, whose eigenvalues go
down to minus the weight decay where training ends, takes twice that; "rough" stops at a tenth of
the residual, and "1 step" takes the best combination of the directions that EK-FAC gives for all
queries. Other libraries are looked for in the interpreters given by ``--peer-python``.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.harness.experiment import DATA, PEER_PYTHON, SEED, Option, Run, experiment
from benchmarks.harness.processes import Found, interpreter
from benchmarks.harness.report import table
from benchmarks.harness.timing import MIB, Peak
from benchmarks.influence import methods
from benchmarks.influence.methods import Outcome, Problem, timed
from benchmarks.influence.retraining import DECAY, NETWORKS, write_truth

TIME_LIMIT = 300
DAMPINGS = {"ggn": 1.0, "hessian": 2.0}
"""Times the weight decay."""


def load(path: str, name: str) -> tuple[Problem, dict[str, np.ndarray]]:
    """Read a trained network with its data, in float32, and what training again found."""
    with np.load(path) as file:
        arrays = dict(file)
    model = NETWORKS[name]()
    state = {k[2:]: torch.tensor(v).float() for k, v in arrays.items() if k.startswith("p_")}
    model.load_state_dict(state)

    def part(which: str) -> tuple[Tensor, Tensor]:
        return torch.tensor(arrays[f"x_{which}"]).float(), torch.tensor(arrays[f"y_{which}"])

    return Problem(model, part("train"), part("query"), DECAY[name]), arrays


def ours(problem: Problem, make: Callable[..., Any], curvature: str = "ggn") -> Outcome:
    """Run this package with the solver that `make` returns, for modules, model, loss and data."""
    import lowrank_inverse as li
    import lowrank_inverse_torch as lit

    loss = partial(cross_entropy, reduction="none")

    def fit() -> Any:
        solver = make(li, lit, problem.model, loss, problem.train)
        knows_none = isinstance(solver, li.Identity)
        damping = None if knows_none else DAMPINGS[curvature] * problem.damping
        options = {"curvature": curvature, "solver": solver, "damping": damping}
        return lit.InfluenceFunction(problem.model, loss, problem.train, **options)

    found: list[Any] = []

    def scores(influence: Any) -> Tensor:
        found.append(influence)
        return influence.scores(problem.query)

    return timed(fit, scores)._replace(products=found[0].info.num_products if found else None)


def default(li: Any, lit: Any, *about: Any) -> Any:
    """Return no solver: the default is taken."""
    return None


def rough(li: Any, lit: Any, *about: Any) -> Any:
    """Return conjugate gradients that stop at a tenth of the residual."""
    return li.CG(rtol=0.1)


def gradients(li: Any, lit: Any, *about: Any) -> Any:
    """Return the identity: TracIn at the last checkpoint."""
    return li.Identity()


def kfac(
    li: Any,
    lit: Any,
    *about: Any,
    corrected: bool = True,
    alone: bool = False,
    max_steps: int | None = None,
) -> Any:
    """Return EK-FAC or KFAC, alone or as a preconditioner."""
    found = lit.KFAC(*about, eigenvalue_correction=corrected)
    return found if alone else li.CG(preconditioner=found, max_steps=max_steps)


def subsampled(li: Any, lit: Any, *about: Any, alone: bool = False) -> Any:
    """Return the largest terms of the Gauss-Newton matrix, alone or as a preconditioner."""
    found = lit.SubsampledGaussNewton(*about)
    return found if alone else li.CG(preconditioner=found)


METHODS: dict[str, Callable[[Problem], Outcome]] = {
    "lowrank-inverse default": partial(ours, make=default),
    "lowrank-inverse Hessian": partial(ours, make=default, curvature="hessian"),
    "lowrank-inverse Hessian, rough": partial(ours, make=rough, curvature="hessian"),
    "lowrank-inverse Hessian, 1 step": partial(
        ours, make=partial(kfac, max_steps=1), curvature="hessian"
    ),
    "lowrank-inverse CG, subsampled": partial(ours, make=subsampled),
    "lowrank-inverse CG, EK-FAC": partial(ours, make=kfac),
    "lowrank-inverse CG, KFAC": partial(ours, make=partial(kfac, corrected=False)),
    "lowrank-inverse subsampled": partial(ours, make=partial(subsampled, alone=True)),
    "lowrank-inverse EK-FAC": partial(ours, make=partial(kfac, alone=True)),
    "lowrank-inverse KFAC": partial(ours, make=partial(kfac, corrected=False, alone=True)),
    "lowrank-inverse gradients": partial(ours, make=gradients),
    "pyDVL block CG": methods.METHODS["pyDVL block CG"],
    "pyDVL EK-FAC": methods.METHODS["pyDVL EK-FAC"],
    "dattri CG": methods.METHODS["dattri CG"],
    "kronfluence EK-FAC": methods.METHODS["kronfluence EK-FAC"],
    "captum TracIn": methods.captum_gradients,
    "traker TRAK": methods.trak,
}


def measure(path: str, name: str, method: str) -> Found:
    """Run one method on one network; return its agreement with the truth, seconds and memory."""
    from lowrank_inverse.influence.metrics import leave_one_out, linear_datamodelling_score

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    problem, truth = load(path, name)
    # The libraries are imported, and torch's first use is over, before anything is measured.
    few = (tuple(a[:30] for a in part) for part in (problem.train, problem.query))
    if not method.startswith("kronfluence"):  # which changes the model for good
        METHODS[method](Problem(problem.model, *few, damping=10.0))  # of 30 it is indefinite
    with Peak() as peak:
        outcome = METHODS[method](problem)
    scores = outcome.scores.double().numpy()
    changes = scores[:, truth["removed"]] / scores.shape[1]
    return {
        "lds": linear_datamodelling_score(scores, truth["subsets"], truth["losses"]),
        "one_out": leave_one_out(changes, truth["changes"])._asdict(),
        "seconds": outcome.fit + outcome.query,
        "peak_mib": peak.num_bytes / MIB,
        "products": outcome.products,
    }


@experiment(
    *("influence-truth", __doc__, DATA, PEER_PYTHON),
    Option("networks", list(NETWORKS), "what is trained", choices=list(NETWORKS)),
    Option("methods", list(METHODS), "what is compared", choices=list(METHODS)),
    Option("train", 500, "training images", least=4),
    Option("halves", 120, "trainings on random halves", least=2),
    Option("removals", 40, "trainings without one image", least=2),
    SEED,
    packages=("torch", "numpy"),
)
def main(run: Run) -> None:
    options = run.options
    sizes = {"num_train": options.train, "halves": options.halves, "removals": options.removals}
    sizes |= {"data_dir": str(options.data_dir), "seed": options.seed}
    candidates, left_out = [sys.executable, *options.peer_python], {}
    pythons: dict[str, str] = {}
    for method in options.methods:
        library = method.split(" ")[0]
        if library != "lowrank-inverse":
            python, version = interpreter(library, candidates)
            if python is None:
                left_out[method] = version
            else:
                pythons[method], run.about["versions"][library] = python, version
    problems = {name: run.file(write_truth, {"name": name, **sizes}) for name in options.networks}
    cells = {
        (name, method): {"path": problems[name]["path"], "name": name, "method": method}
        for name in options.networks
        for method in options.methods
        if method not in left_out
    }
    found = run.each(
        measure,
        cells,
        strict=False,
        pythons={cell: pythons[cell[1]] for cell in cells if cell[1] in pythons},
        timeout=TIME_LIMIT,
    )
    failed = {cell: one["failed"][:120] for cell, one in found.items() if "failed" in one}
    texts = []
    for name, problem in problems.items():
        rows = [
            {
                "method": method,
                "LDS": f"{one['lds']:.3f}",
                "one out": f"{one['one_out']['pearson']:.3f}",
                "products": "" if one["products"] is None else str(one["products"]),
                "seconds": f"{one['seconds']:.2f}",
                "MiB": f"{one['peak_mib']:.0f}",
            }
            for (of, method), one in found.items()
            if of == name and "failed" not in one
        ]
        title = f"{name}: {problem['parameters']} parameters, weight decay {DECAY[name]:g}"
        texts += [f"{title}, norm of the gradient {problem['gradient']:.0e}", table(rows)]
    notes = [f"{method} ({reason})" for method, reason in left_out.items()]
    notes += [f"{', '.join(cell)} ({reason})" for cell, reason in failed.items()]
    run.publish(
        *texts,
        f"{options.train} training images; LDS over {options.halves} random halves; one out: "
        f"Pearson correlation over {options.removals} images\nleft out, each with all queries. "
        "products: of curvature and vector. seconds: of the CPU. MiB: growth of the\nprocess at "
        "its peak." + (f"\nLeft out: {'; '.join(notes)}." if notes else ""),
        problems={
            name: {key: value for key, value in problem.items() if key != "path"}
            for name, problem in problems.items()
        },
        methods={", ".join(cell): one for cell, one in found.items()},
    )
    draw(run, {cell: one for cell, one in found.items() if "failed" not in one})


def draw(run: Run, found: dict[tuple[str, str], Found]) -> None:
    """Draw the LDS of each method against its seconds, a panel for each network."""
    from matplotlib import colormaps

    names = list(dict.fromkeys(name for name, _ in found))
    order, colors = list(METHODS), colormaps["tab20"]
    figure, axes = run.figure(1, len(names), 3.2 * len(names) + 2.6, 3.6)
    for axis, name in zip(axes[0], names, strict=True):
        for (of, method), one in found.items():
            if of == name:
                k = order.index(method)
                own = method.startswith("lowrank-inverse")
                axis.plot(
                    *(one["seconds"], one["lds"], "o" if own else "s"),
                    color=colors(k),
                    fillstyle="full" if own else "none",
                    label=method.replace("lowrank-inverse", "ours:"),
                )
        axis.set(title=name, xlabel="CPU seconds", xscale="log")
        axis.grid(visible=True, alpha=0.3)
    axes[0, 0].set_ylabel("LDS")
    handles = {h.get_label(): h for axis in axes[0] for h in axis.get_lines()}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=7)
    run.draw(figure)
