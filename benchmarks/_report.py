"""What every experiment prints and writes: a table, a JSON file, and where it ran."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lowrank_inverse import __version__

HARDWARE = ("processor", "cores", "versions")


def machine(*packages: str, **settings: Any) -> dict[str, Any]:
    """Describe the machine, the versions of `packages`, and the settings of the run."""
    versions = {"python": platform.python_version(), "lowrank-inverse": __version__}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "versions": versions,
        **settings,
    }


def table(rows: Sequence[dict[str, str]]) -> str:
    """Format rows with the same keys as a table, numbers to the right."""
    headings = list(rows[0])
    widths = [max(len(h), *(len(row[h]) for row in rows)) for h in headings]
    lines = [
        "  ".join(
            text.ljust(width) if column == 0 else text.rjust(width)
            for column, (text, width) in enumerate(zip(texts, widths, strict=True))
        )
        for texts in [headings, *([row[h] for h in headings] for row in rows)]
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(line.rstrip() for line in lines)


def publish(folder: Path, name: str, text: str, about: dict[str, Any], **results: Any) -> None:
    """Print a text and write it beside its figures, as NAME.txt and NAME.json."""
    where = [about["processor"], f"{about['cores']} cores"]
    where += [f"{package} {number}" for package, number in about["versions"].items()]
    where += [f"{key} {value}" for key, value in about.items() if key not in HARDWARE]
    text = f"{text}\n\n{', '.join(where)}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
    figures = json.dumps({"machine": about, **results}, indent=1)
    (folder / f"{name}.json").write_text(figures + "\n", encoding="utf-8")
    print(f"\n{text}\n\nWritten to {folder}: {name}.txt, {name}.json")


def pyplot() -> Any:
    """Return matplotlib's pyplot, which draws into files here and needs no screen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
