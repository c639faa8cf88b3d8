"""Models and data as they come: structures, precisions, attention, single examples."""

from __future__ import annotations

import copy
import pickle
import sys
from collections import UserDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lowrank_inverse as li
from lowrank_inverse_torch import InfluenceFunction

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(24, 4, generator=GENERATOR).double()
Y = torch.randint(0, 3, (24,), generator=GENERATOR)
QUERY = X[:5] + 1, Y[:5]
DAMPING = 0.1
SOLVER = li.Exact(damping=DAMPING)


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none")


def linear() -> Any:
    torch.manual_seed(1)
    return nn.Linear(4, 3).double()


def expected(model: Any = None, loss: Any = cross_entropy, query: Any = QUERY) -> Tensor:
    """Return the dense answer for a linear model, from its Gauss-Newton matrix by jacobians."""
    model = linear() if model is None else model
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    def outputs(flat: Tensor, x: Tensor) -> Tensor:
        return x @ flat[:12].reshape(3, 4).T + flat[12:]

    J = torch.func.jacrev(outputs)(flat, X)
    p = outputs(flat, X).softmax(1)
    middle = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    H = torch.einsum("icn,icd,idm->nm", J, middle, J) / len(X)
    by_train = torch.func.jacrev(lambda v: cross_entropy(outputs(v, X), Y))(flat)
    by_query = torch.func.jacrev(lambda v: loss(outputs(v, query[0]), query[1]))(flat)
    return by_query @ torch.linalg.solve(H + DAMPING * torch.eye(15).double(), by_train.T)


def assert_close(actual: Tensor, wanted: Tensor, rtol: float = 1e-10) -> None:
    assert actual.shape == wanted.shape
    assert (actual - wanted).abs().max() <= rtol * wanted.abs().max()


# Outputs


class Named(NamedTuple):
    logits: Tensor
    inputs: Tensor


class Output(UserDict[str, Any]):
    """As the outputs of transformers: a mapping with attributes."""

    @property
    def logits(self) -> Tensor:
        return self["logits"]


class Wrapped(nn.Module):
    def __init__(self, wrap: Any) -> None:
        super().__init__()
        self.inner, self.wrap = linear(), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.inner(x), x)


@dataclass(frozen=True)
class Record:
    """As many models return it."""

    logits: Tensor
    loss: Any = None


OUTPUTS = {
    "dataclass": (lambda z, x: Record(z), lambda o: o.logits),
    "dict": (lambda z, x: {"inputs": x, "logits": z}, lambda o: o["logits"]),
    "tuple": (lambda z, x: (x, z), lambda o: o[1]),
    "nested": (lambda z, x: {"a": [x, (z[:, :1], z[:, 1:])]}, lambda o: torch.cat(o["a"][1], 1)),
    "named": (lambda z, x: Named(z, x), lambda o: o.logits),
    "mapping": (lambda z, x: Output(logits=z, hidden=[2 * z], note="text"), lambda o: o.logits),
}


@pytest.mark.parametrize(("wrap", "logits"), OUTPUTS.values(), ids=OUTPUTS)
def test_outputs_of_every_structure_give_the_same_gauss_newton_matrix(wrap, logits):
    influence = InfluenceFunction(
        Wrapped(wrap), lambda o, t: cross_entropy(logits(o), t), (X, Y), solver=SOLVER
    )
    for method in ("jvp", "gradients"):
        assert_close(influence.scores(QUERY, method=method), expected())


def test_outputs_that_depend_on_no_parameter_are_named():
    model = Wrapped(lambda z, x: {"logits": z.detach()})
    with pytest.raises(ValueError, match="outputs of `model` must depend on `params`"):
        InfluenceFunction(model, lambda o, t: cross_entropy(o["logits"], t), (X, Y), solver=SOLVER)


# Data


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = linear()

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_a_mapping_is_given_to_model_and_loss_as_it_is(kind):
    def loss(output: Tensor, batch: Any) -> Tensor:
        return cross_entropy(output, batch["labels"])

    data = [kind(x=X[i : i + 7], labels=Y[i : i + 7]) for i in range(0, 24, 7)]
    influence = InfluenceFunction(Keywords(), loss, data, solver=SOLVER)
    query = kind(labels=QUERY[1], x=QUERY[0])  # the order of the keys is no matter
    for method in ("jvp", "gradients"):
        assert_close(influence.scores(query, method=method), expected())
    with pytest.raises(
        TypeError, match=r"passed to the model as keyword arguments, .* pass `split`"
    ):
        InfluenceFunction(linear(), loss, data, solver=SOLVER)


def by_name(batch: Any) -> Any:
    return batch["x"], batch["y"]


