"""What the experiments of the paper share: options, runs that are kept, and what they come to."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks._measure import Found, Records, apart, use_threads
from benchmarks._report import machine

SUPPORTED, IN_PART, NOT_SUPPORTED = "supported", "in part", "not supported"
"""Verdicts on what the paper claims."""


def parser(name: str, about: str | None, *, seeds: int, data: bool = True) -> Any:
    """Return the parser of the options that all experiments have."""
    found = argparse.ArgumentParser(prog=f"python -m benchmarks {name}", description=about)
    found.add_argument("--quick", action="store_true", help="smaller, minutes on two cores")
    if data:
        found.add_argument("--data-dir", type=Path, default=Path("data"), help="(default: data)")
    found.add_argument("--seeds", type=int, default=seeds, help=f"runs of each (default: {seeds})")
    found.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    found.add_argument("--workers", type=int, default=2, help="runs at a time (default: 2)")
    found.add_argument("--output", type=Path, default=Path("results"), help="folder for results")
    return found


def parse(parser: Any, arguments: list[str]) -> Any:
    """Parse and check them."""
    import torch

    options = parser.parse_args(arguments)
    for name in ("seeds", "workers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1; got {getattr(options, name)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    return options


def run_all(name: str, target: str, cells: dict[str, Found], options: Any) -> tuple[Found, Found]:
    """Call the function `target`, ``module:name``, with the settings of every cell.

    Each call has a process of its own with one thread, `options.workers` at a time. What is done is
    written at once to NAME.runs.json in the folder of the results, and found there by the next run
    with the same versions and device; a cell whose settings changed is run anew.

    Returns
    -------
    dict
        What the function returned, by the name of the cell.
    dict
        The machine, for the report.
    """
    import torch

    use_threads(1)
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    about = machine("torch", "numpy", device=device)
    records = Records(options.output / f"{name}.runs.json", about)
    found: Found = {}
    waiting = {}
    for cell, settings in cells.items():
        key = f"{cell} {settings}"
        if key in records.found:
            found[cell] = records.found[key]
        else:
            waiting[cell] = key
    failed = {}
    with (
        tqdm(total=len(cells), initial=len(found), desc=name, unit="run") as progress,
        ThreadPoolExecutor(options.workers) as pool,
    ):
        calls = {pool.submit(apart, target, cells[cell]): cell for cell in waiting}
        try:
            for call in as_completed(calls):
                cell, result = calls[call], call.result()
                if "failed" in result:
                    failed[cell] = result["failed"]
                else:
                    found[cell] = records.get(waiting[cell], lambda result=result: result)
                progress.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failed:
        reasons = "; ".join(f"{cell}: {reason}" for cell, reason in failed.items())
        raise SystemExit(f"{name}: {len(failed)} of {len(cells)} runs failed. {reasons}")
    return found, about


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """Write mean ± standard deviation."""
    return f"{np.mean(values):{form}} ± {np.std(values):{form}}"


def claim(paper: str, ours: str, verdict: str) -> Found:
    """Say what the paper claims, what came out here, and whether that supports it."""
    if verdict not in (SUPPORTED, IN_PART, NOT_SUPPORTED):
        raise ValueError(f"`verdict` must be one of the three; got {verdict!r}.")
    return {"paper": paper, "ours": ours, "verdict": verdict}


def told(claims: Sequence[Found]) -> str:
    """Write claims out, one paragraph each."""
    return "\n".join(f"Paper: {c['paper']}\nHere:  {c['ours']}\n→ {c['verdict']}" for c in claims)
