"""Files for Nyström approximations."""

from __future__ import annotations

import json
import zipfile

import numpy as np
import pytest
from array_api_compat import device

import lowrank_inverse as li
from lowrank_inverse._io import HEADER
from lowrank_inverse.arrays.conversion import is_array
from tests.conftest import host, open_backend
from tests.problems import RANK, WIDTH, indices, matrix, rhs

SPECTRA = ["linear", "low rank", "slightly"]


@pytest.fixture(params=[".npz", ".safetensors"])
def path(request, tmp_path):
    if request.param == ".safetensors":
        pytest.importorskip("safetensors", reason="safetensors is not installed")
    return tmp_path / f"factor{request.param}"


def factor(library=None, name="linear"):
    A = matrix(name) if library is None else library.asarray(matrix(name))
    return li.nystrom(A, indices=indices())


def assert_same(found, expected):
    """Every attribute is equal, bit for bit and kind for kind."""
    assert vars(found).keys() == vars(expected).keys()
    for name, value in vars(expected).items():
        other = getattr(found, name)
        assert type(other) is type(value), name
        parts = zip(other, value, strict=True) if isinstance(value, tuple) else [(other, value)]
        for part, wanted in parts:
            if is_array(wanted):
                assert part.dtype == wanted.dtype and device(part) == device(wanted)
                assert host(part).tobytes() == host(wanted).tobytes(), name
            else:
                assert part == wanted, name


# Round trips


@pytest.mark.parametrize("name", SPECTRA)
def test_a_factor_is_read_back_bit_for_bit_into_its_own_library(path, name, library):
    approx = factor(library, name)
    li.save(path, approx)
    again = li.load(path, like=approx.columns)
    assert_same(again, approx)
    b = library.asarray(rhs(width=WIDTH))
    for compute in (
        lambda a: a @ b,
        lambda a: a.inverse(0.1) @ b,
        lambda a: a.inverse(0.1, chunk_size=3) @ b,
    ):
        assert host(compute(again)).tobytes() == host(compute(approx)).tobytes()
    assert again.logdet(0.1) == approx.logdet(0.1)


@pytest.mark.parametrize("sampling", ["rpcholesky", "greedy", "gaussian"])
def test_factors_of_every_sampling_are_read_back(path, sampling):
    for rank in (5, "auto"):
        approx = li.nystrom(matrix("exponential"), rank, sampling=sampling, rng=0)
        li.save(path, approx)
        again = li.load(path)
        assert_same(again, approx)
        assert repr(again) == repr(approx)
        assert again.residual_trace == approx.residual_trace


def test_a_factor_of_jax_without_float64_is_read_back_bit_for_bit(path):
    with open_backend("jax", "float32") as narrow:
        approx = factor(narrow)
        li.save(path, approx)
        assert_same(li.load(path, like=approx.columns), approx)
    again, b = li.load(path), rhs().astype("float32")
    np.testing.assert_allclose(again @ b, factor() @ rhs(), rtol=1e-3, atol=1e-4)


def test_a_factor_of_one_library_is_read_into_another(path, library):
    expected = factor()
    li.save(path, li.nystrom(library.asarray(matrix("linear")), indices=indices()))
    for like, kind in ((None, np.ndarray), (library.asarray(np.ones(2)), None)):
        again = li.load(path, like=like)
        assert type(again.columns) is (kind or type(library.asarray(np.ones(1))))
        assert host(again.columns).dtype == library.dtype
        np.testing.assert_allclose(host(again.core), expected.core, rtol=1e-5, atol=1e-6)
        assert type(again.indices) is np.ndarray


def test_the_order_in_memory_is_kept_and_with_it_the_last_digit(path):
    A = matrix("linear")
    approx = li.nystrom(
        li.FunctionOperator(lambda v: A @ v, len(A), columns=by_columns), RANK, rng=0
    )
    assert approx.columns.flags.f_contiguous
    li.save(path, approx)
    again = li.load(path)
    assert again.columns.flags.f_contiguous
    np.testing.assert_array_equal(again.inverse(0.1) @ rhs(), approx.inverse(0.1) @ rhs())


def by_columns(chosen):
    return np.asfortranarray(matrix("linear")[:, chosen])


def test_a_text_may_be_the_path(tmp_path):
    li.save(str(tmp_path / "factor.npz"), factor())
    assert_same(li.load(str(tmp_path / "factor.npz")), factor())


# Interrupted


def test_an_interrupted_save_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    path = tmp_path / "factor.npz"
    li.save(path, factor())
    before = path.read_bytes()

    def cut_short(file, **arrays):
        file.write(b"half of a fi")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(np, "savez", cut_short)
        li.save(path, factor(name="exponential"))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["factor.npz"]
    li.save(path, factor(name="exponential"))
    assert_same(li.load(path), factor(name="exponential"))


