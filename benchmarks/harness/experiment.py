"""An experiment: its options, measurements that are kept, a table, a record and a picture.

::

    @experiment("accuracy", __doc__, seeds(5))
    def main(run: Run) -> None:
        found = run.each(error, {(case, seed): {...} for ...})
        run.publish(table(rows), "what is in the table", errors=found)
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks.harness import processes
from benchmarks.harness.claims import told
from benchmarks.harness.processes import Found
from benchmarks.harness.records import Records, completed, write
from benchmarks.harness.report import machine, where


class Option(NamedTuple):
    """An option of a command; a list takes several values, ``False`` is a switch."""

    name: str
    default: Any
    help: str
    least: float | None = None
    choices: Sequence[Any] | None = None
    kind: Any = None
    quick: Any = None
    """What it is by default with ``--quick``."""

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Declare it; what is not given is None until `value` fills it in."""
        if self.default is False:
            parser.add_argument(self.flag, action="store_true", help=self.help)
            return
        many = isinstance(self.default, list)
        example = (self.default or [""])[0] if many else self.default
        shown = "all" if many and self.default == list(self.choices or []) else self.default
        more: Found = {"nargs": "+"} if many else {}
        parser.add_argument(
            self.flag,
            type=self.kind or type(example),
            choices=self.choices,
            metavar="NAME" if many and self.choices else None,
            help=self.help + ("" if shown in (None, []) else f" (default: {shown})"),
            **more,
        )

    @property
    def flag(self) -> str:
        return f"--{self.name.replace('_', '-')}"

    def value(self, given: Any, quick: bool) -> Any:
        """Return what was given or the default; raise ValueError if it is too small."""
        if given is None:
            given = self.quick if quick and self.quick is not None else self.default
        values = given if isinstance(given, list) else [given]
        if self.least is not None and any(v is not None and v < self.least for v in values):
            raise ValueError(f"{self.flag} must be at least {self.least:g}; got {given}")
        return given


QUICK = Option("quick", False, "smaller, to try it")
DATA = Option("data_dir", Path("data"), "folder of the data")
SEED = Option("seed", 0, "of all that is random")
DEVICE = Option("device", "cpu", "where torch computes", choices=["cpu", "cuda"])
WORKERS = Option("workers", 2, "runs at a time", least=1)
THREADS = Option("threads", 1, "of the processor", least=1)
REPEATS = Option("repeats", 5, "of each call", least=1)
OUTPUT = Option("output", Path("results"), "folder for results")
ANEW = Option("anew", False, "measure again what an earlier call has measured")
TIMED = (REPEATS, THREADS, SEED)
PEER_PYTHON = Option("peer_python", [], "interpreters of environments with other libraries")


def seeds(count: int, quick: int | None = None) -> Option:
    """Return the option of how often all is repeated."""
    return Option("seeds", count, "runs of each", least=1, quick=quick)


