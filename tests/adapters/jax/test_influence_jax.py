"""Influence functions of functions of pytrees: against dense derivatives, and against torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import lowrank_inverse as li
from lowrank_inverse_jax import InfluenceFunction
from tests.conftest import x64

NUM_TRAIN, NUM_QUERY, NUM_HIDDEN, NUM_CLASSES = 14, 5, 5, 3
DAMPING = 0.6  # above the negative curvature of the Hessian
TOLERANCE = {"float64": 1e-9, "float32": 2e-4}
EXACT = {"float64": 1e-12, "float32": 1e-6}
CURVATURES = ("ggn", "hessian", "empirical_fisher")

SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in CURVATURES[1:]]  # to compile

each_curvature = pytest.mark.parametrize("curvature", ["ggn", *SLOW])


@pytest.fixture(params=["float64", pytest.param("float32", marks=pytest.mark.slow)])
def dtype(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run in both, with 64-bit types on for float64 alone."""
    with x64(request.param == "float64"):
        yield request.param


def outputs(params: Any, batch: Any) -> jax.Array:
    weight, bias = params["out"]
    hidden = jnp.tanh(batch["x"] @ params["hidden"]["weight"] + params["hidden"]["bias"])
    return hidden @ weight + bias


def loss_of_outputs(outputs: jax.Array, batch: Any) -> jax.Array:
    logits = jax.nn.log_softmax(outputs)
    return -jnp.take_along_axis(logits, batch["y"][:, None], axis=1)[:, 0]


def loss(params: Any, batch: Any) -> jax.Array:
    return loss_of_outputs(outputs(params, batch), batch)


class Problem:
    """Parameters, examples and dense answers in NumPy's float64."""

    def __init__(self, dtype: str = "float64") -> None:
        rng = np.random.default_rng(0)

        def draw(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape).astype(np.float32).astype(dtype)

        self.dtype = dtype
        self.params = {
            "hidden": {"weight": draw(4, NUM_HIDDEN), "bias": draw(NUM_HIDDEN)},
            "out": (draw(NUM_HIDDEN, NUM_CLASSES), draw(NUM_CLASSES)),
            "activation": "tanh",
        }
        x, y = draw(NUM_TRAIN + NUM_QUERY, 4), np.arange(NUM_TRAIN + NUM_QUERY) * 7 % NUM_CLASSES
        y = y.astype(np.int32)
        self.train = {"x": x[:NUM_TRAIN], "y": y[:NUM_TRAIN]}
        self.query = {"x": x[NUM_TRAIN:], "y": y[NUM_TRAIN:]}

    def influence(self, **options: Any) -> InfluenceFunction:
        solver = li.NystromCG(rank=10, rtol=EXACT[self.dtype], damping=DAMPING)
        arguments = {"outputs": outputs, "solver": solver, "rng": 0, "train": self.train}
        arguments |= options
        train = as_jax(arguments.pop("train"))
        return InfluenceFunction(loss_of_outputs, as_jax(self.params), train, **arguments)

    def dense(self, curvature: str, weights: Any = None) -> tuple[np.ndarray, ...]:
        with x64(True):
            kept = {k: v for k, v in self.params.items() if k != "activation"}
            kept = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), kept)
            train, query = wide(self.train), wide(self.query)
            flat, unravel = ravel_pytree(kept)
            w = jnp.ones(NUM_TRAIN) if weights is None else jnp.asarray(weights)
            by_train = jax.jacrev(lambda v: loss(unravel(v), train))(flat)
            by_query = jax.jacrev(lambda v: loss(unravel(v), query))(flat)
            if curvature == "hessian":
                H = jax.jacrev(jax.jacrev(lambda v: jnp.sum(w * loss(unravel(v), train))))(flat)
            elif curvature == "empirical_fisher":
                H = by_train.T @ (w[:, None] * by_train)
            else:
                J = jax.jacrev(lambda v: outputs(unravel(v), train))(flat)
                p = jax.nn.softmax(outputs(kept, train))
                middle = jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None, :]
                H = jnp.einsum("i,icn,icd,idm->nm", w, J, middle, J)
            return tuple(np.asarray(a) for a in (H / NUM_TRAIN, by_train, by_query))

    def expected(self, curvature: str, shift: float = DAMPING) -> np.ndarray:
        H, by_train, by_query = self.dense(curvature)
        return by_query @ np.linalg.solve(H + shift * np.eye(len(H)), by_train.T)


def as_jax(tree: Any) -> Any:
    return jax.tree.map(lambda a: jnp.asarray(a) if isinstance(a, np.ndarray) else a, tree)


