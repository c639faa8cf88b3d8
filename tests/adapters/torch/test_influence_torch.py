"""Influence functions of live torch models against dense oracles on the flattened parameters."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)

import lowrank_inverse as li
from lowrank_inverse_torch import InfluenceFunction
from tests.adapters.torch.models import (
    Tied,
    Unused,
    assert_unchanged,
    dead_relu,
    frozen,
    mlp,
    snapshot,
)

NUM_TRAIN, NUM_QUERY, NUM_FEATURES, NUM_CLASSES = 14, 5, 3, 3
DAMPING = 0.05
CURVATURES = ("ggn", "hessian", "empirical_fisher")


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none")


def normalised() -> nn.Module:
    model = nn.Sequential(
        nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)
    )
    model[1].running_mean.fill_(0.2)
    model[1].running_var.fill_(1.5)
    return model


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    dead_inputs: bool = False


CASES = {
    "mlp": Case(mlp),
    "no bias": Case(lambda: mlp(bias=False)),
    "dead relu": Case(dead_relu),
    "dead inputs": Case(mlp, dead_inputs=True),
    "dropout and batch norm": Case(normalised),
    "frozen": Case(frozen),
    "tied": Case(Tied),
    "unused": Case(Unused),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


class Problem:
    """A model in training mode, examples, and dense answers in float64."""

    def __init__(self, case: Case = CASES["mlp"], dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(0)
        self.model = case.make().to(torch.float32).to(dtype).train()
        x = torch.randn(NUM_TRAIN + NUM_QUERY, NUM_FEATURES)
        if case.dead_inputs:
            x[:, 1:2] = 0
        y = torch.arange(len(x)) * 7 % NUM_CLASSES
        self.x, self.y = x.to(dtype), y
        self.train = self.x[:NUM_TRAIN], y[:NUM_TRAIN]
        self.query = self.x[NUM_TRAIN:], y[NUM_TRAIN:]
        self.dtype = dtype

    def influence(self, **options: Any) -> InfluenceFunction:
        rtol = 1e-12 if self.dtype is torch.float64 else 1e-6
        solver = li.NystromCG(rank=10, rtol=rtol, damping=DAMPING)
        arguments: dict[str, Any] = {"solver": solver, "rng": 0, "curvature": "ggn"}
        return InfluenceFunction(self.model, cross_entropy, self.train, **{**arguments, **options})

    def dense(self, curvature: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return the mean curvature and the gradients of training and query examples as rows.

        By forward mode on a copy in evaluation mode, in float64; nothing of the code under test.
        """
        model = copy.deepcopy(self.model).double().eval()
        kept = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
        sizes = [p.numel() for p in kept.values()]
        flat = torch.cat([p.reshape(-1) for p in kept.values()])

        def outputs(flat: Tensor, x: Tensor) -> Tensor:
            parts = zip(kept.items(), flat.split(sizes), strict=True)
            values = {name: part.reshape(p.shape) for (name, p), part in parts}
            return torch.func.functional_call(model, values, (x,))

        def losses(flat: Tensor, part: tuple[Tensor, Tensor]) -> Tensor:
            return cross_entropy(outputs(flat, part[0].double()), part[1])

        by_train = torch.func.jacfwd(losses)(flat, self.train)
        by_query = torch.func.jacfwd(losses)(flat, self.query)
        if curvature == "hessian":
            H = torch.func.hessian(lambda flat: losses(flat, self.train).sum())(flat)
        elif curvature == "empirical_fisher":
            H = by_train.T @ by_train
        else:
            x = self.train[0].double()
            J = torch.func.jacfwd(outputs)(flat, x)  # (N, C, n)
            p = outputs(flat, x).softmax(dim=1)
            middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
            H = torch.einsum("icn,icd,idm->nm", J, middle, J)
        return H / NUM_TRAIN, by_train, by_query

    def expected(self, curvature: str, shift: float = DAMPING) -> Tensor:
        H, by_train, by_query = self.dense(curvature)
        return by_query @ torch.linalg.solve(H + shift * torch.eye(len(H)).double(), by_train.T)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype is torch.float64
    scale = expected.abs().max().item()
    assert scale > 0
    assert (actual - expected).abs().max().item() <= 1e-9 * scale


def indefinite_shift(problem: Problem, curvature: str) -> float:
    """Return a damping that makes the curvature positive definite."""
    if curvature != "hessian":
        return DAMPING
    lowest = torch.linalg.eigvalsh(problem.dense("hessian")[0])[0].item()
    return DAMPING + max(0.0, -1.2 * lowest)


# Scores


@pytest.mark.parametrize("curvature", CURVATURES)
@each_case
def test_scores_equal_the_dense_answer(case, curvature):
    problem = Problem(case)
    damping = indefinite_shift(problem, curvature)
    influence = problem.influence(curvature=curvature, damping=damping)
    expected = problem.expected(curvature, damping)
    for method in ("jvp", "gradients", "auto"):
        assert_close(influence.scores(problem.query, method=method), expected)


