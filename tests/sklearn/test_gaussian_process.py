"""Gaussian process regression, factored and iterative."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

pytest.importorskip("sklearn", minversion="1.6", reason="scikit-learn 1.6 is not installed")
import sklearn.gaussian_process as theirs
from sklearn.base import clone
from sklearn.datasets import make_friedman1
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, Matern, WhiteKernel
from sklearn.utils.estimator_checks import parametrize_with_checks

from lowrank_inverse.sklearn import GaussianProcessRegressor
from tests.oracles import LONG, solve
from tests.sklearn.friedman import NEW, TARGETS, X, Y

EACH = np.array([0.5, 0.8, 1.0, 1.5, 2.0, 3.0])
START = {"signal_variance": 2.0, "noise": 0.3}
KERNELS = {
    "rbf": RBF,
    "matern 0.5": lambda scale: Matern(scale, nu=0.5),
    "matern 1.5": lambda scale: Matern(scale, nu=1.5),
    "matern 2.5": lambda scale: Matern(scale, nu=2.5),
}
ITERATIVE = {"memory_budget": 0, "random_state": 0}


def ours(kernel="rbf", lengthscale=1.3, **options):
    name, _, nu = kernel.partition(" ")
    options = {"optimizer": None, **START, **options}
    return GaussianProcessRegressor(name, nu=float(nu or 2.5), lengthscale=lengthscale, **options)


def dense_likelihood(points, targets, theta, nu=None):
    """Return the log likelihood in long double, by elimination; of the RBF or a Matérn kernel."""
    n = len(points)
    theta = np.asarray(theta, dtype=LONG)
    scaled = points.astype(LONG) / np.exp(theta[1:-1])
    squares = ((scaled[:, None] - scaled[None]) ** 2).sum(-1)
    K = np.exp(-squares / 2)
    if nu is not None:
        s = np.sqrt(2 * LONG(nu) * squares)
        K = {0.5: 1, 1.5: 1 + s, 2.5: 1 + s + s * s / 3}[nu] * np.exp(-s)
    G = np.exp(theta[0]) * K + np.exp(theta[-1]) * np.eye(n)
    pivots = []
    S = G.copy()
    for j in range(n):
        pivots.append(S[j, j])
        S[j + 1 :, j + 1 :] -= np.outer(S[j + 1 :, j], S[j, j + 1 :]) / S[j, j]
    fit = (targets * solve(G, targets)).sum()
    log_det = np.sum(np.log(np.array(pivots)))
    return -(fit + targets.shape[1] * (log_det + n * np.log(2 * LONG(np.pi)))) / 2


@parametrize_with_checks([GaussianProcessRegressor()])
def test_scikit_learn_accepts_the_estimator(estimator, check):
    check(estimator)


@pytest.mark.slow
@parametrize_with_checks(
    [
        GaussianProcessRegressor("matern", lengthscale="features", normalize_y=False),
        GaussianProcessRegressor(rank=50, noise=1.0, optimizer=None, **ITERATIVE),
        GaussianProcessRegressor(rank=50, fixed="noise", **ITERATIVE),
    ]
)
def test_scikit_learn_accepts_its_other_ways(estimator, check):
    check(estimator)


@pytest.mark.parametrize("lengthscale", [1.3, EACH], ids=["one", "each"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_factored_it_is_that_of_scikit_learn(kernel, lengthscale):
    for targets, normalize_y in ((Y, True), (TARGETS, False)):
        prior = ConstantKernel(2.0) * KERNELS[kernel](lengthscale) + WhiteKernel(0.3)
        shared = {"optimizer": None, "normalize_y": normalize_y}
        wanted = theirs.GaussianProcessRegressor(prior, alpha=0, **shared).fit(X, targets)
        model = ours(kernel, lengthscale, **shared).fit(X, targets)
        np.testing.assert_allclose(model.theta_, wanted.kernel_.theta, rtol=1e-14)
        theta = model.theta_ + np.linspace(-0.3, 0.4, model.theta_.size)
        value, slope = model.log_marginal_likelihood(theta, eval_gradient=True)
        their_value, their_slope = wanted.log_marginal_likelihood(theta, eval_gradient=True)
        assert abs(value - their_value) < 1e-8 * abs(their_value)
        assert np.abs(slope - their_slope).max() < 1e-8 * np.abs(their_slope).max()
        assert model.log_marginal_likelihood_error_ == 0
        for form in ("return_std", "return_cov"):
            mean, spread = model.predict(NEW, **{form: True}, include_noise=True)
            their_mean, their_spread = wanted.predict(NEW, **{form: True})
            np.testing.assert_allclose(mean, their_mean, rtol=1e-6, atol=1e-9)
            np.testing.assert_allclose(spread, their_spread, rtol=1e-6, atol=1e-9)


ALPHA = np.random.default_rng(5).uniform(0.0, 0.5, len(Y)) ** 2


def test_known_noise_of_each_observation_is_that_of_scikit_learn():
    prior = ConstantKernel(2.0) * RBF(1.3) + WhiteKernel(0.3)
    wanted = theirs.GaussianProcessRegressor(
        prior, alpha=ALPHA, optimizer=None, normalize_y=True
    ).fit(X, Y)
    model = ours(alpha=ALPHA).fit(X, Y)
    value, slope = model.log_marginal_likelihood(model.theta_, eval_gradient=True)
    their_value, their_slope = wanted.log_marginal_likelihood(model.theta_, eval_gradient=True)
    assert abs(value - their_value) < 1e-8 * abs(their_value)
    assert np.abs(slope - their_slope).max() < 1e-8 * np.abs(their_slope).max()
    for mine, its in zip(
        model.predict(NEW, return_std=True, include_noise=True),
        wanted.predict(NEW, return_std=True),
        strict=True,
    ):
        np.testing.assert_allclose(mine, its, rtol=1e-6, atol=1e-9)
    one = ours(alpha=0.1, noise=0.2).fit(X, Y)
    np.testing.assert_allclose(one.predict(NEW), ours().fit(X, Y).predict(NEW), atol=1e-9)


@pytest.mark.parametrize("held", [False, True])
def test_iterative_with_known_noise_it_is_the_factored_one(held):
    n = 120
    exact = ours(alpha=ALPHA[:n]).fit(X[:n], Y[:n])
    options = {"rank": n, "memory_budget": 8 * n * n if held else 0, "tol": 1e-11}
    value, slope = exact.log_marginal_likelihood(exact.theta_, eval_gradient=True)
    found, errors = [], []
    for seed in range(8):
        model = ours(alpha=ALPHA[:n], random_state=seed, **options).fit(X[:n], Y[:n])
        found.append(model.log_marginal_likelihood(model.theta_, eval_gradient=True))
        errors.append(model.log_marginal_likelihood_error_)
    # The mean of eight estimates, each of sixteen probes: five standard errors.
    assert abs(np.mean([f[0] for f in found]) - value) < 5 * np.mean(errors) / 8**0.5
    slopes = np.array([f[1] for f in found])
    spread = slopes.std(axis=0, ddof=1) / 8**0.5
    assert np.all(np.abs(slopes.mean(axis=0) - slope) < 6 * spread + 1e-9)
    for exact_variance in (False, True):
        model.exact_variance = exact_variance
        model.fit(X[:n], Y[:n])
        for mine, its in zip(
            model.predict(NEW, return_std=True), exact.predict(NEW, return_std=True), strict=True
        ):
            assert np.abs(mine - its).max() < 1e-7 * np.abs(its).max()


def test_without_noise_the_spread_is_that_of_the_function():
    model = ours().fit(X, Y)
    prior = ConstantKernel(2.0) * RBF(1.3)
    wanted = theirs.GaussianProcessRegressor(prior, alpha=0.3, optimizer=None, normalize_y=True)
    for form in ("return_std", "return_cov"):
        found = model.predict(NEW, **{form: True})[1]
        np.testing.assert_allclose(found, wanted.fit(X, Y).predict(NEW, **{form: True})[1], 1e-6)


@pytest.mark.filterwarnings("ignore:The optimal value found for dimension")
@pytest.mark.parametrize("kernel", ["rbf", "matern 2.5"])
def test_the_optimum_is_as_likely_as_that_of_scikit_learn(kernel):
    noisy = Y + np.random.default_rng(0).standard_normal(len(Y))
    model = ours(kernel, "features", optimizer="fmin_l_bfgs_b").fit(X, noisy)
    prior = ConstantKernel(2.0) * KERNELS[kernel](X.std(axis=0) * 6**0.5) + WhiteKernel(0.3)
    wanted = theirs.GaussianProcessRegressor(prior, alpha=0, normalize_y=True).fit(X, noisy)
    least = wanted.log_marginal_likelihood_value_
    assert model.log_marginal_likelihood_value_ > least - 1e-3 * abs(least)
    value, slope = model.log_marginal_likelihood(eval_gradient=True)
    assert value == model.log_marginal_likelihood_value_
    limits = np.log(model.bounds)
    inside = np.abs(model.theta_ - model._start.free(())) < limits[1] - 1e-6
    assert np.abs(slope[inside]).max() < 0.05


def test_restarts_find_what_the_start_misses():
    P = np.linspace(0, 10, 40)[:, None]
    t = np.sin(3 * P[:, 0]) + 0.2 * np.random.default_rng(0).standard_normal(40)
    start = {"lengthscale": 30.0, "noise": 10.0, "optimizer": "fmin_l_bfgs_b"}
    alone = ours(**start).fit(P, t)
    many = ours(**start, n_restarts_optimizer=8, random_state=0).fit(P, t)
    again = clone(many).fit(P, t)
    assert many.log_marginal_likelihood_value_ >= alone.log_marginal_likelihood_value_
    assert many.lengthscale_ < 3
    np.testing.assert_array_equal(many.theta_, again.theta_)


def test_what_is_fixed_stays_and_the_rest_stays_within_its_bounds():
    options = {"optimizer": "fmin_l_bfgs_b", "bounds": (0.5, 2.0)}
    model = ours(fixed=["noise", "lengthscale"], **options).fit(X, Y)
    assert (model.noise_, model.lengthscale_) == (0.3, 1.3)
    assert model.theta_.shape == (1,) and 1 <= model.signal_variance_ <= 4 * (1 + 1e-12)
    assert model.log_marginal_likelihood(model.theta_, eval_gradient=True)[1].shape == (1,)
    model = ours(fixed=["noise", "lengthscale", "signal_variance"], **options).fit(X, Y)
    assert model.theta_.size == 0 and model.predict(NEW).shape == (len(NEW),)
    assert model.log_marginal_likelihood([], eval_gradient=True)[1].shape == (0,)


@pytest.mark.parametrize("kernel", ["rbf", "matern 0.5", "matern 1.5"])
@pytest.mark.parametrize("held", [False, True])
def test_iterative_with_all_columns_it_is_the_factored_one(kernel, held):
    n = 120
    budget = 8 * n * n if held else 0
    for lengthscale, targets in ((1.3, TARGETS[:n]), (EACH, Y[:n])):
        exact = ours(kernel, lengthscale).fit(X[:n], targets)
        model = ours(kernel, lengthscale, rank=n, memory_budget=budget, tol=1e-11, random_state=0)
        model.fit(X[:n], targets)
        theta = exact.theta_ + 0.1
        value, slope = exact.log_marginal_likelihood(theta, eval_gradient=True)
        found, its_slope = model.log_marginal_likelihood(theta, eval_gradient=True)
        assert abs(found - value) < 1e-8 * abs(value)
        assert np.abs(its_slope - slope).max() < 1e-8 * np.abs(slope).max()
        for exact_variance in (False, True):
            model.exact_variance = exact_variance
            model.fit(X[:n], targets)
            for form in ("return_std", "return_cov"):
                for mine, its in zip(
                    model.predict(NEW, **{form: True}),
                    exact.predict(NEW, **{form: True}),
                    strict=True,
                ):
                    assert np.abs(mine - its).max() < 1e-7 * np.abs(its).max()


@pytest.mark.parametrize("kernel", ["rbf", "matern 1.5"])
def test_its_error_falls_with_rank_and_its_variance_is_never_too_small(kernel):
    exact = ours(kernel, EACH).fit(X, Y)
    value, slope = exact.log_marginal_likelihood(eval_gradient=True)
    mean, cov = exact.predict(NEW, return_cov=True)
    std = exact.predict(NEW, return_std=True)[1]
    errors = []
    for rank in (20, 60, 180):
        model = ours(kernel, EACH, rank=rank, **ITERATIVE).fit(X, Y)
        found, its_slope = model.log_marginal_likelihood(eval_gradient=True)
        assert found == model.log_marginal_likelihood_value_
        assert abs(found - value) < 5 * model.log_marginal_likelihood_error_
        its_mean, its_cov = model.predict(NEW, return_cov=True)
        its_std = model.predict(NEW, return_std=True)[1]
        np.testing.assert_allclose(its_mean, mean, atol=1e-4 * Y.std())
        np.testing.assert_allclose(its_std**2, np.diagonal(its_cov), rtol=1e-10)
        assert (its_std > std * (1 - 1e-10)).all()
        assert np.linalg.eigvalsh(its_cov - cov)[0] > -1e-10 * np.linalg.norm(cov)
        errors.append(
            [
                model.log_marginal_likelihood_error_,
                np.abs(its_slope - slope).max(),
                np.abs(its_std - std).max(),
            ]
        )
    assert (np.diff(errors, axis=0) < 0).all(), errors


@pytest.mark.slow
def test_estimates_are_right_on_average_and_as_uncertain_as_they_say():
    exact = ours("matern 2.5", EACH).fit(X, Y)
    value, slope = exact.log_marginal_likelihood(exact.theta_, eval_gradient=True)
    errors, claimed = [], []
    for seed in range(60):
        model = ours("matern 2.5", EACH, rank=20, num_probes=8, memory_budget=0, random_state=seed)
        found, its_slope = model.fit(X, Y).log_marginal_likelihood(eval_gradient=True)
        errors.append([found - value, *(its_slope - slope)])
        claimed.append(model.log_marginal_likelihood_error_)
    spread = np.std(errors, axis=0)
    assert (np.abs(np.mean(errors, axis=0)) < 4 * spread / 60**0.5).all()
    assert 0.5 < np.mean(claimed) / spread[0] < 1.5
    assert (spread[1:] < 0.05 * np.linalg.norm(slope)).all()


def test_a_solve_for_each_variance_bounds_it_as_closely_as_the_residual():
    exact = ours("matern 1.5", EACH).fit(X, Y)
    std = exact.predict(NEW, return_std=True)[1]
    for tol in (0.3, 1e-2, 1e-6):
        model = ours("matern 1.5", EACH, rank=20, tol=tol, exact_variance=True, **ITERATIVE)
        found = model.fit(X, Y).predict(NEW, return_std=True)[1]
        C = 2.0 * model._covariance.K.evaluate(X, NEW)
        most = (tol * np.linalg.norm(C, axis=0)) ** 2 / 0.3 * Y.var()
        excess = found**2 - std**2
        assert (excess > -1e-10 * Y.var()).all() and (excess < most + 1e-10 * Y.var()).all()


@pytest.mark.slow
def test_in_tiles_nothing_is_as_large_as_the_matrix():
    P, t = make_friedman1(3000, n_features=6, noise=0.5, random_state=0)
    model = ours(rank=20, num_probes=2, tol=1e-3, noise=1.0, **ITERATIVE)
    tracemalloc.start()
    model.fit(P, t).log_marginal_likelihood(eval_gradient=True)
    model.predict(P[:100], return_std=True)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * len(P) ** 2 / 3


@pytest.mark.slow
def test_the_iterative_optimum_is_near_the_factored_one():
    exact = ours("rbf", EACH, optimizer="fmin_l_bfgs_b").fit(X, Y)
    model = ours("rbf", EACH, optimizer="fmin_l_bfgs_b", rank=120, **ITERATIVE).fit(X, Y)
    there = exact.log_marginal_likelihood(model.theta_)
    assert there > exact.log_marginal_likelihood_value_ - 0.5
    again = clone(model).fit(X, Y)
    np.testing.assert_array_equal(again.theta_, model.theta_)


@pytest.mark.parametrize("nu", [None, 0.5, 1.5, 2.5])
def test_likelihood_and_slope_are_right_in_extended_precision(nu):
    P, t = np.vstack([X[:18], X[:2]]), TARGETS[:20]  # two points twice
    model = ours("rbf" if nu is None else f"matern {nu}", EACH, normalize_y=False).fit(P, t)
    theta = model.theta_ - 0.2
    value, slope = model.log_marginal_likelihood(theta, eval_gradient=True)
    assert value == pytest.approx(float(dense_likelihood(P, t, theta, nu)), rel=1e-12)
    for i, step in enumerate(np.eye(theta.size) * 1e-5):
        up, down = (dense_likelihood(P, t, theta + sign * step, nu) for sign in (1, -1))
        assert slope[i] == pytest.approx(float((up - down) / LONG(2e-5)), rel=1e-7, abs=1e-7)


def test_many_features_have_their_slopes_too():
    P = np.random.default_rng(0).standard_normal((60, 25)) + 1e4  # a shift costs no digits
    scales = np.linspace(3.0, 9.0, 25)
    model = ours("matern 2.5", scales).fit(P, P[:, 0] * P[:, 1])
    prior = ConstantKernel(2.0) * Matern(scales, nu=2.5) + WhiteKernel(0.3)
    wanted = theirs.GaussianProcessRegressor(prior, alpha=0, optimizer=None, normalize_y=True)
    wanted.fit(P - 1e4, P[:, 0] * P[:, 1])
    slope = model.log_marginal_likelihood(eval_gradient=True)[1]
    expected = wanted.log_marginal_likelihood(model.theta_, eval_gradient=True)[1]
    assert np.abs(slope - expected).max() < 1e-8 * np.abs(expected).max()


@pytest.mark.filterwarnings("ignore:a solve did not meet its tolerance")
def test_equal_points_and_tiny_noise_give_no_negative_variance():
    P = np.repeat(X[:20], 3, axis=0)
    for options in ({}, {"rank": 10, **ITERATIVE}, {"exact_variance": True, **ITERATIVE}):
        model = ours(noise=1e-10, **options).fit(P, np.repeat(Y[:20], 3))
        std = model.predict(P, return_std=True)[1]
        assert np.isfinite(std).all() and (std >= 0).all()
        assert (np.diagonal(model.predict(P, return_cov=True)[1]) >= 0).all()


def test_a_quadrature_that_ends_early_warns(monkeypatch):
    import lowrank_inverse.sklearn.iterative_covariance as module

    monkeypatch.setattr(module, "NUM_STEPS", 3)
    with pytest.warns(ConvergenceWarning, match=r"quadrature of the likelihood .* Raise `rank`"):
        ours("matern 0.5", rank=5, **ITERATIVE).fit(X, Y)


def test_solves_that_end_early_warn():
    model = ours(rank=20, max_iter=2, exact_variance=True, **ITERATIVE)
    with pytest.warns(ConvergenceWarning, match=r"did not meet its tolerance: .* Raise `rank`"):
        model.fit(X, Y)
    with pytest.warns(ConvergenceWarning, match=r"relative residual"):
        std = model.predict(NEW, return_std=True)[1]
    exact = ours().fit(X, Y).predict(NEW, return_std=True)[1]
    assert (std > exact * (1 - 1e-10)).all()  # too large, if anything


@pytest.mark.parametrize("targets", [Y, TARGETS], ids=["one", "two"])
def test_samples_have_the_mean_and_the_covariance_of_predictions(targets):
    model = ours().fit(X, targets)
    samples = model.sample_y(NEW[:4], 20000, random_state=1)
    mean, cov = model.predict(NEW[:4], return_cov=True)
    assert samples.shape == (*mean.shape, 20000)
    first = samples if targets.ndim == 1 else samples[:, 0]
    cov = cov if targets.ndim == 1 else cov[..., 0]
    wanted = mean if targets.ndim == 1 else mean[:, 0]
    deviation = np.sqrt(np.diagonal(cov))
    assert (np.abs(first.mean(axis=1) - wanted) < 5 * deviation / 20000**0.5).all()
    assert np.abs(np.cov(first) - cov).max() < 0.06 * np.abs(cov).max()
    np.testing.assert_array_equal(samples, model.sample_y(NEW[:4], 20000, random_state=1))


def test_units_of_points_and_targets_change_nothing_but_the_units():
    model = GaussianProcessRegressor(lengthscale="features").fit(X, Y)
    other = clone(model).fit(X * 1e12, Y * 1e-9)
    np.testing.assert_allclose(other.theta_[[0, -1]], model.theta_[[0, -1]], rtol=1e-3)
    np.testing.assert_allclose(other.lengthscale_ / 1e12, model.lengthscale_, rtol=1e-2)
    mean, std = model.predict(NEW, return_std=True)
    its_mean, its_std = other.predict(NEW * 1e12, return_std=True)
    np.testing.assert_allclose(its_mean * 1e9, mean, rtol=1e-3)
    np.testing.assert_allclose(its_std * 1e9, std, rtol=1e-2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel": "polynomial"}, "`kernel` must be 'rbf' or 'matern'; got 'polynomial'"),
        ({"noise": 0.0}, "`noise` must be finite and > 0"),
        ({"signal_variance": -1.0}, "`signal_variance` must be finite and > 0"),
        ({"lengthscale": "wide"}, "`lengthscale` must be positive, 'scale' or 'features'"),
        ({"lengthscale": np.ones(5)}, "`lengthscale` must"),
        ({"fixed": ["alpha"]}, "`fixed` must hold some of"),
        ({"bounds": (2.0, 3.0)}, "`bounds` must be two factors"),
        ({"optimizer": "adam"}, "`optimizer` must be 'fmin_l_bfgs_b' or None; got 'adam'"),
        ({"rank": 0}, "`rank` must be at least 1"),
        ({"alpha": -1.0}, "`alpha` must be finite and >= 0"),
        ({"alpha": np.ones(3)}, "`alpha` must be a number or hold one for each of the"),
    ],
)
def test_bad_settings_are_refused_by_fit(settings, message):
    with pytest.raises(ValueError, match=message):
        GaussianProcessRegressor(**settings).fit(X, Y)


def test_a_covariance_without_a_factor_says_what_to_do():
    with pytest.raises(np.linalg.LinAlgError, match="raise `noise`"):
        ours(noise=1e-30).fit(np.repeat(X[:20], 2, axis=0), np.repeat(Y[:20], 2))


def test_bad_calls_are_refused():
    model = ours().fit(X, Y)
    with pytest.raises(ValueError, match="`theta` must hold 3 finite logarithms"):
        model.log_marginal_likelihood([0.0, 0.0])
    with pytest.raises(ValueError, match="one of `return_std` and `return_cov`"):
        model.predict(NEW, return_std=True, return_cov=True)
    value, slope = model.log_marginal_likelihood([0.0, 20.0, -60.0], eval_gradient=True)
    assert value == -np.inf and (slope == 0).all()


def test_an_optimiser_that_ends_early_warns(monkeypatch):
    import lowrank_inverse.sklearn.hyperparameters as module

    minimize = module.minimize
    monkeypatch.setattr(
        module, "minimize", lambda *a, **k: minimize(*a, **k, options={"maxiter": 1})
    )
    with pytest.warns(ConvergenceWarning, match="the optimiser ended early"):
        ours(optimizer="fmin_l_bfgs_b").fit(X, Y)