def test_single_examples_and_arrays_of_numpy_are_data_too():
    rows = [(X[i], Y[i]) for i in range(24)]
    columns = [(X[i], Y[i : i + 1]) for i in range(24)]
    dicts = [{"x": X[i].tolist(), "y": int(Y[i])} for i in range(24)]
    arrays = X.numpy(), Y.numpy()
    turned = np.ascontiguousarray(X.numpy()[::-1])[::-1], Y.numpy()  # negative strides
    first = InfluenceFunction(
        linear(), lambda z, t: cross_entropy(z, t[:, 0]), columns, solver=SOLVER
    )
    assert_close(first.scores((QUERY[0], QUERY[1][:, None])), expected())
    for data in (rows, arrays, turned, [arrays], list(zip(*arrays, strict=True))):
        influence = InfluenceFunction(linear(), cross_entropy, data, solver=SOLVER, batch_size=10)
        assert influence.info.num_train == 24
        assert_close(influence.scores(QUERY), expected())
    for data in (dicts, [UserDict(row) for row in dicts], Rows(dicts)):
        influence = InfluenceFunction(
            linear().float(), cross_entropy, data, split=by_name, solver=SOLVER
        )
        scores = influence.scores([{"x": QUERY[0].float(), "y": QUERY[1]}])
        assert_close(scores, expected().float(), 1e-4)


class Rows:
    """A data set that is none of torch's."""

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Any:
        return self.rows[i]


def test_the_items_of_a_data_set_of_any_class_are_examples():
    def sums(output: Tensor, batch: Any) -> Tensor:
        return ((output - batch["y"]) ** 2).sum(1)

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.inner = nn.Linear(4, 4).double()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.inner(x)

    rows = Rows([{"x": X[i], "y": X[i] ** 2} for i in range(24)])  # a batch of numbers to look at
    whole = {"x": X, "y": X**2}
    found, wanted = (
        InfluenceFunction(Named(), sums, data, solver=SOLVER).scores({"x": X[:3], "y": X[:3]})
        for data in (rows, whole)
    )
    assert_close(found, wanted)


def test_examples_that_cannot_be_stacked_are_named():
    ragged = [{"x": [1.0] * (4 + i % 2), "y": 0} for i in range(6)]
    with pytest.raises(ValueError, match=r"cannot be stacked: .*collate_fn"):
        InfluenceFunction(linear().float(), cross_entropy, ragged, split=by_name, solver=SOLVER)


# Precisions


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_in_low_precision_have_their_curvature_in_float32(dtype):
    low = linear().to(dtype)
    train, query = (X.to(dtype), Y), (QUERY[0].to(dtype), Y[:5])
    wide = copy.deepcopy(low).float()
    for solver in (SOLVER, li.CG(damping=DAMPING, rtol=1e-6)):
        ours = InfluenceFunction(low, cross_entropy, train, solver=solver)
        theirs = InfluenceFunction(wide, cross_entropy, (train[0].float(), Y), solver=solver)
        scores = ours.scores(query)
        assert scores.dtype == torch.float32
        assert torch.equal(scores, theirs.scores((query[0].float(), Y[:5])))
    assert all(p.dtype == dtype and p.grad is None for p in low.parameters())
    with torch.no_grad():
        low.weight += 1
    with pytest.raises(RuntimeError, match="changed in place after"):
        ours.scores(query)


def test_a_part_of_a_model_in_low_precision_may_be_differentiated_by():
    model = nn.Sequential(linear(), nn.Tanh(), nn.Linear(3, 3)).to(torch.bfloat16)
    influence = InfluenceFunction(
        model, cross_entropy, (X.bfloat16(), Y), params=model[2].parameters(), solver=SOLVER
    )
    assert influence.info.num_params == 12
    assert torch.isfinite(influence.scores((QUERY[0].bfloat16(), Y[:5]))).all()


def test_a_frozen_body_in_low_precision_stays_in_it(tmp_path):
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.body = nn.Linear(4, 6).bfloat16().requires_grad_(False)
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.body(x).float())

    train, query = (X.bfloat16(), Y), (QUERY[0].bfloat16(), Y[:5])
    model = Adapted()
    influence = InfluenceFunction(model, cross_entropy, train, solver=SOLVER)
    scores = influence.scores(query, checkpoint=tmp_path)
    features = model.body(train[0]).float(), model.body(query[0]).float()
    head = InfluenceFunction(model.head, cross_entropy, (features[0], Y), solver=SOLVER)
    assert_close(scores, head.scores((features[1], Y[:5])), 1e-2)  # sums in bfloat16
    with torch.no_grad():
        model.body.weight.mul_(2)
    with pytest.raises(ValueError, match="another computation: parameters"):
        InfluenceFunction(model, cross_entropy, train, solver=SOLVER).scores(
            query, checkpoint=tmp_path
        )


# Attention


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.q, self.k, self.v = (nn.Linear(8, 8).double() for _ in range(3))
        self.head = nn.Linear(8, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (2, 4)).mT.mT for part in (self.q, self.k, self.v))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.head(mixed.transpose(1, 2).flatten(2).mean(1))


