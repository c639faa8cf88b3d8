"""The page on trouble has an entry for each reason, finding and warning of the sources."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import lowrank_inverse as li
from lowrank_inverse.bilevel.minimum import REMEDIES
from tests import structure

PAGE = Path(__file__).parents[2] / "docs" / "troubleshooting.md"
SECTIONS = dict(re.findall(r"^## (.*)\n((?:(?!^## ).*\n)*)", PAGE.read_text("utf-8"), re.M))


def entries(section):
    return re.findall(r"^\| `(\w+)` \|", SECTIONS[section], re.MULTILINE)


def test_every_reason_of_a_solve_has_an_entry():
    assert entries("Why a solve ended") == [reason.name.lower() for reason in li.Reason]


def test_every_reason_of_a_minimisation_has_an_entry():
    assert sorted(entries("Why a bilevel minimisation ended")) == sorted(REMEDIES)


def test_every_finding_has_an_entry():
    source = (structure.CORE / "bilevel" / "diagnostics.py").read_text("utf-8")
    names = {
        call.args[0].value
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "Finding"
    }
    assert len(names) >= 9
    assert set(entries("What is wrong with a hypergradient")) == names


def texts(node):
    """Return the constant pieces of the texts below a node."""
    return [
        part.value
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    ]


def warnings_of(tree):
    """Yield the pieces of each text that is warned of, or kept in `missed` to be warned of."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn":
            yield texts(node.args[0])
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "missed":
            yield texts(node.value)
        elif isinstance(node, ast.FunctionDef) and node.name in ("missed", "_missed", "maximiser"):
            yield [t for r in ast.walk(node) if isinstance(r, ast.Return) for t in texts(r)]


@pytest.mark.parametrize("folder", ["lowrank_inverse", "adapters"])
def test_every_warning_has_an_entry(folder):
    known = re.findall(r"“(.*?)”", SECTIONS["Warnings"])
    pieces = [piece.strip(" .") for begin in known for piece in begin.split("…")]
    pieces = [piece for piece in pieces if piece]
    found = 0
    for path in structure.modules(folder):
        for words in warnings_of(ast.parse(path.read_text("utf-8"))):
            if any(len(word) > 12 for word in words):
                found += 1
                assert any(piece in " ".join(words) for piece in pieces), (path.name, words)
    assert found >= {"lowrank_inverse": 7, "adapters": 1}[folder]
