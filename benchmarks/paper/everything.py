"""All figures and tables of the paper, one after the other, and one summary.

Each experiment keeps its runs in the folder of the results: called again, the command goes on where
it was interrupted, and does not repeat what is done. An experiment that fails is named, and the
next one begins.
"""

from __future__ import annotations

import json
import textwrap
import time
from typing import Any

from benchmarks import __main__ as command
from benchmarks.harness import claims
from benchmarks.harness.experiment import DATA, DEVICE, QUICK, WORKERS, Option, Run, experiment
from benchmarks.harness.processes import Found
from benchmarks.harness.records import Records
from benchmarks.harness.report import table

INTERRUPTED = 130
EXPERIMENTS = {
    "Figure 1": "figure1",
    "Figure 2": "figure2",
    "Figure 3": "figure3",
    "Figure 4": "figure4",
    "Table 2": "table2",
    "Table 3": "table3",
    "Table 4": "table4",
    "Table 5": "paper-table5",
    "Table 6": "table6",
}
SHARED = (QUICK, DATA, DEVICE, WORKERS)
WIDTHS = {"experiment": 10, "the paper": 36, "here": 64, "verdict": 13}


def arguments_of(name: str, options: Any) -> list[str]:
    """Return the arguments of an experiment: those of the shared options that it has."""
    arguments = []
    for option in SHARED:
        value = getattr(options, option.name)
        if option in command.load(name).options and value is not False:
            arguments += [option.flag] if value is True else [option.flag, str(value)]
    return [*arguments, "--output", str(options.output)]


def call(name: str, arguments: list[str]) -> None:
    """Run a command; raise RuntimeError with its reason if it does not end well."""
    try:
        status = command.load(name)(arguments)
    except SystemExit as stop:  # its code is a message, or the number of one printed before
        status = stop.code
    if status:
        raise RuntimeError(status if isinstance(status, str) else f"it ended with {status}")


def perform(title: str, options: Any, times: Records) -> Found:
    """Run one experiment unless it is done; return its claims, or why it failed, and its time."""
    name = EXPERIMENTS[title]
    arguments = arguments_of(name, options)
    key = " ".join([name, *arguments])
    path = options.output / f"{name.replace('-', '_')}.json"
    before = times.get(key, {"seconds": 0.0, "done": False})
    if before["done"] and path.exists():
        print(f"{title}: done before, {path}")
        return {**json.loads(path.read_text(encoding="utf-8")), "seconds": before["seconds"]}
    # An older result must not be taken for that of a run which fails.
    path.unlink(missing_ok=True)
    start, found, done = time.perf_counter(), {}, False
    try:
        call(name, [*arguments, *(["--anew"] if options.anew else [])])
        found = json.loads(path.read_text(encoding="utf-8"))
        if not found.get("claims"):
            raise RuntimeError(f"{path} has no claims")
        done = True
    except Exception as error:
        found = {"failed": f"{error}"[:500]}
        print(f"\n{title} failed: {error}")
    finally:  # an interruption keeps its time too
        seconds = before["seconds"] + time.perf_counter() - start
        times[key] = {"seconds": seconds, "done": done}
    return {**found, "seconds": seconds}


def rows(results: dict[str, Found]) -> list[dict[str, str]]:
    """Return the lines of the summary: one a claim, or one for an experiment that failed."""
    lines = []
    for name, found in results.items():
        failed = [{"paper": "", "ours": found.get("failed"), "verdict": "failed"}]
        for one in failed if "failed" in found else found.get("claims", []):
            texts = [name, *(str(one[key]) for key in ("paper", "ours", "verdict"))]
            lines += wrapped(dict(zip(WIDTHS, texts, strict=True)))
            name = ""
    return lines


def wrapped(row: dict[str, str]) -> list[dict[str, str]]:
    """Break a row into lines as wide as `WIDTHS`, with an empty one after it."""
    columns = {name: textwrap.wrap(text, WIDTHS[name]) for name, text in row.items()}
    height = max(map(len, columns.values())) + 1
    return [
        {
            name.ljust(WIDTHS[name]): [*lines, *[""] * height][at].ljust(WIDTHS[name])
            for name, lines in columns.items()
        }
        for at in range(height)
    ]


def summarize(run: Run, results: dict[str, Found]) -> None:
    """Print and write the summary."""
    judged = [one["verdict"] for found in results.values() for one in found.get("claims", [])]
    verdicts = (claims.SUPPORTED, claims.IN_PART, claims.NOT_SUPPORTED)
    minutes = [
        {
            "experiment": name,
            "minutes": f"{found['seconds'] / 60:.1f}",
            "outcome": "failed" if "failed" in found else "done",
        }
        for name, found in results.items()
    ]
    total = sum(found["seconds"] for found in results.values()) / 60
    kept = ("claims", "failed", "seconds")
    run.publish(
        table(rows(results)).rstrip(),
        f"Verdicts: {', '.join(f'{judged.count(verdict)} {verdict}' for verdict in verdicts)}.",
        table(minutes),
        f"Together {total:.1f} minutes with {run.options.workers} workers.",
        experiments={n: {k: found[k] for k in kept if k in found} for n, found in results.items()},
    )


@experiment(
    *("paper", __doc__, *SHARED),
    Option("only", [], "such as 'Table 2'", choices=list(EXPERIMENTS)),
    packages=("torch", "numpy"),
)
def main(run: Run) -> int:
    names = [name for name in EXPERIMENTS if not run.options.only or name in run.options.only]
    times = Records(run.options.output / "paper.runs.json", run.about)
    results: dict[str, Found] = {}
    for number, name in enumerate(names, 1):
        print(f"\n=== {name} ({number} of {len(names)})")
        try:
            results[name] = perform(name, run.options, times)
        except KeyboardInterrupt:
            rest = ", ".join(names[number - 1 :])
            print(f"\nInterrupted. Left: {rest}. The same command goes on from here.")
            return INTERRUPTED
    summarize(run, results)
    failed = [name for name, found in results.items() if "failed" in found]
    if failed:
        print(f"Failed: {', '.join(failed)}. The same command tries them again.")
    return 1 if failed else 0
