"""Models and data of jax as they come, and what changed since."""

from __future__ import annotations

import copy
import pickle
from collections import UserDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")
import jax.numpy as jnp

import lowrank_inverse as li
from lowrank_inverse_jax import InfluenceFunction
from tests.conftest import x64

NUM = 24
DAMPING = 0.1
SOLVER = li.CG(damping=DAMPING, rtol=1e-10)


@pytest.fixture(autouse=True)
def wide() -> Iterator[None]:
    """Run with 64-bit types."""
    with x64(True):
        yield


def arrays() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((NUM, 4)), rng.integers(0, 3, NUM), rng.standard_normal((4, 3))


def losses_at(outputs: Any, batch: Any) -> Any:
    logits = jax.nn.log_softmax(outputs)
    return -jnp.take_along_axis(logits, batch["y"][:, None], 1)[:, 0]


def outputs_of(params: Any, batch: Any) -> Any:
    return batch["x"] @ params["w"]


def loss(params: Any, batch: Any) -> Any:
    return losses_at(outputs_of(params, batch), batch)


def influence(data: Any = None, function: Any = loss, params: Any = None, **options: Any) -> Any:
    x, y, w = arrays()
    arguments: dict[str, Any] = {"curvature": "hessian", "solver": SOLVER}
    data = {"x": x, "y": y} if data is None else data
    params = {"w": jnp.asarray(w)} if params is None else params
    return InfluenceFunction(function, params, data, **{**arguments, **options})


def query() -> dict[str, np.ndarray]:
    x, y, _ = arrays()
    return {"x": x[:5] + 1, "y": y[:5]}


def dense(shift: Any = DAMPING) -> np.ndarray:
    """Return the scores from the dense Hessian."""
    x, y, w = arrays()
    train = {"x": jnp.asarray(x), "y": jnp.asarray(y)}

    def flat(v: Any, batch: Any) -> Any:
        return loss({"w": v.reshape(4, 3)}, batch)

    v = jnp.asarray(w).reshape(-1)
    H = jax.hessian(lambda v: flat(v, train).mean())(v)
    by_train, by_query = (jax.jacrev(flat)(v, batch) for batch in (train, query()))
    A = np.asarray(H) + np.diag(np.broadcast_to(shift, 12))
    return np.asarray(by_query) @ np.linalg.solve(A, np.asarray(by_train).T)


def assert_close(actual: Any, wanted: np.ndarray, rtol: float = 1e-8) -> None:
    assert np.shape(actual) == wanted.shape
    assert np.abs(np.asarray(actual, np.float64) - wanted).max() <= rtol * np.abs(wanted).max()


# What changed


@pytest.mark.slow
def test_a_checkpoint_and_a_file_belong_to_one_loss(tmp_path):
    ours = influence()
    ours.scores(query(), checkpoint=tmp_path / "partial")
    ours.save(tmp_path / "influence.npz")
    x, y, w = arrays()

    def other(params: Any, batch: Any) -> Any:  # closes over another constant
        return loss({"w": 3.0 * params["w"]}, batch)

    with pytest.raises(ValueError, match=r"another computation: training losses, .*query losses"):
        influence(function=other).scores(query(), checkpoint=tmp_path / "partial")
    with pytest.raises(ValueError, match="was saved with other training losses"):
        InfluenceFunction.load(
            tmp_path / "influence.npz", other, {"w": jnp.asarray(w)}, {"x": x, "y": y}
        )


@pytest.mark.slow
def test_leaves_that_are_not_differentiated_by_belong_to_a_checkpoint(tmp_path):
    _, _, w = arrays()

    def shifted(params: Any, batch: Any) -> Any:
        return loss({"w": params["w"]}, batch) + 0 * params["steps"]

    params = {"w": jnp.asarray(w), "steps": 3}
    influence(function=shifted, params=params).scores(query(), checkpoint=tmp_path)
    with pytest.raises(ValueError, match="another computation: parameters differ"):
        influence(function=shifted, params={**params, "steps": 4}).scores(
            query(), checkpoint=tmp_path
        )


@pytest.mark.slow
@pytest.mark.slow
def test_constants_and_data_changed_in_place_are_noticed():
    x, y, _ = arrays()
    scale = np.ones(3)
    live = influence(function=lambda p, b: losses_at(scale * outputs_of(p, b), b))
    live.scores(query())
    scale[1] = 4.0
    with pytest.raises(RuntimeError, match="constants of the loss were changed in place"):
        live.scores(query())
    live = influence({"x": x, "y": y})
    x[20] += 1
    with pytest.raises(RuntimeError, match="The loss of example 20 of `train` was"):
        live.scores(query())


def test_a_loss_that_is_random_is_refused():
    rng = np.random.default_rng(1)
    with pytest.raises(ValueError, match="is random in evaluation too"):
        influence(function=lambda p, b: loss(p, b) + rng.standard_normal())


# Data


