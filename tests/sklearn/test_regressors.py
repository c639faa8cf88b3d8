"""What both ridge regressions do."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest

import lowrank_inverse as li

pytest.importorskip("sklearn", minversion="1.6", reason="scikit-learn 1.6 is not installed")
import sklearn.kernel_ridge
from sklearn.utils.estimator_checks import parametrize_with_checks

from lowrank_inverse.sklearn import KernelRidge, KernelRidgeCV, NystromRidge
from tests.oracles import LONG, relative_error, solve
from tests.sklearn.friedman import NEW, SCALE, X, Y

ALPHAS = [1e-10, 1e-7, 1e-4, 1e-1, 1e2]
LENGTHSCALES = [0.05, 0.3, 3.0]


@parametrize_with_checks([KernelRidge(), KernelRidgeCV(), NystromRidge()])
def test_scikit_learn_accepts_the_estimators(estimator, check):
    check(estimator)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the tolerance was not met")  # in float32, by a factor of 20
@parametrize_with_checks(
    [
        KernelRidge(kernel="linear"),
        KernelRidge(kernel="precomputed"),
        KernelRidge(fit_intercept=True, rank=5, memory_budget=0, tol=1e-12),
        KernelRidgeCV([1.0], kernel="linear", fit_intercept=True),
        KernelRidgeCV(kernel="precomputed"),
        NystromRidge(kernel="linear"),
    ]
)
def test_scikit_learn_accepts_their_other_ways(estimator, check):
    check(estimator)


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


@pytest.mark.parametrize("model", [KernelRidge(0.01, rank=40), NystromRidge(0.01, rank=100)])
def test_float32_stays_float32_and_keeps_its_digits(model):
    model.set_params(random_state=0, lengthscale=SCALE)
    wanted = model.fit(X, Y).predict(NEW)
    found = model.fit(X.astype("float32"), Y).predict(NEW.astype("float32"))
    assert found.dtype == np.float32 and wanted.dtype == np.float64
    assert relative_error(found, wanted) < 1e-2


def test_the_lengthscale_by_default_is_the_spread_of_the_points():
    assert KernelRidge().fit(X, Y).lengthscale_ == pytest.approx(np.sqrt(X.var(axis=0).sum()))
    assert NystromRidge().fit(np.ones((5, 2)), np.ones(5)).lengthscale_ == 1


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
    with pytest.raises(ValueError, match=r"at least one non-zero number|all are zero"):
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
