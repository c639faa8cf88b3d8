"""Influence in a language model of ten million parameters, beside training again.

A network like GPT-2 (pre-norm, learned positions, tied embeddings) is built from a configuration
and learns the documentation that comes with Python, a token a word; then it is tuned to sequences
it has not seen, with a penalty for the distance from where it started, whose strength is the
damping. The queries are sequences of neither part. Tuned again on random halves, it tells the
linear datamodelling score (LDS): the rank correlation, over the halves, of the sum of the scores in
a half with the loss of a query after tuning on it, the mean over the queries. kronfluence is looked
for in the interpreters given by ``--peer-python``. Each runs in float32, in a process of its own.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.harness.experiment import (
    PEER_PYTHON,
    SEED,
    THREADS,
    WORKERS,
    Option,
    Run,
    experiment,
)
from benchmarks.harness.processes import Found, interpreter
from benchmarks.harness.report import table
from benchmarks.harness.timing import MIB, Peak
from benchmarks.influence.language_model import (
    CHUNK,
    GPT,
    SHAPE,
    half,
    load,
    retrain,
    token_losses,
    write_model,
)
from benchmarks.influence.methods import Outcome, Problem, kronfluence_ekfac, timed


def ours(
    model: GPT, train: Tensor, query: Tensor, damping: float, kind: str, rtol: float, memory: int
) -> tuple[Outcome, Found]:
    """Run this package: by conjugate gradients, EK-FAC, or none for plain gradients."""
    import lowrank_inverse as li
    import lowrank_inverse_torch as lit

    data = train, train
    make = {
        "CG": lambda: li.CG(rtol=rtol),
        "EK-FAC": lambda: lit.KFAC(model, token_losses, data, eigenvalue_correction=True),
        "gradients": li.Identity,
    }[kind]
    planned: Found = {}

    def fit() -> Any:
        influence = lit.InfluenceFunction(
            *(model, token_losses, data),
            solver=make(),
            damping=None if kind == "gradients" else damping,
            memory_budget=memory * MIB,
            batch_size=CHUNK,
            rng=0,
        )
        if kind == "CG":
            plan = influence.plan((query, query))
            planned["plan"] = {"products": plan.num_products, "bytes": plan.num_bytes}
            planned["plan"] |= {"width": plan.width}
        return influence

    def scores(influence: Any) -> Tensor:
        found = influence.scores((query, query))
        info = influence.info
        planned["products"] = info.num_products
        if info.relative_residual is not None:
            planned["residual"] = float(np.max(info.relative_residual))
        return found

    return timed(fit, scores), planned


def next_tokens(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Return the logits of all tokens but the first, and these."""
    return model(batch[0])[:, :-1].flatten(0, 1), batch[0][:, 1:].flatten()


PEER = "kronfluence EK-FAC"
METHODS = ("lowrank-inverse CG", "lowrank-inverse EK-FAC", "lowrank-inverse gradients", PEER)


def measure(
    path: str,
    method: str,
    sizes: Found,
    damping: float,
    rtol: float,
    memory: int,
    seed: int,
    threads: int,
) -> Found:
    """Return the scores of one method, its CPU seconds, its memory and its plan."""
    torch.set_num_threads(threads)
    warnings.simplefilter("ignore")
    model, train, query, _ = load(path, sizes, seed)
    library, _, kind = method.partition(" ")
    about: Found = {}
    with Peak() as peak:
        if library == "kronfluence":
            problem = Problem(model, (train,), (query,), damping)
            outcome = kronfluence_ekfac(problem, next_tokens, CHUNK)
        else:
            outcome, about = ours(model, train, query, damping, kind, rtol, memory)
    return about | {
        "scores": outcome.scores.tolist(),
        "seconds": outcome.fit + outcome.query,
        "peak_mib": peak.num_bytes / MIB,
    }


