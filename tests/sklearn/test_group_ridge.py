"""Penalties of groups of coefficients, learned by the gradient of cross-validation."""

from __future__ import annotations

import inspect

import numpy as np
import pytest

pytest.importorskip("sklearn", minversion="1.6", reason="scikit-learn 1.6 is not installed")
import scipy.sparse
from sklearn.datasets import make_classification, make_regression
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss, roc_auc_score
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.utils.estimator_checks import parametrize_with_checks

from lowrank_inverse.bilevel.evaluation import Evaluator
from lowrank_inverse.sklearn import GroupLogisticRegressionCV, GroupRidgeCV
from lowrank_inverse.sklearn.group_ridge import base, regression
from lowrank_inverse.sklearn.group_ridge import problem as problems
from lowrank_inverse.sklearn.group_ridge.design import Design
from lowrank_inverse.sklearn.group_ridge.losses import Logistic, Softmax, Squared
from lowrank_inverse.sklearn.group_ridge.models import Gram, Rows, Split
from lowrank_inverse.sklearn.group_ridge.problem import Groups, Problem

N, D = 60, 4
KINDS = ["squared", "gram", "logistic", "softmax"]
KNOWN = inspect.signature(parametrize_with_checks).parameters
NOT_STRICT = {"xfail_strict": False} if "xfail_strict" in KNOWN else {}  # rounding decides
FEW = {"max_iter": 3}  # so that duplicates and weights differ by no more than rounding


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@parametrize_with_checks([GroupRidgeCV(**FEW)])
def test_scikit_learn_accepts_the_regression(estimator, check):
    check(estimator)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@parametrize_with_checks(
    [GroupLogisticRegressionCV(**FEW)],
    expected_failed_checks=lambda estimator: {
        f"check_sample_weight_equivalence_on_{kind}_data": "the penalties are those of inner "
        "minima to a tolerance: equal to 1e-5, where 1e-7 is asked for"
        for kind in ("dense", "sparse")
    },
    **NOT_STRICT,
)
def test_scikit_learn_accepts_the_classifier(estimator, check):
    check(estimator)


def test_a_weight_of_two_is_as_good_as_an_example_twice():
    X, y, _, folds = examples("softmax")
    whole = np.arange(N) % 3 + 1.0
    rows = np.repeat(np.arange(N), whole.astype(int))
    of = [(np.flatnonzero(np.isin(rows, a)), np.flatnonzero(np.isin(rows, b))) for a, b in folds]
    first = GroupLogisticRegressionCV(cv=folds).fit(X, y, whole)
    second = GroupLogisticRegressionCV(cv=of).fit(X[rows], y[rows])
    np.testing.assert_allclose(
        first.decision_function(X), second.decision_function(X), rtol=1e-3, atol=1e-3
    )