# Files that are none


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.5, 0.99])
def test_a_file_that_was_cut_short_is_refused(path, fraction):
    li.save(path, factor())
    content = path.read_bytes()
    path.write_bytes(content[: int(fraction * len(content))])
    with pytest.raises(ValueError, match="cannot be read: it is cut short, damaged"):
        li.load(path)


def test_a_changed_number_in_an_npz_file_is_noticed(tmp_path):
    path = tmp_path / "factor.npz"
    li.save(path, factor())
    content, number = bytearray(path.read_bytes()), factor().columns[0].tobytes()[:8]
    content[content.index(number)] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cut short, damaged"):
        li.load(path)


def test_files_of_others_are_refused(tmp_path):
    path = tmp_path / "other.npz"
    np.savez(path, columns=np.ones((3, 2)), indices=[0, 1])
    with pytest.raises(ValueError, match=r"no file of lowrank_inverse\.save"):
        li.load(path)
    np.savez(path, **{HEADER: np.array("[]")})
    with pytest.raises(ValueError, match=r"no file of lowrank_inverse\.save"):
        li.load(path)
    path.write_text("neither a zip file nor an array")
    with pytest.raises(ValueError, match="cannot be read"):
        li.load(path)


def test_safetensors_of_others_are_refused(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy", reason="safetensors is not installed")
    safetensors.save_file({"columns": np.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"no file of lowrank_inverse\.save"):
        li.load(tmp_path / "other.safetensors")


def test_pickled_objects_are_refused(tmp_path):
    path = tmp_path / "pickled.npz"
    np.savez(path, **{HEADER: np.array([{}], dtype=object)})
    with pytest.raises(ValueError, match="cannot be read"):
        li.load(path)


def rewritten(path, change):
    """Save a factor with its header changed."""
    li.save(path, factor())
    with np.load(path) as file:
        arrays = dict(file)
    content = json.loads(str(arrays.pop(HEADER)))
    change(content, arrays)
    np.savez(path, **arrays, **{HEADER: np.array(json.dumps(content))})
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content, arrays: content.update(version=99), "another version"),
        (lambda content, arrays: content["content"]["dict"].pop("core"), "another version"),
        (lambda content, arrays: content["content"]["dict"].update(inverse=1), "another version"),
        (lambda content, arrays: content.pop("format"), "no file of"),
        (lambda content, arrays: arrays.pop("array0"), "it lacks the array 'array0'"),
    ],
)
def test_another_layout_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        li.load(rewritten(tmp_path / "factor.npz", change))


def test_an_npz_file_is_an_ordinary_zip_file_of_arrays(tmp_path):
    li.save(tmp_path / "factor.npz", factor())
    with zipfile.ZipFile(tmp_path / "factor.npz") as file:
        assert file.testzip() is None
    with np.load(tmp_path / "factor.npz", allow_pickle=False) as file:
        shapes = [file[key].shape for key in file.files]
    assert factor().columns.shape in shapes


# Bad input


@pytest.mark.parametrize("function", [lambda p: li.save(p, factor()), li.load])
@pytest.mark.parametrize("name", ["factor", "factor.pkl", "factor.pt"])
def test_another_ending_is_refused(function, name, tmp_path):
    with pytest.raises(ValueError, match=r"`path` must end in \.npz or \.safetensors"):
        function(tmp_path / name)


def test_what_is_no_factor_is_refused(tmp_path):
    for thing in (np.eye(3), factor().inverse(0.1)):
        with pytest.raises(TypeError, match="`approx` must be a NystromApproximation"):
            li.save(tmp_path / "factor.npz", thing)
    approx = factor()
    approx.extra = object()
    with pytest.raises(TypeError, match=r"`content\.extra` cannot be saved: it is builtins"):
        li.save(tmp_path / "factor.npz", approx)


def test_a_missing_file_is_missing(path):
    with pytest.raises(FileNotFoundError):
        li.load(path)


def test_a_factor_that_jax_traces_is_refused(tmp_path):
    with open_backend("jax", "float64") as jax_backend:
        import jax

        def function(A):
            li.save(tmp_path / "factor.npz", li.nystrom(A, indices=indices()))
            return A

        with pytest.raises(TypeError, match="unknown while jax traces"):
            jax.jit(function)(jax_backend.asarray(matrix("linear")))


def test_float64_is_never_cut_to_float32(tmp_path):
    li.save(tmp_path / "factor.npz", factor())
    with (
        open_backend("jax", "float32") as narrow,
        pytest.raises(TypeError, match=r"float64, which `like` does not support.*jax_enable_x64"),
    ):
        li.load(tmp_path / "factor.npz", like=narrow.asarray(np.ones(1)))


def test_without_safetensors_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    for function in (lambda p: li.save(p, factor()), li.load):
        with pytest.raises(ImportError, match=r'pip install "lowrank-inverse\[safetensors\]"'):
            function(tmp_path / "factor.safetensors")
