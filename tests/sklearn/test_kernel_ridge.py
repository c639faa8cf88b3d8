"""Kernel ridge regression, direct and iterative."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp

import lowrank_inverse as li

pytest.importorskip("sklearn", minversion="1.6", reason="scikit-learn 1.6 is not installed")
import sklearn.kernel_ridge
from sklearn.base import clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Ridge
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.utils.estimator_checks import parametrize_with_checks

from lowrank_inverse.sklearn import KernelRidge, KernelRidgeCV, NystromRidge
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


@every_way
def test_each_target_may_have_its_own_strength(way):
    alphas = [0.1, 10.0]
    model = KernelRidge(alphas, lengthscale=SCALE, random_state=0, **WAYS[way])
    theirs = sklearn.kernel_ridge.KernelRidge(alpha=alphas, kernel="rbf", gamma=0.5 / SCALE**2)
    found = model.fit(X, TARGETS, WEIGHTS).predict(NEW)
    assert relative_error(found, theirs.fit(X, TARGETS, WEIGHTS).predict(NEW)) < 1e-7
    for target, alpha in enumerate(alphas):
        alone = clone(model).set_params(alpha=alpha).fit(X, TARGETS[:, target], WEIGHTS)
        assert relative_error(found[:, target], alone.predict(NEW)) < 1e-7


@every_way
@pytest.mark.parametrize("weight", [None, WEIGHTS], ids=["equal", "weights"])
def test_an_intercept_is_that_of_a_constant_that_costs_nothing(weight, way):
    model = KernelRidge(0.1, kernel="linear", fit_intercept=True, random_state=0, **WAYS[way])
    for targets in (Y + 1e3, TARGETS):
        model.fit(X, targets, weight)
        ridge = Ridge(0.1).fit(X, targets, weight)
        assert relative_error(model.predict(NEW), ridge.predict(NEW)) < 1e-7
        assert np.shape(model.intercept_) == np.shape(ridge.intercept_)
        np.testing.assert_allclose(model.dual_coef_.T @ model.X_fit_, ridge.coef_, atol=1e-5)
    # A constant far beyond the kernel's is an intercept, too.
    model.set_params(kernel="rbf", lengthscale=SCALE, alpha=1.0).fit(X, Y, weight)
    K, w = rbf_kernel(X, gamma=0.5 / SCALE**2), np.ones(len(X)) if weight is None else weight
    rows = np.flatnonzero(w)
    bordered = np.block([[K[np.ix_(rows, rows)] + np.diag(1 / w[rows]), np.ones((len(rows), 1))]])
    bordered = np.vstack([bordered, np.append(np.ones(len(rows)), 0.0)])
    wanted = np.linalg.solve(bordered, np.append(Y[rows], 0.0))
    assert relative_error(model.dual_coef_, wanted[:-1]) < 1e-6
    assert model.intercept_ == pytest.approx(wanted[-1], rel=1e-7)


@pytest.mark.parametrize("model", [KernelRidge(0.1), KernelRidgeCV([0.1, 1.0])])
def test_a_precomputed_kernel_is_as_good_as_points(model):
    K, across = rbf_kernel(X, gamma=0.5 / SCALE**2), rbf_kernel(NEW, X, gamma=0.5 / SCALE**2)
    for targets, weight in ((Y, None), (TARGETS, WEIGHTS)):
        found = clone(model).set_params(kernel="precomputed").fit(K, targets, weight)
        wanted = clone(model).set_params(lengthscale=SCALE).fit(X, targets, weight)
        assert relative_error(found.predict(across), wanted.predict(NEW)) < 1e-8
    with pytest.raises(ValueError, match=r"`X` must be the kernel of .*\(200, 6"):
        clone(model).set_params(kernel="precomputed").fit(X, Y)


@pytest.mark.parametrize(
    "model", [KernelRidge(), KernelRidge(rank=20, memory_budget=0), KernelRidgeCV(), NystromRidge()]
)
def test_sparse_points_are_taken_by_the_linear_kernel_alone(model):
    sparse, new = sp.csr_array(np.where(X > 0.7, X, 0)), sp.csr_array(np.where(NEW > 0.7, NEW, 0))
    model = clone(model).set_params(kernel="linear")
    found = model.fit(sparse, TARGETS, WEIGHTS).predict(new)
    wanted = model.fit(sparse.toarray(), TARGETS, WEIGHTS).predict(new.toarray())
    assert relative_error(found, wanted) < 1e-8
    with pytest.raises(TypeError, match=r"sparse `X` needs kernel='linear'; got kernel='rbf'"):
        model.set_params(kernel="rbf").fit(sparse, Y)


def test_a_strength_for_each_target_must_be_one_for_each():
    with pytest.raises(ValueError, match=r"one for each of 2 targets, shape \(2,\); got.*\(3,\)"):
        KernelRidge([1.0, 2.0, 3.0]).fit(X, TARGETS)
    with pytest.raises(ValueError, match="`alpha` must be finite and > 0"):
        KernelRidge([1.0, 0.0]).fit(X, TARGETS)
    with pytest.raises(ValueError, match="'precomputed' is for KernelRidge"):
        NystromRidge(kernel="precomputed").fit(X @ X.T, Y)