@experiment(
    *("influence-language", __doc__, PEER_PYTHON),
    Option("width", 384, "of the states", least=1),
    Option("layers", 6, "of the network", least=1),
    Option("vocabulary", 2000, "words", least=2),
    Option("length", 12, "tokens of a sequence", least=2),
    Option("train", 2000, "sequences to tune to", least=2),
    Option("queries", 10, "sequences asked for", least=1),
    Option("epochs", 4, "of the first training", least=1),
    Option("damping", 20.0, "of the mean curvature, and strength of the penalty"),
    Option("steps", 12, "of gradients in tuning, half as many for a half", least=1),
    Option("halves", 16, "of the sequences, tuned to again", least=2),
    Option("rtol", 1e-3, "largest relative residual"),
    Option("memory", 12_500, "MiB to work with", least=1),
    Option("methods", list(METHODS), "what is compared", choices=list(METHODS)),
    *(THREADS, WORKERS, SEED),
    packages=("torch", "numpy"),
)
def main(run: Run) -> None:
    options = run.options
    sizes = {name: getattr(options, name) for name in (*SHAPE, "train", "queries")}
    shared = {"sizes": sizes, "damping": options.damping, "seed": options.seed}
    shared |= {"threads": options.threads}
    methods, pythons = list(options.methods), {}
    if PEER in methods:
        python, version = interpreter("kronfluence", [sys.executable, *options.peer_python])
        run.about["versions"]["kronfluence"] = version
        if python is None:
            methods.remove(PEER)
        else:
            pythons[PEER] = python
    training = {"epochs": options.epochs, "steps": options.steps}
    model = run.file(write_model, shared | training)
    shared |= {"path": model["path"]}
    settings = shared | {"rtol": options.rtol, "memory": options.memory}
    found = run.each(
        measure, {m: settings | {"method": m} for m in methods}, strict=False, pythons=pythons
    )
    steps, numbers = max(1, options.steps // 2), range(options.halves)
    again = run.each(
        retrain, {("half", i): shared | {"number": i, "steps": steps} for i in numbers}
    )
    publish(run, model, found, [again["half", i] for i in numbers])


def publish(run: Run, model: Found, found: Found, again: list[Found]) -> None:
    """Compare scores with losses after tuning to halves, and write the table."""
    from lowrank_inverse.influence.metrics import linear_datamodelling_score

    options = run.options
    after = np.array([one["losses"] for one in again])
    subsets = np.stack([half(options.train, i, options.seed) for i in range(options.halves)])
    for one in found.values():
        if "failed" not in one:
            scores = np.array(one.pop("scores"))
            one["lds"] = linear_datamodelling_score(scores, subsets, after)
    rows = [
        {
            "method": method,
            "LDS": f"{one['lds']:.3f}",
            "products": str(one["products"]) if one.get("products") else "",
            "residual": f"{one['residual']:.0e}" if one.get("residual") else "",
            "CPU seconds": f"{one['seconds']:.0f}",
            "MiB": f"{one['peak_mib']:.0f}",
            "planned": f"{sum(one['plan']['bytes'].values()) / MIB:.0f}" if "plan" in one else "",
        }
        for method, one in found.items()
        if "failed" not in one
    ]
    failed = "; ".join(f"{m}: {one['failed'][:120]}" for m, one in found.items() if "failed" in one)
    before, tuned = model["before"], model["after"]
    largest = max(one["gradient"] for one in again)
    tokens = options.length - 1
    run.publish(
        table(rows),
        f"{model['parameters']} parameters; scores of {options.train} sequences for "
        f"{options.queries} queries, damping {options.damping:g}; LDS over {options.halves} halves."
        f"\nNats per token, before and after tuning: {before['train'] / tokens:.2f} and "
        f"{tuned['train'] / tokens:.2f} of the sequences, {before['query'] / tokens:.2f} and "
        f"{tuned['query'] / tokens:.2f} of the queries.\nNorm of the gradient where tuning ended: "
        f"{model['gradient']:.1e}; to halves at most {largest:.1e}.\nMiB: growth of the process at "
        "its peak.",
        failed,
        model={key: value for key, value in model.items() if key != "path"},
        methods=found,
    )
