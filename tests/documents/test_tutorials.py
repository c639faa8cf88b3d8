"""Tutorials become pages with what they print and draw; a failure ends the build."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="tutorials are run by the build of the documents")
from mkdocs.exceptions import PluginError

DOCS = Path(__file__).parents[2] / "docs"
TUTORIALS = sorted((DOCS / "tutorials").glob("*.py"))
SPEC = importlib.util.spec_from_file_location("tutorials", DOCS / "_hooks" / "tutorials.py")
hook = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hook)

TUTORIAL = """# %% [markdown]
# # A line
#
# Prose.

# %% alt="A rising line."
import matplotlib.pyplot as plt
import lowrank_inverse

print("six", 2 * 3)
plt.plot([0, 1])
plt.show()
"""


def test_a_page_shows_what_a_cell_prints_and_draws(tmp_path):
    pytest.importorskip("matplotlib")
    script = tmp_path / "line.py"
    script.write_text(TUTORIAL)
    found = hook.cells(script, tmp_path / "cache")
    page = hook.markdown(found, "line")
    assert page.startswith("# A line\n\n[Script](line.py)")
    assert "\n\nProse.\n\n```python\nimport matplotlib" in page
    assert "```text\nsix 6\n```" in page
    (picture,) = (line for line in page.splitlines() if line.startswith("<figure"))
    assert 'role="img" aria-label="A rising line."' in picture
    assert "currentColor" in picture and "#000000" not in picture
    cells = json.loads(hook.notebook(found))["cells"]
    assert [cell["cell_type"] for cell in cells] == ["markdown", "code"]

    script.write_text(TUTORIAL.replace("2 * 3", "2 / 0"))
    with pytest.raises(PluginError, match=r"line\.py failed(.|\n)*ZeroDivisionError"):
        hook.cells(script, tmp_path / "cache")
    script.write_text(TUTORIAL.replace(' alt="A rising line."', ""))
    with pytest.raises(PluginError, match="needs a description"):
        hook.cells(script, tmp_path / "cache")


def test_a_tutorial_that_has_not_changed_is_not_run_again(tmp_path, monkeypatch):
    script = tmp_path / "one.py"
    script.write_text("# %%\nprint(1)\n")
    monkeypatch.setattr(hook, "run", lambda script: '["run"]')
    assert hook.cells(script, tmp_path) == ["run"]
    monkeypatch.setattr(hook, "run", lambda script: '["run again"]')
    assert hook.cells(script, tmp_path) == ["run"]
    script.write_text("# %%\nprint(2)\n")
    assert hook.cells(script, tmp_path) == ["run again"]
    assert len(list(tmp_path.glob("one-*.json"))) == 1


@pytest.mark.parametrize("script", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_ends_with_how_to_tell_and_asserts_it(script):
    text = script.read_text(encoding="utf-8")
    before, last = text.rsplit("# ## ", 1)
    assert last.startswith("How to tell that it worked\n")
    assert "\nassert " in last
    assert text.startswith("# %% [markdown]\n# # ") and "alt=" in before
    assert max(len(line) for line in text.splitlines() if not line.startswith("#")) <= 80
