"""One influence method in a process of its own: ``python _influence_worker.py METHOD IN OUT``.

Run by ``benchmarks/influence.py``, also with the interpreter of another library's environment, so
it imports nothing of this package but in the methods that are its own.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

DAMPING = 0.01


class Problem(NamedTuple):
    """A trained network, its training set and the queries."""

    model: nn.Module
    train: tuple[Tensor, Tensor]
    query: tuple[Tensor, Tensor]
    damping: float = DAMPING


class Outcome(NamedTuple):
    """Scores, positive for helpful, and CPU seconds before and for the queries."""

    scores: Tensor
    fit: float
    query: float


def network(num_features: int, width: int, num_classes: int) -> nn.Module:
    """Return a perceptron with one hidden layer."""
    return nn.Sequential(nn.Linear(num_features, width), nn.Tanh(), nn.Linear(width, num_classes))


def load(path: Path, dtype: torch.dtype) -> Problem:
    """Read what the driver wrote."""
    with np.load(path) as file:
        arrays = {name: torch.tensor(file[name]) for name in file}
    weights = [arrays[f"p{i}"].to(dtype) for i in range(4)]
    model = network(weights[0].shape[1], weights[0].shape[0], weights[2].shape[0]).to(dtype)
    for parameter, value in zip(model.parameters(), weights, strict=True):
        parameter.data = value.clone()
    train = arrays["x_train"].to(dtype), arrays["y_train"]
    return Problem(model, train, (arrays["x_query"].to(dtype), arrays["y_query"]))


def each_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy of each example."""
    return nn.functional.cross_entropy(output, target, reduction="none")


def ours(problem: Problem, curvature: str, solver: Any) -> Outcome:
    from lowrank_inverse_torch import InfluenceFunction

    start = time.process_time()
    influence = InfluenceFunction(
        problem.model,
        each_loss,
        problem.train,
        curvature=curvature,
        solver=solver,
        damping=None if solver is not None and not hasattr(solver, "damping") else problem.damping,
        rng=0,
    )
    fitted = time.process_time()
    scores = influence.scores(problem.query)
    return Outcome(scores, fitted - start, time.process_time() - fitted)


def own(name: str) -> Callable[[Problem], Outcome]:
    """Return one of this package's methods."""

    def run(problem: Problem) -> Outcome:
        import lowrank_inverse as li

        if name == "reference":
            return ours(problem, "hessian", li.NystromCG(rank=100, rtol=1e-10))
        settings: dict[str, tuple[str, Any]] = {
            "default": ("hessian", None),
            "rtol 1e-4": ("hessian", li.NystromCG(rank=50, rtol=1e-4)),
            "CG": ("hessian", li.CG(rtol=1e-4)),
            "Nyström 50": ("hessian", li.Nystrom(rank=50, damping=1e-2)),
            "Nyström 200": ("hessian", li.Nystrom(rank=200, damping=1e-2)),
            "Gauss-Newton": ("ggn", None),
            "gradient product": ("hessian", li.Identity()),
        }
        return ours(problem, *settings[name])

    return run


def pydvl(name: str) -> Callable[[Problem], Outcome]:
    """Return one of pyDVL's methods."""

    def run(problem: Problem) -> Outcome:
        from pydvl.influence import torch as library

        loss = nn.functional.cross_entropy
        common: dict[str, Any] = {"regularization": problem.damping}
        kinds: dict[str, Callable[[], Any]] = {
            "Nyström 50": lambda: library.NystroemSketchInfluence(
                problem.model, loss, rank=50, **common
            ),
            "Nyström 200": lambda: library.NystroemSketchInfluence(
                problem.model, loss, rank=200, **common
            ),
            "CG": lambda: library.CgInfluence(problem.model, loss, **common),
            "block CG": lambda: library.CgInfluence(
                problem.model, loss, solve_simultaneously=True, **common
            ),
            "LiSSA": lambda: library.LissaInfluence(problem.model, loss, **common),
            "EK-FAC": lambda: library.EkfacInfluence(
                problem.model, hessian_regularization=problem.damping
            ),
        }
        size = 128 if name == "LiSSA" else len(problem.train[1])
        data = DataLoader(TensorDataset(*problem.train), batch_size=size)
        start = time.process_time()
        influence = kinds[name]().fit(data)
        fitted = time.process_time()
        factors = influence.influence_factors(*problem.query)
        scores = [
            influence.influences_from_factors(factors, x, y).detach()
            for x, y in DataLoader(TensorDataset(*problem.train), batch_size=128)
        ]
        return Outcome(torch.cat(scores, dim=1), fitted - start, time.process_time() - fitted)

    return run


