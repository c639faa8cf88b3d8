"""The comparison of Gaussian processes, in its smallest setting."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("sklearn", reason="the comparison needs scikit-learn")
from benchmarks.harness.processes import interpreter
from benchmarks.systems import gaussian_process
from benchmarks.systems.gaussian_process_methods import METHODS

SMALL = ["--size", "120", "--most", "100", "--rank", "60", "--probes", "4"]


@pytest.fixture
def absent(monkeypatch):
    monkeypatch.setattr(gaussian_process, "interpreter", lambda *_: (None, "not installed"))


def read(folder, name):
    return json.loads((folder / f"gp_{name}.json").read_text(encoding="utf-8"))["results"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["digits", "rough"])
def test_every_method_has_the_answer_of_scikit_learn(name, tmp_path, absent):
    assert gaussian_process.main([*SMALL, "--sets", name, "--output", str(tmp_path)]) == 0
    found = read(tmp_path, name)
    small = [row for row in found if row["n"] == 100]
    ours = [method for method in METHODS if "gpytorch" not in method]
    assert [row["method"] for row in small] == ours
    assert {row["n"] for row in found} == {100, 120}
    for row in small:
        errors = row["errors"]
        if row["method"] == "ours, factored":
            assert max(errors.values()) < 1e-7
        assert errors["likelihood"] < 1e-6 + 5 * row.get("claimed", 0.0)
        assert errors["mean"] < 1e-3
    text = (tmp_path / f"gp_{name}.txt").read_text(encoding="utf-8")
    assert "gpytorch is not installed" in text and "error: likelihood" in text


@pytest.mark.slow
def test_gpytorch_gives_the_same_where_it_is_installed(tmp_path):
    import sys

    if interpreter("gpytorch", [sys.executable])[0] is None:
        pytest.skip("gpytorch is not installed")
    assert gaussian_process.main([*SMALL, "--sets", "rough", "--output", str(tmp_path)]) == 0
    dense = next(row for row in read(tmp_path, "rough") if row["method"] == "gpytorch, Cholesky")
    assert max(dense["errors"].values()) < 1e-6


def test_mnist_without_its_folder_is_refused(absent):
    with pytest.raises(SystemExit, match="mnist needs --data-dir"):
        gaussian_process.main(["--sets", "mnist"])


def test_errors_are_against_the_same_points_alone():
    exact = {"n": 3, "value": -2.0, "gradient": [4.0, 0.0], "mean": [1.0, -2.0], "std": [0.5, 1.0]}
    found = {"n": 3, "value": -2.5, "gradient": [4.0, 1.0], "mean": [1.0, -2.2], "std": [0.6, 1.0]}
    errors = gaussian_process.errors(found, exact)
    wanted = {"likelihood": 0.5, "gradient": 0.25, "mean": 0.1, "std": 0.2}
    assert errors == pytest.approx(wanted)
    assert gaussian_process.errors(found, exact | {"n": 4}) == {}
    assert gaussian_process.errors(found, None) == {}
    assert np.isfinite(list(errors.values())).all()
