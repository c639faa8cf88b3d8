"""Files that are written whole, values that are kept in them, and calls several at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.harness.processes import Found


class Records(dict[str, Any]):
    """Values in a JSON file, written at once; those of another machine or version are left."""

    def __init__(self, path: Path, about: Found) -> None:
        super().__init__()
        self.path, self.about = path, json.loads(json.dumps(about))
        if path.exists():
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["machine"] == self.about:
                self.update(content["runs"])

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        write(self.path, json.dumps({"machine": self.about, "runs": self}, indent=1) + "\n")


def write(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(part, path)


def completed(
    measure: Callable[[Any], Any], cells: Sequence[Hashable], workers: int
) -> Iterator[tuple[Any, Any]]:
    """Yield each cell with its result as it is done; without workers one by one in this thread."""
    if not workers:
        yield from ((cell, measure(cell)) for cell in cells)
        return
    with ThreadPoolExecutor(workers) as pool:
        calls = {pool.submit(measure, cell): cell for cell in cells}
        try:
            for call in as_completed(calls):
                yield calls[call], call.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
