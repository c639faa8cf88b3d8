"""What changed since is noticed: weights, buffers, constants, data and randomness."""

from __future__ import annotations

import copy
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lowrank_inverse as li
from lowrank_inverse_torch import InfluenceFunction

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(40, 5, generator=GENERATOR).double()
Y = torch.randint(0, 3, (40,), generator=GENERATOR)
QUERY = torch.randn(4, 5, generator=GENERATOR).double(), Y[:4]
SOLVER = li.Nystrom(rank=12, damping=0.1)


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none")


def brier(output: Tensor, target: Tensor) -> Tensor:
    return ((output.softmax(1) - F.one_hot(target, 3)) ** 2).sum(1)


def network() -> Any:
    """Return a frozen first layer, batch norm, and a head to differentiate by."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    model[0].requires_grad_(False)
    return model


def scale_frozen(model: Any) -> None:
    model[0].weight.data.mul_(3)  # through .data, which tells torch nothing


def scale_buffer(model: Any) -> None:
    model[1].running_var.mul_(4)


def influence(model: Any, loss: Any = cross_entropy, data: Any = None) -> InfluenceFunction:
    return InfluenceFunction(model, loss, (X, Y) if data is None else data, solver=SOLVER)


CHANGES = {
    "frozen weights": (scale_frozen, cross_entropy, None, "parameters"),
    "buffers": (scale_buffer, cross_entropy, None, "parameters"),
    "loss": (lambda model: None, brier, None, "training losses"),
    "data": (lambda model: None, cross_entropy, (2 * X + 1, Y), "training set"),
}
each_change = pytest.mark.parametrize(
    ("change", "loss", "data", "name"), CHANGES.values(), ids=CHANGES
)


@each_change
def test_a_checkpoint_belongs_to_one_loss_model_and_data(change, loss, data, name, tmp_path):
    model = network()
    expected = influence(model).scores(QUERY, checkpoint=tmp_path)
    assert torch.equal(influence(model).scores(QUERY, checkpoint=tmp_path), expected)
    change(model)
    with pytest.raises(ValueError, match=f"another computation: .*{name}"):
        influence(model, loss, data).scores(QUERY, checkpoint=tmp_path)


@each_change
def test_a_file_belongs_to_one_loss_model_and_data(change, loss, data, name, tmp_path):
    model, path = network(), tmp_path / "influence.npz"
    influence(model).save(path)
    assert torch.equal(
        InfluenceFunction.load(path, model, cross_entropy, (X, Y)).scores(QUERY),
        influence(model).scores(QUERY),
    )
    change(model)
    with pytest.raises(ValueError, match=f"was saved with other .*{name}"):
        InfluenceFunction.load(path, model, loss, (X, Y) if data is None else data)


def test_a_checkpoint_belongs_to_one_function_of_the_queries(tmp_path):
    model = network()
    influence(model).scores(QUERY, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="query losses differ"):
        influence(model).scores(QUERY, query_loss=brier, checkpoint=tmp_path)


@pytest.mark.parametrize("change", [scale_frozen, scale_buffer])
def test_a_change_of_the_model_is_noticed_on_a_live_object(change):
    model = network()
    live = influence(model)
    live.scores(QUERY)
    change(model)
    for call in (
        lambda: live.scores(QUERY),
        live.self_influence,
        lambda: live.removal_effect(QUERY, [1]),
        lambda: live.inverse_product(torch.ones(33).double()),
    ):
        with pytest.raises(RuntimeError, match="changed in place after"):
            call()


def test_changed_constants_and_data_are_noticed_on_a_live_object():
    weights = torch.ones(3).double()

    def weighted(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, weight=weights, reduction="none")

    live = influence(network(), weighted)
    weights[2] = 5.0
    with pytest.raises(RuntimeError, match="constants of the loss were changed in place"):
        live.scores(QUERY)
    x = X.clone()
    live = influence(network(), data=(x, Y))
    x[30] += 1
    with pytest.raises(RuntimeError, match="The loss of example 30 of `train` was"):
        live.scores(QUERY)


def test_a_model_that_is_random_in_evaluation_is_refused():
    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 8).double(), nn.Linear(8, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.dropout(torch.tanh(self.a(x))))  # training=True is its default

    dropping, model = Dropping(), network()
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"random in evaluation too, such as F\.dropout"):
        influence(dropping)
    with pytest.raises(ValueError, match="random in evaluation too"):
        influence(model, lambda z, t: cross_entropy(z, t) + torch.rand(len(t)))
    influence(model)
    assert torch.equal(torch.get_rng_state(), state)


class Augmented(Dataset[Any]):
    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> Any:
        return X[i] + 0.5 * torch.randn(5).double(), Y[i]


class Reshuffled:
    def __iter__(self) -> Any:
        order = torch.randperm(len(X))
        for part in order.split(16):
            yield X[part], Y[part]


@pytest.mark.parametrize("data", [DataLoader(Augmented(), batch_size=16), Reshuffled()])
@pytest.mark.parametrize("budget", [1, 2**30])
def test_data_that_are_others_in_each_pass_are_refused(data, budget):
    options: dict[str, Any] = {"solver": li.CG(damping=0.1, rtol=1e-10)}
    with pytest.raises(RuntimeError, match="same examples each time it is read"):
        InfluenceFunction(network(), cross_entropy, data, memory_budget=budget, **options)
    kept = InfluenceFunction(network(), cross_entropy, list(data), **options)
    torch.testing.assert_close(kept.scores(QUERY), kept.scores(QUERY), rtol=1e-8, atol=1e-8)


def test_data_that_can_be_read_once_are_refused():
    class Once:
        def __init__(self) -> None:
            self.batches = [(X, Y)]

        def __iter__(self) -> Any:
            while self.batches:
                yield self.batches.pop()

    with pytest.raises(RuntimeError, match=r"is gone when it was read again.*list\(train\)"):
        influence(network(), data=Once())


def test_a_file_is_not_written_after_a_change(tmp_path):
    model = network()
    live = influence(model)
    scale_frozen(model)
    for write in (lambda: live.save(tmp_path / "influence.npz"), lambda: copy.deepcopy(live)):
        with pytest.raises(RuntimeError, match="changed in place after"):
            write()


def test_a_file_belongs_to_one_split_of_the_loss_into_outputs_and_their_loss(tmp_path):
    class Softmax(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x).softmax(1)

    def log(output: Tensor, target: Tensor) -> Tensor:
        return F.nll_loss(output.log(), target, reduction="none")

    model, path = network(), tmp_path / "influence.npz"
    influence(model).save(path)
    with pytest.raises(ValueError, match="was saved with other curvature than"):
        InfluenceFunction.load(path, Softmax(model), log, (X, Y))


def test_losses_of_a_model_that_fits_all_examples_are_not_taken_for_others():
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    with torch.no_grad():
        model.weight.mul_(0)
        model.bias.copy_(torch.tensor([17.0, 0.0, 0.0]))
    x, y = X.float(), torch.zeros(40, dtype=torch.int64)
    live = InfluenceFunction(model, cross_entropy, (x, y), solver=SOLVER, batch_size=7)
    assert live.info.loss < 1e-6
    live.scores((x[:3], y[:3]))


def test_data_that_change_later_are_noticed():
    class Drifting:
        passes = 0

        def __iter__(self) -> Any:
            self.passes += 1
            yield X[:20], Y[:20]
            yield X[20:] + (self.passes > 6), Y[20:]

    live = InfluenceFunction(
        network(), cross_entropy, Drifting(), memory_budget=1, solver=li.CG(damping=0.1)
    )
    changed = "differ each time they are read|returned the loss"
    with pytest.raises(RuntimeError, match=changed):
        for _ in range(3):
            live.scores(QUERY)
