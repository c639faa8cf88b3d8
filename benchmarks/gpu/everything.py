"""Everything that needs a GPU, in one call of minutes: parts in the order of their importance.

Each part has a process of its own and a limit of its own, and writes each result as it comes: a
part that is cut short, or a call, keeps what it had. Called again with the same folder, it goes on
from there. ``--dry-run`` tries all of it on the CPU, on small problems. ``--limit 0`` runs nothing,
and writes the report of what is in the folder. ``benchmarks/gpu.sh`` brings what is not installed.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import NamedTuple

from benchmarks.gpu import report
from benchmarks.harness import processes
from benchmarks.harness.experiment import Option, Run, experiment
from benchmarks.harness.processes import Found

LEAST = 5.0
"""Seconds below which no part is begun."""
NO_TIME = "no time left"


class Call(NamedTuple):
    """A part: the function that runs it, and the seconds it may take."""

    target: str
    limit: float
    settings: Found


CALLS = {
    "tests": Call("suite:run", 90.0, {}),
    "table5": Call("hypergradients:table5", 90.0, {}),
    "jax": Call("hypergradients:in_jax", 120.0, {}),
    "precision": Call("precision:run", 60.0, {}),
    "sizes": Call("sizes:run", 90.0, {}),
    "busy": Call("busy:run", 90.0, {}),
    "larger": Call("hypergradients:table5", 120.0, {"model": "wrn10"}),
}
FILES = {"larger": "table5"}
"""Parts that write to the file of another."""


@experiment(
    *("gpu", __doc__),
    Option("limit", 540.0, "seconds in all", least=0),
    Option("dry_run", False, "on the CPU, on small problems"),
    Option("parts", list(CALLS), "what is run", choices=list(CALLS)),
    packages=("torch", "jax", "cupy-cuda13x", "hypergrad", "jaxopt", "numpy"),
)
def main(run: Run) -> int:
    options = run.options
    run.about["device"] = "cpu" if options.dry_run else device(options.limit)
    ended = {}
    start = time.perf_counter()
    for name in options.parts:
        left = options.limit - (time.perf_counter() - start)
        call = CALLS[name]
        if left < LEAST:
            ended[name] = NO_TIME
            continue
        settings = {"path": str(path_of(run, name)), "about": run.about, "small": options.dry_run}
        print(f"{name}: at most {min(call.limit, left):.0f} s", flush=True)
        begun = time.perf_counter()
        found = processes.apart(
            f"benchmarks.gpu.{call.target}",
            settings | call.settings,
            timeout=min(call.limit, left),
        )
        failed = found["failed"] if isinstance(found, dict) else None
        ended[name] = failed or f"done in {time.perf_counter() - begun:.0f} s"
        print(f"{name}: {ended[name]}", flush=True)
    publish(run, ended)
    return 0 if all(one.startswith(("done", "more than", NO_TIME)) for one in ended.values()) else 1


def device(limit: float) -> str:
    """Return the name of the GPU; end where there is none and something is to be run."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if limit > 0:
        raise SystemExit("gpu: torch finds no CUDA device; --dry-run tries it on the CPU")
    return "none: not run yet"


def path_of(run: Run, name: str) -> Path:
    """Return the file of a part."""
    return (run.options.output / f"gpu-{FILES.get(name, name)}.json").resolve()


def publish(run: Run, ended: dict[str, str]) -> None:
    """Write what all parts have found so far, with where it was measured."""
    parts = {}
    for name in CALLS:
        if path_of(run, name).exists():
            content = json.loads(path_of(run, name).read_text(encoding="utf-8"))
            parts[FILES.get(name, name)], run.about = content["runs"], content["machine"]
    ran = run.options.limit > 0
    outcomes = "\n".join(f"{name}: {outcome}" for name, outcome in ended.items() if ran)
    run.publish(*report.text(parts), outcomes, parts={name: len(f) for name, f in parts.items()})
