"""A function called in a process of its own, by this interpreter or another one.

What is called by the interpreter of a peer imports nothing that the peer may not have.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

Found = dict[str, Any]


def use_threads(count: int) -> None:
    """Let the processes that follow compute on `count` threads, and JAX on 1 or on all."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(count)
    if count == 1:
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"


def return_freed_memory() -> None:
    """Let the processes that follow give back large arrays as they are freed, with glibc.

    Its threshold for that rises to 32 MiB by itself. What lies below stays part of the process.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"


def apart(
    target: str, settings: Found, *, python: str | None = None, timeout: float | None = None
) -> Any:
    """Call the function `target`, ``module:name``, in a fresh process; it returns a JSON value.

    What goes wrong there is returned as ``{"failed": reason}``.
    """
    paths = [str(ROOT), str(ROOT / "adapters"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    process = subprocess.Popen(
        [python or sys.executable, "-m", "benchmarks.harness.processes"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(json.dumps([target, settings]), timeout)
    except subprocess.TimeoutExpired:
        return {"failed": f"more than {timeout:g} s"}
    finally:
        _end(process)
    if process.returncode < 0:
        return {"failed": f"ended by signal {-process.returncode}, for want of memory perhaps"}
    if process.returncode > 0:
        lines = err.strip().splitlines() or ["no message"]
        return {"failed": lines[-1][:300]}
    return json.loads(out.splitlines()[-1])


def _end(process: subprocess.Popen[str]) -> None:
    """End a process that leads a session, and those that it started, which might go on alone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def interpreter(package: str, candidates: Sequence[str]) -> tuple[str | None, str]:
    """Return the first interpreter that has the package, and the version there."""
    for python in candidates:
        found = apart("importlib.metadata:version", {"distribution_name": package}, python=python)
        if isinstance(found, str):
            return python, found
    return None, "not installed"


if __name__ == "__main__":
    wanted, given = json.loads(sys.stdin.read())
    module, name = wanted.split(":")
    print(json.dumps(getattr(importlib.import_module(module), name)(**given)))