@pytest.mark.slow
def test_a_loader_of_torch_is_read_in_order():
    torch = pytest.importorskip("torch")
    x, y, _ = arrays()

    def collate(rows: Any) -> Any:
        return {"x": np.stack([row[0] for row in rows]), "y": np.stack([row[1] for row in rows])}

    torch.manual_seed(0)
    pairs = list(zip(x, y, strict=True))
    dicts = [{"x": a, "y": b} for a, b in pairs]
    loader = torch.utils.data.DataLoader
    shuffled = loader(pairs, batch_size=7, collate_fn=collate, shuffle=True, drop_last=True)
    of_tensors = loader(dicts, batch_size=7, shuffle=True)
    for data, budget in ((shuffled, 1), (shuffled, 2**20), (of_tensors, 2**20)):
        assert_close(influence(data, memory_budget=budget).scores(query()), dense())
    bootstrap = torch.utils.data.RandomSampler(pairs, replacement=True)
    with pytest.raises(ValueError, match="draws its examples by a RandomSampler"):
        influence(loader(pairs, sampler=bootstrap, collate_fn=collate))


@pytest.mark.slow
def test_single_examples_and_mappings_are_data_too():
    x, y, _ = arrays()
    rows = [{"x": x[i], "y": y[i]} for i in range(NUM)]
    numbers = [{"x": jnp.asarray(x[i]), "y": int(y[i])} for i in range(NUM)]
    whole = UserDict(x=x, y=y)
    batches = [UserDict(x=x[i : i + 5], y=y[i : i + 5]) for i in range(0, NUM, 5)]
    for data in (numbers, [UserDict(row) for row in rows], whole, batches):
        ours = influence(data, batch_size=10)
        assert ours.info.num_train == NUM
        assert_close(ours.scores(UserDict(query())), dense())
    with pytest.raises(TypeError, match=r"must have batches of numbers, .* holds 'text'"):
        influence([{"x": x, "y": y, "name": "text"}])


# Precisions, functions of queries, sums, ridges, copies


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_in_low_precision_have_their_curvature_in_float32(dtype):
    x, y, w = arrays()
    low = jnp.asarray(w, dtype)
    data = {"x": jnp.asarray(x, dtype), "y": y}
    queries = {name: a[:3] for name, a in data.items()}
    solver = li.CG(damping=DAMPING)
    scores = influence(data, params={"w": low}, solver=solver).scores(queries)
    assert scores.dtype == jnp.float32
    wide = {"x": data["x"].astype(jnp.float32), "y": y}
    ours = influence(wide, params={"w": low.astype(jnp.float32)}, solver=solver)
    expected = ours.scores({name: a[:3] for name, a in wide.items()})
    assert_close(scores, np.asarray(expected), 1e-4)


def margin(params: Any, batch: Any) -> Any:
    return jnp.take_along_axis(outputs_of(params, batch), batch["y"][:, None], 1)[:, 0]


@pytest.mark.slow
@pytest.mark.slow
def test_other_functions_of_the_queries_and_their_sum(tmp_path):
    ours = influence()
    assert_close(ours.scores(query(), reduction="sum"), dense().sum(0, keepdims=True))
    wanted = influence(function=margin, solver=li.Identity())._backend.gradients(
        {name: jnp.asarray(a) for name, a in query().items()}
    )
    directions = np.asarray(ours.inverse_product(wanted))
    gradients = np.asarray(ours._backend.gradients(ours._train.get(0)))
    for method in ("jvp", "gradients"):
        found = ours.scores(query(), query_loss=margin, method=method)
        assert_close(found, directions.T @ gradients)
    out = ours.scores(query(), out=tmp_path / "scores.npy")
    assert isinstance(out, np.memmap)
    assert_close(np.load(tmp_path / "scores.npy"), dense())


@pytest.mark.slow
def test_each_parameter_may_have_a_ridge_of_its_own(tmp_path):
    ridge = np.linspace(0.0, 0.5, 12)
    tree = {"w": ridge.reshape(4, 3)}
    for form, solver in ((ridge, li.NystromCG(damping=DAMPING)), (tree, li.Exact(damping=DAMPING))):
        ours = influence(ridge=form, solver=solver)
        assert_close(ours.scores(query()), dense(ridge + DAMPING), 1e-4)
    assert_close(influence(ridge={"w": 0.2}).scores(query()), dense(0.2 + DAMPING))
    with pytest.raises(ValueError, match="`ridge` must be >= 0 everywhere"):
        influence(ridge={"w": -ridge.reshape(4, 3)})


def test_a_finite_loss_without_a_finite_gradient_names_the_example():
    x, y, _ = arrays()
    x[17] = 0

    def root(params: Any, batch: Any) -> Any:
        return jnp.sqrt(jnp.linalg.norm(outputs_of(params, batch), axis=1))

    with pytest.raises(ValueError, match="example 17 of `train` is not, though the loss is"):
        influence({"x": x, "y": y}, root)


@pytest.mark.slow
def test_copies_and_pickles_have_the_columns_and_give_the_same_scores():
    ours = influence(solver=li.NystromCG(rank=6, damping=DAMPING), ridge={"w": 0.1}, batch_size=7)
    scores = ours.scores(query())
    for other in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert np.array_equal(other.scores(query()), scores)
        assert other.info.num_products == ours.info.num_products - 6
