"""The reference shows docstrings of NumPy's form without a trace of their markup."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
griffe = pytest.importorskip("griffe", reason="griffe, which reads the docstrings, is missing")


def hook(name):
    """Return a module of docs/_hooks, which is no package."""
    path = ROOT / "docs" / "_hooks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def package():
    extensions = griffe.load_extensions(hook("docstrings").MarkdownDocstrings)
    return griffe.load(
        "lowrank_inverse",
        search_paths=[ROOT],
        allow_inspection=False,
        extensions=extensions,
        docstring_parser="numpy",
    )


def sections(package, path):
    """Return the parsed docstring at `path`, its sections by the name of their kind."""
    return {section.kind.value: section.value for section in package[path].docstring.parsed}


def test_a_shape_is_printed_as_it_is_written(package):
    found = sections(package, "iterative.conjugate_gradients.cg")["parameters"]
    parameters = {p.name: p for p in found}
    assert str(parameters["A"].annotation) == "linear operator of shape (n, n)"
    assert str(parameters["b"].annotation) == "array of shape (n,) or (n, m)"
    attributes = {p.name: p for p in sections(package, "results.solution.Solution")["attributes"]}
    assert str(attributes["residual_norm"].annotation) == "array of shape () or (m,)"


def test_no_type_is_read_as_a_tuple_that_is_none(package):
    def check(obj):
        if obj.docstring:
            for section in obj.docstring.parsed:
                for item in section.value if isinstance(section.value, list) else []:
                    note = getattr(item, "annotation", None)
                    if isinstance(note, griffe.ExprTuple):
                        assert str(note) in obj.docstring.value, obj.path
        for member in obj.members.values():
            if not member.is_alias:
                check(member)

    check(package)


def test_roles_become_links_to_what_they_name(package):
    text = package["low_rank.approximation.NystromApproximation"].docstring.value
    assert "[`nystrom`][lowrank_inverse.low_rank.nystrom_columns.nystrom]" in text
    assert ":func:" not in text
    assert ":meth:" not in text
    method = "[`inverse`][lowrank_inverse.low_rank.approximation.NystromApproximation.inverse]"
    assert method in text
    text = package["low_rank.nystrom_columns.nystrom"].docstring.value
    cls = "lowrank_inverse.low_rank.approximation.NystromApproximation"
    assert f"[`sufficient_rank`][{cls}.sufficient_rank]" in text


def test_citations_are_links_to_references(package):
    text = package["iterative.conjugate_gradients.cg"].docstring.value
    assert "[[1]](#ref-1)" in text
    assert "\n[1] M. R. Hestenes" in text
    assert "{: #ref-1 }" in text
    assert "]_" not in text
    assert ".. [" not in text


def test_a_citation_of_the_references_of_the_class_is_no_link(package):
    markdown = hook("docstrings").markdown
    method = package["low_rank.approximation.NystromApproximation.inverse"]
    text = "By [1]_, [2]_.\n\nReferences\n----------\n.. [1] A. Author.\n"
    assert markdown(text, method).startswith("By [[1]](#ref-1), [2].")
