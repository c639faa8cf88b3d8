"""What is asked of an influence function: other functions, sums, files, ridges, plans."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F
from torch import Tensor, nn

import lowrank_inverse as li
from lowrank_inverse.influence.plan import UnitCosts
from lowrank_inverse.influence.queries.ensemble import Ensemble
from lowrank_inverse_torch import InfluenceFunction

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(30, 4, generator=GENERATOR).double()
Y = torch.randint(0, 3, (30,), generator=GENERATOR)
QUERY = X[:5] + 1, Y[:5]
RIDGES = {"weight": 0.2, "bias": 0.0}


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none")


def margin(output: Tensor, target: Tensor) -> Tensor:
    """Return how far the right output is above the mean of the others."""
    right = output.gather(1, target[:, None])[:, 0]
    return right - (output.sum(1) - right) / 2


def linear() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(4, 3).double()


def derivatives(query_loss: Any = cross_entropy) -> tuple[Tensor, Tensor, Tensor]:
    """Return the Hessian, which for a linear model is Gauss-Newton, and the gradients as rows."""
    flat = torch.cat([p.detach().reshape(-1) for p in linear().parameters()])

    def losses(flat: Tensor, loss: Any, x: Tensor, y: Tensor) -> Tensor:
        return loss(x @ flat[:12].reshape(3, 4).T + flat[12:], y)

    H = torch.func.hessian(lambda v: losses(v, cross_entropy, X, Y).mean())(flat)
    by_train = torch.func.jacrev(lambda v: losses(v, cross_entropy, X, Y))(flat)
    by_query = torch.func.jacrev(lambda v: losses(v, query_loss, *QUERY))(flat)
    return H, by_train, by_query


def dense(shift: Any, query_loss: Any = cross_entropy) -> Tensor:
    """Return the scores from the dense Hessian."""
    H, by_train, by_query = derivatives(query_loss)
    shift = torch.as_tensor(shift, dtype=torch.float64).expand(15)
    return by_query @ torch.linalg.solve(H + torch.diag(shift), by_train.T)


def influence(**options: Any) -> InfluenceFunction:
    arguments: dict[str, Any] = {"solver": li.NystromCG(rank=8, damping=0.1, rtol=1e-12)}
    return InfluenceFunction(linear(), cross_entropy, (X, Y), **{**arguments, **options})


def assert_close(actual: Any, wanted: Tensor, rtol: float = 1e-9) -> None:
    actual = torch.as_tensor(actual)
    assert actual.shape == wanted.shape
    assert (actual - wanted).abs().max() <= rtol * wanted.abs().max()


def test_the_function_of_the_queries_may_be_another_than_the_loss():
    wanted, ours = dense(0.1, margin), influence()
    for method in ("jvp", "gradients"):
        assert_close(ours.scores(QUERY, query_loss=margin, method=method), wanted)
    assert_close(ours.scores(QUERY), dense(0.1))
    best = ours.top_k(QUERY, 3, query_loss=margin)
    assert np.array_equal(best.indices, wanted.argsort(dim=1, descending=True)[:, :3])
    effect = ours.removal_effect(QUERY, [3, 9], query_loss=margin)
    assert_close(effect, wanted[:, [3, 9]].sum(1) / 30)
    with pytest.raises(ValueError, match="one number per example"):
        ours.scores(QUERY, query_loss=lambda z, t: z.sum())


@pytest.mark.parametrize("query_loss", [None, margin])
def test_the_sum_over_a_query_set_takes_one_solve(query_loss, tmp_path):
    wanted = dense(0.1, query_loss or cross_entropy).sum(0, keepdim=True)
    ours = influence(batch_size=2)
    options: dict[str, Any] = {"query_loss": query_loss, "reduction": "sum"}
    assert_close(ours.scores(QUERY, checkpoint=tmp_path, **options), wanted)
    assert ours.info.relative_residual.shape == (1,)
    assert_close(ours.scores(QUERY, checkpoint=tmp_path, **options), wanted)
    best = ours.top_k(QUERY, 4, "harmful", **options)
    assert np.array_equal(best.indices, wanted.argsort(dim=1)[:, :4])
    assert ours.plan(QUERY, **options).num_solves == 1
    with pytest.raises(ValueError, match="another computation: kind"):
        ours.scores(QUERY, checkpoint=tmp_path, query_loss=query_loss)
    with pytest.raises(ValueError, match="`reduction` must be one of 'none', 'sum'; got 'mean'"):
        ours.scores(QUERY, reduction="mean")


def test_weighted_sums_of_queries_take_one_solve_each(tmp_path):
    W = np.random.default_rng(0).standard_normal((3, 5))
    wanted = torch.as_tensor(W) @ dense(0.1)
    for ours in (influence(batch_size=2), influence(memory_budget=1)):  # one sum at a time
        assert_close(ours.scores(QUERY, weights=W), wanted)
    before = ours.info.num_products
    assert_close(
        ours.scores(QUERY, weights=torch.as_tensor(W[0]), out=tmp_path / "w.npy"), wanted[:1]
    )
    assert ours.info.relative_residual.shape == (1,) and ours.info.num_products > before
    best = ours.top_k(QUERY, 4, weights=W).indices
    assert np.array_equal(best, wanted.argsort(dim=1, descending=True)[:, :4])
    assert ours.plan(QUERY, weights=W).num_solves == 3
    with pytest.raises(ValueError, match=r"shape \(5,\) or \(k, 5\), .*; got shape \(4,\)"):
        ours.scores(QUERY, weights=np.ones(4))
    with pytest.raises(ValueError, match="`weights` must be finite"):
        ours.scores(QUERY, weights=np.full(5, np.nan))
    with pytest.raises(ValueError, match="got both"):
        ours.scores(QUERY, weights=np.ones(5), reduction="sum")


def test_scores_are_normalised_by_what_the_dense_inverse_says(tmp_path):
    H, of_train, of_query = derivatives()
    inverse = torch.linalg.inv(H + 0.1 * torch.eye(15).double())
    scores, own = of_query @ inverse @ of_train.T, (of_train @ inverse * of_train).sum(1)
    of_queries = (of_query @ inverse * of_query).sum(1)
    wanted = {
        "none": scores,
        "theta-relatif": scores / (of_train @ inverse).norm(dim=1),
        "l-relatif": scores / own.sqrt(),
        "cosine": scores / torch.outer(of_queries, own).sqrt(),
    }
    solver = li.Exact(damping=0.1)
    for ours in (
        influence(solver=solver),
        influence(solver=solver, memory_budget=2**13, batch_size=7),  # several groups
    ):
        for normalize, expected in wanted.items():
            assert_close(ours.scores(QUERY, normalize=normalize), expected)
    assert_close(ours.scores(QUERY, normalize="cosine", method="gradients"), wanted["cosine"])
    best = ours.top_k(QUERY, 3, normalize="l-relatif")
    assert np.array_equal(best.indices, wanted["l-relatif"].argsort(dim=1, descending=True)[:, :3])
    few = ours.scores(QUERY, (X[4:9], Y[4:9]), normalize="cosine", checkpoint=tmp_path)
    assert_close(few, wanted["cosine"][:, 4:9])
    again = ours.scores(QUERY, (X[4:9], Y[4:9]), normalize="cosine", checkpoint=tmp_path)
    assert torch.equal(few, again)
    assert ours.plan(QUERY, normalize="cosine").num_solves == 35
    with pytest.raises(ValueError, match="`normalize` must be one of 'none', 'theta-relatif'"):
        ours.scores(QUERY, normalize="length")


def test_an_example_without_gradient_has_a_normalised_score_of_zero():
    def loss(output: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(output, target) * (target != 1)

    for normalize in ("theta-relatif", "l-relatif", "cosine"):
        solver = li.CG(damping=0.1, rtol=1e-12)
        ours = InfluenceFunction(linear(), loss, (X, Y), solver=solver)
        scores = ours.scores(QUERY, normalize=normalize)
        assert torch.all(scores[:, Y == 1] == 0) and torch.isfinite(scores).all()


def test_groups_of_training_examples_have_the_sum_of_their_scores():
    groups, wanted = torch.arange(30) % 4, dense(0.1)
    expected = torch.stack([wanted[:, groups == i].sum(1) for i in range(4)], dim=1)
    for ours in (influence(), influence(memory_budget=2**13, batch_size=7)):
        assert_close(ours.group_scores(QUERY, groups), expected)
    some = ours.group_scores(QUERY, [0, 1, 0], (X[:3], Y[:3]), reduction="sum")
    assert_close(some, torch.stack([wanted[:, [0, 2]].sum(), wanted[:, 1].sum()])[None])
    with pytest.raises(ValueError, match=r"shape \(30,\); got shape \(3,\) and dtype int64"):
        ours.group_scores(QUERY, [0, 1, 2])
    with pytest.raises(ValueError, match="numbered from 0; got -1"):
        ours.group_scores(QUERY, groups - 1)


def test_an_ensemble_has_the_mean_of_the_scores_of_its_models():
    other = nn.Linear(4, 3).double()
    second = InfluenceFunction(other, cross_entropy, (X, Y), solver=li.Exact(damping=0.1))
    ensemble = Ensemble([influence(), second])
    wanted = (dense(0.1) + second.scores(QUERY)) / 2
    assert_close(ensemble.scores(QUERY), wanted)
    best = ensemble.top_k(QUERY, 4, "harmful")
    assert np.array_equal(best.indices, wanted.argsort(dim=1)[:, :4])
    few = InfluenceFunction(other, cross_entropy, (X[:9], Y[:9]), solver=li.Exact(damping=0.1))
    with pytest.raises(ValueError, match=r"the same training set; got sets of \[9, 30\] examples"):
        Ensemble([second, few])
    with pytest.raises(ValueError, match="at least one influence function"):
        Ensemble([])
    with pytest.raises(TypeError, match="must be influence functions; got"):
        Ensemble([other])


def test_the_faster_way_to_the_scores_is_timed_where_there_are_many_batches(monkeypatch, tmp_path):
    for graph, jvp in ((0.0, True), (1e9, False)):
        ours = influence(batch_size=3)
        costs = UnitCosts(graph=graph, slope=0.0, gradient=1.0)
        monkeypatch.setattr(ours, "_unit_costs", costs)
        assert ours.plan(QUERY).method == ("jvp" if jvp else "gradients")
        taken: list[int] = []
        gradients = ours._backend.gradients

        def counted(batch: Any, of: Any = gradients, taken: list[int] = taken) -> Tensor:
            taken.append(len(batch[0]))
            return of(batch)

        monkeypatch.setattr(ours._backend, "gradients", counted)
        assert_close(ours.scores(QUERY, checkpoint=tmp_path / str(jvp)), dense(0.1))
        assert sum(taken) == (5 if jvp else 35)  # of the queries, and of the training examples
        monkeypatch.setattr(ours, "_unit_costs", costs._replace(graph=1e9 - graph))
        assert_close(ours.scores(QUERY, checkpoint=tmp_path / str(jvp)), dense(0.1))
    timed = influence(batch_size=3)
    assert_close(timed.scores(QUERY), dense(0.1))
    assert min(timed._unit_costs) >= 0 and timed._unit_costs.gradient > 0


def test_a_plan_has_the_seconds_and_bytes_of_a_product():
    wide = nn.Linear(4, 5000).double()
    ours = InfluenceFunction(wide, cross_entropy, (X, Y), solver=li.CG(damping=0.1))
    plan = ours.plan(QUERY)
    assert plan.seconds["product"] > 0 and plan.why == "as it was given"
    outputs, vector = 30 * 5000 * 8, 25_000 * 8
    assert outputs + vector <= plan.num_bytes["batch"] <= 20 * outputs + 5 * vector
    assert ours.info.num_products == 0


def test_scores_go_to_a_memory_mapped_file(tmp_path):
    ours = influence(batch_size=7, memory_budget=2**13)
    assert ours._width() < len(QUERY[1])  # several groups of queries
    for method in ("jvp", "gradients"):
        path = tmp_path / f"{method}.npy"
        found = ours.scores(QUERY, out=path, method=method)
        assert isinstance(found, np.memmap)
        assert_close(np.load(path), dense(0.1))
    array = np.zeros((5, 30))
    assert ours.scores(QUERY, out=array) is array
    assert_close(array, dense(0.1))
    with pytest.raises(ValueError, match=r"of shape \(5, 30\) and dtype float64"):
        ours.scores(QUERY, out=np.zeros((5, 3)))


@pytest.mark.parametrize(
    "solver",
    [
        li.NystromCG(rank=8, damping=0.1, rtol=1e-12),
        li.CG(damping=0.1, rtol=1e-12),
        li.Exact(damping=0.1),
        li.Nystrom(rank=15, damping=0.1),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_each_parameter_may_have_a_ridge_of_its_own(solver, tmp_path):
    shift = torch.tensor([0.3] * 12 + [0.1] * 3, dtype=torch.float64)
    vector = shift - 0.1
    scaled = {"weight": 0.2 * torch.ones(3, 4).double(), "bias": 0}
    for ridge in (RIDGES, scaled, vector, vector.numpy()):
        ours = influence(solver=solver, ridge=ridge)
        assert_close(ours.scores(QUERY), dense(shift))
    ours = influence(solver=solver, ridge=RIDGES)
    gradient = ours._operator.gradient + vector * ours._backend.vector()
    assert ours.info.gradient_norm == pytest.approx(gradient.norm().item(), rel=1e-6)
    ours.save(tmp_path / "influence.npz")
    again = InfluenceFunction.load(tmp_path / "influence.npz", linear(), cross_entropy, (X, Y))
    assert torch.equal(again.scores(QUERY), ours.scores(QUERY))


def test_ridges_are_checked_and_the_default_damping_fills_what_they_leave():
    assert influence(solver=None, ridge=RIDGES).info.damping > 0
    assert influence(solver=None, ridge={"weight": 0.2, "bias": 0.1}).info.damping == 0
    with pytest.raises(ValueError, match=r"one entry for each parameter, \['weight', 'bias'\]"):
        influence(ridge={"weight": 0.1})
    with pytest.raises(ValueError, match=r"an array of shape \(15,\), or a dict by name"):
        influence(ridge=torch.ones(3))
    with pytest.raises(ValueError, match="`ridge` must be >= 0 everywhere"):
        influence(ridge={"weight": -0.1, "bias": 0.0})
    with pytest.raises(ValueError, match="not positive definite") as error:
        _indefinite()
    enough = float(str(error.value).split("A damping of ")[1].split(" would")[0])
    _indefinite(enough)


def _indefinite(damping: float = 0.0) -> Tensor:
    """Return scores for a concave term of the loss, with a ridge on one parameter alone."""

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(output, target) - 0.3 * (output**2).sum(1)

    ridge = {"weight": 0.05, "bias": 0.0}
    return InfluenceFunction(
        linear(), loss, (X, Y), ridge=ridge, solver=li.CG(), damping=damping
    ).scores(QUERY)


def test_the_default_is_dense_for_many_right_hand_sides_of_a_small_model(capsys):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 15), nn.Tanh(), nn.Linear(15, 3)).double()
    few = InfluenceFunction(model, cross_entropy, (X, Y), ridge=0.05)
    n = few.info.num_params
    few.top_k((X[:1], Y[:1]), 1)
    assert few.info.solver == "CG()"
    many = InfluenceFunction(model, cross_entropy, (X, Y), ridge=0.05, progress=True)
    plan = many.plan()
    assert plan.solver == "Exact()" and plan.num_products == n
    assert many.info.num_products == 0
    values = many.self_influence()
    assert many.info.solver == "Exact()"
    assert many.info.num_products == n
    assert str(plan) in capsys.readouterr().err
    precise = InfluenceFunction(model, cross_entropy, (X, Y), ridge=0.05, solver=li.CG(rtol=1e-12))
    assert_close(values, precise.self_influence())
    stronger = many.with_damping(0.3).self_influence()
    assert_close(stronger, precise.with_damping(0.3).self_influence())
    assert many.info.num_products == n  # on the same columns