def test_parameters_may_be_a_part_of_the_model():
    problem = Problem()
    whole = problem.dense("ggn")
    places = slice(16, None)  # the last layer
    H, by_train, by_query = whole[0][places, places], whole[1][:, places], whole[2][:, places]
    expected = by_query @ torch.linalg.solve(H + DAMPING * torch.eye(len(H)).double(), by_train.T)
    for params in (problem.model[2], list(problem.model[2].parameters())):
        influence = problem.influence(params=params)
        for method in ("jvp", "gradients"):
            assert_close(influence.scores(problem.query, method=method), expected)


# The model comes back as it was


def test_the_model_comes_back_as_it_was():
    problem = Problem(CASES["dropout and batch norm"], torch.float32)
    model, calls = problem.model, []
    model[0].eval()  # a mode of its own
    model[4].register_forward_hook(lambda *args: calls.append(len(args)))
    model(problem.train[0]).sum().backward()
    calls.clear()
    before = snapshot(model)
    influence = problem.influence(damping=1.0)
    for method in ("jvp", "gradients"):
        influence.scores(problem.query, method=method)
    influence.self_influence()
    influence.removal_effect(problem.query, [1, 2], leverage=True)
    influence.top_k(problem.query, 2)
    assert calls  # hooks are part of the model
    assert_unchanged(model, before)


def test_a_hook_that_vmap_cannot_run_is_no_hindrance():
    problem = Problem()
    sums = []
    problem.model.register_forward_hook(lambda _, __, output: sums.append(output.sum().item()))
    scores = problem.influence().scores(problem.query, method="gradients")
    assert_close(scores, problem.expected("ggn"))


def test_it_works_within_no_grad_and_on_parameters_that_are_not_changed_meanwhile():
    problem = Problem()
    with torch.no_grad():
        influence = problem.influence()
        scores = influence.scores(problem.query)
        assert not torch.is_grad_enabled()
    assert_close(scores, problem.expected("ggn"))
    with torch.no_grad():
        problem.model[0].weight += 1
    with pytest.raises(RuntimeError, match="changed in place after"):
        influence.scores(problem.query)


# Forms of data


class Pieces(IterableDataset[Any]):
    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Any:
        return iter(self.batches)


