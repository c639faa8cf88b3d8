"""The experiments with influence functions: against training again, and beside other libraries."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn", reason="the experiments need scikit-learn's digits: extra `dev`")

from scipy.stats import spearmanr

from benchmarks.influence import language, leaveoneout, libraries, methods, truth
from lowrank_inverse.influence.metrics import leave_one_out
from tests.benchmarks.conftest import refused, text, written
from tests.conftest import assert_picture

L2, NUM_QUERY, NUM_REMOVED = 0.01, 20, 25


@pytest.fixture(scope="module")
def trained():
    digits = leaveoneout.load_problem(0)
    trainer = leaveoneout.Trainer(digits.train_x, digits.train_y, L2)
    return digits, trainer, trainer.fit()


def test_the_trainer_ends_at_the_minimum_that_torch_sees(trained):
    digits, trainer, theta = trained
    found = leaveoneout.influence_function(digits, theta, L2)
    assert found.info.gradient_norm < 1e-11
    rng = np.random.default_rng(0)
    w, step = rng.random(len(digits.train_x)), rng.standard_normal(theta.shape)
    ahead = trainer.gradient(theta + 1e-6 * step, w) - trainer.gradient(theta - 1e-6 * step, w)
    product = trainer.hessian(theta, w) @ step.reshape(-1)
    assert np.allclose(product, ahead.reshape(-1) / 2e-6, rtol=1e-5, atol=1e-8)


def test_influence_agrees_with_training_again_without_each_image(trained):
    digits, trainer, theta = trained
    query = slice(0, NUM_QUERY)
    x, y = digits.test_x[query], digits.test_y[query]
    before = leaveoneout.losses(x, y, theta)
    removed = np.random.default_rng(0).permutation(leaveoneout.NUM_TRAIN)[:NUM_REMOVED]
    refitted = [trainer.fit_without(int(i), theta) for i in removed]
    for i, one in zip(removed, refitted, strict=True):
        w = np.ones(leaveoneout.NUM_TRAIN)
        w[i] = 0
        assert np.linalg.norm(trainer.gradient(one, w)) < 1e-11
    actual = np.stack([leaveoneout.losses(x, y, one) - before for one in refitted], axis=1)
    found = leaveoneout.influence_function(digits, theta, L2)
    data = torch.tensor(x), torch.tensor(y)
    scores = found.scores(data).numpy()[:, removed] / leaveoneout.NUM_TRAIN
    agreement = leave_one_out(scores, actual)
    assert agreement.pearson >= 0.999
    assert agreement.spearman >= 0.999
    assert agreement.slope == pytest.approx(1, abs=0.1)
    largest = int(np.argmax(np.abs(actual).sum(axis=0)))
    truth = actual[:, largest]
    effects = [
        found.removal_effect(data, [removed[largest]], leverage=leverage).numpy()
        for leverage in (False, True)
    ]
    assert np.allclose(effects[0], scores[:, largest], rtol=0, atol=1e-4 * np.abs(truth).max())
    errors = [np.linalg.norm(effect - truth) / np.linalg.norm(truth) for effect in effects]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.slow
def test_the_comparison_with_training_again_has_its_table_and_its_picture(tmp_path):
    assert leaveoneout.main(["--removals", "40", "--output", str(tmp_path)]) == 0
    results = written(tmp_path, "leaveoneout")
    assert results["agreement"]["influence"]["pearson"] >= 0.999
    assert results["agreement"]["gradient product"]["pearson"] < 0.9
    assert_picture(tmp_path / "leaveoneout.png")
    assert "influence" in text(tmp_path, "leaveoneout")


@pytest.mark.slow
def test_the_comparison_of_libraries_runs_what_is_here_and_names_what_is_not(tmp_path):
    own = ["lowrank-inverse default", "lowrank-inverse gradient product"]
    options = ["--width", "6", "--methods", *own, "pyDVL CG", "--output", str(tmp_path)]
    assert libraries.main(options) == 0
    found = written(tmp_path, "influence-460")["methods"]
    assert found[own[0]]["spearman"] > 0.9999
    assert found[own[1]]["spearman"] < 0.9
    assert found[own[0]]["peak_mib"] < 300
    assert found["pyDVL CG"] == {"left out": "not installed"}
    assert "Left out: pyDVL CG (not installed)." in text(tmp_path, "influence-460")


@pytest.mark.slow
def test_training_again_is_what_influence_predicts(tmp_path, calls):
    own = ["lowrank-inverse default", "lowrank-inverse CG, EK-FAC", "lowrank-inverse gradients"]
    options = ["--networks", "digits regression", "--methods", *own]
    sizes = ["--train", "60", "--halves", "8", "--removals", "8", "--output", str(tmp_path)]
    assert truth.main([*options, *sizes]) == 0
    results = written(tmp_path, "influence_truth")
    found = {key.removeprefix("digits regression, "): v for key, v in results["methods"].items()}
    assert results["problems"]["digits regression"]["gradient"] < 1e-7
    assert found[own[0]]["one_out"]["pearson"] > 0.9
    assert found[own[0]]["one_out"]["pearson"] > found[own[2]]["one_out"]["pearson"]
    assert found[own[1]]["lds"] == pytest.approx(found[own[0]]["lds"], abs=1e-2)
    assert_picture(tmp_path / "influence_truth.png")


@pytest.mark.slow
def test_in_a_language_model_influence_predicts_tuning_again(tmp_path, calls):
    own = ["lowrank-inverse CG", "lowrank-inverse gradients"]
    shape = ["--width", "32", "--layers", "1", "--vocabulary", "300", "--length", "8"]
    sizes = ["--train", "80", "--queries", "3", "--epochs", "1", "--halves", "8", "--steps", "15"]
    options = [*shape, *sizes, "--methods", *own, "--output", str(tmp_path)]
    assert language.main(options) == 0
    found = written(tmp_path, "influence_language")["methods"]
    assert found[own[0]]["residual"] <= 1e-3
    assert found[own[0]]["lds"] > max(0.9, found[own[1]]["lds"])


def test_the_agreement_is_the_mean_rank_correlation():
    a, b = np.random.default_rng(0).standard_normal((2, 3, 40))
    expected = np.mean([spearmanr(x, y)[0] for x, y in zip(a, b, strict=True)])
    assert methods.agreement(a, b) == pytest.approx(expected, rel=1e-12)


def test_the_experiments_refuse_bad_options(capsys):
    message = "--removals must be at least 2; got 1"
    refused(leaveoneout.main, ["--removals", "1"], message, capsys)
    refused(libraries.main, ["--width", "0"], "--width must be at least 1; got 0", capsys)
