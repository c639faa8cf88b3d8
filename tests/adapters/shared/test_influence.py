"""Influence functions of both adapters against dense derivatives in NumPy."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from array_api_compat import array_namespace

import lowrank_inverse as li
from tests.adapters.shared.frameworks import each, flat, mapped, rebuilt, slow_in_jax
from tests.conftest import host
from tests.oracles import gradient, jacobian

NUM_TRAIN, NUM_QUERY, NUM_CLASSES = 14, 5, 3
DAMPING = 0.6
"""Above the negative curvature of the Hessian."""
TOLERANCE = {"float64": 1e-9, "float32": 2e-4}
EXACT = {"float64": 1e-12, "float32": 1e-6}
CURVATURES = {name: name for name in ("ggn", "hessian", "empirical_fisher")}

each_curvature = each("curvature", CURVATURES, quick=("ggn",))


def outputs(params: Any, x: Any) -> Any:
    xp = array_namespace(x)
    return xp.tanh(x @ params["first"] + params["bias"]) @ params["second"] + params["shift"]


def cross_entropy(z: Any, y: Any) -> Any:
    """Return the cross entropy of each example, the targets of one for the class and else zero."""
    xp = array_namespace(z)
    return xp.log(xp.sum(xp.exp(z), axis=1)) - xp.sum(y * z, axis=1)


@functools.cache
def numbers() -> Any:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32).astype(np.float64)

    params = {"bias": draw(5), "first": draw(4, 5), "second": draw(5, 3), "shift": draw(3)}
    x = draw(NUM_TRAIN + NUM_QUERY, 4)
    y = np.eye(NUM_CLASSES)[np.arange(len(x)) * 7 % NUM_CLASSES]
    return params, (x[:NUM_TRAIN], y[:NUM_TRAIN]), (x[NUM_TRAIN:], y[NUM_TRAIN:])


@functools.cache
def dense(curvature: str, removed: tuple[int, ...] = ()) -> tuple[np.ndarray, ...]:
    """Return the mean curvature, and the gradients of training and query examples as rows."""
    params, train, query = numbers()
    theta, w = flat(params), np.ones(NUM_TRAIN)
    w[list(removed)] = 0

    def losses(t: np.ndarray, part: Any) -> np.ndarray:
        return cross_entropy(outputs(rebuilt(t, params), part[0]), part[1])

    by_train = gradient(lambda t: losses(t, train), theta)
    by_query = gradient(lambda t: losses(t, query), theta)
    if curvature == "hessian":
        H = jacobian(lambda t: gradient(lambda s: np.sum(w * losses(s, train)), t), theta)
    elif curvature == "empirical_fisher":
        H = by_train.T @ (w[:, None] * by_train)
    else:
        J = gradient(lambda t: outputs(rebuilt(t, params), train[0]), theta)
        p = np.exp(outputs(params, train[0]))
        p /= p.sum(axis=1, keepdims=True)
        middle = p[:, :, None] * np.eye(NUM_CLASSES) - p[:, :, None] * p[:, None, :]
        H = np.einsum("i,icn,icd,idm->nm", w, J, middle, J)
    return H / NUM_TRAIN, by_train, by_query


def inverse(curvature: str, damping: float = DAMPING, removed: tuple[int, ...] = ()) -> np.ndarray:
    H = dense(curvature, removed)[0]
    return np.linalg.inv(H + damping * np.eye(len(H)))


def expected(curvature: str = "ggn", damping: float = DAMPING) -> np.ndarray:
    """Return the scores of all queries and training examples."""
    _, by_train, by_query = dense(curvature)
    return by_query @ inverse(curvature, damping) @ by_train.T


class Problem:
    """The network and the examples in the arrays of a framework."""

    def __init__(self, framework: Any, dtype: str = "float64") -> None:
        self.framework, self.dtype = framework, dtype
        arrays = mapped(lambda x: framework.array(x, dtype), numbers())
        self.params, self.train, self.query = arrays

    def influence(self, train: Any = None, loss: Any = cross_entropy, **options: Any) -> Any:
        solver = li.NystromCG(sampling="uniform", rank=10, rtol=EXACT[self.dtype], damping=DAMPING)
        options = {"solver": solver, "rng": 0, **options} if "load" not in options else options
        train = self.train if train is None else train
        return self.framework.influence(outputs, loss, self.params, train, **options)

    def batches(self, size: int) -> list[Any]:
        x, y = self.train
        return [(x[i : i + size], y[i : i + size]) for i in range(0, NUM_TRAIN, size)]


def assert_close(actual: Any, wanted: np.ndarray, dtype: str = "float64") -> None:
    assert tuple(actual.shape) == wanted.shape
    assert str(actual.dtype).removeprefix("torch.") == dtype
    scale = np.abs(wanted).max()
    assert scale > 0
    assert np.abs(np.asarray(host(actual), float) - wanted).max() <= TOLERANCE[dtype] * scale


# Scores.


KINDS = {f"{c}, {dtype}": (c, dtype) for c in CURVATURES for dtype in TOLERANCE}


@each("kind", KINDS, quick=("ggn, float64",))
def test_scores_equal_the_dense_answer(framework, kind):
    curvature, dtype = kind
    with framework.narrow() if dtype == "float32" else framework.wide():
        problem = Problem(framework, dtype)
        influence = problem.influence(curvature=curvature)
        for method in ("jvp", "gradients", "auto"):
            scores = influence.scores(problem.query, method=method)
            assert_close(scores, expected(curvature), dtype)
    assert influence.info.message == "5 converged"


@each("size", {str(i): i for i in (1, 5, 13, 14, 100)}, quick=())
def test_the_batch_size_makes_no_difference(framework, size):
    problem = Problem(framework)
    batches = problem.batches(size)
    for options in (
        {"batch_size": size},
        {"train": batches},
        {"train": batches, "batch_size": 4},
        {"train": batches, "memory_budget": 1},
    ):
        influence = problem.influence(**options)
        assert influence.info.num_train == NUM_TRAIN
        assert_close(influence.scores(problem.query), expected())


@slow_in_jax
def test_the_order_of_the_examples_makes_no_difference_but_their_numbers(framework):
    problem = Problem(framework)
    order = np.random.default_rng(0).permutation(NUM_TRAIN)
    train = tuple(part[framework.array(order)] for part in problem.train)
    for curvature in CURVATURES:
        influence = problem.influence(train, curvature=curvature, batch_size=4)
        assert_close(influence.scores(problem.query), expected(curvature)[:, order])


@slow_in_jax
@pytest.mark.parametrize("memory_budget", [1, 2000, 20_000])
def test_a_small_memory_budget_gives_the_same_scores(framework, memory_budget):
    problem = Problem(framework)
    influence = problem.influence(memory_budget=memory_budget)
    for method in ("jvp", "gradients"):
        assert_close(influence.scores(problem.query, method=method), expected())
    best = influence.top_k(problem.query, 3)
    assert np.array_equal(best.indices, np.argsort(-expected(), axis=1)[:, :3])


def test_arrays_beyond_the_budget_are_cut_without_being_kept(framework):
    problem = Problem(framework)
    xp = array_namespace(problem.train[0])
    many = tuple(xp.concat([part] * 40, axis=0) for part in problem.train)  # the same mean
    influence = problem.influence(many, memory_budget=1, batch_size=200)
    assert influence._train.sizes == [200, 200, 160] and influence._train.num_bytes == 0
    scores = influence.scores(problem.query)
    assert_close(scores, np.tile(expected(), (1, 40)))


@slow_in_jax
def test_other_examples_than_the_training_set_can_be_scored(framework):
    problem = Problem(framework)
    scores = problem.influence().scores(problem.query, problem.query)
    by_query = dense("ggn")[2]
    assert_close(scores, by_query @ inverse("ggn") @ by_query.T)


SOLVERS = {
    "cg": li.CG(damping=0.2, rtol=1e-12),
    "exact": li.Exact(damping=0.2),
    "nystrom-cg": li.NystromCG(damping=0.2, rtol=1e-12),
    "callable": lambda matvec, b: (
        li.cg(li.FunctionOperator(matvec, len(b), like=b, matmat=matvec), b, rtol=1e-12).value
    ),
}


@each("solver", SOLVERS, quick=())
def test_ridge_and_damping_add_up(framework, solver):
    problem = Problem(framework)
    options = {"damping": 0.2} if callable(solver) else {}
    influence = problem.influence(solver=solver, ridge=0.3, **options)
    assert_close(influence.scores(problem.query), expected(damping=0.5))


@slow_in_jax
def test_a_nystrom_inverse_of_full_rank_is_exact_and_one_of_low_rank_is_not(framework):
    problem = Problem(framework)
    n = len(dense("ggn")[0])
    full = problem.influence(solver=li.Nystrom(rank=n, damping=0.05))
    assert_close(full.scores(problem.query), expected(damping=0.05))
    low = problem.influence(solver=li.Nystrom(sampling="uniform", rank=3, damping=0.05))
    difference = np.abs(host(low.scores(problem.query)) - expected(damping=0.05)).max()
    assert difference > 0.01 * np.abs(expected(damping=0.05)).max()
    assert low.info.relative_residual.min() > 0.01
    assert low.info.message == f"{NUM_QUERY} direct"


# Top k, another damping, self-influence, removal.


@pytest.mark.parametrize("kind", ["helpful", "harmful", "absolute"])
def test_top_k_is_the_sorted_head_of_the_scores(framework, kind):
    problem = Problem(framework)
    influence = problem.influence(batch_size=4)
    scores = expected()
    ranked = {"helpful": -scores, "harmful": scores, "absolute": -np.abs(scores)}[kind]
    for k in (4, NUM_TRAIN):
        best, order = influence.top_k(problem.query, k, kind), np.argsort(ranked, axis=1)[:, :k]
        assert np.array_equal(best.indices, order)
        assert_close(best.scores, np.take_along_axis(scores, order, axis=1))


def test_another_damping_takes_the_same_columns(framework):
    problem = Problem(framework)
    influence = problem.influence()
    influence.scores(problem.query)
    products = influence.info.num_products
    stronger = influence.with_damping(2.0)
    assert_close(stronger.scores(problem.query), expected(damping=2.0))
    steps = int(stronger.info.num_steps.max())
    assert stronger.info.num_products - products <= (steps + 2) * NUM_QUERY  # no columns anew
    assert stronger.info.damping == 2.0
    assert influence.info.damping == DAMPING


@each_curvature
def test_self_influence_is_the_diagonal_of_the_scores_of_the_training_set(framework, curvature):
    problem, by_train = Problem(framework), dense(curvature)[1]
    wanted = np.einsum("in,nm,im->i", by_train, inverse(curvature), by_train)
    for options in ({}, {"memory_budget": 50_000, "batch_size": 3}):
        influence = problem.influence(curvature=curvature, **options)
        assert_close(influence.self_influence(), wanted)
        assert influence.info.relative_residual.shape == (NUM_TRAIN,)


@each("curvature", CURVATURES, quick=())
def test_the_removal_effect_is_the_sum_of_scores_over_the_number_of_examples(framework, curvature):
    problem = Problem(framework)
    influence = problem.influence(curvature=curvature, batch_size=4)
    wanted = expected(curvature)[:, [2, 9, 13]].sum(axis=1) / NUM_TRAIN
    assert_close(influence.removal_effect(problem.query, [9, 2, 13]), wanted)


LEVERAGE = {
    **{
        f"{c}, nystrom-cg": (c, li.NystromCG(sampling="uniform", rank=8, rtol=1e-12))
        for c in CURVATURES
    },
    **{f"{c}, exact": (c, li.Exact()) for c in CURVATURES},
    "hessian, cg": ("hessian", li.CG(rtol=1e-12)),
    "ggn, nystrom": ("ggn", li.Nystrom(rank=43, damping=1.0)),
}


@each("case", LEVERAGE, quick=("ggn, nystrom-cg",))
def test_with_leverage_the_curvature_of_the_removed_examples_goes_too(framework, case):
    (curvature, solver), removed = case, (2, 9, 13)
    problem = Problem(framework)
    influence = problem.influence(curvature=curvature, damping=DAMPING, solver=solver, batch_size=5)
    effect = influence.removal_effect(problem.query, list(removed), leverage=True)
    _, by_train, by_query = dense(curvature)
    step = inverse(curvature, removed=removed) @ by_train[list(removed)].sum(axis=0) / NUM_TRAIN
    assert_close(effect, by_query @ step)


@slow_in_jax
def test_with_leverage_the_removal_effect_is_exact_for_least_squares(framework):
    rng, ridge, removed = np.random.default_rng(3), 0.1, [0, 5, 6, 11]
    x, y = rng.standard_normal((20, 4)), rng.standard_normal((20, 1))
    query = rng.standard_normal((6, 4)), rng.standard_normal((6, 1))

    def fitted(rows: Any) -> np.ndarray:
        normal = x[rows].T @ x[rows] / 20 + ridge * np.eye(4)
        return np.linalg.solve(normal, x[rows].T @ y[rows] / 20)

    def squares(z: Any, y: Any) -> Any:
        return array_namespace(z).sum((z - y) ** 2, axis=1) / 2

    whole = fitted(np.arange(20))
    influence = framework.influence(
        lambda params, x: x @ params["w"],
        squares,
        {"w": framework.array(whole)},
        (framework.array(x), framework.array(y)),
        ridge=ridge,
        solver=li.CG(rtol=1e-13),
    )
    assert influence.info.gradient_norm < 1e-12
    # linear outputs: the effect to first order in the step is the gradient times the true step
    step = fitted(np.delete(np.arange(20), removed)) - whole
    slope = ((query[0] @ whole - query[1]) * (query[0] @ step))[:, 0]
    given = tuple(map(framework.array, query))
    assert_close(influence.removal_effect(given, removed, leverage=True), slope)
    plain = host(influence.removal_effect(given, removed))
    assert np.abs(plain - slope).max() > 0.05 * np.abs(slope).max()


def test_the_inverse_product_is_that_of_the_damped_curvature(framework):
    influence = Problem(framework).influence()
    G = np.random.default_rng(0).standard_normal((43, 2))
    for block in (G, G[:, 1]):
        found = influence.inverse_product(framework.array(block))
        assert_close(found, inverse("ggn") @ block)


# The record and the damping.


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@slow_in_jax
def test_the_record_has_the_true_relative_residual_of_each_query(framework, dtype):
    with framework.narrow() if dtype == "float32" else framework.wide():
        problem, by_query = Problem(framework, dtype), dense("ggn")[2]
        influence = problem.influence(
            solver=li.NystromCG(sampling="uniform", rank=4, damping=0.05, rtol=1e-3)
        )
        Z = host(influence.inverse_product(framework.array(by_query.T, dtype))).astype(float)
    residual = by_query.T - (dense("ggn")[0] + 0.05 * np.eye(43)) @ Z
    true = np.linalg.norm(residual, axis=0) / np.linalg.norm(by_query, axis=1)
    info = influence.info
    rtol = {"float64": 1e-6, "float32": 1e-2}[dtype]
    assert np.allclose(info.relative_residual, true, rtol=rtol)
    assert np.all(info.relative_residual <= 1e-3)
    assert np.all(info.num_steps > 0)
    assert info.message == f"{NUM_QUERY} converged"
    assert info.rank == 4


@slow_in_jax
def test_the_record_has_the_loss_and_the_gradient_of_the_objective(framework):
    params, (x, y), _ = numbers()
    wanted = np.linalg.norm(dense("ggn")[1].mean(axis=0) + 0.1 * flat(params))
    for curvature in ("ggn", "empirical_fisher"):
        info = Problem(framework).influence(ridge=0.1, curvature=curvature).info
        assert info.gradient_norm == pytest.approx(wanted, rel=1e-10)
        assert info.loss == pytest.approx(cross_entropy(outputs(params, x), y).mean(), rel=1e-12)


@slow_in_jax
def test_a_solve_that_falls_short_warns(framework):
    problem = Problem(framework)
    influence = problem.influence(solver=li.CG(damping=1e-4, max_steps=1))
    with pytest.warns(RuntimeWarning, match="did not converge: 5 max_steps"):
        influence.scores(problem.query)
    assert influence.info.relative_residual.max() > 1e-4


@slow_in_jax
def test_the_auto_damping_is_near_a_tenth_of_the_mean_eigenvalue_and_reported(framework):
    problem, H = Problem(framework), dense("ggn")[0]
    for solver in (None, li.CG(rtol=1e-12)):
        influence = problem.influence(damping="auto", solver=solver)
        assert influence.info.damping == pytest.approx(0.1 * np.trace(H) / len(H), rel=0.3)
    assert_close(influence.scores(problem.query), expected(damping=influence.info.damping))


@slow_in_jax
def test_without_a_solver_the_damping_is_automatic_unless_there_is_ridge(framework):
    problem = Problem(framework)
    assert problem.influence(solver=None).info.damping > 0
    regular = problem.influence(solver=None, ridge=0.1)
    assert (regular.info.damping, regular.info.ridge) == (0.0, 0.1)
    assert problem.influence(solver=li.CG(damping=0.3), ridge=0.1).info.damping == 0.3


INDEFINITE = {
    "nystrom-cg": li.NystromCG(sampling="uniform", rank=10),
    "cg": li.CG(),
    "exact": li.Exact(),
    "nystrom": li.Nystrom(rank=30, damping=1e-3),
}


@each("solver", INDEFINITE, quick=())
def test_an_indefinite_hessian_is_named_with_its_lowest_ritz_value_and_a_damping_that_does(
    framework, solver
):
    lowest = np.linalg.eigvalsh(dense("hessian")[0])[0]
    assert lowest < -1e-3
    problem = Problem(framework)
    influence = problem.influence(curvature="hessian", solver=solver)
    with pytest.raises(ValueError, match=r"the Hessian .* its lowest Ritz value is") as error:
        influence.scores(problem.query)
    message = str(error.value)
    value = float(message.split("lowest Ritz value is ")[1].split(". ")[0])
    assert value - influence.info.damping == pytest.approx(lowest, rel=0.05)
    enough = float(message.split("A damping of ")[1].split(" would")[0])
    assert -lowest < enough < -2 * lowest
    if not isinstance(solver, li.Nystrom):
        influence.with_damping(enough).scores(problem.query)


@slow_in_jax
def test_gauss_newton_columns_precondition_the_hessian(framework):
    problem = Problem(framework)
    influence = problem.influence(curvature="hessian")
    influence.scores(problem.query)
    kept = influence._factor.A
    assert np.allclose(host(kept.kept), dense("ggn")[0][:, kept.indices], atol=1e-12)


# Files.


def test_what_was_saved_is_loaded_without_computing_the_columns_again(framework, tmp_path):
    problem = Problem(framework)
    influence = problem.influence()
    scores = host(influence.scores(problem.query))
    path = tmp_path / "influence.npz"
    influence.save(path)
    loaded = problem.influence(load=path)
    assert np.array_equal(host(loaded.scores(problem.query)), scores)
    assert loaded.info.num_products == influence.info.num_products - 10
    assert loaded.info.damping == DAMPING
    with pytest.raises(ValueError, match="saved with other training set"):
        problem.influence(problem.query, load=path)
    problem.params["shift"] = problem.params["shift"] + 1e-9
    with pytest.raises(ValueError, match="was saved with other parameters"):
        problem.influence(load=path)


@slow_in_jax
def test_a_file_that_holds_something_else_is_refused(framework, tmp_path):
    np.savez(tmp_path / "other.npz", other=np.ones(2))
    with pytest.raises(ValueError, match=r"no file of InfluenceFunction\.save"):
        Problem(framework).influence(load=tmp_path / "other.npz")


@slow_in_jax
@pytest.mark.parametrize("method", ["jvp", "gradients"])
def test_a_run_cut_short_goes_on_where_it_was(framework, method, tmp_path):
    problem, calls = Problem(framework), []
    options = {"batch_size": 4, "memory_budget": 2**16}
    influence = problem.influence(**options)
    wanted = host(influence.scores(problem.query, method=method))
    name = {"jvp": "slopes", "gradients": "gradients"}[method]
    original = getattr(influence._backend, name)

    def failing(*args: Any) -> Any:
        calls.append(None)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*args)

    setattr(influence._backend, name, failing)
    with pytest.raises(KeyboardInterrupt):
        influence.scores(problem.query, method=method, checkpoint=tmp_path)
    first = sorted(path.name for path in tmp_path.iterdir())
    assert "directions-0.npz" in first
    assert sum(one.startswith("scores-") for one in first) >= 1
    again = problem.influence(**options)
    for _ in range(2):
        scores = again.scores(problem.query, method=method, checkpoint=tmp_path)
        assert np.array_equal(host(scores), wanted)
        assert again.info.num_products < influence.info.num_products
    assert again.info.message == "read from the checkpoint"


def test_a_checkpoint_is_read_and_one_of_another_computation_is_refused(framework, tmp_path):
    problem = Problem(framework)
    scores = problem.influence().scores(problem.query, checkpoint=tmp_path)
    again = problem.influence()
    assert np.array_equal(host(again.scores(problem.query, checkpoint=tmp_path)), host(scores))
    assert again.info.num_products == 0
    with pytest.raises(ValueError, match="results of another computation: settings differ"):
        problem.influence(damping=0.2).scores(problem.query, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="query, query losses differ"):
        again.scores(problem.train, checkpoint=tmp_path)
    with pytest.raises(ValueError, match="kind"):
        again.self_influence(checkpoint=tmp_path)
    with pytest.raises(ValueError, match="needs a seed"):
        problem.influence(rng=None).scores(problem.query, checkpoint=tmp_path)


# Errors.

BAD: dict[str, tuple[dict[str, Any], str]] = {
    "curvature": ({"curvature": "fisher"}, "`curvature` must be one of 'ggn', 'hessian', 'empiri"),
    "ridge": ({"ridge": -1.0}, "`ridge` must be finite and >= 0"),
    "damping a word": ({"damping": "much"}, "`damping` must be a number or 'auto'; got 'much'"),
    "damping": ({"damping": -1.0}, "`damping` must be finite and >= 0"),
    "batch size": ({"batch_size": 0}, "`batch_size` must be at least 1"),
    "memory budget": ({"memory_budget": 0}, "`memory_budget` must be at least 1"),
    "solver": ({"solver": "cg"}, "`solver` must be settings"),
    "loss a mean": (
        {"loss": lambda z, y: array_namespace(z).mean(cross_entropy(z, y))},
        r"one number per example, shape \(14,\), .*; got shape \(\)",
    ),
    "loss of all": (
        {"loss": lambda z, y: cross_entropy(z, y) - array_namespace(z).mean(z)},
        "must not depend on other examples",
    ),
    "no batches": ({"train": []}, "`train` must hold at least one example"),
    "read once": ({"train": iter([])}, "can be iterated only once"),
}


@pytest.mark.parametrize(("options", "message"), BAD.values(), ids=BAD)
def test_bad_arguments_are_refused_by_name(framework, options, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Problem(framework).influence(**options)


def test_data_that_do_not_fit_are_refused_by_name(framework):
    problem = Problem(framework)
    x, y = problem.train
    with pytest.raises((TypeError, ValueError), match="`train` must hold at least one example"):
        problem.influence((x[:0], y[:0]))
    with pytest.raises((TypeError, ValueError), match="one row for each example"):
        problem.influence((x, y[:3]))
    holes = numbers()[1][0].copy()
    holes[7, 1] = np.nan
    with pytest.raises(ValueError, match=r"it is nan for example 7 of `train`, .* 1 of the 14"):
        problem.influence((framework.array(holes), y))
    with pytest.raises(ValueError, match="example 7 of `query`"):
        problem.influence().scores((framework.array(holes), y))


def test_bad_arguments_of_the_methods_are_refused_by_name(framework):
    problem = Problem(framework)
    influence = problem.influence()
    query, array = problem.query, framework.array
    for call, message in (
        (lambda: influence.top_k(query, 1, "best"), "`kind` must be one of 'helpful'"),
        (lambda: influence.top_k(query, 15), "`k` must be from 1 to 14; got 15"),
        (lambda: influence.scores(query, method="vmap"), "`method` must be one of"),
        (lambda: influence.removal_effect(query, [14]), "must lie in 0 … 13"),
        (lambda: influence.removal_effect(query, [1, 1]), "`indices` must be distinct"),
        (lambda: influence.inverse_product(array(np.ones(3))), "`G` must have 43 rows"),
        (lambda: influence.inverse_product(array(np.full(43, np.nan))), "`G` must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_function_for_a_solver_cannot_be_saved(framework, tmp_path):
    influence = Problem(framework).influence(solver=lambda matvec, b: b)
    with pytest.raises(TypeError, match="`solver` must be settings"):
        influence.save(tmp_path / "influence.npz")


def test_progress_bars_are_shown_when_asked_for(framework, capsys):
    pytest.importorskip("tqdm", reason="the extra `plot` is missing: no tqdm")
    problem = Problem(framework)
    problem.influence(progress=True).self_influence()
    problem.influence(progress=True).scores(problem.query)
    shown = capsys.readouterr().err
    assert "self-influence" in shown
    assert "scores" in shown
    problem.influence().scores(problem.query)
    assert capsys.readouterr().err == ""
