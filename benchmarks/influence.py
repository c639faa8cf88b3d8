"""Influence functions on scikit-learn's digits: ours beside those of other libraries.

A perceptron with tanh and one hidden layer, trained by L-BFGS to the end; the scores of all 1 437
training images on the 20 test images with the largest loss; Hessian with damping 0.01. Each method
runs in a process of its own on one thread, in float32, with the defaults of its library where
nothing else is said. The reference is the same system solved in float64 to a relative residual of
1e-10. Other libraries are looked for in the interpreters given by ``--peer-python``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from sklearn.datasets import load_digits
from torch import nn
from tqdm import tqdm

from benchmarks._influence_worker import DAMPING, METHODS, network
from benchmarks._report import machine, publish, table

ROOT = Path(__file__).parents[1]
NUM_TRAIN, NUM_QUERY = 1437, 20
WEIGHT_DECAY = 1e-3
REFERENCE = "lowrank-inverse reference"
# Left out from this width on: half a minute or more each.
SLOW = {"dattri CG": 100} | dict.fromkeys(
    ["lowrank-inverse CG", "pyDVL CG", "pyDVL Nyström 200", "pyDVL LiSSA"], 500
)
NOT_INSTALLED = 3
TIME_LIMIT = 600


def write_problem(width: int, seed: int, path: Path) -> int:
    """Train a network and write it with its data; return the number of parameters."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    x, y = torch.tensor(images[order] / 16), torch.tensor(labels[order])
    torch.manual_seed(seed)
    model = network(x.shape[1], width, 10).double()
    optimizer = torch.optim.LBFGS(
        model.parameters(), max_iter=200, history_size=20, line_search_fn="strong_wolfe"
    )
    train_x, train_y = x[:NUM_TRAIN], y[:NUM_TRAIN]

    def objective() -> torch.Tensor:
        optimizer.zero_grad()
        decay = sum((p**2).sum() for p in model.parameters())
        loss = nn.functional.cross_entropy(model(train_x), train_y) + WEIGHT_DECAY / 2 * decay
        loss.backward()
        return loss

    optimizer.step(objective)
    with torch.no_grad():
        test = nn.functional.cross_entropy(model(x[NUM_TRAIN:]), y[NUM_TRAIN:], reduction="none")
    hardest = NUM_TRAIN + test.topk(NUM_QUERY).indices
    parameters = {f"p{i}": p.detach().numpy() for i, p in enumerate(model.parameters())}
    np.savez(
        path,
        x_train=train_x.numpy(),
        y_train=train_y.numpy(),
        x_query=x[hardest].numpy(),
        y_query=y[hardest].numpy(),
        **parameters,
    )
    return sum(p.size for p in parameters.values())


def measure(name: str, problem: Path, pythons: list[str]) -> dict[str, Any] | str:
    """Run a method in the first interpreter that has it; return what it found, or why not."""
    worker = ROOT / "benchmarks" / "_influence_worker.py"
    is_own = name.startswith("lowrank-inverse")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    if is_own:
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "adapters")])
    reason = "not installed"
    for python in [sys.executable] if is_own else pythons:
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "out.npz"
            command = [python, str(worker), name, str(problem), str(target)]
            try:
                done = subprocess.run(
                    command,
                    env=environment,
                    cwd=folder,
                    capture_output=True,
                    text=True,
                    timeout=TIME_LIMIT,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                return f"more than {TIME_LIMIT} s"
            if done.returncode == 0:
                with np.load(target) as file:
                    return {"scores": file["scores"], **json.loads(str(file["figures"]))}
            if done.returncode != NOT_INSTALLED:
                lines = done.stderr.strip().splitlines() or [f"exit {done.returncode}"]
                reason = f"failed: {lines[-1][:120]}"
    return reason


def agreement(scores: np.ndarray, reference: np.ndarray) -> float:
    """Mean rank correlation over the queries."""
    pairs = zip(scores, reference, strict=True)
    return float(np.mean([spearmanr(a, b)[0] for a, b in pairs]))


def main(arguments: list[str]) -> int:
    """Run all methods, print the table, write JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks influence", description=__doc__)
    parser.add_argument(
        "--peer-python",
        action="append",
        default=[],
        metavar="PATH",
        help="interpreter of an environment with other libraries; may be given again",
    )
    parser.add_argument("--width", type=int, default=133, help="hidden units (default: 133)")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for results")
    options = parser.parse_args(arguments)
    if options.width < 1:
        parser.error(f"--width must be at least 1; got {options.width}")
    names = [name for name in METHODS if name in options.methods and name != REFERENCE]
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        problem = Path(folder) / "problem.npz"
        size = write_problem(options.width, options.seed, problem)
        reference = measure(REFERENCE, problem, [])
        if isinstance(reference, str):
            raise RuntimeError(f"the reference {reference}")
        pythons = [sys.executable, *options.peer_python]
        try:
            for name in tqdm(names, desc=f"influence, {size} parameters", unit="method"):
                if options.width >= SLOW.get(name, options.width + 1):
                    found[name] = {"left out": "for its time"}
                    continue
                outcome = measure(name, problem, pythons)
                if isinstance(outcome, str):
                    found[name] = {"left out": outcome}
                    continue
                scores = outcome.pop("scores")
                found[name] = {**outcome, "spearman": agreement(scores, reference["scores"])}
        except KeyboardInterrupt:
            if not found:
                raise
            print("\nInterrupted: the table has what was finished.")
            found = {name: found.get(name, {"left out": "interrupted"}) for name in names}
    measured = {name: run for name, run in found.items() if "spearman" in run}
    rows = [
        {
            "method": name,
            "Spearman": f"{run['spearman']:.6f}",
            "fit (s)": f"{run['fit']:.2f}",
            "queries (s)": f"{run['query']:.2f}",
            "together (s)": f"{run['fit'] + run['query']:.2f}",
            "MiB": f"{run['peak_mib']:.0f}",
        }
        for name, run in measured.items()
    ]
    text = (
        f"{table(rows)}\n\n{size} parameters, {NUM_QUERY} queries × {NUM_TRAIN} training images, "
        f"damping {DAMPING}. Spearman: rank correlation with the\nconverged float64 answer, mean "
        "over the queries. s: CPU seconds. MiB: growth of the process at its peak."
    )
    notes = [f"{name} ({found[name]['left out']})" for name in names if name not in measured]
    if notes:
        text += "\nLeft out: " + ", ".join(notes) + "."
    about = machine("torch", "numpy", threads=1, seed=options.seed)
    for name, run in measured.items():
        if run["version"]:
            about["versions"][name.split(" ")[0]] = run["version"]
    results = {name: found[name] for name in names}
    publish(options.output, f"influence-{size}", text, about, parameters=size, methods=results)
    return 0