def wide(tree: Any) -> Any:
    return jax.tree.map(
        lambda a: jnp.asarray(a, jnp.float64) if a.dtype.kind == "f" else jnp.asarray(a), tree
    )


def assert_close(actual: Any, expected: np.ndarray, dtype: str) -> None:
    assert isinstance(actual, jax.Array)
    assert actual.shape == expected.shape
    assert actual.dtype == dtype
    scale = np.abs(expected).max()
    assert np.abs(np.asarray(actual, np.float64) - expected).max() <= TOLERANCE[dtype] * scale


@each_curvature
def test_scores_equal_the_dense_answer(curvature, dtype):
    problem = Problem(dtype)
    influence = problem.influence(curvature=curvature)
    for method in ("jvp", "gradients"):
        scores = influence.scores(as_jax(problem.query), method=method)
        assert_close(scores, problem.expected(curvature), dtype)
    assert influence.info.relative_residual.shape == (NUM_QUERY,)
    assert influence.info.message == "5 converged"


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 5, 13, 14])
def test_batch_size_and_order_make_no_difference(size, dtype):
    problem = Problem(dtype)
    expected = problem.expected("ggn")
    batches = [
        {name: a[i : i + size] for name, a in problem.train.items()}
        for i in range(0, NUM_TRAIN, size)
    ]
    for options in (
        {"batch_size": size},
        {"train": batches},
        {"train": batches, "memory_budget": 1},
    ):
        influence = problem.influence(**options)
        assert_close(influence.scores(as_jax(problem.query)), expected, dtype)
    order = np.random.default_rng(1).permutation(NUM_TRAIN)
    turned = {name: a[order] for name, a in problem.train.items()}
    scores = problem.influence(train=turned, batch_size=size).scores(as_jax(problem.query))
    assert_close(scores, expected[:, order], dtype)


@each_curvature
def test_without_outputs_the_loss_takes_the_parameters(curvature, wide):
    problem = Problem()
    params, train = as_jax(problem.params), as_jax(problem.train)
    options = {"solver": li.NystromCG(rank=10, rtol=1e-12, damping=DAMPING), "rng": 0}
    if curvature == "ggn":
        with pytest.raises(ValueError, match="needs `outputs`, a function"):
            InfluenceFunction(loss, params, train, **options)
        return
    influence = InfluenceFunction(loss, params, train, curvature=curvature, **options)
    scores = influence.scores(as_jax(problem.query))
    assert_close(scores, problem.expected(curvature), "float64")


@pytest.mark.slow
@each_curvature
def test_self_influence_and_removal_equal_the_dense_answer(curvature, dtype):
    problem = Problem(dtype)
    influence = problem.influence(curvature=curvature, batch_size=5)
    H, by_train, by_query = problem.dense(curvature)
    inverse = np.linalg.inv(H + DAMPING * np.eye(len(H)))
    values = influence.self_influence()
    assert_close(values, np.einsum("in,nm,im->i", by_train, inverse, by_train), dtype)
    query = as_jax(problem.query)
    removed = by_train[[3, 8]].sum(axis=0) / NUM_TRAIN
    assert_close(influence.removal_effect(query, [8, 3]), by_query @ inverse @ removed, dtype)
    weights = np.ones(NUM_TRAIN)
    weights[[3, 8]] = 0
    smaller = problem.dense(curvature, weights)[0] + DAMPING * np.eye(len(H))
    effect = influence.removal_effect(query, [8, 3], leverage=True)
    assert_close(effect, by_query @ np.linalg.solve(smaller, removed), dtype)


def test_top_k_another_damping_and_the_inverse_product(wide):
    problem = Problem()
    influence = problem.influence(batch_size=4)
    query = as_jax(problem.query)
    expected = problem.expected("ggn")
    best = influence.top_k(query, 4, "harmful")
    assert np.array_equal(best.indices, np.argsort(expected, axis=1)[:, :4])
    assert_close(best.scores, np.sort(expected, axis=1)[:, :4], "float64")
    stronger = influence.with_damping(2.0)
    assert_close(stronger.scores(query), problem.expected("ggn", 2.0), "float64")
    H = problem.dense("ggn")[0]
    G = np.random.default_rng(0).standard_normal((len(H), 2))
    product = influence.inverse_product(jnp.asarray(G))
    assert_close(product, np.linalg.solve(H + DAMPING * np.eye(len(H)), G), "float64")


