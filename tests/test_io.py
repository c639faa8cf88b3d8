"""The one record that every file is: what goes in comes out, and nothing else is read."""

from __future__ import annotations

import numpy as np
import pytest

import lowrank_inverse as li
from lowrank_inverse._io import Format

FILE = Format("tests.save", 3)


@pytest.fixture(params=[".npz", ".safetensors"])
def path(request, tmp_path):
    if request.param == ".safetensors":
        pytest.importorskip("safetensors", reason="safetensors is not installed")
    return tmp_path / f"record{request.param}"


def test_what_goes_into_a_record_comes_out(path):
    content = {
        "array": np.arange(6.0).reshape(2, 3).T,
        "nothing": None,
        "plain": [True, 3, 0.1, "text", float("inf")],
        "nested": ({"array": np.zeros((0, 2), np.int32)}, []),
    }
    FILE.save(path, content)
    found = FILE.load(path)
    assert found.keys() == content.keys()
    assert np.array_equal(found["array"], content["array"])
    assert found["array"].flags.f_contiguous and not found["array"].flags.c_contiguous
    assert found["plain"] == content["plain"] and found["nothing"] is None
    (inner, empty) = found["nested"]
    assert isinstance(found["nested"], tuple) and empty == []
    assert inner["array"].dtype == np.int32 and inner["array"].shape == (0, 2)


def test_a_record_may_be_one_array(path):
    FILE.save(path, np.ones(2))
    assert np.array_equal(FILE.load(path), np.ones(2))


def test_records_of_other_kinds_and_versions_are_refused(path):
    FILE.save(path, {"a": 1})
    with pytest.raises(ValueError, match=r"no file of others\.save: it was written by tests\.save"):
        Format("others.save", 3).load(path)
    with pytest.raises(ValueError, match="its layout is number 3, and 4 is read here"):
        Format("tests.save", 4).load(path)


def test_every_reader_refuses_the_files_of_the_others(path):
    writers = {
        "lowrank_inverse.save": lambda p: li.save(p, li.nystrom(np.eye(3), 2, rng=0)),
        r"HypergradientState\.save": li.HypergradientState(np.ones(3)).save,
    }
    readers = {
        "lowrank_inverse.save": li.load,
        r"HypergradientState\.save": li.HypergradientState.load,
    }
    for writer, write in writers.items():
        write(path)
        for reader, read in readers.items():
            if reader != writer:
                with pytest.raises(ValueError, match=f"was written by {writer}"):
                    read(path)


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.9])
def test_a_file_cut_short_is_named(path, fraction):
    FILE.save(path, {"array": np.arange(1000.0)})
    whole = path.read_bytes()
    path.write_bytes(whole[: int(fraction * len(whole))])
    with pytest.raises(ValueError, match="cannot be read: it is cut short, damaged"):
        FILE.load(path)


def test_what_no_record_holds_is_named_with_its_place(path):
    with pytest.raises(TypeError, match=r"`content\.a\[1\]` cannot be saved: it is builtins\.set"):
        FILE.save(path, {"a": [1, {2}]})
    assert not path.exists()
