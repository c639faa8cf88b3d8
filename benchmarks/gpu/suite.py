"""The tests that need a GPU, each outcome kept as it comes; the adapters' first."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

from benchmarks.gpu.part import Part
from benchmarks.harness.processes import ROOT, Found

FIRST = ["adapters/torch/test_transfers.py", "adapters/shared/test_devices.py", "adapters/torch"]
CORE = ["arrays", "low_rank", "iterative", "solvers", "operators", "spectral", "estimators"]
CORE += ["bilevel", "results", "influence"]
WORKERS = 12


def run(path: str, about: Found, small: bool) -> None:
    """Run them; a process more for each, up to `WORKERS`, where pytest-xdist is installed."""
    import pytest

    flags = os.environ.get("XLA_FLAGS", "")
    os.environ |= {
        "JAX_PLATFORMS": "cpu" if small else "cuda,cpu",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_FLAGS": f"{flags} --xla_gpu_autotune_level=0",  # tuning takes longer than the tests
    }
    part = Part(path, about, small)
    part.records.clear()  # they are counted anew
    folders = [str(ROOT / "tests" / name) for name in (FIRST[:1] if small else FIRST + CORE)]
    options = ["-q", "-m", "gpu and not slow", "-p", "no:cacheprovider", "--no-header"]
    if not small and importlib.util.find_spec("xdist") is not None:
        options += ["--numprocesses", str(WORKERS)]
    pytest.main([*options, *folders], plugins=[Outcomes(part)])


class Outcomes:
    """Keeps the count of outcomes in each file, and the end of what failing tests said."""

    def __init__(self, part: Part) -> None:
        self.records = part.records

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        file = report.nodeid.split("::")[0].removeprefix("tests/")
        found = self.records.get(file, {"passed": 0, "skipped": 0, "failed tests": {}})
        if report.outcome == "failed":
            found["failed tests"][report.nodeid] = report.longreprtext[-600:]
        else:
            found[report.outcome] += 1
        self.records[file] = found