def dattri_cg(problem: Problem) -> Outcome:
    from dattri.algorithm.influence_function import IFAttributorCG
    from dattri.task import AttributionTask

    def loss(params: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        output = torch.func.functional_call(problem.model, params, batch[0])
        return nn.functional.cross_entropy(output, batch[1])

    def loader(part: tuple[Tensor, Tensor]) -> Any:
        return DataLoader(TensorDataset(*part), batch_size=len(part[1]))

    start = time.process_time()
    task = AttributionTask(loss, problem.model, problem.model.state_dict())
    attributor = IFAttributorCG(task, max_iter=100, regularization=problem.damping)
    attributor.cache(loader(problem.train))
    fitted = time.process_time()
    scores = attributor.attribute(loader(problem.train), loader(problem.query)).T
    return Outcome(scores.detach(), fitted - start, time.process_time() - fitted)


def kronfluence_ekfac(problem: Problem) -> Outcome:
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import ScoreArguments
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            output = model(batch[0])
            target = batch[1]
            if sample:
                with torch.no_grad():
                    target = torch.multinomial(output.softmax(dim=1), 1)[:, 0]
            return nn.functional.cross_entropy(output, target, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

    torch.manual_seed(0)  # it samples the labels of its Fisher matrix from the global generator
    train, query = TensorDataset(*problem.train), TensorDataset(*problem.query)
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        model = prepare_model(problem.model, Classification())
        analyzer = Analyzer(
            "digits", model, Classification(), cpu=True, output_dir=folder, disable_tqdm=True
        )
        analyzer.fit_all_factors("ekfac", train, per_device_batch_size=len(train))
        fitted = time.process_time()
        analyzer.compute_pairwise_scores(
            "scores",
            "ekfac",
            query,
            train,
            per_device_query_batch_size=len(query),
            per_device_train_batch_size=len(train),
            score_args=ScoreArguments(damping_factor=problem.damping),
        )
        scores = analyzer.load_pairwise_scores("scores")["all_modules"]
        return Outcome(scores, fitted - start, time.process_time() - fitted)


METHODS: dict[str, Callable[[Problem], Outcome]] = {
    **{
        f"lowrank-inverse {name}": own(name)
        for name in (
            "reference",
            "default",
            "rtol 1e-4",
            "CG",
            "Nyström 50",
            "Nyström 200",
            "Gauss-Newton",
            "gradient product",
        )
    },
    **{
        f"pyDVL {name}": pydvl(name)
        for name in ("block CG", "CG", "Nyström 50", "Nyström 200", "LiSSA", "EK-FAC")
    },
    "dattri CG": dattri_cg,
    "kronfluence EK-FAC": kronfluence_ekfac,
}


def memory(field: str) -> float:
    """Return a field of this process's status in MiB (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    return float("nan")


def main(name: str, source: str, target: str) -> int:
    """Run one method and write its scores, seconds and peak memory."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    distribution = name.split(" ")[0]
    try:
        number = "" if distribution == "lowrank-inverse" else version(distribution)
    except PackageNotFoundError:
        print(f"{distribution} is not installed", file=sys.stderr)
        return 3
    dtype = torch.float64 if name.endswith("reference") else torch.float32
    problem = load(Path(source), dtype)
    # The libraries are imported, and torch's first use is over, before anything is measured.
    few = (tuple(a[:30] for a in part) for part in (problem.train, problem.query))
    small = Problem(problem.model, *few, damping=10.0)  # of 30 the Hessian is indefinite
    if not name.startswith("kronfluence"):  # which changes the model for good
        METHODS[name](small)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
    outcome = METHODS[name](problem)
    figures = {
        "fit": outcome.fit,
        "query": outcome.query,
        "peak_mib": memory("VmHWM") - before,
        "version": number,
    }
    np.savez(target, scores=outcome.scores.double().numpy(), figures=json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
