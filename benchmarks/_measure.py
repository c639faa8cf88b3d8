"""One measurement, in a process of its own: its times, and its peak of memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MIB = 2**20

Found = dict[str, Any]


def use_threads(count: int) -> None:
    """Let the processes that follow compute on `count` threads, and JAX on 1 or on all."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(count)
    if count == 1:
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"


def apart(target: str, settings: Found, *, python: str | None = None) -> Found:
    """Call the function `target`, ``module:name``, in a fresh process; it returns a JSON object.

    What goes wrong there is returned as ``{"failed": reason}``.
    """
    paths = [str(ROOT), str(ROOT / "adapters"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    process = subprocess.run(
        [python or sys.executable, "-m", "benchmarks._measure"],
        input=json.dumps([target, settings]),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    if process.returncode < 0:
        return {"failed": f"ended by signal {-process.returncode}, for want of memory perhaps"}
    if process.returncode > 0:
        lines = process.stderr.strip().splitlines() or ["no message"]
        return {"failed": lines[-1][:300]}
    return json.loads(process.stdout.splitlines()[-1])


class Peak:
    """The peak of memory in a ``with`` block above the level before it, `num_bytes`.

    On CUDA, of the allocator. On the CPU, of the resident set, which Linux lets us reset; elsewhere
    the growth of the process's own peak.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device, self.num_bytes = device, 0

    def __enter__(self) -> Peak:
        gc.collect()
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self._level = torch.cuda.memory_allocated()
        else:
            _trim()
            try:
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
                self._level = _status("VmRSS")
            except OSError:
                self._level = _maximum()
        return self

    def __exit__(self, *_: object) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        else:
            try:
                peak = _status("VmHWM")
            except OSError:
                peak = _maximum()
        self.num_bytes = max(peak - self._level, 0)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise OSError(f"/proc/self/status has no {name}")


def _maximum() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _trim() -> None:
    """Give what malloc keeps in reserve back, lest it hide what a call takes."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def seconds(run: Callable[[], Any], device: str = "cpu", count: int = 1) -> float:
    """Time one call, the mean over `count`."""
    _wait(device)
    start = time.perf_counter()
    for _ in range(count):
        run()
    _wait(device)
    return (time.perf_counter() - start) / count


def _wait(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def in_turn(
    runs: dict[str, Callable[[], Any]],
    device: str,
    *,
    repeats: int,
    budget: float,
    known: dict[str, float] | None = None,
) -> dict[str, list[float]]:
    """Time functions in turn, `repeats` times or until `budget` seconds are over.

    What a machine does beside it changes from minute to minute: ratios of times taken one after
    the other hold still where the times themselves do not. Short ones are repeated within a turn.
    One whose `known` time alone is beyond the budget is not called again.
    """
    known = dict(known or {})
    counts: dict[str, int] = {}
    for name, run in runs.items():
        if name not in known:
            known[name] = seconds(run, device)
        before = known[name]
        counts[name] = max(1, min(20, int(0.1 / before))) if before < budget else 0
    times: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for turn in range(repeats if all(counts.values()) else 1):
        for name, run in runs.items():
            again = counts[name]
            times[name].append(seconds(run, device, again) if again else known[name])
        if turn > 0 and time.perf_counter() - start > budget:
            break
    return times


def ratio(times: dict[str, list[float]], over: str, under: str) -> float:
    """Return the median of the ratios within the turns."""
    return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))


class Records:
    """Measurements by name in a JSON file, which a run that was cut short begins with.

    Those of another machine, version or setting are left behind.
    """

    def __init__(self, path: Path, about: Found) -> None:
        self.path, self.about = path, about
        self.found: dict[str, Found] = {}
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["machine"] == json.loads(json.dumps(about)):
                self.found = content["measurements"]

    def get(self, name: str, measure: Callable[[], Found]) -> Found:
        """Return the measurement called `name`, made now unless it is there."""
        if name not in self.found:
            self.put(name, measure())
        return self.found[name]

    def put(self, name: str, found: Found) -> None:
        """Keep the measurement called `name`, in the place of an earlier one."""
        self.found[name] = found
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"machine": self.about, "measurements": self.found}
        self.path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Read what to call from the standard input, and print what it returns."""
    target, settings = json.loads(sys.stdin.read())
    module, name = target.split(":")
    print(json.dumps(getattr(importlib.import_module(module), name)(**settings)))


if __name__ == "__main__":
    main()
