"""A part of the call: it runs in a process of its own, and keeps each result as it comes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness.processes import Found
from benchmarks.harness.records import Records


class Part:
    """Where a part measures, and the file to which it writes.

    Attributes
    ----------
    small : bool
        Whether it is tried out, on small problems.
    device : str
        Where torch computes.
    models : tuple of str
        The networks on which it measures what both of them tell.
    """

    def __init__(self, path: str, about: Found, small: bool) -> None:
        self.records, self.small = Records(Path(path), about), small
        self.device = "cpu" if small else "cuda"
        self.models = ("mlp",) if small else ("mlp", "wrn")

    def measure(self, name: str, function: Callable[..., Found], /, **settings: Any) -> Found:
        """Keep and return what a function returns, or why it failed, unless that is known."""
        known: Found | None = self.records.get(name)
        if known is None or "failed" in known:
            try:
                known = json.loads(json.dumps(function(**settings)))
            except Exception as error:
                known = {"failed": f"{type(error).__name__}: {error}"[:300]}
                self._free()
            self.records[name] = known
        return known

    def _free(self) -> None:
        """Hand back what a call took that had no memory left."""
        torch = sys.modules.get("torch")
        if torch is not None and self.device == "cuda":
            torch.cuda.empty_cache()
