"""Hypergradients of live models against the implicit formula written out with dense matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import lowrank_inverse as li

torch = pytest.importorskip("torch")

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lowrank_inverse.bilevel.diagnostics import HypergradientWarning
from lowrank_inverse_torch import HessianOperator, hypergradient
from tests.adapters.shared.frameworks import Torch, flat, leaves, rebuilt, relative
from tests.adapters.shared.problem import Dense
from tests.adapters.torch.models import (
    Stochastic,
    Tied,
    assert_unchanged,
    dead_relu,
    frozen,
    mlp,
    snapshot,
)

NUM_EXAMPLES, NUM_FEATURES, NUM_CLASSES, NUM_HIDDEN = 8, 3, 3, 4
N = NUM_HIDDEN * (NUM_FEATURES + 1) + NUM_CLASSES * (NUM_HIDDEN + 1)
N_LINEAR = NUM_CLASSES * (NUM_FEATURES + 1)

Tree = dict[str, Tensor]


# Problems and the dense oracle.


def linear() -> nn.Module:
    return nn.Linear(NUM_FEATURES, NUM_CLASSES)


class Problem:
    """Weighted classification: weights and decay of the inner loss are the hyperparameters.

    The two losses are written once, as functions of a forward pass, the parameters and the
    hyperparameters: the closures apply them to the live model, the oracle to tensors of its own.
    """

    def __init__(
        self,
        make: Callable[[], nn.Module] = mlp,
        *,
        dtype: torch.dtype = torch.float64,
        decay: float = 0.5,
    ) -> None:
        torch.manual_seed(3)
        # The same numbers in every dtype.
        self.model = make().to(torch.float64).to(dtype)
        draws = torch.randn(2, NUM_EXAMPLES, NUM_FEATURES, dtype=torch.float64).to(dtype)
        self.x, self.clean_x = draws
        self.y = torch.arange(NUM_EXAMPLES) % NUM_CLASSES
        self.clean_y = torch.arange(NUM_EXAMPLES) // 2 % NUM_CLASSES
        weights = torch.linspace(-1, 1, NUM_EXAMPLES, dtype=dtype)
        self.hparams: Tree = {
            "weights": weights.requires_grad_(),
            "log_decay": torch.tensor(math.log(decay), dtype=dtype, requires_grad=True),
        }

    def data_term(self, forward: Any, hparams: Tree) -> Tensor:
        losses = F.cross_entropy(forward(self.x), self.y, reduction="none")
        return (torch.sigmoid(hparams["weights"]) * losses).mean()

    def inner(self, forward: Any, params: Tree, hparams: Tree) -> Tensor:
        squares = sum((value**2).sum() for value in params.values())
        return self.data_term(forward, hparams) + 0.5 * hparams["log_decay"].exp() * squares

    def outer(self, forward: Any, params: Tree, hparams: Tree) -> Tensor:
        loss = F.cross_entropy(forward(self.clean_x), self.clean_y)
        return loss + 0.05 * (hparams["weights"] ** 2).sum()

    def trainable(self) -> Tree:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def inner_loss(self) -> Tensor:
        return self.inner(self.model, self.trainable(), self.hparams)

    def outer_loss(self) -> Tensor:
        return self.outer(self.model, self.trainable(), self.hparams)

    def hypergradient(self, **options: Any) -> Any:
        arguments = {
            "inner_loss": self.inner_loss,
            "outer_loss": self.outer_loss,
            "params": self.model,
            "hparams": self.hparams,
            "solver": li.Exact(),
            "accumulate_grad": False,
        }
        return hypergradient(**{**arguments, **options})

    def dense(self) -> Dense:
        def applied(loss: Any) -> Callable[[Tree, Tree], Tensor]:
            def function(params: Tree, hparams: Tree) -> Tensor:
                return loss(lambda x: functional_call(self.model, params, (x,)), params, hparams)

            return function

        return dense(applied(self.inner), applied(self.outer), self.trainable(), self.hparams)


def dense(inner: Any, outer: Any, params: Tree, hparams: Tree) -> Dense:
    """Differentiate two functions of (params, hparams) by torch.func, on flat vectors."""

    def on_vectors(function: Any) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda t, p: function(rebuilt(t, params), rebuilt(p, hparams))

    f, g = on_vectors(inner), on_vectors(outer)
    at = tuple(torch.from_numpy(flat(tree)) for tree in (params, hparams))
    gradient = torch.func.jacrev(f)
    parts = (
        torch.func.hessian(f)(*at),
        torch.func.jacrev(gradient, argnums=1)(*at),
        gradient(*at),
        *torch.func.jacrev(g, argnums=(0, 1))(*at),
    )
    return Dense(*(part.detach().numpy() for part in parts))


def richardson(matvec: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
    """Four steps of a solver that a user might bring."""
    x = torch.zeros_like(b)
    for _ in range(4):
        x = x + 0.2 * (b - matvec(x))
    return x


# Forms of the parameters.


def test_live_parameters_may_come_in_any_structure_and_the_ihvp_comes_back_in_it():
    problem = Problem()
    first, second = problem.model[0], problem.model[2]
    wanted = problem.hypergradient()
    assert list(wanted.ihvp) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    by_iterator = problem.hypergradient(params=problem.model.parameters())
    nested = {"a": (first.weight, [first.bias]), "b": second}
    by_structure = problem.hypergradient(params=nested)
    for out in (by_iterator, by_structure):
        assert relative(out.grads, wanted.grads) < 1e-14
        assert relative(out.ihvp, wanted.ihvp) < 1e-14
    assert isinstance(by_iterator.ihvp, list)
    assert isinstance(by_structure.ihvp["a"], tuple)
    assert by_structure.ihvp["a"][1][0].shape == first.bias.shape
    assert list(by_structure.ihvp["b"]) == ["weight", "bias"]


def test_parameters_that_are_no_leaves_are_differentiated_by():
    problem = Problem(linear)
    raw = torch.from_numpy(flat(problem.trainable())).requires_grad_()
    params = {name: 1.0 * value for name, value in rebuilt(raw, problem.trainable()).items()}

    def forward(x: Tensor) -> Tensor:
        return functional_call(problem.model, params, (x,))

    out = problem.hypergradient(
        inner_loss=lambda: problem.inner(forward, params, problem.hparams),
        outer_loss=lambda: problem.outer(forward, params, problem.hparams),
        params=params,
    )
    assert relative(out.grads, problem.hypergradient().grads) < 1e-14


def test_tied_tensors_count_once_and_share_their_part_of_the_ihvp():
    problem = Problem(Tied)
    first, second = problem.model.encode, problem.model.decode
    whole = problem.hypergradient()
    assert sum(leaf.numel() for leaf in leaves(whole.ihvp)) == 9 + 3 + 3
    assert list(whole.ihvp) == [name for name, _ in problem.model.named_parameters()]
    out = problem.hypergradient(params=[first.weight, first.bias, second.weight, second.bias])
    assert out.ihvp[0] is out.ihvp[2]
    assert relative(out.grads, whole.grads) < 1e-14


def test_frozen_parameters_are_none_in_the_ihvp():
    ihvp = Problem(frozen).hypergradient().ihvp
    assert [name for name, part in ihvp.items() if part is None] == ["0.bias", "2.weight"]


def test_dead_relus_and_their_zero_columns_are_no_trouble():
    problem = Problem(dead_relu, decay=1e-300)
    oracle = problem.dense()
    H, damping = oracle.hessian, 0.5
    dead = np.abs(H).max(axis=0) < 1e-100
    assert dead.sum() >= 2 * (NUM_FEATURES + 1)
    out = problem.hypergradient(solver=li.Exact(damping=damping))
    assert relative(out.grads, oracle.at(oracle.ihvp(damping))) < 1e-8
    # The dead columns, and those of the last layer, where the Hessian is positive semidefinite.
    zero = np.flatnonzero(dead)
    live = np.array([i for i in range(NUM_HIDDEN * (NUM_FEATURES + 1), N) if not dead[i]])
    W = H[np.ix_(live, live)]
    H_k = H[:, live] @ np.linalg.pinv(W, rcond=1e-10, hermitian=True) @ H[:, live].T
    q = np.linalg.solve(H_k + damping * np.eye(N), oracle.outer_grad)
    solver = li.Nystrom(damping=damping, indices=(*live, *zero))
    out = problem.hypergradient(solver=solver)
    assert relative(out.grads, oracle.at(q)) < 1e-7
    assert out.info.rank == np.linalg.matrix_rank(W, tol=1e-10)


# Forms of the hyperparameters.


def test_hparams_may_be_a_module_such_as_a_weight_network():
    problem = Problem()
    weigh = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    names = dict(weigh.named_parameters())
    with torch.no_grad():
        fixed = F.cross_entropy(problem.model(problem.x), problem.y, reduction="none")

    def called(params: Tree) -> Callable[[Tensor], Tensor]:
        return lambda x: functional_call(problem.model, params, (x,))

    def inner(params: Tree, hparams: Tree, seen: Tensor | None = None) -> Tensor:
        losses = F.cross_entropy(called(params)(problem.x), problem.y, reduction="none")
        seen = losses.detach() if seen is None else seen
        weights = functional_call(weigh, hparams, (seen[:, None],))
        squares = sum((value**2).sum() for value in params.values())
        return (torch.sigmoid(weights[:, 0]) * losses).mean() + 0.3 * squares

    def outer(params: Tree, hparams: Tree) -> Tensor:
        return F.cross_entropy(called(params)(problem.clean_x), problem.clean_y)

    oracle = dense(lambda p, h: inner(p, h, fixed), outer, problem.trainable(), names)
    out = problem.hypergradient(
        inner_loss=lambda: inner(problem.trainable(), names),
        outer_loss=lambda: outer(problem.trainable(), names),
        hparams=weigh,
        accumulate_grad=True,
    )
    assert list(out.grads) == list(names)
    assert relative(out.grads, oracle.at(oracle.ihvp())) < 1e-8
    assert all(torch.equal(p.grad, out.grads[name]) for name, p in names.items())
    assert np.all(flat(out.direct) == 0)


def test_hparams_that_are_no_leaves_give_gradients_that_flow_on_by_hand():
    problem = Problem()
    wanted = problem.hypergradient()
    raw = [value.detach() / 2 for value in problem.hparams.values()]
    for value in raw:
        value.requires_grad_()
    problem.hparams = {"weights": 2 * raw[0], "log_decay": 2 * raw[1]}
    out = problem.hypergradient(accumulate_grad=True)
    assert relative(out.grads, wanted.grads) < 1e-14
    assert all(value.grad is None for value in raw)
    torch.autograd.backward(list(problem.hparams.values()), list(out.grads.values()))
    assert relative([value.grad for value in raw], 2 * flat(wanted.grads)) < 1e-14


def test_closures_may_share_what_was_computed_from_the_hparams_before():
    problem = Problem(linear)
    weights = problem.hparams["weights"]
    positive = torch.sigmoid(weights)  # one graph, evaluated once, used by all closures

    def inner() -> Tensor:
        losses = F.cross_entropy(problem.model(problem.x), problem.y, reduction="none")
        squares = sum((p**2).sum() for p in problem.model.parameters())
        return (positive * losses).mean() + 0.1 * squares

    def outer() -> Tensor:
        losses = F.cross_entropy(problem.model(problem.clean_x), problem.clean_y, reduction="none")
        return (positive * losses).mean()

    def fresh(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            nonlocal positive
            positive = torch.sigmoid(weights)
            return loss()

        return closure

    options = {"hparams": weights}
    wanted = problem.hypergradient(inner_loss=fresh(inner), outer_loss=fresh(outer), **options)
    found = problem.hypergradient(inner_loss=inner, outer_loss=outer, **options)
    assert relative(found.grads, wanted.grads) < 1e-14
    found = problem.hypergradient(inner_loss=[inner, inner], outer_loss=[outer, outer], **options)
    assert relative(found.grads, wanted.grads) < 1e-14
    positive.sum().backward()  # and the caller may still use it


def test_frozen_hparams_have_no_gradient():
    problem = Problem()
    wanted = problem.hypergradient()
    problem.hparams["weights"].requires_grad_(False)
    out = problem.hypergradient(accumulate_grad=True)
    assert out.grads["weights"] is None
    assert problem.hparams["weights"].grad is None
    assert relative(out.grads["log_decay"], wanted.grads["log_decay"]) < 1e-14


# The model comes back as it was.


def by_hand(problem: Problem, mask: Tensor) -> Dense:
    """The same network from its formulas, with a given mask."""

    def forward(params: Tree) -> Callable[[Tensor], Tensor]:
        def function(x: Tensor) -> Tensor:
            z = x @ params["first.weight"].T + params["first.bias"]
            z = (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt()
            z = mask * torch.tanh(params["norm.weight"] * z + params["norm.bias"])
            return z @ params["last.weight"].T + params["last.bias"]

        return function

    return dense(
        lambda p, h: problem.inner(forward(p), p, h),
        lambda p, h: problem.outer(forward(p), p, h),
        problem.trainable(),
        problem.hparams,
    )


def stochastic() -> Problem:
    problem = Problem(Stochastic, decay=8.0)  # enough for a positive definite Hessian
    problem.model.first.weight.grad = torch.ones_like(problem.model.first.weight)
    return problem


def test_batchnorm_and_dropout_in_training_mode_give_the_hypergradient_of_one_frozen_mask():
    problem = stochastic()
    state = torch.get_rng_state()
    mask = F.dropout(torch.ones(NUM_EXAMPLES, NUM_HIDDEN, dtype=torch.float64), 0.4)
    assert 0.0 in mask
    oracle = by_hand(problem, mask)
    n = len(oracle.hessian)
    for solver in (li.Exact(), li.CG(rtol=1e-12), li.Nystrom(rank=n, damping=0.1)):
        torch.set_rng_state(state)
        out = problem.hypergradient(solver=solver)
        assert relative(out.grads, oracle.at(oracle.ihvp(getattr(solver, "damping", 0)))) < 1e-8


@pytest.mark.parametrize("num_batches", [1, 2])
@pytest.mark.parametrize(
    "solver",
    [li.Exact(), li.CG(), li.Nystrom(rank=5, damping=1.0), li.Neumann(), li.Identity(), richardson],
    ids=["exact", "cg", "nystrom", "neumann", "identity", "callable"],
)
def test_buffers_mode_grads_and_random_state_come_back_as_they_were(solver, num_batches):
    problem = stochastic()
    before = snapshot(problem.model)
    problem.hypergradient(
        inner_loss=[problem.inner_loss] * num_batches,
        outer_loss=[problem.outer_loss] * num_batches,
        solver=solver,
        accumulate_grad=True,
    )
    assert_unchanged(problem.model, before)
    assert problem.hparams["weights"].grad is not None


def test_the_model_comes_back_as_it_was_after_an_error_too():
    problem = stochastic()
    before = snapshot(problem.model)

    def fails() -> Tensor:
        problem.outer_loss()
        problem.model.eval()
        raise KeyError("of the user")

    with pytest.raises(KeyError, match="of the user"):
        problem.hypergradient(outer_loss=fails, accumulate_grad=True)
    assert_unchanged(problem.model, before)
    assert problem.hparams["weights"].grad is None


def test_a_network_of_hyperparameters_comes_back_as_it_was():
    problem = Problem()
    weigh = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Dropout(0.2), nn.Linear(3, 1))
    weigh = weigh.double()
    before = snapshot(weigh)

    def inner() -> Tensor:
        losses = F.cross_entropy(problem.model(problem.x), problem.y, reduction="none")
        weights = torch.sigmoid(weigh(losses.detach()[:, None])[:, 0])
        squares = sum((p**2).sum() for p in problem.model.parameters())
        return (weights * losses).mean() + 0.3 * squares

    out = problem.hypergradient(inner_loss=inner, hparams=weigh)
    assert_unchanged(weigh, before)
    assert np.linalg.norm(flat(out.grads)) > 0


def test_a_module_named_beside_bare_tensors_is_guarded_too():
    problem = stochastic()
    params = list(problem.model.parameters())
    before = snapshot(problem.model)
    problem.hypergradient(params=params, module=problem.model)
    assert_unchanged(problem.model, before)
    problem.hypergradient(params=params, module=iter([problem.model]))
    assert_unchanged(problem.model, before)
    problem.hypergradient(params=params)
    assert problem.model.calls == 2  # nobody told that there was a module


# Accumulation.


def test_accumulate_grad_adds_to_what_is_there():
    problem = Problem()
    weights, log_decay = problem.hparams.values()
    weights.grad = torch.ones_like(weights)
    idle = problem.hparams["idle"] = torch.ones(2, dtype=torch.float64, requires_grad=True)
    out = problem.hypergradient(accumulate_grad=True)
    assert torch.equal(weights.grad, 1 + out.grads["weights"])
    assert torch.equal(log_decay.grad, out.grads["log_decay"])
    assert idle.grad is None  # no loss depends on it
    problem.hypergradient(accumulate_grad=True)
    torch.testing.assert_close(weights.grad, 1 + 2 * out.grads["weights"])
    assert all(p.grad is None for p in problem.model.parameters())


def test_grads_are_returned_and_not_accumulated_unless_asked_for():
    problem = Problem()
    arguments = problem.inner_loss, problem.outer_loss, problem.model, problem.hparams
    out = hypergradient(*arguments)
    assert problem.hparams["weights"].grad is None
    again = hypergradient(*arguments, accumulate_grad=True)
    assert torch.equal(problem.hparams["weights"].grad, out.grads["weights"])
    assert torch.equal(again.grads["weights"], out.grads["weights"])


def test_without_a_solver_the_products_are_bounded_and_the_answer_is_close():
    problem = Problem()
    out = problem.hypergradient(solver=None)
    assert out.info.num_products <= 42
    exact = problem.hypergradient(solver=li.Exact())
    difference = (out.grads["weights"] - exact.grads["weights"]).norm()
    assert difference <= 1e-3 * exact.grads["weights"].norm()


def test_the_grads_returned_are_no_alias_of_what_was_accumulated():
    problem = Problem()
    out = problem.hypergradient(accumulate_grad=True)
    kept = out.grads["weights"].clone()
    problem.hparams["weights"].grad.zero_()
    assert torch.equal(out.grads["weights"], kept)


def test_without_accumulate_grad_the_grads_are_left_alone():
    problem = Problem()
    weights, log_decay = problem.hparams.values()
    mark = weights.grad = torch.full_like(weights, 7.0)
    problem.hypergradient(accumulate_grad=False)
    assert weights.grad is mark
    assert torch.equal(mark, torch.full_like(weights, 7.0))
    assert log_decay.grad is None


# The ridge.


def spread(*shape: int) -> Tensor:
    return torch.linspace(0.05, 2.0, math.prod(shape), dtype=torch.float64).reshape(shape)


def test_a_ridge_of_tied_and_frozen_parameters_follows_their_structure():
    problem = Problem(Tied)
    problem.model.encode.bias.requires_grad_(False)
    rate = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    ridge = {
        name: rate * torch.ones_like(p) if p.requires_grad else None
        for name, p in problem.model.named_parameters()
    }
    hparams = {**problem.hparams, "rate": rate}

    def with_term() -> Tensor:
        squares = sum((p**2).sum() for p in problem.trainable().values())
        return problem.inner_loss() + 0.5 * rate * squares

    outside = problem.hypergradient(ridge=ridge, hparams=hparams)
    inside = problem.hypergradient(inner_loss=with_term, hparams=hparams)
    assert relative(outside.grads, inside.grads) < 1e-8
    flat = problem.hypergradient(ridge=rate.expand(9 + 3), hparams=hparams)
    assert relative(flat.grads, inside.grads) < 1e-8


def test_a_part_of_the_ridge_that_is_none_is_zero():
    problem, weight = Problem(linear), spread(NUM_CLASSES, NUM_FEATURES)
    zeros = torch.zeros(NUM_CLASSES, dtype=torch.float64)
    found, wanted = (
        problem.hypergradient(ridge={"weight": weight, "bias": bias}) for bias in (None, zeros)
    )
    assert relative(found.grads, wanted.grads) < 1e-14


def test_a_ridge_graph_may_be_used_again_by_the_caller():
    problem = Problem(linear)
    ridge = problem.hparams["log_decay"].exp()
    first = problem.hypergradient(ridge=ridge)
    again = problem.hypergradient(ridge=ridge)
    assert relative(again.grads, first.grads) < 1e-14
    ridge.backward()


def test_a_ridge_of_another_precision_is_converted():
    problem = Problem(linear, dtype=torch.float32)
    wanted = problem.hypergradient(ridge=0.5)
    rate = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    hparams = [problem.hparams["weights"]]
    for ridge in (rate, rate * torch.ones(N_LINEAR, dtype=torch.float64)):
        out = problem.hypergradient(ridge=ridge)
        assert relative(out.grads, wanted.grads) < 1e-6
        assert problem.hypergradient(ridge=ridge, hparams=hparams).grads[0].dtype is torch.float32
        assert problem.hypergradient(ridge=ridge, hparams=rate).grads.dtype is torch.float64


# Losses.


def batches(problem: Problem) -> tuple[list[Any], list[Any]]:
    """Inner and outer closures whose mean is the loss of the problem."""

    def inner(i: int) -> Callable[[], Tensor]:
        return lambda: (0.6 + 0.4 * i) * problem.inner_loss() + (i - 1) * tilt()

    def tilt() -> Tensor:
        weights = problem.hparams["weights"]
        return (torch.tanh(problem.model(problem.x)).sum(1) * weights).sum() / 10

    def outer(i: int) -> Callable[[], Tensor]:
        return lambda: (0.5 + 0.5 * i) * problem.outer_loss() + (i - 1) * tilt()

    return [inner(i) for i in range(3)], [outer(i) for i in range(3)]


@pytest.mark.parametrize(
    ("solver", "damping"),
    [
        (li.Exact(), 0.0),
        (li.NystromCG(rank=8, rtol=1e-13), 0.0),
        (li.Nystrom(rank=N, damping=0.3), 0.3),
        (li.Nystrom(rank=N, damping=0.3, memory="streamed"), 0.3),
    ],
    ids=["exact", "nystrom-cg", "nystrom", "streamed"],
)
def test_lists_of_closures_are_averaged(solver, damping):
    problem = Problem()
    inner, outer = batches(problem)
    oracle = problem.dense()
    out = problem.hypergradient(inner_loss=inner, outer_loss=outer, solver=solver, rng=0)
    assert relative(out.grads, oracle.at(oracle.ihvp(damping))) < 1e-8
    assert out.info.inner_grad_norm == pytest.approx(np.linalg.norm(oracle.inner_grad), rel=1e-12)


def test_one_of_several_outer_losses_may_lack_a_part():
    problem = Problem()
    weights = problem.hparams["weights"]
    out = problem.hypergradient(outer_loss=[problem.outer_loss, lambda: (weights**2).sum()])
    wanted = problem.hypergradient(
        outer_loss=lambda: (problem.outer_loss() + (weights**2).sum()) / 2
    )
    assert relative(out.grads, wanted.grads) < 1e-12
    constant = problem.hypergradient(
        outer_loss=[problem.outer_loss, lambda: torch.tensor(3.0, dtype=torch.float64)]
    )
    assert relative(constant.grads, flat(problem.hypergradient().grads) / 2) < 1e-12


def test_losses_may_be_evaluated_tensors_whose_graph_stays_usable():
    problem = Problem()
    wanted = problem.hypergradient()
    inner, outer = problem.inner_loss(), problem.outer_loss()
    for _ in range(2):
        out = problem.hypergradient(inner_loss=inner, outer_loss=outer)
        assert relative(out.grads, wanted.grads) < 1e-14
    (inner + outer).backward()
    assert problem.model[0].weight.grad is not None


def test_it_works_inside_no_grad():
    problem = Problem(linear)
    rate = problem.hparams["log_decay"].exp()
    bias = {"weight": None, "bias": rate * torch.ones(NUM_CLASSES, dtype=torch.float64)}
    for ridge in (rate, rate * spread(N_LINEAR), bias):
        wanted = problem.hypergradient(ridge=ridge)
        with torch.no_grad():
            out = problem.hypergradient(ridge=ridge, accumulate_grad=True)
            assert not torch.is_grad_enabled()
        assert relative(out.grads, wanted.grads) < 1e-14
        assert torch.equal(problem.hparams["weights"].grad, out.grads["weights"])
        problem.hparams["weights"].grad = None


def test_the_results_carry_no_graph():
    problem = Problem(linear)
    out = problem.hypergradient(ridge=problem.hparams["log_decay"].exp(), accumulate_grad=True)
    parts = [out.grads, out.direct, out.implicit, out.ihvp, out.state.value]
    assert not any(leaf.requires_grad for leaf in leaves(parts))
    assert not problem.hparams["weights"].grad.requires_grad


def test_chunk_size_reaches_the_operator(monkeypatch):
    made = Torch().counted(monkeypatch)
    Problem().hypergradient(chunk_size=7)
    assert made[0].chunk_size == 7


# The record.


def test_num_products_counts_those_of_the_mean_over_batches_once(monkeypatch):
    made, problem = Torch().counted(monkeypatch), Problem()
    inner, outer = batches(problem)
    out = problem.hypergradient(inner_loss=inner, outer_loss=outer, solver=li.CG())
    assert out.info.num_products == made[0].count == made[0].num_products


def test_the_record_holds_numbers_of_python():
    info = Problem(linear).hypergradient(solver=li.CG()).info
    assert isinstance(info.num_products, int)
    assert isinstance(info.relative_residual, float)
    assert isinstance(info.inner_grad_norm, float)
    assert info.negative_curvature is False


# Seeds.


def test_the_generator_of_torch_is_neither_read_nor_moved():
    problem = Problem()

    def grads() -> np.ndarray:
        return flat(problem.hypergradient(solver=li.Nystrom(rank=3, damping=1e-2), rng=0).grads)

    state = torch.get_rng_state()
    first = grads()
    problem.hypergradient(solver=li.Neumann(), rng=None)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(4)
    assert np.array_equal(grads(), first)


# Errors.

BAD: dict[str, tuple[Callable[[Problem], dict[str, Any]], Any, str]] = {
    "inner loss no tensor": (
        lambda p: {"inner_loss": lambda: 1.0}, TypeError, "`inner_loss` must be a scalar tensor",
    ),
    "outer loss no tensor": (
        lambda p: {"outer_loss": 1.0}, TypeError, "`outer_loss` must be a scalar tensor.*got float",
    ),
    "inner loss NaN": (
        lambda p: {"inner_loss": lambda: math.nan * p.inner_loss()},
        ValueError, "`inner_loss` must be finite; got nan",
    ),
    "outer loss infinite": (
        lambda p: {"outer_loss": lambda: math.inf * p.outer_loss()},
        ValueError, "`outer_loss` must be finite; got inf",
    ),
    "outer gradient NaN": (
        lambda p: {"outer_loss": lambda: (0 * p.model[0].bias).pow(2).sum().sqrt()},
        ValueError, "`gradient of the outer loss` must be finite",
    ),
    "inner loss list empty": (
        lambda p: {"inner_loss": []}, ValueError, "`inner_loss` must hold at least one closure",
    ),
    "outer loss list empty": (
        lambda p: {"outer_loss": []}, ValueError, "`outer_loss` must hold at least one closure",
    ),
    "inner loss under no_grad": (
        lambda p: {"inner_loss": torch.no_grad()(p.inner_loss)},
        ValueError, "`inner_loss` must depend on `params`.*torch.no_grad",
    ),
    "outer loss under no_grad": (
        lambda p: {"outer_loss": torch.no_grad()(p.outer_loss)},
        ValueError, "`outer_loss` must depend on `params`.*torch.no_grad",
    ),
    "params frozen": (
        lambda p: {"params": p.model.requires_grad_(False)},
        ValueError, "`params` must hold a tensor that requires grad; got 4 leaves",
    ),
    "hparams without grad": (
        lambda p: {"hparams": torch.ones(2)},
        ValueError, "`hparams` must hold a tensor that requires grad; got 1 leaves",
    ),
    "hparams no tensors": (
        lambda p: {"hparams": {"decay": 0.1}},
        TypeError, "`hparams` must be a module or hold tensors; got float at 'decay'",
    ),
    "overlap": (
        lambda p: {"hparams": [p.hparams["weights"], p.model[0].bias]},
        ValueError, "`hparams` and `params` must be distinct; '1' is in both",
    ),
    "overlap of modules": (
        lambda p: {"params": p.model[0], "hparams": p.model},
        ValueError, "`hparams` and `params` must be distinct; '0.weight' is in both",
    ),
    "ridge of wrong shape in the structure": (
        lambda p: {"ridge": {n: torch.ones(1, dtype=torch.float64) for n in p.trainable()}},
        ValueError, r"`ridge` at '0.weight' must have shape \(4, 3\); got \(1,\)",
    ),
    "state no solution": (
        lambda p: {"solver": li.CG(), "state": p.hypergradient(solver=li.CG())},
        TypeError, "`state` must be .*Solution.*got .*Hypergradient",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("options", "kind", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_by_name_and_leaves_everything_as_it_was(options, kind, message):
    problem = Problem()
    options = {**options(problem), "accumulate_grad": True}
    before = snapshot(problem.model)
    with pytest.raises(kind, match=message):
        problem.hypergradient(**options)
    assert_unchanged(problem.model, before)
    assert all(value.grad is None for value in problem.hparams.values())


def test_inference_mode_is_refused():
    problem = Problem()
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match=r"cannot be computed inside torch.inference_mode\(\)"),
    ):
        problem.hypergradient()


def test_a_step_taken_by_a_closure_is_refused():
    problem = Problem()

    def steps() -> Tensor:
        loss = problem.outer_loss()
        with torch.no_grad():
            problem.model[0].weight.add_(1.0)
        return loss * 1.0

    with pytest.raises(RuntimeError, match="`outer_loss` changed `params` in place"):
        problem.hypergradient(outer_loss=steps)


def test_hparams_that_move_no_minimum_are_refused_with_the_reason():
    w, rate = torch.ones(2, requires_grad=True), torch.tensor(0.1, requires_grad=True)
    with pytest.raises(ValueError, match="A learning rate or an initial value does not move"):
        hypergradient(lambda: (w**2).sum(), lambda: w.sum(), w, rate, solver=li.CG())


@pytest.mark.parametrize("rng", [torch.Generator(), "0", -1], ids=["generator", "text", "negative"])
def test_a_seed_of_another_kind_is_refused_by_name(rng):
    with pytest.raises(TypeError, match="`rng` must be a whole number >= 0"):
        Problem().hypergradient(solver=li.NystromCG(rank=2), rng=rng)


def test_a_ridge_may_be_a_number_for_each_tensor():
    problem = Problem(linear)
    decay = torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)
    whole = {
        "weight": decay[0].expand(NUM_CLASSES, NUM_FEATURES),
        "bias": decay[1].expand(NUM_CLASSES),
    }
    wanted = problem.hypergradient(ridge=whole, hparams=decay).grads
    found = problem.hypergradient(ridge={"weight": decay[0], "bias": decay[1]}, hparams=decay)
    torch.testing.assert_close(found.grads, wanted)
    numbers = problem.hypergradient(ridge={"weight": 0.3, "bias": 0.7})
    tensors = problem.hypergradient(ridge={k: v.detach() for k, v in whole.items()})
    torch.testing.assert_close(numbers.ihvp, tensors.ihvp)
    with pytest.raises(TypeError, match=r"`ridge` at 'bias' must be a torch\.Tensor; got str"):
        problem.hypergradient(ridge={"weight": 0.3, "bias": "0.7"})


def test_sharded_parameters_are_refused_by_name():
    distributed = pytest.importorskip("torch.distributed.tensor")
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        w = distributed.distribute_tensor(torch.ones(4), mesh, [distributed.Shard(0)])
        w.requires_grad_()
        with pytest.raises(TypeError, match="`params` must hold whole tensors; '0' is a DTensor"):
            HessianOperator(lambda: (w**2).sum(), [w])
    finally:
        torch.distributed.destroy_process_group()


def test_a_mesh_needs_a_version_of_torch_that_is_named(monkeypatch):
    pytest.importorskip("torch.distributed.device_mesh")
    monkeypatch.setattr(torch, "__version__", "2.10.0+cpu")
    w = torch.ones(4, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"`mesh` needs PyTorch 2\.11 or newer.* got 2\.10\.0"):
        HessianOperator(lambda: (w**2).sum(), [w], mesh=object())


def test_ranks_that_see_a_part_of_the_data_each_are_warned_of(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.warns(HypergradientWarning, match="Each of the 2 ranks .* Pass `mesh`"):
        Problem(linear).hypergradient()


def test_at_the_minimum_of_a_lasso_the_support_is_named_and_the_formula_holds_there():
    rng = np.random.default_rng(0)
    X = torch.from_numpy(rng.standard_normal((40, 10)))
    truth = torch.cat([torch.tensor([2.0, -1.0, 1.0], dtype=torch.float64), torch.zeros(7)])
    y = X @ truth + 0.1 * torch.from_numpy(rng.standard_normal(40))
    A, L = X.mT @ X / 40, float(torch.linalg.eigvalsh(X.mT @ X / 40)[-1])

    def solved(penalty: float) -> Tensor:
        w = torch.zeros(10, dtype=torch.float64)
        for _ in range(2000):
            w = w - (A @ w - X.mT @ y / 40) / L
            w = w.sign() * torch.relu(w.abs() - penalty / L)
        return w

    h = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    whole = solved(0.1).requires_grad_()
    support = whole.detach() != 0
    free = whole.detach()[support].requires_grad_()

    def inner(w: Tensor) -> Tensor:
        return 0.5 * ((X @ w - y) ** 2).mean() + h * w.abs().sum()

    def outer(w: Tensor) -> Tensor:
        return ((w - truth) ** 2).sum()

    def placed() -> Tensor:
        return torch.zeros(10, dtype=torch.float64).masked_scatter(support, free)

    out = hypergradient(lambda: inner(whole), lambda: outer(whole), whole, h, solver=li.CG())
    assert [one.name for one in out.info.findings()] == ["not_smooth"]
    assert f" {int((~support).sum())} parameters that are exactly 0" in out.explain()
    out = hypergradient(
        lambda: inner(placed()), lambda: outer(placed()), free, h, solver=li.Exact()
    )
    assert out.info.findings() == ()
    difference = (outer(solved(0.1 + 1e-6)) - outer(solved(0.1 - 1e-6))).item() / 2e-6
    assert out.grads.item() == pytest.approx(difference, rel=1e-5)