@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_fused_attention_is_differentiated_twice(curvature):
    x = torch.randn(12, 5, 8, generator=torch.Generator().manual_seed(3)).double()
    model = Attending()
    options: dict[str, Any] = {"curvature": curvature, "solver": li.Exact(damping=5.0)}
    found = InfluenceFunction(model, cross_entropy, (x, Y[:12]), **options)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        wanted = InfluenceFunction(model, cross_entropy, (x, Y[:12]), **options)
        expected = wanted.scores((x[:2], Y[:2]))
    assert_close(found.scores((x[:2], Y[:2])), expected)


@pytest.fixture
def transformers(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    return pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_models_and_collators_of_transformers_are_taken_as_they_are(transformers):
    config = transformers.BertConfig(
        vocab_size=12,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=16,
        num_labels=3,
    )
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length in torch.randint(3, 8, (9,), generator=generator).tolist():
        words = torch.randint(1, 12, (length,), generator=generator).tolist()
        rows.append({"input_ids": words, "labels": words[0] % 3})

    def collate(part: list[Any]) -> Any:
        longest = max(len(row["input_ids"]) for row in part)
        padded = [row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in part]
        ids = torch.tensor(padded)
        labels = torch.tensor([row["labels"] for row in part])
        return transformers.BatchEncoding(
            {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}
        )

    found = {}
    for attention in ("eager", "sdpa"):
        torch.manual_seed(0)
        model = transformers.BertForSequenceClassification._from_config(
            config, attn_implementation=attention
        )
        influence = InfluenceFunction(
            model,
            lambda output, batch: cross_entropy(output.logits, batch["labels"]),
            DataLoader(rows, batch_size=4, collate_fn=collate),
            solver=li.NystromCG(rank=20, damping=0.5, rtol=1e-6),
        )
        query = DataLoader(rows[:3], batch_size=3, collate_fn=collate)
        found[attention] = influence.scores(query)
        assert_close(influence.scores(query, method="gradients"), found[attention], 1e-3)
    assert_close(found["sdpa"], found["eager"], 1e-3)


# Gradients that are no numbers


def test_a_finite_loss_without_a_finite_gradient_names_the_example():
    def root(output: Tensor, target: Tensor) -> Tensor:
        return output.norm(dim=1).sqrt()

    solver = li.Exact(damping=5.0)
    model = nn.Linear(4, 3, bias=False).double()
    x = X.clone()
    x[17] = 0
    with pytest.raises(ValueError, match="example 17 of `train` is not, though the loss is"):
        InfluenceFunction(model, root, (x, Y), solver=solver)
    influence = InfluenceFunction(model, root, (X, Y), solver=solver)
    with pytest.raises(ValueError, match="example 17 of `query` is not"):
        influence.scores((x, Y))
    for reduction in ("none", "sum"):
        with pytest.raises(ValueError, match="example 2 of `query` is not"):
            influence.scores((x[15:], Y[15:]), reduction=reduction)
    with pytest.raises(ValueError, match="example 17 of `train` is not"):
        influence.scores(QUERY, (x, Y))


# Copies


def loss_of_module(output: Tensor, target: Tensor) -> Tensor:
    return cross_entropy(output, target)


@pytest.mark.parametrize("solver", [None, li.NystromCG(rank=9, damping=0.2), li.Exact(damping=0.2)])
def test_copies_and_pickles_have_the_columns_and_give_the_same_scores(solver, tmp_path):
    model = nn.Sequential(linear(), nn.Tanh(), nn.Linear(3, 3).double())
    influence = InfluenceFunction(
        model,
        cross_entropy,
        (X, Y),
        params=model[2].parameters(),
        solver=solver,
        ridge={"2.weight": 0.1, "2.bias": 0.0},
        batch_size=7,
    )
    scores = influence.scores(QUERY)
    columns = influence._factor.A.kept.shape[1]
    copies = [pickle.loads(pickle.dumps(influence)), copy.deepcopy(influence)]
    joblib = pytest.importorskip("joblib", reason="joblib is not installed")
    joblib.dump(influence, tmp_path / "influence.joblib")
    copies.append(joblib.load(tmp_path / "influence.joblib"))
    for other in copies:
        assert torch.equal(other.scores(QUERY), scores)
        assert other.info.num_products <= influence.info.num_products - columns
        assert other.info.damping == influence.info.damping
    stronger = pickle.loads(pickle.dumps(influence.with_damping(0.7)))
    assert torch.equal(stronger.scores(QUERY), influence.with_damping(0.7).scores(QUERY))
    with torch.no_grad():
        model[2].weight += 1  # a deep copy has a model of its own
    assert torch.equal(copies[1].scores(QUERY), scores)
