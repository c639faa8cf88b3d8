"""The experiments on linear systems: accuracy, certificates, steps, kernel ridge regression."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest

from benchmarks.harness import processes
from benchmarks.systems import accuracy, certificate, gradients, peers, psd
from tests.benchmarks.conftest import refused, text, written
from tests.conftest import x64

ABSENT = {"of nobody": ("no_such_package_at_all", False, peers.scipy_cg)}


# Accuracy in float32, and the tightness of the certificate.


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


# Memory of gradients.


@pytest.mark.slow
@pytest.mark.parametrize("method", gradients.METHODS)
def test_every_method_finds_the_gradient_of_a_solution(method):
    pytest.importorskip(method.split(", ")[-1])
    n = 8
    D = 2 * np.eye(n) - np.roll(np.eye(n), 1, axis=0) - np.roll(np.eye(n), -1, axis=0)
    b = np.random.default_rng(0).standard_normal(n)
    A = np.eye(n) + gradients.SCALE * D
    x = np.linalg.solve(A, b)
    with x64(True):
        found = gradients.measure(method, n, 8, 0)["gradient"]
    assert found == pytest.approx(-x @ D @ x, rel=1e-4)


# Positive semidefinite systems.


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("psd")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psd, "PEERS", {"scipy cg": psd.PEERS["scipy cg"]} | ABSENT)
        patch.setattr(psd, "GRID", 10)
        assert psd.main(["--size", "200", "--rank", "60", "--output", str(folder)]) == 0
    return folder


def test_the_systems_are_symmetric_and_positive_semidefinite_with_the_spectra_they_claim():
    found = psd.systems(120, 0)
    assert list(found) == ["smile", "spiral", "ridge", "poisson", "step"]
    for name, system in found.items():
        A = system.matrix
        w = np.linalg.eigvalsh(A)[::-1]
        np.testing.assert_array_equal(A, A.T)
        assert w[-1] > -1e-12 * w[0], name
        if name in ("smile", "spiral"):
            np.testing.assert_array_equal(np.diagonal(A), 1)
        if name == "ridge":
            np.testing.assert_allclose(w, 1 / np.arange(1, 121) ** 2.0, rtol=1e-8)
        if name == "step":
            np.testing.assert_allclose(w[:10], [*[1.0] * 8, 1e-3, 1e-3])
        if name == "poisson":
            np.testing.assert_allclose(w[0] + w[-1], 8)
    other = psd.systems(120, 1)
    assert not np.array_equal(other["smile"].matrix, found["smile"].matrix)


def test_the_smile_is_a_face():
    X = psd.smile_points(400, np.random.default_rng(0))
    assert X.shape == (400, 2)
    left, right, mouth, face = X[:20], X[20:40], X[40:80], X[80:]
    assert np.all(np.hypot(*(left - [-4, 4]).T) <= 1)
    assert np.all(np.hypot(*(right - [4, 4]).T) <= 1)
    np.testing.assert_allclose(mouth[:, 1], mouth[:, 0] ** 2 / 16 - 5)
    np.testing.assert_allclose(np.hypot(*face.T), 10)


def test_the_table_has_every_system_and_choice_of_columns(table):
    results = written(table, "psd")
    assert list(results["steps"]) == ["smile", "spiral", "ridge", "poisson", "step"]
    for by_sampling in results["steps"].values():
        assert list(by_sampling) == ["CG", *psd.SAMPLINGS]
        for result in by_sampling.values():
            assert result["seconds"] > 0
            assert result["met"] == (result["residual"] <= 1.001e-8)
    for name in psd.FALLING:
        steps = results["steps"][name]
        assert steps["rpcholesky"]["steps"] < steps["CG"]["steps"]
        auto = results["times"][name][psd.AUTO]
        assert auto["met"] and auto["steps"] <= steps["CG"]["steps"]
        assert results["times"][name]["scipy cg"]["residual"] < 1e-7


def test_an_absent_peer_is_named_as_such(table):
    assert written(table, "psd")["absent"] == ["of nobody"]
    assert "Not installed: of nobody." in text(table, "psd")


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("name", peers.PEERS)
def test_every_peer_that_is_there_solves_the_system(name):
    module, _, run = peers.PEERS[name]
    pytest.importorskip(module, reason=f"{module} is not installed")
    system = psd.systems(200, 0)["smile"]
    b = np.ones(200)
    with x64(True) if name == "lineax CG" else contextlib.nullcontext():
        x, steps = run(system.matrix, b, 0.1, 1e-8, 50)
    exact = np.linalg.solve(system.matrix + 0.1 * np.eye(200), b)
    assert np.linalg.norm(x - exact) < 1e-6 * np.linalg.norm(exact)
    assert 1 <= steps <= psd.MAX_STEPS


def test_a_peer_that_fails_is_a_result():
    system = psd.System(np.eye(3), 0.0)
    found = psd.measured(system, np.ones(3), 1e-8, lambda: 1 / 0)
    assert found == {"failed": "ZeroDivisionError: division by zero"}
    assert psd.shown_time(found) == "ZeroDivisionError"
    short = psd.measured(system, np.ones(3), 1e-8, lambda: (np.zeros(3), 7))
    assert psd.shown_steps(short) == ">7"
    assert psd.shown_time(short).endswith("s, 7, only 1e+00")


def test_sizes_that_make_no_sense_are_refused(capsys):
    refused(psd.main, ["--size", "10"], "--size must be at least 100", capsys)


# Kernel ridge regression.


@pytest.fixture
def kernel_ridge():
    pytest.importorskip("sklearn", reason="the comparison needs scikit-learn")
    from benchmarks.systems import kernel_ridge

    return kernel_ridge


@pytest.mark.slow
def test_kernel_ridge_has_the_error_of_scikit_learn(kernel_ridge, tmp_path):
    arguments = ["--size", "600", "--rank", "200", "--output", str(tmp_path)]
    assert kernel_ridge.main(arguments) == 0
    found = written(tmp_path, "kernel_ridge_friedman")["results"]
    assert list(found) == list(kernel_ridge.METHODS)
    theirs = found["sklearn KernelRidge"]["error"]
    for method in ("ours KernelRidge", "ours KernelRidge, in tiles"):
        assert found[method]["error"] == pytest.approx(theirs, rel=1e-3)
        assert found[method]["steps"] >= 1
    for method in ("sklearn Nystroem + Ridge", "ours NystromRidge, rpcholesky"):
        assert found[method]["error"] == pytest.approx(theirs, rel=0.25)
    lines = text(tmp_path, "kernel_ridge_friedman")
    assert "Gaussian kernel, lengthscale 2.5, alpha 0.0001" in lines


def test_every_method_of_the_kernel_ridge_table_fits_and_predicts(kernel_ridge, tmp_path, calls):
    arguments = ["--size", "160", "--most", "100", "--rank", "60", "--output", str(tmp_path)]
    assert kernel_ridge.main(arguments) == 0
    expected = {"most": 100, "size": 160, "all": 160}
    found = written(tmp_path, "kernel_ridge_friedman")["results"]
    with np.load(calls[0]["path"]) as data:
        deviation = np.std(data["test_y"])
    for method, points in kernel_ridge.METHODS.items():
        assert found[method]["n"] == expected[points]
        assert 0 < found[method]["error"] < deviation
        assert len(kernel_ridge.row("friedman", method, found[method])) == 7
    assert len(calls) == 1 + len(found)


def test_mnist_without_its_folder_is_refused(kernel_ridge):
    with pytest.raises(SystemExit, match="mnist needs --data-dir"):
        kernel_ridge.main(["--sets", "mnist"])


def test_a_method_that_fails_in_its_process_is_a_result(kernel_ridge):
    settings = {"path": "nowhere", "method": "", "n": 1, "classes": False}
    result = processes.apart("benchmarks.systems.kernel_ridge:measure", settings)
    assert "FileNotFoundError" in result["failed"]
    assert "FileNotFoundError" in kernel_ridge.row("friedman", "x", result)["test error"]
