"""The experiments run from end to end, and what they write has the properties they are to show."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tqdm", reason="the experiments need the extra `plot`: tqdm is missing")

from benchmarks import __main__ as command
from benchmarks import accuracy, certificate
from benchmarks._report import machine, publish, table
from benchmarks.paper import figure1
from tests.conftest import assert_picture

os.environ.setdefault("MPLBACKEND", "Agg")

METHODS = ["identity", "Neumann", "CG", "Nyström", "Nyström-CG", "exact"]
STEPS = 2


def need_pictures() -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is missing: no matplotlib")


def written(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


# Data hyper-cleaning.


@pytest.fixture(scope="module")
def hypercleaning() -> Any:
    need_pictures()
    pytest.importorskip("torch", reason="the demo needs the extra `torch`")
    pytest.importorskip("sklearn", reason="the demo needs scikit-learn's digits: extra `dev`")
    from benchmarks import hypercleaning

    return hypercleaning


@pytest.fixture(scope="module")
def demo(hypercleaning: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with few examples and two outer steps."""
    folder = tmp_path_factory.mktemp("demo") / "not" / "there"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hypercleaning, "NUM_TRAIN", 120)
        patch.setattr(hypercleaning, "NUM_VALIDATION", 100)
        options = ["--steps", str(STEPS), "--seed", "1", "--output", str(folder)]
        assert hypercleaning.main(options) == 0
    return folder


def test_the_demo_runs_all_six_inverses_side_by_side(demo):
    results = written(demo, "hypercleaning")
    assert list(results["runs"]) == METHODS
    text = (demo / "hypercleaning.txt").read_text(encoding="utf-8")
    assert [line.split("  ")[0] for line in text.splitlines()[2:8]] == METHODS
    for heading in ("relative error", "cosine", "products", "ms", "validation loss"):
        assert heading in text.splitlines()[0]
    assert_picture(demo / "hypercleaning.png")
    assert results["machine"]["seed"] == 1
    assert {"python", "torch", "numpy", "lowrank-inverse"} <= results["machine"]["versions"].keys()


def test_in_the_demo_the_exact_inverse_is_exact_and_others_come_closer_than_the_identity(demo):
    runs = written(demo, "hypercleaning")["runs"]
    assert runs["exact"]["relative_error"] == 0
    assert runs["exact"]["cosine"] == pytest.approx(1, abs=1e-12)
    assert runs["CG"]["relative_error"] < 0.1 * runs["identity"]["relative_error"]
    assert runs["Nyström-CG"]["relative_error"] < runs["identity"]["relative_error"]
    assert runs["Neumann"]["relative_error"] < runs["identity"]["relative_error"]
    assert runs["CG"]["cosine"] > runs["identity"]["cosine"]
    assert all(0 <= run["cosine"] <= 1 + 1e-12 for run in runs.values())


def test_in_the_demo_every_method_but_the_exact_one_has_about_the_same_number_of_products(
    demo, hypercleaning
):
    runs = written(demo, "hypercleaning")["runs"]
    features = 65
    assert runs["exact"]["num_products"] >= features * hypercleaning.NUM_CLASSES
    assert runs["identity"]["num_products"] == 1
    for name in ("Neumann", "CG", "Nyström", "Nyström-CG"):
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


def test_the_data_of_the_demo_have_half_of_their_training_labels_replaced(hypercleaning):
    from sklearn.datasets import load_digits

    problem, again = hypercleaning.load_problem(3), hypercleaning.load_problem(3)
    other = hypercleaning.load_problem(4)
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


def test_the_demo_refuses_a_number_of_steps_below_one(hypercleaning, capsys):
    with pytest.raises(SystemExit, match="2"):
        hypercleaning.main(["--steps", "0"])
    assert "--steps must be at least 1; got 0" in capsys.readouterr().err


# Figure 1.


@pytest.fixture(scope="module")
def figure(tmp_path_factory: pytest.TempPathFactory) -> Path:
    need_pictures()
    folder = tmp_path_factory.mktemp("figure")
    assert figure1.main(["--seeds", "3", "--output", str(folder)]) == 0
    return folder


def test_figure_1_draws_two_matrices_of_order_40_and_rank_20():
    for kind, A in figure1.matrices(0).items():
        assert A.shape == (40, 40)
        assert np.allclose(A, A.T, rtol=0, atol=1e-15), kind
        assert np.linalg.matrix_rank(A, tol=1e-10) == 20
        assert np.linalg.eigvalsh(A)[0] > -1e-14
        assert not np.array_equal(A, figure1.matrices(1)[kind])
    eigenvalues = np.linalg.eigvalsh(figure1.matrices(0)["eigenvalues 1/i²"])
    assert np.allclose(eigenvalues[:-21:-1], 1 / np.arange(1, 21) ** 2.0)


def test_in_figure_1_nystrom_with_the_rank_of_the_matrix_gives_its_exact_inverse(figure):
    errors = written(figure, "figure1")["relative_errors"]
    assert len(errors) == 2
    for by_name in errors.values():
        assert all(len(by_seed) == 3 for by_seed in by_name.values())
        assert max(by_name["Nyström, k = 20"]) < 1e-12
        for method in ("Nyström, k", "Neumann, l"):
            means = [np.mean(by_name[f"{method} = {size}"]) for size in (5, 10, 20)]
            assert means == sorted(means, reverse=True)
            assert means[0] < 1