def examples(kind, seed=0):
    """Return features, targets, weights and three folds."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((N, D)) * [1.0, 3.0, 0.2, 1.0] + [0.0, 5.0, 0.0, -1.0]
    scores = X @ rng.standard_normal((D, 3)) + rng.gumbel(size=(N, 3))
    y = {"logistic": scores[:, 0] > scores[:, 1], "softmax": scores.argmax(axis=1)}
    weight = rng.integers(0, 3, N).astype(float)
    folds = list(KFold(3, shuffle=True, random_state=0).split(X))
    return X, np.asarray(y.get(kind, scores[:, 0])) * 1, weight, folds


def bilevel(kind, learn_weights=False, prior=0.0):
    """Return the problem of a penalty for each feature, and what it was made of."""
    X, y, weight, folds = examples(kind)
    design, share = Design(X, weight, True), weight / weight.sum()
    train, validate = np.zeros((2, N, 3))
    for k, (first, second) in enumerate(folds):
        train[first, k] = validate[second, k] = 1
    split = Split(share, train, validate)
    C = 3 if kind == "softmax" else 1
    shares = np.full(2 if C == 1 else C, 1 / 3)
    if kind == "gram":
        model = Gram(design, y, split)
    else:
        losses = {"squared": Squared, "logistic": Logistic, "softmax": Softmax}
        make = losses[kind]
        more = () if kind == "squared" else (shares,)
        model = Rows(design, lambda rows: make(y[rows], *more), C, split)
    unit = np.repeat(np.append(1 / design.square, 0)[:, None], C, axis=1)
    index = np.repeat(np.append(np.arange(D), 0)[:, None], C, axis=1)
    of_examples = D + np.arange(N) % 2 if learn_weights else None
    phi = np.log([0.1, 0.02, 0.3, 1.0] + [0.5, 0.8] * learn_weights)
    return Problem(model, Groups(unit, index, of_examples), phi, prior=prior), phi


def validation_loss(kind, phi):
    """Return the validation loss of fits by scikit-learn, to columns over roots of penalties."""
    X, y, weight, folds = examples(kind)
    Z = X / np.sqrt(np.exp(phi[:D]) * weight.sum())
    factor = np.exp(phi[D + np.arange(N) % 2]) if len(phi) > D else np.ones(N)
    total = 0.0
    for first, second in folds:
        inner = (weight * factor)[first]
        if kind in ("squared", "gram"):
            fit = Ridge(1.0, tol=1e-14).fit(Z[first], y[first], inner)
            total += weight[second] @ (fit.predict(Z[second]) - y[second]) ** 2 / 2
        else:
            fit = LogisticRegression(tol=1e-12, max_iter=10**5, solver="newton-cholesky")
            p = fit.fit(Z[first], y[first], inner).predict_proba(Z[second])
            total -= weight[second] @ np.log(p[np.arange(len(second)), y[second]])
    return total / weight.sum()


@pytest.mark.parametrize("learn_weights", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_by_penalties_and_weights_is_that_of_differences(kind, learn_weights):
    if learn_weights and kind == "gram":
        pytest.skip("weights are learned of classifiers alone")
    problem, phi = bilevel(kind, learn_weights)
    evaluate = Evaluator(problem, None, 1000, 0)
    evaluate.progress = 1e-6  # tolerances of 1e-8
    record, gradient = evaluate(phi)
    assert not record.rejected
    assert record.value == pytest.approx(validation_loss(kind, phi), rel=1e-9)
    differences = [
        (validation_loss(kind, phi + 1e-4 * e) - validation_loss(kind, phi - 1e-4 * e)) / 2e-4
        for e in np.eye(len(phi))
    ]
    # Central differences: of second order in 1e-4, and rounding of 1e-12 over it.
    np.testing.assert_allclose(gradient, differences, atol=2e-7 * np.linalg.norm(differences))


@pytest.mark.parametrize("dense", [0, 1500])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_that_of_dense_algebra(kind, dense, monkeypatch):
    monkeypatch.setattr(problems, "DENSE", dense)  # with and without a held preconditioner
    problem, phi = bilevel(kind)
    theta = np.random.default_rng(1).standard_normal(problem.params.size)
    unit = np.eye(len(theta))
    ridge = np.broadcast_to(problem.ridge(phi), problem.model.shape)
    scale = np.sqrt(problem.model.curvature + ridge).reshape(-1)
    U = (theta / scale).reshape(problem.model.shape)
    at = problem.model.at(U, 1.0)
    H = np.stack([at.product(e.reshape(U.shape)).reshape(-1) for e in unit])
    steps = [
        (problem.model.inner(U + h, 1.0)[1] - problem.model.inner(U - h, 1.0)[1]).reshape(-1) / 2e-5
        for h in 1e-5 * unit.reshape(-1, *U.shape)
    ]
    np.testing.assert_allclose(H, steps, atol=1e-8 * np.abs(H).max())
    q = np.linalg.solve(H + np.diag(ridge.reshape(-1)), at.outer_gradient.reshape(-1))
    wanted = -np.sum(q.reshape(U.shape) * ridge * U, axis=(1, 2))[:D]
    found = problem.differentiate(theta, phi, None, 1e-12)
    np.testing.assert_allclose(found.gradient, wanted, atol=1e-9 * np.linalg.norm(wanted))


def test_the_prior_adds_half_its_strength_times_squared_distances():
    plain, phi = bilevel("gram")
    prior = np.array([0.3, 0.0, 2.0, 1.0])
    problem, _ = bilevel("gram", prior=prior)
    far = phi + np.array([1.0, 2.0, -0.5, 0.0])
    before, after = (each.differentiate(each.params, far, None, 1e-12) for each in (plain, problem))
    assert after.value - before.value == pytest.approx((0.3 * 1.0 + 2.0 * 0.25) / 2, rel=1e-9)
    np.testing.assert_allclose(after.gradient - before.gradient, [0.3, 0, -1.0, 0], atol=1e-12)


def noisy(seed=0, n=400, d=30):
    X, y = make_classification(
        n, d, n_informative=4, n_redundant=0, n_clusters_per_class=1, random_state=seed
    )
    return X, y


def test_one_penalty_is_that_of_ridge_at_the_minimum_of_cross_validation():
    X, y = make_regression(120, 8, n_informative=4, noise=60.0, random_state=0)
    model = GroupRidgeCV("all", tol=1e-7).fit(X, y)
    assert model.reason_ == "converged" and model.alpha_.shape == (1,)
    plain = Ridge(model.alpha_[0]).fit(X, y)
    np.testing.assert_allclose(model.coef_, plain.coef_, atol=1e-8 * np.abs(plain.coef_).max())
    assert model.intercept_ == pytest.approx(plain.intercept_, abs=1e-8 * y.std())

    def error(alpha):
        fits = [(Ridge(alpha).fit(X[a], y[a]), b) for a, b in KFold(5).split(X)]
        return np.mean(np.concatenate([(fit.predict(X[b]) - y[b]) ** 2 for fit, b in fits]))

    assert error(model.alpha_[0]) < min(error(model.alpha_[0] * f) for f in (0.98, 1.02))


@pytest.mark.parametrize("num_classes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_one_penalty_is_that_of_logistic_regression_at_the_minimum(num_classes):
    X, y = noisy(1, 200, 8)
    y = y + (X[:, 0] > 0) * (num_classes - 2)
    model = GroupLogisticRegressionCV("all", tol=1e-6).fit(X, y)
    assert model.reason_ == "converged"

    def fit(alpha, rows):
        return LogisticRegression(C=1 / alpha, tol=1e-10, max_iter=10**4).fit(X[rows], y[rows])

    plain = fit(model.alpha_[0], slice(None))
    np.testing.assert_allclose(model.predict_proba(X), plain.predict_proba(X), atol=1e-6)
    assert model.score(X, y) == plain.score(X, y)

    def loss(alpha):
        parts = [
            log_loss(y[b], fit(alpha, a).predict_proba(X[b]), labels=model.classes_) * len(b)
            for a, b in StratifiedKFold(5).split(X, y)
        ]
        return sum(parts) / len(y)

    assert loss(model.alpha_[0]) < min(loss(model.alpha_[0] * f) for f in (0.97, 1.03))


@pytest.mark.parametrize("groups", ["features", "classes", "coefficients", [0, 0, 1, 1, 2, 2]])
def test_the_fit_is_that_of_its_penalties(groups):
    X, y = noisy(2, 150, 6)
    y = y + (X[:, 1] > 0)
    model = GroupLogisticRegressionCV(groups, tol=0.0, max_iter=6)
    with pytest.warns(ConvergenceWarning, match="all evaluations were used"):
        model.fit(X, y)
    alpha = model.alpha_
    if groups == "classes":
        alpha = alpha[:, None]
    elif not isinstance(groups, str):
        alpha = alpha[np.array(groups)]
    p = model.predict_proba(X)
    slope = (p - np.eye(3)[y]).T @ X + np.broadcast_to(alpha, (3, 6)) * model.coef_
    assert np.abs(slope).max() < 1e-6 * np.abs(X.T @ np.eye(3)[y]).max()
    np.testing.assert_allclose(p.sum(axis=0), np.bincount(y), rtol=1e-7)  # of the intercept


@pytest.mark.parametrize("estimator", [GroupRidgeCV, GroupLogisticRegressionCV])
@pytest.mark.parametrize(
    "shape", [(120, 8), pytest.param((40, 60), marks=pytest.mark.slow)]
)  # few features, and more than examples
def test_sparse_features_give_the_fit_of_dense_ones(estimator, shape):
    rng = np.random.default_rng(0)
    X = rng.standard_normal(shape) * (rng.random(shape) < 0.3) + (np.arange(shape[1]) == 2)
    y = (X[:, 0] + X[:, 1] + 0.5 * rng.standard_normal(shape[0]) > 0) * 1
    model = estimator(tol=0.0, max_iter=4)
    with pytest.warns(ConvergenceWarning):
        dense = model.fit(X, y).coef_
    with pytest.warns(ConvergenceWarning):
        found = model.fit(scipy.sparse.csr_array(X), y).coef_
    np.testing.assert_allclose(found, dense, atol=1e-5 * np.abs(dense).max())


def test_sparse_features_are_dense_in_none_but_small_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    X = scipy.sparse.random_array((80, 40), density=0.2, rng=rng, format="csr")
    y = X[:, [0]].toarray()[:, 0] + 0.3 * rng.standard_normal(80)

    def refuse(*_):
        raise AssertionError("made dense")

    monkeypatch.setattr(problems, "DENSE", 0)  # as if there were many features
    monkeypatch.setattr(regression, "MAX_GRAM", 0)
    monkeypatch.setattr(scipy.sparse.csr_array, "toarray", refuse)
    for model in (GroupRidgeCV(max_iter=2), GroupLogisticRegressionCV(max_iter=2)):
        with pytest.warns(ConvergenceWarning):
            fit = model.fit(X, y if isinstance(model, GroupRidgeCV) else y > 0)
        assert np.any(fit.coef_)


def test_a_penalty_for_each_feature_predicts_better_than_one():
    X, y = noisy(0, 1000, 60)
    one = GroupLogisticRegressionCV("all").fit(X[:500], y[:500])
    each = GroupLogisticRegressionCV().fit(X[:500], y[:500])
    losses = [log_loss(y[500:], fit.predict_proba(X[500:])) for fit in (one, each)]
    assert losses[1] < 0.97 * losses[0]
    informative = np.argsort(-np.abs(one.coef_[0]))[:2]
    assert each.alpha_[informative].max() < np.median(each.alpha_)


@pytest.mark.parametrize("estimator", [GroupRidgeCV, GroupLogisticRegressionCV])
def test_penalties_move_apart_with_their_spread_a_priori(estimator):
    X, y = noisy(3, 300, 20)
    fits = [estimator(spread=spread, tol=1e-3).fit(X, y) for spread in (1e-6, 0.3, 1.0, np.inf)]
    apart = [np.std(np.log(fit.alpha_)) for fit in fits]
    assert apart == sorted(apart) and apart[0] < 1e-6 < 0.01 < apart[1]
    one = estimator("all", tol=1e-3).fit(X, y)
    np.testing.assert_allclose(fits[0].alpha_, one.alpha_[0], rtol=1e-6)


@pytest.mark.slow
def test_a_narrower_prior_keeps_penalties_closer_to_each_other():
    """At a minimum of loss plus weight times deviation, the deviation falls as the weight grows."""
    X, y = noisy(0, 150, 60)
    deviations = [
        np.std(np.log(GroupLogisticRegressionCV(spread=s, tol=1e-3).fit(X, y).alpha_))
        for s in (0.1, 0.5, 2.0, np.inf)
    ]
    assert deviations == sorted(deviations)
    assert deviations[0] < 0.1 < deviations[-1]


def test_the_scale_of_all_features_and_of_targets_changes_nothing():
    X, y = make_regression(120, 8, n_informative=4, noise=60.0, random_state=0)
    plain = GroupRidgeCV().fit(X, y)
    scaled = GroupRidgeCV().fit(2.0**30 * X, 2.0**-20 * y)
    np.testing.assert_allclose(scaled.alpha_, 2.0**60 * plain.alpha_, rtol=1e-6)
    np.testing.assert_allclose(scaled.coef_, 2.0**-50 * plain.coef_, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_columns_of_other_scales_and_constant_ones_do_no_harm(dtype):
    X, y = noisy(0, 200, 6)
    X = (X * [1, 1e6, 1e-6, 1, 1, 1]).astype(dtype)
    X[:, 3], X[:, 4] = 0.1, X[:, 4] + 1e3
    for model in (GroupRidgeCV(), GroupLogisticRegressionCV()):
        fit = model.fit(X, y)
        assert fit.coef_.dtype == dtype and np.all(np.isfinite(fit.coef_))
        assert np.all(fit.coef_[..., 3] == 0)
        assert np.all(fit.alpha_ > 0)


def test_penalties_stay_within_the_bounds_and_those_at_one_are_counted():
    X, y = noisy(0, 400, 20)
    fit = GroupLogisticRegressionCV(bounds=(0.5, 2.0), spread=np.inf, tol=1e-4).fit(X, y)
    ratio = fit.alpha_ / fit.alpha_.min()
    assert ratio.max() == pytest.approx(4.0)
    at = np.isclose(ratio, 1.0, rtol=1e-9) | np.isclose(ratio, 4.0, rtol=1e-9)
    assert fit.num_at_bounds_ == at.sum() > 5


def test_separable_classes_have_a_fit():
    X, y = make_classification(80, 5, class_sep=5.0, random_state=0)
    X = X + 20 * y[:, None]
    fit = GroupLogisticRegressionCV().fit(X, y)
    assert fit.score(X, y) == 1.0 and np.all(np.isfinite(fit.coef_))


@pytest.mark.parametrize("estimator", [GroupRidgeCV, GroupLogisticRegressionCV])
def test_fits_of_more_features_than_examples_that_do_not_end_are_warned_of(estimator, monkeypatch):
    X = np.random.default_rng(0).standard_normal((30, 80))
    y = (X[:, 0] > 0) * 1
    monkeypatch.setattr(problems, "DENSE", 0)  # as if there were many features
    monkeypatch.setattr(base, "INNER_STEPS", 2)
    with pytest.warns(ConvergenceWarning) as met:
        model = estimator().fit(X, y)
    assert model.reason_ == "inner_unsolved"
    first, last = (str(warning.message) for warning in met)
    assert first.startswith("the inner problem could not be minimised. Fits of more coefficients")
    assert last.startswith("the last fit did not end within 2 steps.")
    assert "raise the lower of `bounds`" in first and "raise the lower of `bounds`" in last


def test_weights_of_examples_find_wrong_labels_and_of_classes_are_one_each():
    rng = np.random.default_rng(0)
    X, y = make_classification(300, 6, n_informative=4, class_sep=1.5, random_state=0)
    wrong = np.zeros(300, bool)
    wrong[:200] = rng.random(200) < 0.3
    labels = np.where(wrong, 1 - y, y)
    clean = [(np.arange(200), np.arange(200, 300))]
    cleaner = GroupLogisticRegressionCV("all", cv=clean, learn_weights="examples").fit(X, labels)
    assert roc_auc_score(~wrong[:200], cleaner.weights_[:200]) > 0.8
    assert np.all(cleaner.weights_[200:] == 1) and cleaner.weights_.min() >= 1e-3 * (1 - 1e-12)
    weighed = GroupLogisticRegressionCV("all", learn_weights="classes").fit(X, labels)
    assert weighed.weights_.shape == (2,) and weighed.weights_.max() <= 1


def test_a_class_may_be_missing_from_validation_but_not_from_training():
    X, y = noisy(0, 60, 4)
    y = y + (np.arange(60) < 3)  # the third class is in the first rows
    rows, late = np.arange(60), np.arange(30, 60)
    fit = GroupLogisticRegressionCV("all", cv=[(rows[:40], late)]).fit(X, y)
    assert len(fit.classes_) == 3
    with pytest.raises(ValueError, match=r"training set; that of split 0 has none of class"):
        GroupLogisticRegressionCV(cv=[(late, rows[:30])]).fit(X, y)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": "pixels"}, "`groups` must be one of 'features', 'all', or a label"),
        ({"groups": [0, 1]}, r"shape \(4,\); got shape \(2,\)"),
        ({"bounds": (1.0, 0.5)}, "`bounds` must be a smaller and a larger penalty"),
        ({"bounds": (0.0, 1.0)}, "`bounds` must be finite and > 0"),
        ({"tol": -1.0}, "`tol` must be finite and >= 0"),
        ({"max_iter": 0}, "`max_iter` must be at least 1"),
        ({"spread": 0.0}, "`spread` must be > 0, or inf for no prior; got 0.0"),
        ({"cv": [(np.arange(30), np.zeros(0, int))]}, "every validation set; that of split 0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    X, y, *_ = examples("squared")
    with pytest.raises(ValueError, match=message):
        GroupRidgeCV(**settings).fit(X, y)


def test_bad_labels_and_kinds_of_weights_are_refused():
    X, y, *_ = examples("logistic")
    with pytest.raises(ValueError, match="`y` must have at least two classes; got one class"):
        GroupLogisticRegressionCV().fit(X, np.ones(N, int))
    with pytest.raises(ValueError, match="`learn_weights` must be None, 'classes' or 'examples'"):
        GroupLogisticRegressionCV(learn_weights="rows").fit(X, y)