@dataclass(frozen=True)
class Experiment:
    """A command: called with its arguments, it measures, prints and writes."""

    name: str
    about: str | None
    options: tuple[Option, ...]
    packages: tuple[str, ...]
    body: Callable[[Run], int | None]

    def __call__(self, arguments: Sequence[str]) -> int:
        """Return the status of the process."""
        parser = argparse.ArgumentParser(
            prog=f"python -m benchmarks {self.name}",
            description=self.about,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        options = (*self.options, OUTPUT, ANEW)
        for option in options:
            option.add_to(parser)
        given = parser.parse_args(arguments)
        try:
            for option in options:
                value = option.value(getattr(given, option.name), getattr(given, "quick", False))
                setattr(given, option.name, value)
        except ValueError as error:
            parser.error(str(error))
        if getattr(given, "device", "cpu") == "cuda":
            import torch

            if not torch.cuda.is_available():
                parser.error("--device cuda: torch finds no CUDA device")
        return self.body(Run(self.name.replace("-", "_"), given, self.packages)) or 0


def experiment(
    name: str, about: str | None, *options: Option, packages: Sequence[str] = ("numpy",)
) -> Callable[[Callable[[Run], int | None]], Experiment]:
    """Make a function of a `Run` the experiment that ``python -m benchmarks NAME`` runs."""
    return lambda body: Experiment(name, about, options, tuple(packages), body)


class Run:
    """One call of an experiment.

    Attributes
    ----------
    name : str
        Of the files that are written.
    options : Namespace
        The values of the options.
    about : dict
        Machine, versions, device and threads: what is kept holds for these alone.
    """

    def __init__(self, name: str, options: argparse.Namespace, packages: Sequence[str]) -> None:
        self.name, self.options = name, options
        self.about = machine(*packages)
        if hasattr(options, "device"):
            self.about["device"] = _device(options.device)
        self.about["threads"] = getattr(options, "threads", 1)
        processes.use_threads(self.about["threads"])
        if options.anew:
            self._runs.unlink(missing_ok=True)

    @property
    def _runs(self) -> Path:
        return self.options.output / f"{self.name}.runs.json"

    @property
    def cache(self) -> Path:
        """The folder of files that several processes read."""
        return self.options.output / "cache"

    def each(
        self,
        function: Callable[..., Any],
        cells: dict[Any, Found],
        *,
        apart: bool = True,
        strict: bool = True,
        pythons: dict[Any, str] | None = None,
        timeout: float | None = None,
    ) -> dict[Any, Any]:
        """Return what `function` returns with the settings of each cell, a JSON value.

        Each call has a process of its own, `workers` at a time, unless `apart` is False. What is
        done is written at once to NAME.runs.json, and found there by the next call; a cell whose
        settings changed is measured anew, and so are those that failed. Unless `strict`, failures
        are among the results, as ``{"failed": reason}``.
        """
        names = {cell: _title(cell) for cell in cells}
        keys = {cell: f"{names[cell]} {json.dumps(cells[cell])}" for cell in cells}
        records = Records(self._runs, self.about)
        found = {cell: records[key] for cell, key in keys.items() if key in records}
        failed: dict[Any, str] = {}
        if found:
            kept = f"{len(found)} of {len(cells)} kept from an earlier call"
            print(f"{self.name}: {kept}, {self._runs} (--anew measures again)")

        def measure(cell: Any) -> Any:
            if not apart:
                return json.loads(json.dumps(function(**cells[cell])))
            python = (pythons or {}).get(cell)
            more = {} if python is None else {"python": python}
            more |= {} if timeout is None else {"timeout": timeout}
            target = f"{function.__module__}:{function.__qualname__}"
            return processes.apart(target, cells[cell], **more)

        workers = getattr(self.options, "workers", 1) if apart else 0
        waiting = [cell for cell in cells if cell not in found]
        bar = tqdm(total=len(cells), initial=len(found), desc=self.name, unit="run")
        with bar:
            for cell, result in completed(measure, waiting, workers):
                if isinstance(result, dict) and "failed" in result:
                    failed[cell] = result["failed"]
                else:
                    records[keys[cell]] = result
                found[cell] = result
                bar.set_postfix_str(names[cell])
                bar.update()
        if failed and strict:
            reasons = "; ".join(f"{names[cell]}: {reason}" for cell, reason in failed.items())
            raise SystemExit(f"{self.name}: {len(failed)} of {len(cells)} runs failed. {reasons}")
        return {cell: found[cell] for cell in cells}

    def repeated(
        self, function: Callable[..., Any], cases: dict[Any, Found], **more: Any
    ) -> dict[Any, list[Any]]:
        """Return what `each` does for every case, a list over the seeds 0, 1, …"""
        count = range(self.options.seeds)
        cells = {
            (case, f"seed {seed}"): {**settings, "seed": seed}
            for seed in count
            for case, settings in cases.items()
        }
        found = self.each(function, cells, **more)
        return {case: [found[case, f"seed {seed}"] for seed in count] for case in cases}

    def file(self, function: Callable[..., Found], settings: Found) -> Found:
        """Call a function that writes the file `path`, which others read, unless that was done.

        Returns
        -------
        dict
            What the function returned, and the path.
        """
        self.cache.mkdir(parents=True, exist_ok=True)
        values = "-".join(str(value).replace("/", "_") for value in settings.values())
        path = (self.cache / f"{self.name}-{values}.npz").resolve()
        records = Records(self._runs, self.about)
        key = f"{path} {json.dumps(settings)}"
        if key not in records or not path.exists():
            target = f"{function.__module__}:{function.__qualname__}"
            found = processes.apart(target, {"path": str(path), **settings})
            if "failed" in found:
                raise SystemExit(f"{self.name}: {found['failed']}")
            records[key] = found
        return {**records[key], "path": str(path)}

    def publish(self, *parts: str, name: str | None = None, **results: Any) -> None:
        """Print the parts of a text, write them as NAME.txt, and the results as NAME.json."""
        folder, name = self.options.output, name or self.name
        if "claims" in results:
            parts = (*parts, told(results["claims"]))
        about = self.about | {
            key: f"0…{value - 1}" if key == "seeds" else value
            for key, value in vars(self.options).items()
            if isinstance(value, int | float) and key not in ("anew", "workers")
        }
        if "quick" in about:
            about |= {"quick": "yes" if about["quick"] else "no"}
        text = "\n\n".join([*filter(None, parts), where(about)])
        write(folder / f"{name}.txt", text + "\n")
        write(folder / f"{name}.json", json.dumps({"machine": about, **results}, indent=1) + "\n")
        print(f"\n{text}\n\nWritten to {folder}: {name}.txt, {name}.json")

    def figure(self, rows: int, columns: int, *size: float, **more: Any) -> Any:
        """Return a figure and its axes, an array of shape (rows, columns)."""
        import matplotlib

        matplotlib.use("Agg")  # draws into files, and needs no screen
        from matplotlib import pyplot

        return pyplot.subplots(
            rows, columns, figsize=size, layout="constrained", squeeze=False, **more
        )

    def draw(self, figure: Any) -> None:
        """Write the figure as NAME.png."""
        from matplotlib import pyplot

        content = io.BytesIO()
        figure.savefig(content, dpi=130, format="png")
        pyplot.close(figure)
        path = self.options.output / f"{self.name}.png"
        write(path, content.getvalue())
        print(f"Picture: {path}")


def _title(cell: Any) -> str:
    return ", ".join(map(_title, cell)) if isinstance(cell, tuple) else str(cell)


def _device(name: str) -> str:
    if name != "cuda":
        return name
    import torch

    return torch.cuda.get_device_name()
