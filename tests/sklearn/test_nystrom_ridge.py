"""Kernel ridge regression on sampled points."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("sklearn", minversion="1.6", reason="scikit-learn 1.6 is not installed")
from sklearn.base import clone
from sklearn.kernel_approximation import Nystroem
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from lowrank_inverse.sklearn import KernelRidge, NystromRidge
from tests.oracles import LONG, relative_error, solve
from tests.sklearn.friedman import NEW, SCALE, TARGETS, WEIGHTS, X, Y


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


def test_they_work_in_pipelines_and_searches():
    search = GridSearchCV(
        make_pipeline(StandardScaler(), NystromRidge(rank=60, random_state=0)),
        {"nystromridge__alpha": [1e-3, 10.0], "nystromridge__kernel": ["rbf", "matern"]},
        cv=3,
    )
    assert search.fit(X, Y).best_score_ > 0.85
    assert search.best_params_["nystromridge__alpha"] == 1e-3
