"""The strength of a kernel ridge chosen by leaving points out."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("sklearn", minversion="1.6", reason="scikit-learn 1.6 is not installed")
from sklearn.linear_model import RidgeCV

from lowrank_inverse.sklearn import KernelRidge, KernelRidgeCV
from tests.oracles import relative_error
from tests.sklearn.friedman import NEW, SCALE, TARGETS, WEIGHTS, X, Y

STRENGTHS = [1e-3, 0.1, 10.0]


@pytest.mark.parametrize("fit_intercept", [False, True])
@pytest.mark.parametrize("weight", [None, WEIGHTS + 1], ids=["equal", "weights"])
@pytest.mark.parametrize("alpha_per_target", [False, True])
def test_with_the_linear_kernel_it_is_that_of_scikit_learn(fit_intercept, weight, alpha_per_target):
    shared = {"fit_intercept": fit_intercept, "alpha_per_target": alpha_per_target}
    model = KernelRidgeCV(STRENGTHS, kernel="linear", store_cv_results=True, **shared)
    theirs = RidgeCV(STRENGTHS, store_cv_results=True, **shared)
    for targets in (Y, TARGETS):
        model.fit(X, targets, weight)
        theirs.fit(X, targets, weight)
        np.testing.assert_array_equal(model.alpha_, theirs.alpha_)
        np.testing.assert_allclose(model.best_score_, theirs.best_score_, rtol=1e-7)
        np.testing.assert_allclose(model.cv_results_, theirs.cv_results_, rtol=1e-6, atol=1e-9)
        assert relative_error(model.predict(NEW), theirs.predict(NEW)) < 1e-7


@pytest.mark.parametrize("fit_intercept", [False, True])
def test_its_errors_are_those_of_fits_without_the_point(fit_intercept):
    P, t, w = X[:25], TARGETS[:25], WEIGHTS[:25] + 0.5
    shared = {"lengthscale": SCALE, "fit_intercept": fit_intercept}
    model = KernelRidgeCV(STRENGTHS, store_cv_results=True, **shared).fit(P, t, w)
    for number, alpha in enumerate(STRENGTHS):
        for i in range(0, 25, 6):
            others = np.arange(25) != i
            left = KernelRidge(alpha, **shared).fit(P[others], t[others], w[others])
            wanted = w[i] * (left.predict(P[i : i + 1])[0] - t[i]) ** 2
            np.testing.assert_allclose(model.cv_results_[i, :, number], wanted, rtol=1e-6)


def test_its_fit_is_that_of_the_strengths_chosen():
    model = KernelRidgeCV(STRENGTHS, lengthscale=SCALE, alpha_per_target=True, fit_intercept=True)
    model.fit(X, TARGETS, WEIGHTS)
    plain = KernelRidge(model.alpha_, lengthscale=SCALE, fit_intercept=True)
    plain.fit(X, TARGETS, WEIGHTS)
    assert relative_error(model.predict(NEW), plain.predict(NEW)) < 1e-8
    assert KernelRidgeCV([3.0]).fit(X, Y).alpha_ == 3.0


def test_strengths_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="`alphas` must be finite and > 0; got -1"):
        KernelRidgeCV([1.0, -1.0]).fit(X, Y)
    with pytest.raises(ValueError, match="`alphas` must be of shape"):
        KernelRidgeCV([]).fit(X, Y)
    with pytest.raises(ValueError, match="leave-one-out needs at least two points"):
        KernelRidgeCV().fit(X, Y, np.arange(len(X)) == 3)
