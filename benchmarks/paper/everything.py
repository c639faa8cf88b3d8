"""All figures and tables of the paper, one after the other, and one summary.

Each experiment keeps its runs in the folder of the results: called again, the command goes on where
it was interrupted, and does not repeat what is done. An experiment that fails is named, and the
next one begins.
"""

from __future__ import annotations

import argparse
import json
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._measure import Found, Records
from benchmarks._report import machine, publish, table
from benchmarks.paper import _runs

INTERRUPTED = 130


@dataclass(frozen=True)
class Experiment:
    """One command, the name of its results, and which of the common options it takes."""

    command: str
    result: str
    options: tuple[str, ...] = ("quick", "data_dir", "device", "workers")


WITHOUT_DATA = ("quick", "device", "workers")
EXPERIMENTS = {
    "Figure 1": Experiment("figure1", "figure1", ()),
    "Figure 2": Experiment("figure2", "figure2", WITHOUT_DATA),
    "Figure 3": Experiment("figure3", "figure3", WITHOUT_DATA),
    "Figure 4": Experiment("figure4", "figure4", WITHOUT_DATA),
    "Table 2": Experiment("table2", "table2"),
    "Table 3": Experiment("table3", "table3"),
    "Table 4": Experiment("table4", "table4"),
    "Table 5": Experiment("paper-table5", "paper_table5", ("quick", "device")),
    "Table 6": Experiment("table6", "table6"),
}
WIDTHS = {"experiment": 10, "the paper": 36, "here": 64, "verdict": 13}


def arguments_of(experiment: Experiment, options: Any) -> list[str]:
    """Return the arguments of its command."""
    arguments = ["--quick"] if options.quick and "quick" in experiment.options else []
    for name in ("data_dir", "device", "workers"):
        if name in experiment.options:
            arguments += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    return [*arguments, "--output", str(options.output)]


def call(command: str, arguments: list[str]) -> None:
    """Run a command; raise RuntimeError with its reason if it does not end well."""
    from benchmarks.__main__ import COMMANDS, load

    if command not in COMMANDS:
        raise RuntimeError("there is no such command")
    try:
        status = load(command)(arguments)
    except SystemExit as stop:  # its code is a message, or the number of one printed before
        status = stop.code
    if status:
        raise RuntimeError(status if isinstance(status, str) else f"it ended with {status}")


def perform(name: str, options: Any, times: Records) -> Found:
    """Run one experiment unless it is done; return its claims, or why it failed, and its time."""
    experiment = EXPERIMENTS[name]
    arguments = arguments_of(experiment, options)
    key = " ".join([experiment.command, *arguments])
    path = options.output / f"{experiment.result}.json"
    before = times.found.get(key, {"seconds": 0.0, "done": False})
    start, found = time.perf_counter(), {}
    if before["done"] and path.exists():
        print(f"{name}: done before, {path}")
        return {**json.loads(path.read_text(encoding="utf-8")), "seconds": before["seconds"]}
    # An older result must not be taken for that of a run which fails.
    path.unlink(missing_ok=True)
    done = False
    try:
        call(experiment.command, arguments)
        found, done = json.loads(path.read_text(encoding="utf-8")), True
        if not found.get("claims"):
            raise RuntimeError(f"{path} has no claims")
    except Exception as error:
        found, done = {"failed": f"{error}"[:500]}, False
        print(f"\n{name} failed: {error}")
    finally:  # an interruption keeps its time too
        seconds = before["seconds"] + time.perf_counter() - start
        times.put(key, {"seconds": seconds, "done": done})
    return {**found, "seconds": seconds}


def rows(results: dict[str, Found]) -> list[dict[str, str]]:
    """Return the lines of the summary: one a claim, or one for an experiment that failed."""
    lines = []
    for name, found in results.items():
        claims = found.get("claims", [])
        if "failed" in found:
            claims = [{"paper": "", "ours": found["failed"], "verdict": "failed"}]
        for claim in claims:
            lines.append([name, *(claim[key] for key in ("paper", "ours", "verdict"))])
            name = ""
    return [
        line for texts in lines for line in wrapped(dict(zip(WIDTHS, map(str, texts), strict=True)))
    ]


def wrapped(row: dict[str, str]) -> list[dict[str, str]]:
    """Break a row into lines as wide as `WIDTHS`, with an empty one after it."""
    columns = {name: textwrap.wrap(text, WIDTHS[name]) for name, text in row.items()}
    height = max(map(len, columns.values()))
    return [
        {
            name.ljust(WIDTHS[name]): (lines[at] if at < len(lines) else "").ljust(WIDTHS[name])
            for name, lines in columns.items()
        }
        for at in range(height + 1)
    ]


def left(names: list[str], results: dict[str, Found]) -> list[str]:
    """Return the experiments that have no result yet."""
    return [name for name in names if "claims" not in results.get(name, {})]


def summarize(results: dict[str, Found], options: Any, about: Found) -> None:
    """Print and write the summary."""
    counts = dict.fromkeys((_runs.SUPPORTED, _runs.IN_PART, _runs.NOT_SUPPORTED), 0)
    for found in results.values():
        for claim in found.get("claims", []):
            counts[claim["verdict"]] = counts.get(claim["verdict"], 0) + 1
    minutes = [
        {
            "experiment": name,
            "minutes": f"{found['seconds'] / 60:.1f}",
            "outcome": "failed" if "failed" in found else "done",
        }
        for name, found in results.items()
    ]
    total = sum(found["seconds"] for found in results.values()) / 60
    verdicts = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    text = "\n\n".join(
        [
            table(rows(results)).rstrip(),
            f"Verdicts: {verdicts}.",
            table(minutes),
            f"Together {total:.1f} minutes with {options.workers} workers.",
        ]
    )
    outcomes = {
        name: {key: found[key] for key in ("claims", "failed", "seconds") if key in found}
        for name, found in results.items()
    }
    publish(options.output, "paper", text, about, experiments=outcomes)


def main(arguments: list[str]) -> int:
    """Run them all, print and write the summary; 1 if any failed, 130 if interrupted."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks paper", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="within the hour on two cores")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="(default: data)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for results")
    parser.add_argument(
        "--only", nargs="+", choices=list(EXPERIMENTS), metavar="NAME", help="such as 'Table 2'"
    )
    options = parser.parse_args(arguments)
    if options.workers < 1:
        parser.error(f"--workers must be at least 1; got {options.workers}")
    names = [name for name in EXPERIMENTS if options.only is None or name in options.only]
    about = machine("torch", "numpy", setting="quick" if options.quick else "full")
    times = Records(options.output / "paper.runs.json", about)
    results: dict[str, Found] = {}
    for number, name in enumerate(names, 1):
        print(f"\n=== {name} ({number} of {len(names)})")
        try:
            results[name] = perform(name, options, times)
        except KeyboardInterrupt:
            rest = ", ".join(left(names, results))
            print(f"\nInterrupted. Left: {rest}. The same command goes on from here.")
            return INTERRUPTED
    summarize(results, options, about)
    failed = left(names, results)
    if failed:
        print(f"Failed: {', '.join(failed)}. The same command tries them again.")
    return 1 if failed else 0
