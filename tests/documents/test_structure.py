"""The structure of the sources: layers, circles, sizes and names."""

from __future__ import annotations

import re

import pytest

import lowrank_inverse as li
from tests import structure
from tests.problems import matrix, rhs


def test_imports_point_downwards_and_stand_at_the_top():
    assert structure.upward() == []


def test_imports_have_no_circle():
    assert structure.levels() <= 25


def test_no_folder_has_more_than_twelve_modules():
    sources = structure.modules("lowrank_inverse", "adapters")
    for folder in {path.parent for path in sources}:
        assert sum(path.parent == folder for path in sources) <= 12, folder


def test_no_module_has_more_than_three_hundred_lines():
    for path in structure.modules("lowrank_inverse", "adapters"):
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 300, path


def test_no_module_is_hidden_by_what_it_defines():
    pytest.importorskip("torch")
    pytest.importorskip("jax")
    assert structure.hidden() == []


def test_frameworks_are_looked_up_in_one_place():
    for path in structure.modules("lowrank_inverse"):
        if path.parent.name != "arrays":
            text = path.read_text(encoding="utf-8")
            assert 'sys.modules["jax"]' not in text, path
            assert 'sys.modules.get("torch")' not in text, path


def test_decompositions_are_asked_for_where_they_raise():
    asked = re.compile(r"(?<!np)\.linalg\.(cholesky|eigh|eigvalsh|qr|svd|solve|inv|slogdet)\(")
    for path in structure.modules("lowrank_inverse"):
        assert not asked.search(path.read_text(encoding="utf-8")), f"{path}: algebra(x) has it"


def test_a_call_enters_few_files():
    entered = structure.files_entered(lambda: li.solve(matrix("linear"), rhs()))
    assert "lowrank_inverse/solvers/solve.py" in entered
    assert len(entered) <= 18
