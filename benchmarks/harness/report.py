"""What is printed and written: tables, and where they were measured."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from lowrank_inverse import __version__


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


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """Write mean ± standard deviation."""
    return f"{np.mean(values):{form}} ± {np.std(values):{form}}"


def cuts(full: Any, here: Any) -> str:
    """Return a table of the fields in which two settings of one dataclass differ."""
    in_full = asdict(full)
    rows = [
        {"setting": name.replace("_", " "), "here": str(value), "in full": str(in_full[name])}
        for name, value in asdict(here).items()
        if value != in_full[name]
    ]
    return table(rows) if rows else "The setting in full."


def machine(*packages: str) -> dict[str, Any]:
    """Describe the machine and the versions of `packages`."""
    versions = {"python": platform.python_version(), "lowrank-inverse": __version__}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {"processor": _processor(), "cores": os.cpu_count(), "versions": versions}


def where(about: dict[str, Any]) -> str:
    """Write in one line where something was measured."""
    hardware = [about["processor"], f"{about['cores']} cores"]
    versions = [f"{package} {number}" for package, number in about["versions"].items()]
    known = ("processor", "cores", "versions")
    settings = [f"{key} {value}" for key, value in about.items() if key not in known]
    return ", ".join([*hardware, *versions, *settings])


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
