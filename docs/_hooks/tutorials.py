"""Tutorials are scripts; the build runs them and makes pages and notebooks of them.

Each runs in a process of its own, two at a time. What came out is kept in ``.cache`` until the
tutorial, the package or this folder changes.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
RUNNER = Path(__file__).with_name("run_tutorial.py")
SOURCES = [
    RUNNER,
    *sorted(ROOT.glob("lowrank_inverse/**/*.py")),
    *sorted(ROOT.glob("adapters/**/*.py")),
]
PATH = [str(ROOT), str(ROOT / "adapters")]
BOTH = 2


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add a page and a notebook for each tutorial."""
    scripts = sorted((Path(config.docs_dir) / "tutorials").glob("*.py"))
    cache = ROOT / ".cache" / "tutorials"
    with ThreadPoolExecutor(BOTH) as pool:
        results = list(pool.map(lambda script: cells(script, cache), scripts))
    for script, found in zip(scripts, results, strict=True):
        page = f"tutorials/{script.stem}"
        files.append(File.generated(config, f"{page}.md", content=markdown(found, script.stem)))
        files.append(File.generated(config, f"{page}.ipynb", content=notebook(found)))
    return files


def cells(script: Path, cache: Path) -> list[dict[str, Any]]:
    """Return the cells of a tutorial with their outputs, from the cache where they are there."""
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in [script, *SOURCES]))
    kept = cache / f"{script.stem}-{digest.hexdigest()[:16]}.json"
    if not kept.exists():
        text = run(script)
        cache.mkdir(parents=True, exist_ok=True)
        for old in cache.glob(f"{script.stem}-*.json"):
            old.unlink()
        kept.write_text(text, encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


def run(script: Path) -> str:
    """Run a tutorial; a failure ends the build."""
    found = os.environ.get("PYTHONPATH")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(PATH + ([found] if found else [])),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(RUNNER), str(script)]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if finished.returncode:
        raise PluginError(f"{script.name} failed:\n{finished.stderr}")
    return finished.stdout


def markdown(found: list[dict[str, Any]], name: str) -> str:
    """Return the page of a tutorial."""
    title, _, rest = found[0]["source"].partition("\n")
    links = f"[Script]({name}.py) · [Notebook]({name}.ipynb){{: download }}"
    parts = [title, links, rest.strip()]
    for cell in found[1:]:
        if cell["kind"] == "markdown":
            parts.append(cell["source"])
            continue
        parts.append(f"```python\n{cell['source']}\n```")
        if cell["output"]:
            parts.append(f"```text\n{cell['output']}\n```")
        parts += cell["pictures"]
    return "\n\n".join(parts) + "\n"


def notebook(found: list[dict[str, Any]]) -> str:
    """Return the notebook of a tutorial, to be run by the reader."""
    written = []
    for number, cell in enumerate(found):
        entry = {"cell_type": cell["kind"], "id": f"cell-{number}", "metadata": {}}
        entry["source"] = cell["source"]
        if cell["kind"] == "code":
            entry |= {"execution_count": None, "outputs": []}
        written.append(entry)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return json.dumps(
        {"cells": written, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5},
        indent=1,
    )
