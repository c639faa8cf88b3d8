"""Influence functions on scikit-learn's digits: ours beside those of other libraries.

A perceptron with tanh and one hidden layer, trained by L-BFGS to the end; the scores of all 1 437
training images on the 20 test images with the largest loss; Hessian with damping 0.01. Each method
runs in a process of its own on one thread, in float32, with the defaults of its library where
nothing else is said. The reference is the same system solved in float64 to a relative residual of
1e-10. Other libraries are looked for in the interpreters given by ``--peer-python``.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from benchmarks.data.digits import shuffled
from benchmarks.harness.experiment import PEER_PYTHON, SEED, Option, Run, experiment
from benchmarks.harness.processes import Found, interpreter
from benchmarks.harness.report import table
from benchmarks.influence.methods import DAMPING, METHODS, REFERENCE, load, measure, network

NUM_TRAIN, NUM_QUERY = 1437, 20
WEIGHT_DECAY = 1e-3
# Left out from this width on: half a minute or more each.
SLOW = {"dattri CG": 100} | dict.fromkeys(
    ["lowrank-inverse CG", "pyDVL CG", "pyDVL Nyström 200", "pyDVL LiSSA"], 500
)
TIME_LIMIT = 600


def write_problem(path: str, width: int, seed: int) -> Found:
    """Train a network, solve for the reference, and write both with the data."""
    images, labels = shuffled(np.random.default_rng(seed))
    x, y = torch.tensor(images), torch.tensor(labels)
    torch.manual_seed(seed)
    model = network(x.shape[1], width, 10).double()
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=200, history_size=20, line_search_fn="strong_wolfe"
    )
    train_x, train_y = x[:NUM_TRAIN], y[:NUM_TRAIN]

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        decay = sum((p**2).sum() for p in model.parameters())
        loss = cross_entropy(model(train_x), train_y) + WEIGHT_DECAY / 2 * decay
        loss.backward()
        return loss

    optimizer.step(objective)
    with torch.no_grad():
        test = cross_entropy(model(x[NUM_TRAIN:]), y[NUM_TRAIN:], reduction="none")
    hardest = NUM_TRAIN + test.topk(NUM_QUERY).indices
    arrays = {f"p{i}": p.detach().numpy() for i, p in enumerate(model.parameters())}
    size = sum(p.size for p in arrays.values())
    arrays |= {"x_train": train_x.numpy(), "y_train": train_y.numpy()}
    arrays |= {"x_query": x[hardest].numpy(), "y_query": y[hardest].numpy()}
    np.savez(path, **arrays)
    np.savez(path, reference=REFERENCE(load(path, torch.float64)).scores.numpy(), **arrays)
    return {"parameters": size}


@experiment(
    *("influence", __doc__, PEER_PYTHON),
    Option("width", 133, "hidden units", least=1),
    Option("methods", list(METHODS), "what is compared", choices=list(METHODS)),
    SEED,
    packages=("torch", "numpy"),
)
def main(run: Run) -> None:
    width, seed, names = run.options.width, run.options.seed, run.options.methods
    problem = run.file(write_problem, {"width": width, "seed": seed})
    candidates = [sys.executable, *run.options.peer_python]
    left_out = {n: "for its time" for n in names if width >= SLOW.get(n, width + 1)}
    pythons: dict[str, str] = {}
    for name in names:
        library = name.split(" ")[0]
        if library != "lowrank-inverse" and name not in left_out:
            python, version = interpreter(library, candidates)
            if python is None:
                left_out[name] = version
            else:
                pythons[name], run.about["versions"][library] = python, version
    size = problem["parameters"]
    cells = {n: {"path": problem["path"], "method": n} for n in names if n not in left_out}
    found = run.each(measure, cells, strict=False, pythons=pythons, timeout=TIME_LIMIT)
    left_out |= {n: f"failed: {one['failed'][:120]}" for n, one in found.items() if "failed" in one}
    rows = [
        {
            "method": name,
            "Spearman": f"{one['spearman']:.6f}",
            "fit (s)": f"{one['fit']:.2f}",
            "queries (s)": f"{one['query']:.2f}",
            "together (s)": f"{one['fit'] + one['query']:.2f}",
            "MiB": f"{one['peak_mib']:.0f}",
        }
        for name, one in found.items()
        if name not in left_out
    ]
    notes = ", ".join(f"{name} ({reason})" for name, reason in left_out.items())
    run.publish(
        table(rows),
        f"{size} parameters, {NUM_QUERY} queries × {NUM_TRAIN} training images, damping {DAMPING}."
        " Spearman: rank correlation with the\nconverged float64 answer, mean over the queries. "
        "s: CPU seconds. MiB: growth of the process at its peak."
        + (f"\nLeft out: {notes}." if notes else ""),
        name=f"influence-{size}",
        parameters=size,
        methods={n: {"left out": left_out[n]} if n in left_out else found[n] for n in names},
    )
