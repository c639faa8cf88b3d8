"""Influence by this package and by others, on one problem in a file, each in a process of its own.

The interpreter may be that of another library's environment: nothing of this package is imported
but in the methods that are its own.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.harness.processes import Found
from benchmarks.harness.timing import MIB, Peak

DAMPING = 0.01


class Problem(NamedTuple):
    """A trained network, its training set and the queries."""

    model: nn.Module
    train: tuple[Tensor, ...]
    query: tuple[Tensor, ...]
    damping: float = DAMPING


class Outcome(NamedTuple):
    """Scores, positive for helpful, CPU seconds before and for the queries, and products."""

    scores: Tensor
    fit: float
    query: float
    products: int | None = None


def network(num_features: int, width: int, num_classes: int) -> nn.Module:
    """Return a perceptron with one hidden layer."""
    return nn.Sequential(nn.Linear(num_features, width), nn.Tanh(), nn.Linear(width, num_classes))


def load(path: str, dtype: torch.dtype = torch.float32) -> Problem:
    """Read a problem from its file."""
    with np.load(path) as file:
        arrays = {name: torch.tensor(file[name]) for name in file}
    weights = [arrays[f"p{i}"].to(dtype) for i in range(4)]
    model = network(weights[0].shape[1], weights[0].shape[0], weights[2].shape[0]).to(dtype)
    for parameter, value in zip(model.parameters(), weights, strict=True):
        parameter.data = value.clone()
    train = arrays["x_train"].to(dtype), arrays["y_train"]
    return Problem(model, train, (arrays["x_query"].to(dtype), arrays["y_query"]))


def timed(fit: Callable[[], Any], scores: Callable[[Any], Tensor]) -> Outcome:
    """Prepare, then score."""
    start = time.process_time()
    prepared = fit()
    fitted = time.process_time()
    found = scores(prepared).detach()
    return Outcome(found, fitted - start, time.process_time() - fitted)


def ours(problem: Problem, curvature: str, make: Callable[[Any], Any]) -> Outcome:
    """Run this package with the solver that `make` returns."""
    import lowrank_inverse as li
    from lowrank_inverse_torch import InfluenceFunction

    solver = make(li)
    knows_none = solver is not None and not hasattr(solver, "damping")
    settings = {"solver": solver, "damping": None if knows_none else problem.damping, "rng": 0}
    loss = partial(cross_entropy, reduction="none")
    return timed(
        lambda: InfluenceFunction(
            problem.model, loss, problem.train, curvature=curvature, **settings
        ),
        lambda influence: influence.scores(problem.query),
    )


def pydvl(problem: Problem, kind: str, batch: int = 0, **settings: Any) -> Outcome:
    """Run one of pyDVL's methods."""
    from pydvl.influence import torch as library

    method = getattr(library, f"{kind}Influence")
    train = TensorDataset(*problem.train)
    if kind == "Ekfac":
        influence = method(problem.model, hessian_regularization=problem.damping)
    else:
        influence = method(problem.model, cross_entropy, regularization=problem.damping, **settings)

    def scores(fitted: Any) -> Tensor:
        factors = fitted.influence_factors(*problem.query)
        parts = DataLoader(train, batch_size=128)
        return torch.cat([fitted.influences_from_factors(factors, x, y) for x, y in parts], dim=1)

    return timed(lambda: influence.fit(DataLoader(train, batch_size=batch or len(train))), scores)


