"""The first pages that a reader sees print what they show."""

from __future__ import annotations

import contextlib
import io
import re
import textwrap
from pathlib import Path

import pytest

from tests.conftest import kept_types_of_jax

ROOT = Path(__file__).parents[2]
EXAMPLE = re.compile(r"^( *)```python\n(.*?)^\1```\n\n\1```text\n(.*?)^\1```$", re.DOTALL | re.M)
CODE = re.compile(r"^( *)```(?:python|console)\n(.*?)^\1```$", re.DOTALL | re.M)


@pytest.fixture(autouse=True)
def types_of_jax_as_each_page_found_them():
    yield from kept_types_of_jax()


@pytest.mark.parametrize(
    "page", [pytest.param("README.md", marks=pytest.mark.slow), "docs/index.md"]
)
def test_each_example_prints_what_is_shown_below_it(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    examples = EXAMPLE.findall(text)
    assert len(examples) == text.count("```python\n")
    names: dict = {}
    for _, code, shown in examples:
        for framework in {"torch", "jax"}.intersection(re.findall(r"\w+", code)):
            pytest.importorskip(framework, reason=f"the page shows {framework}")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(textwrap.dedent(code), page, "exec"), names)
        assert printed.getvalue() == textwrap.dedent(shown)


def test_code_fits_in_eighty_columns():
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for _, code in CODE.findall(page.read_text(encoding="utf-8")):
            for line in textwrap.dedent(code).splitlines():
                assert len(line) <= 80, (page.name, line)


def test_the_links_of_the_readme_lead_somewhere():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert len(links) > 10
    assert [link for link in links if not (ROOT / link).is_file()] == []
