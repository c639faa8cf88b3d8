"""Hyper-cleaning, state and minibatches run from end to end, and show what they are to show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="the demo needs the extra `torch`")
pytest.importorskip("sklearn", reason="the demo needs scikit-learn's digits: extra `dev`")

from benchmarks.bilevel import cleaning, hypercleaning, minibatch, state
from tests.benchmarks.conftest import refused, text, written
from tests.conftest import assert_picture

PRODUCTS = ["Neumann", "CG", "Nyström, Krylov", "Nyström, uniform", "Nyström-CG, uniform"]
METHODS = ["identity", *PRODUCTS, "exact"]
STEPS = 2


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with few examples and two outer steps."""
    folder = tmp_path_factory.mktemp("demo") / "not" / "there"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cleaning, "NUM_TRAIN", 120)
        patch.setattr(cleaning, "NUM_VALIDATION", 100)
        options = ["--steps", str(STEPS), "--seed", "1", "--output", str(folder)]
        assert hypercleaning.main(options) == 0
    return folder


def test_the_demo_runs_all_inverses_side_by_side(demo):
    results = written(demo, "hypercleaning")
    assert list(results["runs"]) == METHODS
    lines = text(demo, "hypercleaning").splitlines()
    assert [line.split("  ")[0] for line in lines[2:9]] == METHODS
    for heading in ("relative error", "cosine", "products", "ms", "validation loss"):
        assert heading in lines[0]
    assert_picture(demo / "hypercleaning.png")
    assert results["machine"]["seed"] == 1
    assert {"python", "torch", "numpy", "lowrank-inverse"} <= results["machine"]["versions"].keys()


def test_in_the_demo_the_exact_inverse_is_exact_and_others_come_closer_than_the_identity(demo):
    runs = written(demo, "hypercleaning")["runs"]
    assert runs["exact"]["relative_error"] == 0
    assert runs["exact"]["cosine"] == pytest.approx(1, abs=1e-12)
    assert runs["CG"]["relative_error"] < 0.1 * runs["identity"]["relative_error"]
    assert runs["Nyström-CG, uniform"]["relative_error"] < runs["identity"]["relative_error"]
    assert runs["Neumann"]["relative_error"] < runs["identity"]["relative_error"]
    assert runs["Nyström, Krylov"]["relative_error"] < 0.1 * runs["identity"]["relative_error"]
    assert runs["CG"]["cosine"] > runs["identity"]["cosine"]
    assert all(0 <= run["cosine"] <= 1 + 1e-12 for run in runs.values())


def test_in_the_demo_every_method_but_the_exact_one_has_about_the_same_number_of_products(
    demo,
):
    runs = written(demo, "hypercleaning")["runs"]
    features = 65
    assert runs["exact"]["num_products"] >= features * cleaning.NUM_CLASSES
    assert runs["identity"]["num_products"] == 1
    for name in PRODUCTS:
        assert 1 <= runs[name]["num_products"] / hypercleaning.NUM_PRODUCTS <= 1.5


def test_in_the_demo_every_outer_loop_lowers_the_validation_loss_from_one_start(demo):
    runs = written(demo, "hypercleaning")["runs"]
    for run in runs.values():
        assert len(run["losses"]) == STEPS + 1
        assert run["losses"][0] == pytest.approx(runs["exact"]["losses"][0], rel=1e-6)
        assert run["losses"][-1] < run["losses"][0]
        assert 0 <= run["accuracy"] <= 1
        assert len(run["weights"]) == 120
        assert all(0 <= weight <= 1 for weight in run["weights"])
        assert run["seconds"] > 0
    assert runs["exact"]["losses"][-1] < runs["identity"]["losses"][-1]
    assert runs["CG"]["losses"][-1] == pytest.approx(runs["exact"]["losses"][-1], rel=1e-2)
    assert runs["exact"]["detection"] > 0.7  # wrong labels have the lower weights


def test_the_demo_ends_at_the_optimum(demo):
    results = written(demo, "hypercleaning")
    least = results["minimum"]
    assert least["reason"] == "converged"
    assert all(least["loss"] < run["losses"][-1] for run in results["runs"].values())
    row = text(demo, "hypercleaning").splitlines()[9].split()
    assert row[:2] == ["minimize_bilevel", f"{least['loss']:.4f}"]
    assert least["detection"] > 0.7


def test_the_data_of_the_demo_have_half_of_their_training_labels_replaced():
    from sklearn.datasets import load_digits

    problem, again = cleaning.load_problem(3), cleaning.load_problem(3)
    other = cleaning.load_problem(4)
    train_x, train_y, validation_x, validation_y = map(
        np.asarray, (problem.train_x, problem.train_y, problem.validation_x, problem.validation_y)
    )
    assert np.array_equal(train_x, np.asarray(again.train_x))
    assert np.array_equal(train_y, np.asarray(again.train_y))
    assert not np.array_equal(train_x, np.asarray(other.train_x))
    assert problem.corrupted.sum() == problem.corrupted.size / 2
    # Equal pixels have one label, unless it was replaced.
    images, labels = load_digits(return_X_y=True)
    true = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    found = np.array([true[x.tobytes()] for x in 16 * train_x[:, :-1]])
    assert np.array_equal(found != train_y, problem.corrupted)
    found = np.array([true[x.tobytes()] for x in 16 * validation_x[:, :-1]])
    assert np.array_equal(found, validation_y)
    assert sum(map(len, (train_x, validation_x, problem.test_x))) == len(images)


def test_a_number_of_steps_or_draws_that_makes_no_sense_is_refused(capsys):
    message = "--steps must be at least 1; got 0"
    refused(hypercleaning.main, ["--steps", "0"], message, capsys)
    refused(state.main, ["--steps", "1"], "--steps must be at least 2; got 1", capsys)
    refused(minibatch.main, ["--draws", "0"], "--draws must be at least 1; got 0", capsys)


@pytest.mark.slow
def test_with_state_the_error_is_a_tenth_of_cold_cg_at_equal_products(tmp_path):
    assert state.main(["--seeds", "1", "--steps", "8", "--output", str(tmp_path)]) == 0
    content = written(tmp_path, "state")
    cold, _, warm, kept, _ = (content["means"][name][0] for name in content["runs"][0])
    assert warm < cold / 4
    assert kept < warm / 2
    assert kept < cold / 10
    for run in content["runs"][0].values():
        assert len(run["errors"]) == len(run["products"]) == 8
        assert state.NUM_PRODUCTS <= np.mean(run["products"]) <= state.NUM_PRODUCTS + 20 / 8 + 1


def test_a_mean_of_frozen_minibatches_is_closer_than_fresh_ones(tmp_path):
    assert minibatch.main(["--seeds", "1", "--draws", "2", "--output", str(tmp_path)]) == 0
    (run,) = written(tmp_path, "minibatch")["runs"]
    cosines = {name: np.mean([cosine for cosine, _ in pairs]) for name, pairs in run.items()}
    whole, ten, four, one, fresh = cosines.values()
    assert whole > 0.99
    assert whole > ten > four > max(one, fresh)
