"""Kernel ridge regression as scikit-learn estimators."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest

import lowrank_inverse as li

pytest.importorskip("sklearn", minversion="1.6", reason="scikit-learn 1.6 is not installed")
import sklearn.kernel_ridge
from sklearn.base import clone
from sklearn.datasets import make_friedman1
from sklearn.exceptions import ConvergenceWarning
from sklearn.kernel_approximation import Nystroem
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from lowrank_inverse.sklearn import KernelRidge, NystromRidge
from tests.oracles import LONG, relative_error, solve

SCALE = 1.5
X, Y = make_friedman1(200, n_features=6, noise=0.1, random_state=0)
TARGETS = np.stack([Y, X[:, 0] ** 2], axis=1)
NEW = X[::7] + 0.01
WEIGHTS = np.random.default_rng(0).integers(0, 4, len(X)).astype(float)
WAYS = {  # direct, iterative, and iterative on a matrix that is not held
    "direct": {"rank": 500},
    "held": {"rank": 40, "tol": 1e-10},
    "in tiles": {"rank": 40, "tol": 1e-10, "memory_budget": 0, "chunk_size": 64},
}
every_way = pytest.mark.parametrize("way", WAYS)
KERNELS = {
    "rbf": ({}, {"gamma": 0.5 / SCALE**2}),
    "laplacian": ({}, {"gamma": 1 / SCALE}),
    "polynomial": ({"degree": 2}, {"gamma": 1 / SCALE**2, "degree": 2}),
}


@parametrize_with_checks([KernelRidge(), NystromRidge()])
def test_scikit_learn_accepts_the_estimators(estimator, check):
    check(estimator)


@parametrize_with_checks([KernelRidge(rank=5, memory_budget=0, tol=1e-12)])
def test_scikit_learn_accepts_the_iterative_solve(estimator, check):
    check(estimator)


@every_way
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_ridge_is_that_of_scikit_learn(kernel, way):
    ours, theirs = KERNELS[kernel]
    model = KernelRidge(0.1, kernel=kernel, lengthscale=SCALE, random_state=0, **ours, **WAYS[way])
    expected = sklearn.kernel_ridge.KernelRidge(alpha=0.1, kernel=kernel, **theirs)
    for targets, weight in ((Y, None), (TARGETS, None), (Y, WEIGHTS), (TARGETS, WEIGHTS)):
        found = model.fit(X, targets, weight).predict(NEW)
        wanted = expected.fit(X, targets, weight).predict(NEW)
        assert found.shape == wanted.shape
        assert relative_error(found, wanted) < 1e-7


ALPHAS = [1e-10, 1e-7, 1e-4, 1e-1, 1e2]
LENGTHSCALES = [0.05, 0.3, 3.0]


def conditioned_cases(num_features, outlier, ratio, n=60):
    """Yield fits over the grid: settings, points, targets, weights, the exact fit, its rounding.

    What rounding leaves of a residual, row by row, bounds the error of the fit where weights are
    equal: ``norm(K (K + alpha / w)^{-1} r)``, in the norm of the weights, is at most that of r.
    """
    generator = np.random.default_rng([num_features, n])
    P = generator.random((n, num_features))
    t = np.sin(6 * P[:, 0]) + 0.1 * generator.standard_normal(n)
    if outlier:
        P[7] = 1e8
    w = np.ones(n)
    w[::2] = ratio
    for lengthscale, alpha in itertools.product(LENGTHSCALES, ALPHAS):
        K = li.KernelOperator(P, lengthscale=lengthscale).columns(np.arange(n))
        c = solve(K.astype(LONG) + np.diag(LONG(alpha) / w.astype(LONG)), t)
        sizes = np.sqrt(w) * (np.abs(K) @ np.abs(c) + np.abs(alpha / w * c))
        rounding = float(10 * np.finfo(float).eps * np.linalg.norm(sizes) / np.sqrt(w.min()))
        yield lengthscale, alpha, P, t, w, (K @ c).astype(float), rounding / np.linalg.norm(t)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.filterwarnings("ignore:.*[Ss]ingular|An ill-conditioned")
@pytest.mark.parametrize("num_features", [2, 20])
@pytest.mark.parametrize("outlier", [False, True])
@pytest.mark.parametrize("ratio", [1.0, 1e8])
def test_every_strength_scale_and_weight_gives_the_fit_of_scikit_learn(
    num_features, outlier, ratio
):
    compared = 0
    for lengthscale, alpha, P, t, w, exact, rounding in conditioned_cases(
        num_features, outlier, ratio
    ):
        shared = {"alpha": alpha, "lengthscale": lengthscale, "random_state": 0}
        theirs = sklearn.kernel_ridge.KernelRidge(
            alpha=alpha, kernel="rbf", gamma=0.5 / lengthscale**2
        ).fit(P, t, w)
        for model in (
            KernelRidge(rank=20, **shared),
            KernelRidge(rank=len(P), **shared),
            NystromRidge(rank=len(P), **shared),
        ):
            found = model.fit(P, t, w).predict(P)
            error = np.linalg.norm(found - exact) / np.linalg.norm(t)
            assert error < max(1e-6, rounding), (model, error, rounding)
            if rounding < 1e-6:
                compared += 1
                assert np.linalg.norm(found - theirs.predict(P)) < 1e-6 * np.linalg.norm(t)
    assert compared >= (18 if num_features == 2 else 40)


@pytest.mark.parametrize("model", [KernelRidge(rank=20), NystromRidge(rank=60)])
def test_new_points_are_as_right_as_the_training_points(model):
    for lengthscale, alpha, P, t, w, _, _ in conditioned_cases(2, True, 1.0):
        if alpha < 1e-5:  # rounding by eps moves a function by eps / sqrt(alpha * pivot)
            continue
        model.set_params(alpha=alpha, lengthscale=lengthscale, random_state=0)
        theirs = sklearn.kernel_ridge.KernelRidge(
            alpha=alpha, kernel="rbf", gamma=0.5 / lengthscale**2
        ).fit(P, t, w)
        new = np.random.default_rng(5).random((30, 2))
        error = np.linalg.norm(model.fit(P, t, w).predict(new) - theirs.predict(new))
        assert error < 1e-6 * np.linalg.norm(t)


def test_a_fit_that_weights_spoil_warns():
    weight = np.ones(len(X))
    weight[::2] = 1e20
    model = KernelRidge(1e-3, rank=20, lengthscale=SCALE, memory_budget=0, random_state=0)
    with pytest.warns(ConvergenceWarning, match=r"The fit is known to .* of the targets"):
        model.fit(X, Y, weight)


def test_a_solve_that_stagnates_is_factored_where_the_matrix_is_held():
    P = np.sort(np.random.default_rng(0).random(120))[:, None]
    t = np.sin(9 * P[:, 0]) + 0.1 * np.random.default_rng(1).standard_normal(120)
    model = KernelRidge(1e-10, rank=20, lengthscale=0.3, random_state=0)
    with pytest.warns(ConvergenceWarning, match="stagnated"):
        clone(model).set_params(memory_budget=0).fit(P, t)
    model.fit(P, t)
    assert model.n_iter_ == 1


@pytest.mark.parametrize("weight", [None, WEIGHTS], ids=["equal", "weights"])
@pytest.mark.parametrize("targets", [Y, TARGETS], ids=["one", "two"])
def test_nystrom_ridge_minimises_over_the_functions_it_spans(targets, weight):
    model = NystromRidge(0.1, rank=30, lengthscale=SCALE, random_state=0, chunk_size=32)
    found = model.fit(X, targets, weight).predict(NEW)
    rows = np.arange(len(X)) if weight is None else np.flatnonzero(weight)
    w = np.ones(len(X)) if weight is None else weight
    P, t, w = X[rows], targets[rows], w[rows]
    L = P[model.indices_]

    def kernel(x, y):
        squares = ((x[:, None].astype(LONG) - y[None].astype(LONG)) ** 2).sum(-1)
        return np.exp(-squares / (2 * SCALE**2))

    C = kernel(P, L)
    c = solve(C.T @ (w[:, None] * C) + LONG(0.1) * kernel(L, L), C.T @ (w * t.T).T)
    assert relative_error(found, kernel(NEW, L) @ c) < 1e-7


def test_nystrom_ridge_is_ridge_regression_on_the_nystroem_features_of_scikit_learn():
    model = NystromRidge(0.1, rank=30, lengthscale=SCALE, random_state=0).fit(X, Y)
    features = Nystroem(gamma=0.5 / SCALE**2, n_components=30).fit(model.X_fit_)
    ridge = Ridge(0.1, fit_intercept=False).fit(features.transform(X), Y)
    assert relative_error(model.predict(NEW), ridge.predict(features.transform(NEW))) < 1e-6


def test_nystrom_ridge_of_all_points_is_kernel_ridge():
    found = NystromRidge(0.1, rank=1000, lengthscale=SCALE).fit(X, Y).predict(NEW)
    wanted = KernelRidge(0.1, lengthscale=SCALE).fit(X, Y).predict(NEW)
    assert relative_error(found, wanted) < 1e-8


def test_its_error_against_kernel_ridge_falls_with_rank():
    wanted = KernelRidge(0.1, lengthscale=SCALE).fit(X, Y).predict(NEW)
    errors = [
        relative_error(
            NystromRidge(0.1, rank=rank, lengthscale=SCALE, sampling="rpcholesky", random_state=0)
            .fit(X, Y)
            .predict(NEW),
            wanted,
        )
        for rank in (10, 40, 160)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


@pytest.mark.parametrize("sampling", ["uniform", "diagonal", "greedy", "rpcholesky"])
def test_one_random_state_gives_one_model(sampling):
    model = NystromRidge(0.1, rank=20, sampling=sampling, random_state=3)
    np.testing.assert_array_equal(model.fit(X, Y).predict(NEW), clone(model).fit(X, Y).predict(NEW))
    other = clone(model).set_params(random_state=4).fit(X, Y)
    assert (sampling == "greedy") == np.array_equal(other.indices_, model.indices_)


@pytest.mark.parametrize("model", [KernelRidge(0.01, rank=40), NystromRidge(0.01, rank=100)])
def test_float32_stays_float32_and_keeps_its_digits(model):
    model.set_params(random_state=0, lengthscale=SCALE)
    wanted = model.fit(X, Y).predict(NEW)
    found = model.fit(X.astype("float32"), Y).predict(NEW.astype("float32"))
    assert found.dtype == np.float32 and wanted.dtype == np.float64
    assert relative_error(found, wanted) < 1e-2


def test_a_matrix_beyond_the_budget_is_not_held(monkeypatch):
    sizes = []
    evaluate = li.KernelOperator.evaluate

    def watched(self, x, y):
        sizes.append(len(x) * len(y))
        return evaluate(self, x, y)

    monkeypatch.setattr(li.KernelOperator, "evaluate", watched)
    n = len(X)
    model = KernelRidge(0.1, rank=20, chunk_size=50, random_state=0)
    model.set_params(memory_budget=8 * n**2 - 1).fit(X, Y)
    assert len(sizes) > model.n_iter_ * 10
    assert max(sizes) < n**2 / 4
    sizes.clear()
    model.set_params(memory_budget=8 * n**2).fit(X, Y)
    assert sum(sizes) == n**2 / 2 + 4 * 50**2 / 2


def test_a_tolerance_that_is_not_met_warns():
    model = KernelRidge(1e-6, rank=5, max_iter=2)
    with pytest.warns(ConvergenceWarning, match=r"not met: .*max_steps\. Raise `max_iter`, `rank`"):
        assert model.fit(X, Y).n_iter_ == 2


def test_the_lengthscale_by_default_is_the_spread_of_the_points():
    assert KernelRidge().fit(X, Y).lengthscale_ == pytest.approx(np.sqrt(X.var(axis=0).sum()))
    assert NystromRidge().fit(np.ones((5, 2)), np.ones(5)).lengthscale_ == 1


def test_they_work_in_pipelines_and_searches():
    search = GridSearchCV(
        make_pipeline(StandardScaler(), NystromRidge(rank=60, random_state=0)),
        {"nystromridge__alpha": [1e-3, 10.0], "nystromridge__kernel": ["rbf", "matern"]},
        cv=3,
    )
    assert search.fit(X, Y).best_score_ > 0.85
    assert search.best_params_["nystromridge__alpha"] == 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0.0}, "`alpha` must be finite and > 0"),
        ({"rank": 0}, "`rank` must be at least 1"),
        ({"lengthscale": "wide"}, "`lengthscale` must be positive or 'scale'"),
        ({"kernel": "cosine"}, "`kernel` must be one of"),
        ({"sampling": "best"}, "`sampling` must be one of"),
    ],
)
def test_bad_settings_are_refused_by_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        NystromRidge(**settings).fit(X, Y)
    if "sampling" not in settings:  # not needed for few points
        with pytest.raises(ValueError, match=message):
            KernelRidge(**settings).fit(X, Y)


def test_weights_that_leave_nothing_are_refused():
    with pytest.raises(ValueError, match="at least one non-zero number"):
        KernelRidge().fit(X, Y, np.zeros(len(X)))
    with pytest.raises(ValueError, match="sample_weight"):
        KernelRidge().fit(X, Y, -np.ones(len(X)))


def test_without_scikit_learn_the_error_says_what_to_install():
    code = (
        "import sys; sys.modules['sklearn.base'] = None\n"
        "try:\n    import lowrank_inverse.sklearn\n"
        "except ImportError as error:\n    print(error)"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert 'pip install "lowrank-inverse[sklearn]"' in finished.stdout
