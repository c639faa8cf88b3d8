"""The experiments on positive semidefinite systems and on kernel ridge regression."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

pytest.importorskip("tqdm", reason="the experiments need the extra `plot`: tqdm is missing")

from benchmarks import _mnist, _psd_peers, psd


def written(folder, name):
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


# Positive semidefinite systems


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("psd")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(psd, "PEERS", {"scipy cg": psd.PEERS["scipy cg"]} | ABSENT)
        patch.setattr(psd, "GRID", 10)
        assert psd.main(["--size", "200", "--rank", "60", "--output", str(folder)]) == 0
    return folder


ABSENT = {"of nobody": ("no_such_package_at_all", False, _psd_peers.scipy_cg)}


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
        assert auto["met"] and auto["steps"] < 0.2 * steps["rpcholesky"]["steps"]
        assert results["times"][name]["scipy cg"]["residual"] < 1e-7


def test_an_absent_peer_is_named_as_such(table):
    assert written(table, "psd")["absent"] == ["of nobody"]
    assert "Not installed: of nobody." in (table / "psd.txt").read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("name", _psd_peers.PEERS)
def test_every_peer_that_is_there_solves_the_system(name):
    module, _, run = _psd_peers.PEERS[name]
    pytest.importorskip(module, reason=f"{module} is not installed")
    system = psd.systems(200, 0)["smile"]
    b = np.ones(200)
    if name == "lineax CG":
        from tests.conftest import x64

        with x64(True):
            x, steps = run(system.matrix, b, 0.1, 1e-8, 50)
    else:
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
    with pytest.raises(SystemExit, match="2"):
        psd.main(["--size", "10"])
    assert "--size must be at least 100" in capsys.readouterr().err


# Kernel ridge regression


@pytest.fixture(scope="module")
def kernel_ridge():
    pytest.importorskip("sklearn", reason="the comparison needs scikit-learn")
    from benchmarks import kernel_ridge

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
    text = (tmp_path / "kernel_ridge_friedman.txt").read_text(encoding="utf-8")
    assert "Gaussian kernel, lengthscale 2.5, alpha 0.0001" in text


def test_every_method_of_the_kernel_ridge_table_fits_and_predicts(kernel_ridge, tmp_path):
    data = kernel_ridge.make_data("friedman", 160, 0, None)
    for key, array in data.items():
        np.save(tmp_path / f"{key}.npy", array)
    settings = {**kernel_ridge.SETTINGS["friedman"], "rank": 60, "seed": 0}
    settings |= {"most": 100, "size": 120}
    expected = {"most": 100, "size": 120, "all": 160}
    for method, points in kernel_ridge.METHODS.items():
        result = kernel_ridge.run_one(tmp_path, "friedman", method, settings)
        assert result["n"] == expected[points]
        assert 0 < result["error"] < np.std(data["test_y"])
        assert len(kernel_ridge.row("friedman", method, result)) == 7


def test_mnist_without_its_folder_is_refused(kernel_ridge, capsys):
    with pytest.raises(SystemExit, match="2"):
        kernel_ridge.main(["--sets", "mnist"])
    assert "mnist needs --data-dir" in capsys.readouterr().err


def test_a_method_that_fails_in_its_process_is_a_result(kernel_ridge, tmp_path):
    result = kernel_ridge.run_apart(tmp_path, "friedman", "sklearn KernelRidge", {})
    assert "FileNotFoundError" in result["failed"]
    assert "FileNotFoundError" in kernel_ridge.row("friedman", "x", result)["test error"]


# MNIST


def idx(array):
    shape = b"".join(int(size).to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()


def test_missing_mnist_files_are_named_with_where_to_put_them(tmp_path):
    with pytest.raises(SystemExit, match=r"put the four files train-images.*Missing: train-im"):
        _mnist.load_mnist(tmp_path)


def test_mnist_is_read_from_its_idx_files_and_checked(tmp_path, monkeypatch):
    import hashlib

    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (5, 4, 3), np.uint8), np.arange(5, dtype=np.uint8)
    (tmp_path / "mnist").mkdir()
    sums = {}
    for name, array in zip(_mnist.FILES, (images, labels, images[:2], labels[:2]), strict=True):
        content = gzip.compress(idx(array))
        (tmp_path / "mnist" / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
    with pytest.raises(SystemExit, match="is not the published file: its MD5 sum is"):
        _mnist.load_mnist(tmp_path)
    monkeypatch.setattr(_mnist, "FILES", sums)
    x, y, test_x, test_y = _mnist.load_mnist(tmp_path)
    assert x.shape == (5, 12) and x.dtype == np.float32
    np.testing.assert_allclose(x, images.reshape(5, 12) / 255.0, rtol=1e-6)
    np.testing.assert_array_equal(y, labels)
    assert len(test_x) == len(test_y) == 2
    with pytest.raises(ValueError, match="must begin with 0, 0, 8"):
        _mnist.parse_idx(b"abc\0")