def test_what_was_saved_is_loaded_and_a_checkpoint_is_read(wide, tmp_path):
    problem = Problem()
    query = as_jax(problem.query)
    influence = problem.influence()
    scores = influence.scores(query, checkpoint=tmp_path / "partial")
    influence.save(tmp_path / "influence.npz")
    params, train = as_jax(problem.params), as_jax(problem.train)
    loaded = InfluenceFunction.load(
        tmp_path / "influence.npz", loss_of_outputs, params, train, outputs=outputs
    )
    assert np.array_equal(loaded.scores(query), scores)
    assert loaded.info.num_products == influence.info.num_products - 10
    again = problem.influence()
    assert np.array_equal(again.scores(query, checkpoint=tmp_path / "partial"), scores)
    assert again.info.num_products == 0
    other = {**params, "out": (params["out"][0] + 1, params["out"][1])}
    with pytest.raises(ValueError, match="was saved with other parameters"):
        InfluenceFunction.load(
            tmp_path / "influence.npz", loss_of_outputs, other, train, outputs=outputs
        )


@pytest.mark.slow
def test_an_indefinite_hessian_is_named_with_a_damping_that_does(wide):
    problem = Problem()
    lowest = np.linalg.eigvalsh(problem.dense("hessian")[0])[0]
    assert lowest < -1e-3
    influence = problem.influence(curvature="hessian", damping=0.0)
    with pytest.raises(ValueError, match=r"the Hessian .* lowest Ritz value is") as error:
        influence.scores(as_jax(problem.query))
    message = str(error.value)
    value = float(message.split("lowest Ritz value is ")[1].split(". ")[0])
    assert value == pytest.approx(lowest, rel=0.05)
    enough = float(message.split("A damping of ")[1].split(" would")[0])
    influence.with_damping(enough).scores(as_jax(problem.query))


def test_bad_input_is_named(wide):
    problem = Problem()
    params, train = as_jax(problem.params), as_jax(problem.train)

    def bad(match: str, function: Any = loss, data: Any = train, **options: Any) -> None:
        with pytest.raises((TypeError, ValueError), match=match):
            InfluenceFunction(function, params, data, curvature="hessian", **options)

    bad(r"one number per example, shape \(14,\); got shape \(\)", lambda p, b: loss(p, b).mean())
    bad("must depend on each example alone", lambda p, b: loss(p, b) - b["x"].mean())
    bad("`loss` must be a function", 3)
    bad("`outputs` must be a function", outputs=3)
    bad("example 7 of `train`", data={**train, "x": train["x"].at[7, 0].set(jnp.nan)})
    bad("example 3 of `train`", data={**train, "y": train["y"].at[3].set(NUM_CLASSES)})
    bad("at least one example", data=[])
    bad("at least one example", data={name: a[:0] for name, a in train.items()})
    bad("can be iterated only once", data=iter([train]))
    bad("must be a pytree of arrays", data="digits")
    bad("one row for each example", data={**train, "y": train["y"][:3]})


@each_curvature
def test_torch_and_jax_agree_to_1e_10(curvature, wide):
    torch = pytest.importorskip("torch")
    from lowrank_inverse_torch import InfluenceFunction as TorchInfluence

    problem = Problem()
    params = problem.params
    model = torch.nn.Sequential(
        torch.nn.Linear(4, NUM_HIDDEN), torch.nn.Tanh(), torch.nn.Linear(NUM_HIDDEN, NUM_CLASSES)
    ).double()
    values = [params["hidden"]["weight"].T, params["hidden"]["bias"]]
    values += [params["out"][0].T, params["out"][1]]
    for parameter, value in zip(model.parameters(), values, strict=True):
        parameter.data = torch.tensor(np.ascontiguousarray(value))

    def torch_loss(output: Any, target: Any) -> Any:
        return torch.nn.functional.cross_entropy(output, target, reduction="none")

    def as_torch(part: Any) -> Any:
        return torch.tensor(part["x"]), torch.tensor(part["y"]).long()

    query = as_jax(problem.query)
    for solver in (li.NystromCG(rank=20, rtol=1e-14), li.Exact()):
        ours = problem.influence(curvature=curvature, solver=solver, damping=DAMPING)
        theirs = TorchInfluence(
            model,
            torch_loss,
            as_torch(problem.train),
            curvature=curvature,
            solver=solver,
            damping=DAMPING,
            rng=0,
        )
        pairs = [
            (ours.scores(query), theirs.scores(as_torch(problem.query))),
            (ours.self_influence(), theirs.self_influence()),
            (
                ours.removal_effect(query, [1, 2], leverage=True),
                theirs.removal_effect(as_torch(problem.query), [1, 2], leverage=True),
            ),
        ]
        for a, b in pairs:
            difference = np.abs(np.asarray(a) - b.numpy()).max()
            assert difference <= 1e-10 * np.abs(b.numpy()).max()
