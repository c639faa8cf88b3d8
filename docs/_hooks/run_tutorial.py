"""Run a tutorial and print its cells, with what they printed and drew, as JSON.

``python docs/_hooks/run_tutorial.py TUTORIAL``. A tutorial is a script whose cells begin with
``# %%``, the form that Jupytext and editors open as a notebook. ``# %% [markdown]`` begins prose;
``# %% alt="..."`` describes the picture that a cell draws.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CELL = re.compile(r"^# %%(.*)\n", re.MULTILINE)
INK = "#010203"
"""Stands for the colour of the text of the page, light or dark."""
STYLE = {
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "axes.prop_cycle": plt.cycler(color=["#2b8cab", "#d2731a", "#7d98a5", "#8a5bb5"]),
    "figure.constrained_layout.use": True,
    "figure.facecolor": "none",
    "legend.frameon": False,
    "svg.hashsalt": "tutorial",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


class Cell(NamedTuple):
    """A piece of a tutorial: prose, or code with what it printed and drew."""

    kind: str
    source: str
    output: str = ""
    pictures: tuple[str, ...] = ()


def cells(text: str) -> list[tuple[Cell, str]]:
    """Return the cells of a tutorial, each with what is said of its picture."""
    _, *parts = CELL.split(text)
    found = []
    for head, body in zip(parts[::2], parts[1::2], strict=True):
        if head.strip() == "[markdown]":
            prose = re.sub(r"^# ?", "", body, flags=re.MULTILINE)
            found.append((Cell("markdown", prose.strip()), ""))
        else:
            alt = re.search(r'alt="([^"]+)"', head)
            found.append((Cell("code", body.strip()), alt[1] if alt else ""))
    return found


def picture(figure: plt.Figure, alt: str) -> str:
    """Return a figure as a line of HTML that takes the colours of its page."""
    if not alt:
        raise ValueError('a cell that draws needs a description: # %% alt="..."')
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[a-z]+_\d+"', "", svg).replace(INK, "currentColor")
    width = re.search(r'width="([\d.]+)pt"', svg)[1]
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg, count=2)
    style = f"width: 100%; max-width: {width}pt"
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{alt}" style="{style}"', 1)
    return " ".join(f'<figure style="width: 100%">{svg}</figure>'.split())


def run(text: str, name: str) -> list[Cell]:
    """Run the cells one after the other; warnings are errors."""
    plt.show = lambda: None
    names: dict[str, object] = {"__name__": "__main__"}
    done = []
    with plt.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("error")
        for number, (cell, alt) in enumerate(cells(text), 1):
            if cell.kind == "code":
                printed = io.StringIO()
                with contextlib.redirect_stdout(printed):
                    exec(compile(cell.source, f"{name}, cell {number}", "exec"), names)
                figures = map(plt.figure, plt.get_fignums())
                drawn = tuple(picture(figure, alt) for figure in figures)
                plt.close("all")
                cell = cell._replace(output=printed.getvalue().rstrip(), pictures=drawn)
            done.append(cell)
    return done


if __name__ == "__main__":
    path = Path(sys.argv[1])
    print(json.dumps([cell._asdict() for cell in run(path.read_text("utf-8"), path.name)]))
