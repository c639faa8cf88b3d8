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

import numpy as np
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

NUM_TRAIN, NUM_QUERY, NUM_FEATURES, NUM_CLASSES = 14, 5, 4, 3
DAMPING = 0.05
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}
EXACT = {torch.float64: 1e-12, torch.float32: 1e-6}
SLOW = pytest.mark.slow
CURVATURES = ("ggn", "hessian", "empirical_fisher")


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none")


class Tied(nn.Module):
    """Two layers share one weight, and one parameter is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Parameter(torch.ones(2))
        self.encode, self.decode = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(torch.tanh(self.encode(x)))[:, :3]


def mlp(bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5, bias=bias), nn.Tanh(), nn.Linear(5, 3, bias=bias))


def dead_relu() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        model[0].bias[1:3] = -100.0
    return model


def normalised() -> nn.Module:
    model = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)
    )
    model[1].running_mean.fill_(0.2)
    model[1].running_var.fill_(1.5)
    return model


def frozen() -> nn.Module:
    model = mlp()
    model[0].weight.requires_grad_(False)
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
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
each_kind = pytest.mark.parametrize(
    ("curvature", "dtype"),
    [
        ("ggn", torch.float64),
        ("ggn", torch.float32),
        ("hessian", torch.float64),
        ("empirical_fisher", torch.float64),
        pytest.param("hessian", torch.float32, marks=SLOW),
        pytest.param("empirical_fisher", torch.float32, marks=SLOW),
    ],
)


class Problem:
    """A model in training mode, examples, and dense answers in float64."""

    def __init__(self, case: Case = CASES["mlp"], dtype: torch.dtype = torch.float64) -> None:
        torch.manual_seed(0)
        self.model = case.make().to(torch.float32).to(dtype).train()
        x = torch.randn(NUM_TRAIN + NUM_QUERY, NUM_FEATURES)
        if case.dead_inputs:
            x[:, 1:3] = 0
        y = torch.arange(len(x)) * 7 % NUM_CLASSES
        self.x, self.y = x.to(dtype), y
        self.train = self.x[:NUM_TRAIN], y[:NUM_TRAIN]
        self.query = self.x[NUM_TRAIN:], y[NUM_TRAIN:]
        self.dtype = dtype

    def influence(self, **options: Any) -> InfluenceFunction:
        solver = li.NystromCG(rank=10, rtol=EXACT[self.dtype], damping=DAMPING)
        arguments: dict[str, Any] = {"solver": solver, "rng": 0, "curvature": "ggn"}
        return InfluenceFunction(self.model, cross_entropy, self.train, **{**arguments, **options})

    def dense(self, curvature: str, weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
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
        w = torch.ones(NUM_TRAIN).double() if weights is None else weights
        if curvature == "hessian":
            H = torch.func.hessian(lambda flat: (w * losses(flat, self.train)).sum())(flat)
        elif curvature == "empirical_fisher":
            H = by_train.T @ (w[:, None] * by_train)
        else:
            x = self.train[0].double()
            J = torch.func.jacfwd(outputs)(flat, x)  # (N, C, n)
            p = outputs(flat, x).softmax(dim=1)
            middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
            H = torch.einsum("i,icn,icd,idm->nm", w, J, middle, J)
        return H / NUM_TRAIN, by_train, by_query

    def expected(self, curvature: str, shift: float = DAMPING) -> Tensor:
        H, by_train, by_query = self.dense(curvature)
        return by_query @ torch.linalg.solve(H + shift * torch.eye(len(H)).double(), by_train.T)


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == dtype
    scale = expected.abs().max().item()
    assert scale > 0
    assert (actual.double() - expected).abs().max().item() <= TOLERANCE[dtype] * scale


def indefinite_shift(problem: Problem, curvature: str) -> float:
    """Return a damping that makes the curvature positive definite."""
    if curvature != "hessian":
        return DAMPING
    lowest = torch.linalg.eigvalsh(problem.dense("hessian")[0])[0].item()
    return DAMPING + max(0.0, -1.2 * lowest)


# Scores


@each_kind
@each_case
def test_scores_equal_the_dense_answer(case, curvature, dtype):
    problem = Problem(case, dtype)
    damping = indefinite_shift(problem, curvature)
    influence = problem.influence(curvature=curvature, damping=damping)
    expected = problem.expected(curvature, damping)
    for method in ("jvp", "gradients", "auto"):
        assert_close(influence.scores(problem.query, method=method), expected, dtype)


@each_dtype
@pytest.mark.parametrize(
    "size", [5, 13, *(pytest.param(i, marks=SLOW) for i in (1, 2, 3, 4, 7, 14, 100))]
)
def test_the_batch_size_makes_no_difference(size, dtype):
    problem = Problem(dtype=dtype)
    expected = problem.expected("ggn")
    x, y = problem.train
    batches = [(x[i : i + size], y[i : i + size]) for i in range(0, NUM_TRAIN, size)]
    for train, options in (
        (problem.train, {"batch_size": size}),
        (batches, {}),
        (batches, {"batch_size": 4}),
        (batches, {"memory_budget": 1}),
        (TensorDataset(x, y), {"batch_size": size}),
        (DataLoader(TensorDataset(x, y), batch_size=size), {}),
        (DataLoader(TensorDataset(x, y), batch_size=size, shuffle=True, drop_last=True), {}),
    ):
        influence = InfluenceFunction(
            problem.model,
            cross_entropy,
            train,
            solver=li.NystromCG(rank=10, rtol=EXACT[dtype], damping=DAMPING),
            rng=0,
            **options,
        )
        assert influence.info.num_train == NUM_TRAIN
        assert_close(influence.scores(problem.query), expected, dtype)


@each_kind
def test_the_order_of_the_examples_makes_no_difference_but_their_numbers(curvature, dtype):
    problem = Problem(dtype=dtype)
    damping = indefinite_shift(problem, curvature)
    expected = problem.expected(curvature, damping)
    order = torch.tensor(np.random.default_rng(0).permutation(NUM_TRAIN))
    problem.train = tuple(part[order] for part in problem.train)
    influence = problem.influence(curvature=curvature, damping=damping, batch_size=4)
    assert_close(influence.scores(problem.query), expected[:, order], dtype)


def test_an_unequal_last_batch_weighs_by_its_examples():
    # the mean of batch means would weigh the one example of the last batch as much as the others
    problem = Problem()
    x, y = problem.train
    batches = [(x[:13], y[:13]), (x[13:], y[13:])]
    influence = InfluenceFunction(
        problem.model, cross_entropy, batches, solver=li.Exact(damping=DAMPING), memory_budget=1
    )
    assert influence.info.num_train == NUM_TRAIN
    assert_close(influence.scores(problem.query), problem.expected("ggn"), torch.float64)
    assert influence.info.loss == pytest.approx(
        cross_entropy(copy.deepcopy(problem.model).eval()(x), y).mean().item(), rel=1e-12
    )


@pytest.mark.parametrize("memory_budget", [1, 2000, 20_000])
def test_a_small_memory_budget_gives_the_same_scores(memory_budget):
    problem = Problem()
    influence = problem.influence(memory_budget=memory_budget)
    for method in ("jvp", "gradients"):
        scores = influence.scores(problem.query, method=method)
        assert_close(scores, problem.expected("ggn"), torch.float64)
    best = influence.top_k(problem.query, 3)
    assert np.array_equal(best.indices, problem.expected("ggn").argsort(descending=True)[:, :3])


def test_other_examples_than_the_training_set_can_be_scored():
    problem = Problem()
    H, _, by_query = problem.dense("ggn")
    inverse = torch.linalg.inv(H + DAMPING * torch.eye(len(H)).double())
    scores = problem.influence().scores(problem.query, problem.query)
    assert_close(scores, by_query @ inverse @ by_query.T, torch.float64)


def test_parameters_may_be_a_part_of_the_model():
    problem = Problem()
    whole = problem.dense("ggn")
    places = slice(25, None)  # the last layer
    H, by_train, by_query = whole[0][places, places], whole[1][:, places], whole[2][:, places]
    expected = by_query @ torch.linalg.solve(H + DAMPING * torch.eye(len(H)).double(), by_train.T)
    for params in (problem.model[2], list(problem.model[2].parameters())):
        influence = problem.influence(params=params)
        for method in ("jvp", "gradients"):
            assert_close(influence.scores(problem.query, method=method), expected, torch.float64)


def test_ridge_and_damping_add_up():
    problem = Problem()
    expected = problem.expected("ggn", shift=0.03 + 0.02)
    for solver in (li.CG, li.Exact, li.NystromCG):
        options = {} if solver is li.Exact else {"rtol": 1e-12}
        influence = problem.influence(solver=solver(damping=0.02, **options), ridge=0.03)
        assert_close(influence.scores(problem.query), expected, torch.float64)
    by_function = problem.influence(
        solver=lambda matvec, b: (
            li.cg(li.FunctionOperator(matvec, len(b), like=b, matmat=matvec), b, rtol=1e-12).value
        ),
        ridge=0.03,
        damping=0.02,
    )
    assert_close(by_function.scores(problem.query), expected, torch.float64)


def test_another_damping_takes_the_same_columns():
    problem = Problem()
    influence = problem.influence()
    influence.scores(problem.query)
    products = influence.info.num_products
    stronger = influence.with_damping(0.4)
    assert_close(stronger.scores(problem.query), problem.expected("ggn", 0.4), torch.float64)
    steps = int(stronger.info.num_steps.max())
    assert stronger.info.num_products - products <= (steps + 2) * NUM_QUERY  # no columns anew
    assert stronger.info.damping == 0.4
    assert influence.info.damping == DAMPING


def test_a_nystrom_inverse_of_full_rank_is_exact_and_one_of_low_rank_is_not():
    problem = Problem()
    expected = problem.expected("ggn")
    n = problem.influence().info.num_params
    full = problem.influence(solver=li.Nystrom(rank=n, damping=DAMPING))
    assert_close(full.scores(problem.query), expected, torch.float64)
    low = problem.influence(solver=li.Nystrom(rank=3, damping=DAMPING))
    difference = (low.scores(problem.query) - expected).abs().max()
    assert difference > 0.01 * expected.abs().max()
    assert low.info.relative_residual.min() > 0.01
    assert low.info.message == f"{NUM_QUERY} direct"


@each_dtype
def test_info_has_the_true_relative_residual_of_each_query(dtype):
    problem = Problem(dtype=dtype)
    influence = problem.influence(solver=li.NystromCG(rank=4, damping=DAMPING, rtol=1e-3))
    _, _, by_query = problem.dense("ggn")
    Z = influence.inverse_product(by_query.T.to(dtype))
    H = problem.dense("ggn")[0] + DAMPING * torch.eye(len(Z)).double()
    true = torch.linalg.vector_norm(by_query.T - H @ Z.double(), dim=0)
    true /= torch.linalg.vector_norm(by_query, dim=1)
    info = influence.info
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-2}[dtype]
    assert np.allclose(info.relative_residual, true, rtol=tolerance)
    assert np.all(info.relative_residual <= 1e-3)
    assert np.all(info.num_steps > 0)
    assert info.message == f"{NUM_QUERY} converged"
    assert info.rank == 4


def test_info_has_the_gradient_of_the_objective():
    problem = Problem()
    ridge = 0.1
    model = copy.deepcopy(problem.model).eval()
    objective = cross_entropy(model(problem.train[0]), problem.train[1]).mean()
    objective = objective + ridge / 2 * sum((p**2).sum() for p in model.parameters())
    objective.backward()
    norm = torch.cat([p.grad.reshape(-1) for p in model.parameters()]).norm().item()
    assert problem.influence(ridge=ridge).info.gradient_norm == pytest.approx(norm, rel=1e-10)
    fisher = problem.influence(ridge=ridge, curvature="empirical_fisher")
    assert fisher.info.gradient_norm == pytest.approx(norm, rel=1e-10)


def test_a_solve_that_falls_short_warns():
    problem = Problem()
    influence = problem.influence(solver=li.CG(damping=1e-4, max_steps=1))
    with pytest.warns(RuntimeWarning, match="did not converge: 5 max_steps"):
        influence.scores(problem.query)
    assert influence.info.relative_residual.max() > 1e-4


# Top k, self-influence, removal


@pytest.mark.parametrize("kind", ["helpful", "harmful", "absolute"])
def test_top_k_is_the_sorted_head_of_the_scores(kind):
    problem = Problem()
    influence = problem.influence(batch_size=3)
    scores = influence.scores(problem.query).numpy()
    ranked = {"helpful": -scores, "harmful": scores, "absolute": -np.abs(scores)}[kind]
    for k in (4, NUM_TRAIN):
        best = influence.top_k(problem.query, k, kind)
        expected = np.argsort(ranked, axis=1)[:, :k]
        assert np.array_equal(best.indices, expected)
        assert isinstance(best.scores, Tensor)
        assert np.allclose(best.scores, np.take_along_axis(scores, expected, axis=1), rtol=1e-12)


@each_kind
def test_self_influence_is_the_diagonal_of_the_scores_of_the_training_set(curvature, dtype):
    problem = Problem(dtype=dtype)
    damping = indefinite_shift(problem, curvature)
    H, by_train, _ = problem.dense(curvature)
    inverse = torch.linalg.inv(H + damping * torch.eye(len(H)).double())
    expected = torch.einsum("in,nm,im->i", by_train, inverse, by_train)
    for options in ({}, {"memory_budget": 50_000}, {"batch_size": 3}):
        influence = problem.influence(curvature=curvature, damping=damping, **options)
        values = influence.self_influence()
        assert_close(values, expected, dtype)
        assert influence.info.relative_residual.shape == (NUM_TRAIN,)
    assert values.min() > 0


@each_kind
def test_the_removal_effect_is_the_sum_of_scores_over_the_number_of_examples(curvature, dtype):
    problem = Problem(dtype=dtype)
    damping = indefinite_shift(problem, curvature)
    influence = problem.influence(curvature=curvature, damping=damping, batch_size=4)
    expected = problem.expected(curvature, damping)[:, [2, 9, 13]].sum(dim=1) / NUM_TRAIN
    assert_close(influence.removal_effect(problem.query, [9, 2, 13]), expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=SLOW)])
@pytest.mark.parametrize(
    ("curvature", "solver"),
    [
        *((curvature, solver) for curvature in CURVATURES for solver in ("NystromCG", "Exact")),
        ("hessian", "CG"),
        ("ggn", "Nystrom"),
    ],
)
def test_with_leverage_the_curvature_of_the_removed_examples_goes_too(curvature, solver, dtype):
    problem = Problem(dtype=dtype)
    damping = indefinite_shift(problem, curvature) + 0.1
    weights = torch.ones(NUM_TRAIN).double()
    weights[[2, 9, 13]] = 0
    H, by_train, by_query = problem.dense(curvature, weights)
    step = torch.linalg.solve(
        H + damping * torch.eye(len(H)).double(), ((1 - weights) @ by_train) / NUM_TRAIN
    )
    settings = {
        "NystromCG": li.NystromCG(rank=8, rtol=EXACT[dtype]),
        "CG": li.CG(rtol=EXACT[dtype]),
        "Exact": li.Exact(),
        "Nystrom": li.Nystrom(rank=len(H), damping=1.0),
    }[solver]
    influence = problem.influence(
        curvature=curvature, damping=damping, solver=settings, batch_size=5
    )
    effect = influence.removal_effect(problem.query, [2, 9, 13], leverage=True)
    assert_close(effect, by_query @ step, dtype)


def test_with_leverage_the_removal_effect_is_exact_for_least_squares():
    torch.manual_seed(3)
    x, y = torch.randn(20, 4).double(), torch.randn(20, 1).double()
    ridge = 0.1
    keep = torch.ones(20, dtype=torch.bool)
    keep[[0, 5, 6, 11]] = False

    def fitted(rows: Tensor) -> Tensor:
        A = x[rows].T @ x[rows] / 20 + ridge * torch.eye(4).double()
        return torch.linalg.solve(A, x[rows].T @ y[rows] / 20)

    def squares(output: Tensor, target: Tensor) -> Tensor:
        return ((output - target) ** 2).sum(dim=1) / 2

    whole = fitted(torch.ones(20, dtype=torch.bool))
    model = nn.Linear(4, 1, bias=False).double()
    model.weight.data = whole.T.clone()
    influence = InfluenceFunction(model, squares, (x, y), ridge=ridge, solver=li.CG(rtol=1e-13))
    assert influence.info.gradient_norm < 1e-12
    query = torch.randn(6, 4).double(), torch.randn(6, 1).double()
    # linear outputs: the effect to first order in the step is the gradient times the true step
    step = fitted(keep) - whole
    slope = ((query[0] @ whole - query[1]) * (query[0] @ step))[:, 0]
    effect = influence.removal_effect(query, [0, 5, 6, 11], leverage=True)
    assert_close(effect, slope, torch.float64)
    plain = influence.removal_effect(query, [0, 5, 6, 11])
    assert (plain - slope).abs().max() > 0.05 * slope.abs().max()


@each_dtype
def test_the_inverse_product_is_that_of_the_damped_curvature(dtype):
    problem = Problem(dtype=dtype)
    H = problem.dense("ggn")[0]
    G = torch.randn(len(H), 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = torch.linalg.solve(H + DAMPING * torch.eye(len(H)).double(), G.double())
    influence = problem.influence()
    assert_close(influence.inverse_product(G), expected, dtype)
    assert_close(influence.inverse_product(G[:, 1]), expected[:, 1], dtype)


# The damping


def test_the_auto_damping_is_near_a_tenth_of_the_mean_eigenvalue_and_reported():
    problem = Problem()
    for solver in (None, li.CG(rtol=1e-12)):
        influence = problem.influence(damping="auto", solver=solver)
        H = problem.dense("ggn")[0]
        mean = torch.trace(H).item() / len(H)
        assert influence.info.damping == pytest.approx(0.1 * mean, rel=0.3)
    expected = problem.expected("ggn", influence.info.damping)
    assert_close(influence.scores(problem.query), expected, torch.float64)


def test_without_a_solver_the_damping_is_automatic_unless_there_is_ridge():
    problem = Problem()
    assert problem.influence(solver=None).info.damping > 0
    regular = problem.influence(solver=None, ridge=0.1)
    assert (regular.info.damping, regular.info.ridge) == (0.0, 0.1)
    assert problem.influence(solver=li.CG(damping=0.3), ridge=0.1).info.damping == 0.3


def test_an_indefinite_hessian_is_named_with_its_lowest_ritz_value_and_a_damping_that_does():
    problem = Problem()
    H = problem.dense("hessian")[0]
    lowest = torch.linalg.eigvalsh(H)[0].item()
    assert lowest < -1e-3
    for solver in (li.NystromCG(rank=10), li.CG(), li.Exact(), li.Nystrom(rank=30, damping=1e-3)):
        influence = problem.influence(curvature="hessian", solver=solver)
        with pytest.raises(
            ValueError, match="not positive definite; its lowest Ritz value is"
        ) as e:
            influence.scores(problem.query)
        message = str(e.value)
        assert "the Hessian (with damping" in message
        value = float(message.split("lowest Ritz value is ")[1].split(". ")[0])
        shift = influence.info.damping
        assert value - shift == pytest.approx(lowest, rel=0.05)
        enough = float(message.split("A damping of ")[1].split(" would")[0])
        assert -lowest < enough < -2 * lowest
        if not isinstance(solver, li.Nystrom):
            influence.with_damping(enough).scores(problem.query)


def test_gauss_newton_columns_precondition_the_hessian():
    problem = Problem()
    damping = indefinite_shift(problem, "hessian")
    influence = problem.influence(curvature="hessian", damping=damping)
    influence.scores(problem.query)
    ggn = problem.dense("ggn")[0].numpy()
    kept = influence._factor.A
    assert np.allclose(kept.kept, ggn[:, kept.indices], atol=1e-12)


# The model comes back as it was


def test_the_model_comes_back_as_it_was():
    problem = Problem(CASES["dropout and batch norm"], torch.float32)
    model = problem.model
    model[0].eval()  # a mode of its own
    calls = []
    handle = model[4].register_forward_hook(lambda *args: calls.append(len(args)))
    model(problem.train[0]).sum().backward()
    calls.clear()
    grads = [(p.grad, p.grad.clone()) for p in model.parameters()]
    modes = [module.training for module in model.modules()]
    buffers = [(b, b.clone(), b._version) for b in model.buffers()]
    versions = [p._version for p in model.parameters()]
    state, hooks = torch.get_rng_state(), list(model[4]._forward_hooks.items())
    influence = problem.influence(damping=1.0)
    for method in ("jvp", "gradients"):
        influence.scores(problem.query, method=method)
    influence.self_influence()
    influence.removal_effect(problem.query, [1, 2], leverage=True)
    influence.top_k(problem.query, 2)
    assert calls  # hooks are part of the model
    assert hooks == list(model[4]._forward_hooks.items())
    handle.remove()
    assert modes == [module.training for module in model.modules()]
    for buffer, (first, value, version) in zip(model.buffers(), buffers, strict=True):
        assert buffer is first
        assert torch.equal(buffer, value)
        assert buffer._version == version
    for p, (grad, value) in zip(model.parameters(), grads, strict=True):
        assert p.grad is grad
        assert torch.equal(p.grad, value)
    assert versions == [p._version for p in model.parameters()]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_hook_that_vmap_cannot_run_is_no_hindrance():
    problem = Problem()
    sums = []
    problem.model.register_forward_hook(lambda _, __, output: sums.append(output.sum().item()))
    scores = problem.influence().scores(problem.query, method="gradients")
    assert_close(scores, problem.expected("ggn"), torch.float64)


def test_it_works_within_no_grad_and_on_parameters_that_are_not_changed_meanwhile():
    problem = Problem()
    with torch.no_grad():
        influence = problem.influence()
        scores = influence.scores(problem.query)
        assert not torch.is_grad_enabled()
    assert_close(scores, problem.expected("ggn"), torch.float64)
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
        assert_close(scores, expected, torch.float64)

    def as_pairs(part: tuple[Tensor, Tensor]) -> Any:
        return (part[0][:, :2], part[0][:, 2:]), part[1]

    influence = InfluenceFunction(two, cross_entropy, as_pairs(problem.train), solver=solver)
    for method in ("jvp", "gradients"):
        scores = influence.scores(as_pairs(problem.query), method=method)
        assert_close(scores, expected, torch.float64)


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
        assert_close(influence.scores(problem.query), problem.expected("ggn"), torch.float64)


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


def test_a_loss_that_is_not_one_number_for_each_example_is_refused():
    bad(r"one number per example, shape \(14,\); got shape \(\)", loss=F.cross_entropy)
    bad(r"got shape \(14, 3\)", loss=lambda z, y: z)
    bad("must return an array; got", loss=lambda z, y: 1.0)
    bad("must be real and floating-point", loss=lambda z, y: y)
    bad("must be a function", loss=3)
    bad("must depend on each example alone", loss=lambda z, y: cross_entropy(z, y) - z.mean())


def test_examples_with_nan_are_named():
    problem = Problem()
    x = problem.train[0].clone()
    x[7, 1] = torch.nan
    bad(
        r"it is nan for example 7 of `train`, and not finite for 1 of the 14", (x, problem.train[1])
    )
    bad(
        r"for example 7 of `train`, and not finite for 1 of the 2",
        (x, problem.train[1]),
        batch_size=2,
    )
    with pytest.raises(ValueError, match="example 7 of `query`"):
        problem.influence().scores((x, problem.train[1]))


def test_labels_out_of_range_are_named():
    problem = Problem()
    y = problem.train[1].clone()
    y[6] = NUM_CLASSES
    bad(
        "failed on examples 4 to 7 of `train`: .*all labels within",
        (problem.train[0], y),
        batch_size=4,
    )


def test_data_without_examples_and_data_read_only_once_are_refused():
    problem = Problem()
    x, y = problem.train
    bad("`train` must hold at least one example", DataLoader(TensorDataset(x[:0], y[:0])))
    bad("`train` must hold at least one example", [])
    bad("`train` must hold at least one example", (x[:0], y[:0]))
    bad("can be iterated only once: it is a generator", ((x, y) for _ in range(2)))
    bad("can be iterated only once", iter([(x, y)]))
    bad("must be a DataLoader, a Dataset", x)
    bad("must be a DataLoader, a Dataset", 3)
    bad("one row for each example", (x, y[:3]))
    bad("a batch must be a pair", [(x, y, y)])
    bad("given to the model as keywords, .* give `split`", {"x": x, "y": y})


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


def test_other_bad_arguments_are_refused():
    problem = Problem()
    bad(
        "`curvature` must be one of 'ggn', 'hessian', 'empirical_fisher'; got 'fisher'",
        curvature="fisher",
    )
    bad("`ridge` must be finite and >= 0", ridge=-1.0)
    bad("`damping` must be a number or 'auto'; got 'much'", damping="much")
    bad("`damping` must be finite and >= 0", damping=-1.0)
    bad("`batch_size` must be at least 1", batch_size=0)
    bad("`memory_budget` must be at least 1", memory_budget=0)
    bad("`model` must be a torch.nn.Module", model=lambda x: x)
    bad("`params` must be parameters of `model`", params=[torch.ones(2, requires_grad=True)])
    bad("`solver` must be settings", solver="cg")
    influence = problem.influence()
    with pytest.raises(ValueError, match="`kind` must be one of 'helpful'"):
        influence.top_k(problem.query, 1, "best")
    with pytest.raises(ValueError, match="`k` must be from 1 to 14; got 15"):
        influence.top_k(problem.query, 15)
    with pytest.raises(ValueError, match="`method` must be one of"):
        influence.scores(problem.query, method="vmap")
    with pytest.raises(ValueError, match="must lie in 0 … 13"):
        influence.removal_effect(problem.query, [14])
    with pytest.raises(ValueError, match="`indices` must be distinct"):
        influence.removal_effect(problem.query, [1, 1])
    with pytest.raises(ValueError, match="`G` must have 43 rows"):
        influence.inverse_product(torch.ones(3).double())
    with pytest.raises(ValueError, match="`G` must be finite"):
        influence.inverse_product(torch.full((43,), torch.nan).double())


# Files


def test_what_was_saved_is_loaded_without_computing_the_columns_again(tmp_path):
    problem = Problem()
    influence = problem.influence()
    expected = influence.scores(problem.query)
    path = tmp_path / "influence.npz"
    influence.save(path)
    loaded = InfluenceFunction.load(path, problem.model, cross_entropy, problem.train)
    assert torch.equal(loaded.scores(problem.query), expected)
    assert loaded.info.num_products == influence.info.num_products - 10
    assert loaded.info.damping == DAMPING


def test_a_file_of_other_parameters_or_another_number_of_examples_is_refused(tmp_path):
    problem = Problem()
    path = tmp_path / "influence.npz"
    problem.influence(solver=li.CG(damping=DAMPING)).save(path)
    with pytest.raises(ValueError, match="saved with other training set and training losses"):
        InfluenceFunction.load(path, problem.model, cross_entropy, problem.query)
    with torch.no_grad():
        problem.model[0].weight[0, 0] += 1e-9
    with pytest.raises(ValueError, match="was saved with other parameters"):
        InfluenceFunction.load(path, problem.model, cross_entropy, problem.train)
    np.savez(path, other=np.ones(2))
    with pytest.raises(ValueError, match=r"no file of InfluenceFunction\.save"):
        InfluenceFunction.load(path, problem.model, cross_entropy, problem.train)
    with pytest.raises(TypeError, match="`solver` must be settings"):
        problem.influence(solver=lambda matvec, b: b).save(path)


@pytest.mark.parametrize("method", ["jvp", "gradients"])
def test_a_run_cut_short_goes_on_where_it_was(method, tmp_path):
    problem = Problem()
    folder = tmp_path / "partial"
    influence = problem.influence(batch_size=4, memory_budget=2**16)
    expected = influence.scores(problem.query, method=method)
    calls, name = [], {"jvp": "slopes", "gradients": "gradients"}[method]
    original = getattr(influence._backend, name)

    def failing(*args: Any) -> Any:
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*args)

    setattr(influence._backend, name, failing)
    with pytest.raises(KeyboardInterrupt):
        influence.scores(problem.query, method=method, checkpoint=folder)
    first = sorted(path.name for path in folder.iterdir())
    assert "directions-0.npz" in first
    assert sum(one.startswith("scores-") for one in first) >= 1
    again = problem.influence(batch_size=4, memory_budget=2**16)
    assert torch.equal(again.scores(problem.query, method=method, checkpoint=folder), expected)
    assert again.info.num_products < influence.info.num_products
    products = again.info.num_products
    assert torch.equal(again.scores(problem.query, method=method, checkpoint=folder), expected)
    assert again.info.num_products == products
    assert again.info.message == "read from the checkpoint"


def test_a_checkpoint_of_another_computation_is_refused(tmp_path):
    problem = Problem()
    problem.influence().scores(problem.query, checkpoint=tmp_path)
    with pytest.raises(
        ValueError, match="holds the results of another computation: settings differ"
    ):
        problem.influence(damping=0.2).scores(problem.query, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="query, query losses differ"):
        problem.influence().scores(problem.train, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="kind"):
        problem.influence().self_influence(checkpoint=tmp_path)
    with pytest.raises(ValueError, match="needs a seed"):
        problem.influence(rng=None).scores(problem.query, checkpoint=tmp_path)


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


def test_progress_bars_are_shown_when_asked_for(capsys):
    pytest.importorskip("tqdm", reason="the extra `plot` is missing: no tqdm")
    problem = Problem()
    problem.influence(progress=True).self_influence()
    problem.influence(progress=True).scores(problem.query)
    shown = capsys.readouterr().err
    assert "self-influence" in shown
    assert "scores" in shown
    problem.influence().scores(problem.query)
    assert capsys.readouterr().err == ""
