"""Times taken in turn, and peaks of memory."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MIB = 2**20


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
            return self
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # its reserve would hide what a call takes
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self._level = _resident("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self.device == "cuda":
            import torch

            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = _resident("VmHWM")
        self.num_bytes = max(peak - self._level, 0)


def _resident(field: str) -> int:
    """Return a field of this process's status in bytes, elsewhere than on Linux its peak."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith(f"{field}:"):
                return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


Clock = Callable[[], float]


def seconds(
    run: Callable[[], Any], device: str = "cpu", count: int = 1, clock: Clock = time.perf_counter
) -> float:
    """Time one call, the mean over `count`."""
    _wait(device)
    start = clock()
    for _ in range(count):
        run()
    _wait(device)
    return (clock() - start) / count


def _wait(device: str) -> None:
    if device == "cuda":
        import torch

        torch.cuda.synchronize()


def in_turn(
    runs: dict[str, Callable[[], Any]],
    device: str = "cpu",
    *,
    repeats: int,
    budget: float = float("inf"),
    known: dict[str, float] | None = None,
    clock: Clock = time.perf_counter,
) -> dict[str, list[float]]:
    """Time functions in turn, `repeats` times or until `budget` seconds are over.

    What a machine does beside it changes from minute to minute: ratios of times taken one after
    the other hold still where the times themselves do not. Short ones are repeated within a turn.
    One whose `known` time alone is beyond the budget is not called again. `clock` is that of the
    times returned: ``time.process_time`` leaves out what other processes take.
    """
    known = {name: (known or {}).get(name) or seconds(run, device) for name, run in runs.items()}
    counts = {
        name: max(1, min(20, int(0.1 / before))) if before < budget else 0
        for name, before in known.items()
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    start = time.perf_counter()
    for turn in range(repeats if all(counts.values()) else 1):
        for name, run in runs.items():
            again = counts[name]
            times[name].append(seconds(run, device, again, clock) if again else known[name])
        if turn > 0 and time.perf_counter() - start > budget:
            break
    return times


def ratio(times: dict[str, list[float]], over: str, under: str) -> float:
    """Return the median of the ratios within the turns."""
    return statistics.median(a / b for a, b in zip(times[over], times[under], strict=True))
