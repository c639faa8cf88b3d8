"""The Python blocks of a page, what they print, and what the page shows of it.

``python -m tests.documents.pages PAGE ...`` runs pages and writes what their blocks print below
them. Words are compared exactly; a number such as 0.12 to the last digit shown or a thousandth, a
count above ten, which may be one of steps, to a tenth, and one such as 3.1e-4 by its order of
magnitude. What is smaller may be rounding, another on each processor, and is bounded from above.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BLOCK = re.compile(
    r"^(?P<indent> *)```python\n(?P<code>.*?)^(?P=indent)```\n"
    r"(?P<output>\n(?P=indent)```text\n(?P<shown>.*?)^(?P=indent)```\n)?",
    re.DOTALL | re.MULTILINE,
)
ROUNDING = 1e-5
NUMBER = re.compile(r"(?<![\w.])[-+]?\d+(?:\.\d*)?(?:e[-+]?\d+)?", re.ASCII)


class Block(NamedTuple):
    """A block of Python and the output shown below it, None where there is none."""

    code: str
    shown: str | None

    @property
    def starts_anew(self) -> bool:
        """Whether it is a program of its own, which knows no names of the blocks before."""
        return re.search(r"^import lowrank_inverse", self.code, re.MULTILINE) is not None


def blocks(text: str) -> Iterator[Block]:
    for match in BLOCK.finditer(text):
        shown = match["shown"]
        yield Block(textwrap.dedent(match["code"]), shown and textwrap.dedent(shown))


def run(block: Block, names: dict, page: str) -> str:
    """Run a block in `names` and return what it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(block.code, page, "exec"), names)
    return "\n".join(line.rstrip() for line in printed.getvalue().splitlines()) + "\n"


def agree(shown: str, printed: str) -> bool:
    """Whether two outputs have the same words, and numbers that are equal as far as shown."""
    words = [" ".join(NUMBER.sub("#", text).split()) for text in (shown, printed)]
    pairs = list(zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=False))
    return words[0] == words[1] and all(close(*pair) for pair in pairs)


def close(shown: str, printed: str) -> bool:
    if "e" in shown:
        ratio = abs(float(printed) / float(shown))
        if abs(float(shown)) < ROUNDING:
            return ratio < 100
        return 0.1 < ratio < 10
    digits = len(shown.partition(".")[2])
    unit, thousandth = 1.01 * 10.0**-digits, 1e-3 * abs(float(shown))
    allowed = max(unit, thousandth) if digits else abs(int(shown)) // 10
    return abs(float(shown) - float(printed)) <= allowed


def renew(page: Path) -> None:
    """Write what the blocks of a page print below them."""
    names: dict = {}

    def output(match: re.Match) -> str:
        block = Block(textwrap.dedent(match["code"]), None)
        if block.starts_anew:
            names.clear()
        printed = run(block, names, page.name).rstrip("\n")
        whole, indent = match[0].removesuffix(match["output"] or ""), match["indent"]
        if not printed:
            return whole
        return whole + textwrap.indent(f"\n```text\n{printed}\n```\n", indent, lambda s: s != "\n")

    page.write_text(BLOCK.sub(output, page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        renew(Path(name))