def test_in_figure_1_the_errors_written_are_those_of_the_formulas(figure):
    errors = written(figure, "figure1")["relative_errors"]
    for kind, A in figure1.matrices(2).items():
        exact = np.linalg.inv(A + 0.1 * np.eye(40))
        step = 1 / (np.linalg.eigvalsh(A)[-1] + 0.1)  # what 8 power iterations estimate
        contraction = np.eye(40) - step * (A + 0.1 * np.eye(40))
        series = step * sum(np.linalg.matrix_power(contraction, j) for j in range(20))
        wanted = np.linalg.norm(series - exact) / np.linalg.norm(exact)
        assert errors[kind]["Neumann, l = 20"][2] == pytest.approx(wanted, rel=0.1)


def test_figure_1_has_its_picture_and_its_table(figure):
    assert_picture(figure / "figure1.png")
    text = (figure / "figure1.txt").read_text(encoding="utf-8")
    for name in figure1.approximations(0):
        assert name in text
    assert "Mean and deviation over 3 matrices" in text


def test_figure_1_refuses_no_seeds(capsys):
    with pytest.raises(SystemExit, match="2"):
        figure1.main(["--seeds", "0"])
    assert "--seeds must be at least 1; got 0" in capsys.readouterr().err


# The accuracy table.


def test_the_accuracy_table_shows_the_default_form_far_ahead_of_equation_6(tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy, "SIZE", 300)
    assert accuracy.main(["--seeds", "1", "--output", str(tmp_path)]) == 0
    cases = written(tmp_path, "accuracy")["cases"]
    assert len(cases) == len(accuracy.ROW_CASES)
    for case in cases:
        (errors,) = case["errors"]
        assert list(errors) == list(accuracy.FORMS)
        assert errors["stored (default)"] < errors["Eq. 6 in float32"]
        assert errors["stored (default)"] < 1e-2


# The tightness of the certificate.


def test_the_certificate_table_shows_bounds_that_hold_and_tighten_with_an_inverse(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(certificate, "DAMPINGS", (1e-2,))
    assert certificate.main(["--seeds", "1", "--output", str(tmp_path)]) == 0
    ratios = written(tmp_path, "certificate")["ratios"]
    assert len(ratios) == 2 * len(certificate.INVERSES)
    energy = {name: [pair[1] for pair in pairs] for name, pairs in ratios.items()}
    for pairs in ratios.values():
        assert len(pairs) == 6 * len(certificate.SPECTRA)
        assert min(min(pair) for pair in pairs) >= 1  # they are rounded to four places
    assert np.median(energy["rpcholesky, k = 40, float64"]) < np.median(
        energy["no inverse, float64"]
    )


# State over outer steps, and minibatches.


def test_with_state_the_error_is_a_tenth_of_cold_cg_at_equal_products(tmp_path):
    pytest.importorskip("sklearn", reason="the data are those of scikit-learn")
    pytest.importorskip("torch", reason="it runs in PyTorch")
    from benchmarks import state

    assert state.main(["--seeds", "1", "--steps", "8", "--output", str(tmp_path)]) == 0
    content = written(tmp_path, "state")
    cold, _, warm, kept = (content["means"][name][0] for name in content["runs"][0])
    assert warm < cold / 4
    assert kept < warm / 2
    assert kept < cold / 10
    for run in content["runs"][0].values():
        assert len(run["errors"]) == len(run["products"]) == 8
        assert abs(np.mean(run["products"]) - 12.5) < 1
    with pytest.raises(SystemExit):
        state.main(["--steps", "1"])


def test_a_mean_of_frozen_minibatches_is_closer_than_fresh_ones(tmp_path):
    pytest.importorskip("sklearn", reason="the data are those of scikit-learn")
    pytest.importorskip("torch", reason="it runs in PyTorch")
    from benchmarks import minibatch

    assert minibatch.main(["--seeds", "1", "--draws", "2", "--output", str(tmp_path)]) == 0
    (run,) = written(tmp_path, "minibatch")["runs"]
    cosines = {name: np.mean([cosine for cosine, _ in pairs]) for name, pairs in run.items()}
    whole, ten, four, one, fresh = cosines.values()
    assert whole > 0.99
    assert whole > ten > four > max(one, fresh)
    with pytest.raises(SystemExit):
        minibatch.main(["--draws", "0"])


# What they share.


def test_a_command_is_run_by_its_name(tmp_path, capsys):
    need_pictures()
    assert command.main(["figure1", "--seeds", "1", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "figure1.json").exists()
    assert command.main([]) == 0
    usage = capsys.readouterr().out
    assert all(name in usage for name in command.COMMANDS)
    assert command.main(["figure0"]) == 2


def test_a_table_has_its_names_to_the_left_and_its_numbers_to_the_right():
    rows = [{"name": "a", "value": "1.5"}, {"name": "longer", "value": "10.25"}]
    assert table(rows).splitlines() == [
        "name    value",
        "-------------",
        "a         1.5",
        "longer  10.25",
    ]


def test_results_are_written_with_where_they_were_measured(tmp_path, capsys):
    about = machine("numpy", "no-such-package", seed=5)
    assert about["versions"]["numpy"] == np.__version__
    assert about["versions"]["no-such-package"] == "not installed"
    assert about["cores"] == os.cpu_count()
    publish(tmp_path / "new", "name", "the text", about, figures=[1, 2])
    content = written(tmp_path / "new", "name")
    assert content == {"machine": about, "figures": [1, 2]}
    text = (tmp_path / "new" / "name.txt").read_text(encoding="utf-8")
    assert text.startswith("the text\n")
    assert f"numpy {np.__version__}" in text
    assert "seed 5" in text
    assert "the text" in capsys.readouterr().out
