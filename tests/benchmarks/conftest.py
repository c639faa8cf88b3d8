"""What the tests of the experiments share: they run in this process, and what they wrote."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

for package in ("tqdm", "matplotlib"):
    pytest.importorskip(package, reason=f"the experiments need the extra `plot`: {package}")

from benchmarks.harness import processes


def written(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def text(folder: Path, name: str) -> str:
    return (folder / f"{name}.txt").read_text(encoding="utf-8")


def run_here(patch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Call in this process what has one of its own; return the settings of the calls to come."""
    made: list[dict[str, Any]] = []

    def here(target: str, settings: dict[str, Any], **_: Any) -> Any:
        made.append(settings)
        module, name = target.split(":")
        function = getattr(importlib.import_module(module), name)
        return json.loads(json.dumps(function(**json.loads(json.dumps(settings)))))

    patch.setattr(processes, "apart", here)
    return made


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    return run_here(monkeypatch)


def refused(experiment: Any, arguments: list[str], message: str, capsys: Any) -> None:
    """Assert that the command line is refused with that message."""
    with pytest.raises(SystemExit, match="2"):
        experiment(arguments)
    assert message in capsys.readouterr().err