def dattri_cg(problem: Problem) -> Outcome:
    """Run dattri's conjugate gradients."""
    from dattri.algorithm.influence_function import IFAttributorCG
    from dattri.task import AttributionTask

    def loss(params: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(torch.func.functional_call(problem.model, params, batch[0]), batch[1])

    def loader(part: tuple[Tensor, Tensor]) -> Any:
        return DataLoader(TensorDataset(*part), batch_size=len(part[1]))

    def fit() -> Any:
        task = AttributionTask(loss, problem.model, problem.model.state_dict())
        attributor = IFAttributorCG(task, max_iter=100, regularization=problem.damping)
        attributor.cache(loader(problem.train))
        return attributor

    return timed(fit, lambda found: found.attribute(loader(problem.train), loader(problem.query)).T)


def labelled(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Return the logits of images, and their labels."""
    return model(batch[0]), batch[1]


def kronfluence_ekfac(
    problem: Problem,
    predicted: Callable[[nn.Module, Any], tuple[Tensor, Tensor]] = labelled,
    batch: int = 0,
) -> Outcome:
    """Run kronfluence's EK-FAC; `predicted` returns logits (rows, classes) and targets (rows,)."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import ScoreArguments
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits, targets = predicted(model, batch)
            if sample:
                with torch.no_grad():
                    targets = torch.multinomial(logits.softmax(dim=-1), 1)[:, 0]
            return cross_entropy(logits, targets, reduction="sum")

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    torch.manual_seed(0)  # it samples the labels of its Fisher matrix from the global generator
    train, query = TensorDataset(*problem.train), TensorDataset(*problem.query)
    size = batch or len(train)

    def fit() -> Any:
        task = Classification()
        model = prepare_model(problem.model, task)
        found = Analyzer("influence", model, task, cpu=True, output_dir=folder, disable_tqdm=True)
        found.fit_all_factors("ekfac", train, per_device_batch_size=size)
        return found

    def scores(analyzer: Any) -> Tensor:
        analyzer.compute_pairwise_scores(
            *("scores", "ekfac", query, train),
            per_device_query_batch_size=len(query),
            per_device_train_batch_size=size,
            score_args=ScoreArguments(damping_factor=problem.damping),
        )
        return analyzer.load_pairwise_scores("scores")["all_modules"]

    with tempfile.TemporaryDirectory() as folder:
        return timed(fit, scores)


def captum_gradients(problem: Problem) -> Outcome:
    """Run captum's TracIn on one checkpoint."""
    from captum.influence import TracInCP

    train = TensorDataset(*problem.train)

    def fit() -> Any:
        return TracInCP(
            problem.model,
            train,
            checkpoints=["only"],
            checkpoints_load_func=lambda model, path: 1.0,
            loss_fn=torch.nn.CrossEntropyLoss(reduction="sum"),
            batch_size=len(train),
            sample_wise_grads_per_batch=True,
        )

    return timed(fit, lambda found: found.influence(problem.query))


def trak(problem: Problem) -> Outcome:
    """Run TRAK on one checkpoint with 2 048 random projections."""
    from trak import TRAKer
    from trak.projectors import BasicProjector, ProjectionType

    size = sum(p.numel() for p in problem.model.parameters())
    projector = BasicProjector(
        *(size, min(2048, size), 0, ProjectionType.rademacher, torch.device("cpu")),
        block_size=128,
        dtype=torch.float32,
    )
    folder = tempfile.TemporaryDirectory()
    state = problem.model.state_dict()

    def fit() -> Any:
        found = TRAKer(
            model=problem.model,
            task="image_classification",
            train_set_size=len(problem.train[1]),
            save_dir=folder.name,
            device="cpu",
            projector=projector,
            use_half_precision=False,
            load_from_save_dir=True,
        )
        found.load_checkpoint(state, model_id=0)
        found.featurize(batch=problem.train, num_samples=len(problem.train[1]))
        found.finalize_features()
        return found

    def scores(found: Any) -> Tensor:
        num = len(problem.query[1])
        found.start_scoring_checkpoint("all", state, model_id=0, num_targets=num)
        found.score(batch=problem.query, num_samples=num)
        return torch.tensor(np.array(found.finalize_scores("all"))).T

    with folder:
        return timed(fit, scores)


REFERENCE = partial(ours, curvature="hessian", make=lambda li: li.NystromCG(rank=100, rtol=1e-10))


def uniform(li: Any, rank: int) -> Any:
    """Return the Nyström method with columns drawn uniformly."""
    return li.Nystrom(rank=rank, damping=1e-2, sampling="uniform")


def own(make: Callable[[Any], Any], curvature: str = "hessian") -> Callable[[Problem], Outcome]:
    """Return one of this package's methods."""
    return partial(ours, curvature=curvature, make=make)


METHODS: dict[str, Callable[[Problem], Outcome]] = {
    "lowrank-inverse default": own(lambda li: None),
    "lowrank-inverse rtol 1e-4": own(lambda li: li.NystromCG(rank=50, rtol=1e-4)),
    "lowrank-inverse CG": own(lambda li: li.CG(rtol=1e-4)),
    "lowrank-inverse Nyström 50": own(lambda li: uniform(li, 50)),
    "lowrank-inverse Nyström 200": own(lambda li: uniform(li, 200)),
    "lowrank-inverse Gauss-Newton": own(lambda li: None, "ggn"),
    "lowrank-inverse gradient product": own(lambda li: li.Identity()),
    "pyDVL block CG": partial(pydvl, kind="Cg", solve_simultaneously=True),
    "pyDVL CG": partial(pydvl, kind="Cg"),
    "pyDVL Nyström 50": partial(pydvl, kind="NystroemSketch", rank=50),
    "pyDVL Nyström 200": partial(pydvl, kind="NystroemSketch", rank=200),
    "pyDVL LiSSA": partial(pydvl, kind="Lissa", batch=128),
    "pyDVL EK-FAC": partial(pydvl, kind="Ekfac"),
    "dattri CG": dattri_cg,
    "kronfluence EK-FAC": kronfluence_ekfac,
}


def agreement(scores: np.ndarray, reference: np.ndarray) -> float:
    """Mean rank correlation over the queries; equal scores are not to be expected."""
    ranks = [each.argsort(axis=1).argsort(axis=1) for each in (scores, reference)]
    return float(np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(*ranks, strict=True)]))


def measure(path: str, method: str) -> Found:
    """Run one method; return its seconds, its peak of memory and its agreement."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    problem = load(path)
    # The libraries are imported, and torch's first use is over, before anything is measured.
    few = (tuple(a[:30] for a in part) for part in (problem.train, problem.query))
    if not method.startswith("kronfluence"):  # which changes the model for good
        METHODS[method](Problem(problem.model, *few, damping=10.0))  # of 30 it is indefinite
    with Peak() as peak:
        outcome = METHODS[method](problem)
    with np.load(path) as file:
        spearman = agreement(outcome.scores.double().numpy(), file["reference"])
    times = {"fit": outcome.fit, "query": outcome.query}
    return times | {"peak_mib": peak.num_bytes / MIB, "spearman": spearman}
