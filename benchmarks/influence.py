"""Influence functions on scikit-learn's digits: ours beside those of other libraries.

A perceptron with tanh and one hidden layer, trained by L-BFGS to the end; the scores of all 1 437
training images on the 20 test images with the largest loss; Hessian with damping 0.01. Each method
runs in a process of its own on one thread, in float32, with the defaults of its library where
nothing else is said. The reference is the same system solved in float64 to a relative residual of
1e-11. Other libraries are looked for in the interpreters given by ``--peer-python``.
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
WIDTHS = (133, 1333)  # 9 985 and 99 985 parameters
WEIGHT_DECAY = 1e-3
REFERENCE = "lowrank-inverse reference"
SLOW = {"pyDVL CG": 1333, "pyDVL LiSSA": 1333, "dattri CG": 1333}  # left out from this width
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
    parser.add_argument(
        "--widths", type=int, nargs="+", default=WIDTHS, help="hidden units (default: 133 1333)"
    )
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for results")
    options = parser.parse_args(arguments)
    if min(options.widths) < 1:
        parser.error(f"--widths must be at least 1; got {min(options.widths)}")
    names = [name for name in METHODS if name in options.methods and name != REFERENCE]
    results: dict[str, dict[str, Any]] = {}
    versions: dict[str, str] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=len(options.widths) * len(names), desc="influence", unit="run") as progress,
    ):
        for width in options.widths:
            problem = Path(folder) / f"{width}.npz"
            size = write_problem(width, options.seed, problem)
            reference = measure(REFERENCE, problem, [])
            if isinstance(reference, str):
                raise RuntimeError(f"the reference {reference}")
            found = results[f"{size} parameters"] = {}
            for name in names:
                progress.set_postfix_str(f"{size}: {name}")
                if width >= SLOW.get(name, width + 1):
                    found[name] = {"left out": "takes minutes"}
                    progress.update()
                    continue
                outcome = measure(name, problem, [sys.executable, *options.peer_python])
                if isinstance(outcome, str):
                    found[name] = {"left out": outcome}
                else:
                    scores = outcome.pop("scores")
                    versions[name.split(" ")[0]] = outcome["version"]
                    found[name] = {**outcome, "spearman": agreement(scores, reference["scores"])}
                progress.update()
    rows = []
    for name in names:
        row = {"method": name}
        for size, found in results.items():
            run = found[name]
            has = "spearman" in run
            row[f"{size}: Spearman"] = f"{run['spearman']:.6f}" if has else "-"
            row[f"{size.split()[0]}: s"] = f"{run['fit'] + run['query']:.2f}" if has else "-"
            row[f"{size.split()[0]}: MiB"] = f"{run['peak_mib']:.0f}" if has else "-"
        rows.append(row)
    notes = [
        f"{name}, {size}: {found[name]['left out']}"
        for size, found in results.items()
        for name in names
        if "left out" in found[name]
    ]
    text = (
        f"{table(rows)}\n\n{NUM_QUERY} queries × {NUM_TRAIN} training images, damping {DAMPING}. "
        "Spearman: rank correlation with the converged float64\nanswer, mean over the queries. "
        "s: CPU seconds, fit and query. MiB: growth of the process at its peak."
    )
    if notes:
        text += "\nLeft out: " + "; ".join(notes) + "."
    about = machine("torch", "numpy", threads=1, seed=options.seed)
    about["versions"] |= {name: number for name, number in versions.items() if number}
    publish(options.output, "influence", text, about, results=results)
    return 0
