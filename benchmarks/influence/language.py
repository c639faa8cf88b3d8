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

import math
import re
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

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
from benchmarks.influence.methods import Outcome, timed

BATCH, CHUNK = 64, 100
"""Sequences of a step of the first training, and those taken at a time by all that follows."""
SHAPE = ("vocabulary", "length", "width", "layers")
HEAD = 64
"""Width of a head of attention."""


class Block(nn.Module):
    """Causal attention and a perceptron, each added to its normalised input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map states of shape (sequences, length, width)."""
        size, length, width = x.shape
        parts = self.qkv(self.norms[0](x)).reshape(size, length, 3, self.heads, width // self.heads)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        logits = q @ k.mT / math.sqrt(q.shape[-1])
        mixed = logits.masked_fill(later, -torch.inf).softmax(dim=-1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(size, length, width))
        return x + self.down(functional.gelu(self.up(self.norms[1](x)), approximate="tanh"))


class GPT(nn.Module):
    """A decoder with the layers and the initial values of GPT-2."""

    def __init__(self, vocabulary: int, length: int, width: int, layers: int) -> None:
        super().__init__()
        heads = max(1, width // HEAD)
        self.words, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                ends_block = name.endswith(("out.weight", "down.weight"))
                deviation = 0.02 / math.sqrt(2 * layers) if ends_block else 0.02
                nn.init.normal_(parameter, std=deviation)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits of the next token, shape (sequences, length, vocabulary)."""
        x = self.words(ids) + self.places.weight[: ids.shape[1]]
        return self.norm(self.blocks(x)) @ self.words.weight.T


def token_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the losses of all tokens but the first of each sequence."""
    return functional.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")


def sequences(vocabulary: int, length: int, seed: int) -> Tensor:
    """Return Python's documentation as sequences of token numbers, in random order.

    Tokens are words, numbers and signs; those that are rare are number 0.
    """
    from pydoc_data.topics import topics

    text = " ".join(topics[name] for name in sorted(topics)).lower()
    words = re.findall(r"[a-z_]+|\d+|[^\sa-z_\d]", text)
    common = Counter(words).most_common(vocabulary - 1)
    numbers = {word: i for i, (word, _) in enumerate(common, start=1)}
    ids = np.array([numbers.get(word, 0) for word in words])
    whole = ids[: len(ids) // length * length].reshape(-1, length)
    return torch.tensor(np.random.default_rng(seed).permutation(whole))


def parts(sizes: Found, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sequences to tune to, the queries, and all others."""
    every = sequences(sizes["vocabulary"], sizes["length"], seed)
    ends = sizes["train"], sizes["train"] + sizes["queries"]
    if ends[1] >= len(every):
        raise ValueError(f"the text has {len(every)} sequences; {ends[1] + 1} are needed")
    return every[: ends[0]], every[ends[0] : ends[1]], every[ends[1] :]


def chunks(ids: Tensor) -> Iterable[Tensor]:
    """Cut sequences into batches."""
    return ids.split(CHUNK)


def pretrain(model: nn.Module, ids: Tensor, epochs: int) -> None:
    """Train from the start by AdamW, with a learning rate that rises and falls."""
    count = epochs * math.ceil(len(ids) / BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=count)
    for _ in range(epochs):
        for batch in ids[torch.randperm(len(ids))].split(BATCH):
            optimizer.zero_grad()
            token_losses(model(batch), batch).mean().backward()
            optimizer.step()
            schedule.step()


def tune(
    model: nn.Module, ids: Tensor, start: np.ndarray, centre: np.ndarray, damping: float, steps: int
) -> dict[str, float]:
    """Minimise ``mean loss + damping / 2 * norm(params - centre)**2`` from `start`, by L-BFGS."""
    from scipy.optimize import minimize

    params = list(model.parameters())

    def objective(x: np.ndarray) -> tuple[float, np.ndarray]:
        write(model, x)
        model.zero_grad()
        value = 0.0
        for batch in chunks(ids):
            loss = token_losses(model(batch), batch).sum() / len(ids)
            loss.backward()
            value += float(loss.detach())
        moved = x - centre
        gradient = torch.cat([p.grad.reshape(-1) for p in params if p.grad is not None])
        return value + damping / 2 * moved @ moved, gradient.numpy() + damping * moved

    options = {"maxiter": steps, "maxcor": 8, "ftol": 0.0, "gtol": 0.0}
    found = minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
    write(model, found.x)
    return {"objective": float(found.fun), "gradient": float(np.linalg.norm(found.jac))}


def read(model: nn.Module) -> np.ndarray:
    """Return all parameters as one vector, in float64."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()]).double().numpy()


def write(model: nn.Module, values: np.ndarray) -> None:
    """Undo `read`."""
    given = torch.from_numpy(values).float()
    nn.utils.vector_to_parameters(given, list(model.parameters()))


def losses(model: nn.Module, ids: Tensor) -> np.ndarray:
    """Return the loss of each sequence."""
    with torch.no_grad():
        return torch.cat([token_losses(model(x), x).sum(dim=1) for x in chunks(ids)]).numpy()


def write_model(
    path: str, sizes: Found, epochs: int, damping: float, steps: int, seed: int, threads: int
) -> Found:
    """Train and tune, and write where the network was and came to."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    train, query, rest = parts(sizes, seed)
    model = GPT(*(sizes[name] for name in SHAPE))
    pretrain(model, rest, epochs)
    start = read(model)
    before = {
        "train": float(losses(model, train).mean()),
        "query": float(losses(model, query).mean()),
    }
    ended = tune(model, train, start, start, damping, steps)
    np.savez(path, start=start, tuned=read(model))
    after = {
        "train": float(losses(model, train).mean()),
        "query": float(losses(model, query).mean()),
    }
    return {"parameters": len(start), "others": len(rest), "before": before, "after": after} | ended


def load(path: str, sizes: Found, seed: int) -> tuple[GPT, Tensor, Tensor, dict[str, np.ndarray]]:
    """Return the tuned network, the sequences it was tuned to, and the queries."""
    train, query, _ = parts(sizes, seed)
    with np.load(path) as file:
        arrays = dict(file)
    model = GPT(*(sizes[name] for name in SHAPE))
    write(model, arrays["tuned"])
    return model, train, query, arrays


def half(num: int, number: int, seed: int) -> np.ndarray:
    """Return which sequences are in a random half."""
    chosen = np.random.default_rng([seed, number]).permutation(num)[: num // 2]
    return np.isin(np.arange(num), chosen)


def retrain(
    path: str, number: int, sizes: Found, damping: float, steps: int, seed: int, threads: int
) -> list[float]:
    """Return the losses of the queries after tuning to a half."""
    torch.set_num_threads(threads)
    model, train, query, arrays = load(path, sizes, seed)
    chosen = torch.from_numpy(half(len(train), number, seed))
    tune(model, train[chosen], arrays["tuned"], arrays["start"], damping, steps)
    return losses(model, query).tolist()


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


def kronfluence(model: GPT, train: Tensor, query: Tensor, damping: float) -> Outcome:
    """Run kronfluence's EK-FAC, of the linear layers."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import ScoreArguments
    from kronfluence.task import Task
    from torch.utils.data import TensorDataset

    class Language(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            ids = batch[0]
            logits = model(ids)[:, :-1].flatten(0, 1)
            targets = ids[:, 1:].flatten()
            if sample:
                with torch.no_grad():
                    targets = torch.multinomial(logits.softmax(dim=-1), 1)[:, 0]
            return functional.cross_entropy(logits, targets, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    torch.manual_seed(0)  # it samples tokens from the global generator

    def fit() -> Any:
        task = Language()
        prepared = prepare_model(model, task)
        found = Analyzer("language", prepared, task, cpu=True, output_dir=folder, disable_tqdm=True)
        found.fit_all_factors("ekfac", TensorDataset(train), per_device_batch_size=CHUNK)
        return found

    def scores(analyzer: Any) -> Tensor:
        analyzer.compute_pairwise_scores(
            *("scores", "ekfac", TensorDataset(query), TensorDataset(train)),
            per_device_query_batch_size=len(query),
            per_device_train_batch_size=CHUNK,
            score_args=ScoreArguments(damping_factor=damping),
        )
        return analyzer.load_pairwise_scores("scores")["all_modules"]

    with tempfile.TemporaryDirectory() as folder:
        return timed(fit, scores)


METHODS = (
    "lowrank-inverse CG",
    "lowrank-inverse EK-FAC",
    "lowrank-inverse gradients",
    "kronfluence EK-FAC",
)


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
            outcome = kronfluence(model, train, query, damping)
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
    Option("steps", 12, "of L-BFGS", least=1),
    Option("halves", 16, "of the sequences, tuned to again", least=2),
    Option("rtol", 1e-3, "largest relative residual"),
    Option("memory", 10_000, "MiB for the right-hand sides of a solve", least=1),
    Option("methods", list(METHODS), "what is compared", choices=list(METHODS)),
    *(THREADS, WORKERS, SEED),
    packages=("torch", "numpy"),
)
def main(run: Run) -> None:
    options = run.options
    sizes = {name: getattr(options, name) for name in (*SHAPE, "train", "queries")}
    shared = {"sizes": sizes, "damping": options.damping, "seed": options.seed}
    shared |= {"threads": options.threads}
    training = {"epochs": options.epochs, "steps": options.steps}
    model = run.file(write_model, shared | training)
    methods, pythons = list(options.methods), {}
    python, version = interpreter("kronfluence", [sys.executable, *options.peer_python])
    run.about["versions"]["kronfluence"] = version
    if python is None:
        methods = [method for method in methods if "kronfluence" not in method]
    else:
        pythons = {method: python for method in methods if "kronfluence" in method}
    shared |= {"path": model["path"]}
    settings = shared | {"rtol": options.rtol, "memory": options.memory}
    found = run.each(
        measure, {m: settings | {"method": m} for m in methods}, strict=False, pythons=pythons
    )
    numbers = range(options.halves)
    again = run.each(
        retrain, {("half", i): shared | {"number": i, "steps": options.steps} for i in numbers}
    )
    publish(run, model, found, np.array([again["half", i] for i in numbers]))


def publish(run: Run, model: Found, found: Found, after: np.ndarray) -> None:
    """Compare scores with losses after tuning to halves, and write the table."""
    from lowrank_inverse.influence.metrics import linear_datamodelling_score

    options = run.options
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
    tokens = options.length - 1
    run.publish(
        table(rows),
        f"{model['parameters']} parameters; scores of {options.train} sequences for "
        f"{options.queries} queries, damping {options.damping:g}; LDS over {options.halves} halves."
        f"\nNats per token, before and after tuning: {before['train'] / tokens:.2f} and "
        f"{tuned['train'] / tokens:.2f} of the sequences, {before['query'] / tokens:.2f} and "
        f"{tuned['query'] / tokens:.2f} of the queries.\nMiB: growth of the process at its peak.",
        failed,
        model={key: value for key, value in model.items() if key != "path"},
        methods=found,
    )
