"""Kernel ridge regression, direct and iterative."""

from __future__ import annotations

import numpy as np
import pytest

import lowrank_inverse as li

pytest.importorskip("sklearn", minversion="1.6", reason="scikit-learn 1.6 is not installed")
import sklearn.kernel_ridge
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import parametrize_with_checks

from lowrank_inverse.sklearn import KernelRidge
from tests.oracles import relative_error
from tests.sklearn.friedman import NEW, SCALE, TARGETS, WEIGHTS, X, Y

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