def test_batches_of_any_structure_are_split_by_a_function():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = mlp()

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return self.model(torch.cat([left, right], dim=1))

    problem = Problem()
    expected = problem.expected("ggn")
    two = Two().double()
    two.model = problem.model
    solver = li.CG(damping=DAMPING, rtol=1e-12)

    def as_dicts(part: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return {"left": part[0][:, :2], "right": part[0][:, 2:], "label": part[1]}

    def split(batch: dict[str, Tensor]) -> tuple[Any, Tensor]:
        return {"left": batch["left"], "right": batch["right"]}, batch["label"]

    influence = InfluenceFunction(
        two, cross_entropy, as_dicts(problem.train), split=split, solver=solver
    )
    for method in ("jvp", "gradients"):
        scores = influence.scores(as_dicts(problem.query), method=method)
        assert_close(scores, expected)

    def as_pairs(part: tuple[Tensor, Tensor]) -> Any:
        return (part[0][:, :2], part[0][:, 2:]), part[1]

    influence = InfluenceFunction(two, cross_entropy, as_pairs(problem.train), solver=solver)
    for method in ("jvp", "gradients"):
        scores = influence.scores(as_pairs(problem.query), method=method)
        assert_close(scores, expected)


@pytest.mark.parametrize("size", [1, 5, 14])
def test_data_sets_and_loaders_are_read_in_order_and_to_the_end(size):
    problem = Problem()
    data = TensorDataset(*problem.train)
    for train, options in (
        (data, {"batch_size": size}),
        (DataLoader(data, batch_size=size), {}),
        (DataLoader(data, batch_size=size, shuffle=True, drop_last=True), {}),
    ):
        solver = li.CG(damping=DAMPING, rtol=1e-12)
        influence = InfluenceFunction(problem.model, cross_entropy, train, solver=solver, **options)
        assert influence.info.num_train == NUM_TRAIN
        assert_close(influence.scores(problem.query), problem.expected("ggn"))


def test_an_iterable_data_set_is_read_as_it_comes():
    problem = Problem()
    x, y = problem.train
    loader = DataLoader(Pieces([(x[:9], y[:9]), (x[9:], y[9:])]), batch_size=None)
    for budget in (1, 2**20):
        influence = InfluenceFunction(
            problem.model,
            cross_entropy,
            loader,
            solver=li.CG(damping=DAMPING, rtol=1e-12),
            memory_budget=budget,
        )
        assert_close(influence.scores(problem.query), problem.expected("ggn"))


# Bad input


def bad(match: str, train: Any = None, loss: Any = cross_entropy, **options: Any) -> None:
    problem = Problem()
    with pytest.raises((TypeError, ValueError), match=match):
        InfluenceFunction(
            options.pop("model", problem.model),
            loss,
            problem.train if train is None else train,
            **options,
        )


def test_labels_out_of_range_are_named():
    problem = Problem()
    y = problem.train[1].clone()
    y[6] = NUM_CLASSES
    bad(
        "failed on examples 4 to 7 of `train`: .*all labels within",
        (problem.train[0], y),
        batch_size=4,
    )


def test_losses_models_and_data_of_another_kind_are_refused():
    x, y = Problem().train
    bad(r"got shape \(14, 3, 1\)", loss=lambda z, y: z[:, :, None])
    bad("must return an array; got", loss=lambda z, y: 1.0)
    bad("`loss` must be a function", loss=3)
    bad("must be real and floating-point", loss=lambda z, y: y)
    bad("`model` must be a torch.nn.Module", model=lambda x: x)
    bad("`params` must be parameters of `model`", params=[torch.ones(2, requires_grad=True)])
    bad("`train` must hold at least one example", DataLoader(TensorDataset(x[:0], y[:0])))
    bad("can be iterated only once: it is a generator", ((x, y) for _ in range(2)))
    bad("must be a DataLoader, a Dataset", x)
    bad("must be a DataLoader, a Dataset", 3)
    bad("a batch must be a pair", [(x, y, y)])
    bad("passed to the model as keyword arguments, .* pass `split`", {"x": x, "y": y})


def test_the_number_of_an_example_counts_through_the_batches():
    x, y = Problem().train
    x = x.clone()
    x[7, 1] = torch.nan
    bad("for example 7 of `train`, and not finite for 1 of the 2", (x, y), batch_size=2)


def test_a_loader_that_gives_no_order_is_refused():
    problem = Problem()
    data = TensorDataset(*problem.train)
    weighted = DataLoader(data, sampler=WeightedRandomSampler(torch.ones(NUM_TRAIN), NUM_TRAIN))
    bad("draws its examples by a WeightedRandomSampler", weighted)
    bootstrap = RandomSampler(data, replacement=True)
    bad("draws its examples by a RandomSampler", DataLoader(data, sampler=bootstrap))
    shuffled = BatchSampler(RandomSampler(data), batch_size=4, drop_last=False)
    bad("draws its examples by a RandomSampler", DataLoader(data, batch_sampler=shuffled))
    own = [[3, 1, 2], [0, 4]]
    bad("draws its examples by a list", DataLoader(data, batch_sampler=own))


def test_a_data_set_that_changes_from_pass_to_pass_is_refused():
    class Shrinking:
        def __init__(self, batches: list[Any]) -> None:
            self.batches, self.passes = batches, 0

        def __iter__(self) -> Any:
            self.passes += 1
            return iter(self.batches if self.passes == 1 else self.batches[:-1])

    problem = Problem()
    x, y = problem.train
    data = Shrinking([(x[:9], y[:9]), (x[9:], y[9:])])
    with pytest.raises(RuntimeError, match="had 5 examples in batch 1 at first and has 0 now"):
        InfluenceFunction(problem.model, cross_entropy, data, memory_budget=1)
    kept = InfluenceFunction(
        problem.model, cross_entropy, Shrinking(data.batches), solver=li.CG(damping=DAMPING)
    )
    assert kept.info.num_train == NUM_TRAIN  # read once


# Files


KILLED = """
import os, sys
sys.path[:0] = {paths!r}
from test_influence_torch import Problem
problem = Problem()
influence = problem.influence(memory_budget=2**14)
solve, calls = influence._solve, []
def dying(*args, **kwargs):
    calls.append(None)
    if len(calls) == 4:
        os.kill(os.getpid(), 9)
    return solve(*args, **kwargs)
influence._solve = dying
influence.self_influence(checkpoint=sys.argv[1])
"""


def test_a_killed_process_resumes_and_gives_the_same_self_influence(tmp_path):
    root = Path(__file__).parents[3]
    paths = [str(root), str(root / "adapters"), str(Path(__file__).parent)]
    script = textwrap.dedent(KILLED).format(paths=paths)
    run = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], env=os.environ, check=False, timeout=120
    )
    assert run.returncode == -9
    problem = Problem()
    influence = problem.influence(memory_budget=2**14)
    done = list(tmp_path.glob("values-*.npz"))
    assert len(done) == 3
    whole = problem.influence(memory_budget=2**14)
    expected = whole.self_influence()
    assert torch.equal(influence.self_influence(checkpoint=tmp_path), expected)
    assert influence.info.num_products < whole.info.num_products
