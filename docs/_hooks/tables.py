"""Results that the benchmarks wrote as text become tables of HTML, with a first column that stays.

A page includes them as they are, and reads well in plain Markdown too::

    ```text
    --8<-- "benchmarks/accuracy.txt"
    ```
"""

import html
import itertools
import re
from pathlib import Path
from typing import Any

INCLUDED = re.compile(r'^```text\n--8<-- "(benchmarks/[\w-]+\.txt)"\n```$', re.MULTILINE)
CELL = re.compile(r"<td\b.*?</td>", re.DOTALL)
LONG_CODE = re.compile(r"<code>([^<]{41,})</code>")
VERDICT = re.compile(r"Paper: (.*)\nHere: +(.*)\n→ (.*)")


def on_page_markdown(markdown: str, config: Any, **kwargs: object) -> str:
    """Put the results that a page includes in their place."""
    folder = Path(config.docs_dir)
    return INCLUDED.sub(lambda file: results((folder / file[1]).read_text("utf-8")), markdown)


def on_page_content(text: str, **kwargs: object) -> str:
    """Let long names in the cells of a table break behind their parts."""
    return CELL.sub(lambda cell: LONG_CODE.sub(breakable, cell[0]), text)


def breakable(code: re.Match[str]) -> str:
    """Return code that may break behind slashes, underscores and colons."""
    parts = re.sub(r"(/|_|::)", r"\1<wbr>", code[1])
    return f'<code class="long">{parts}</code>'


def results(text: str) -> str:
    """Return what a benchmark wrote in HTML: tables, verdicts on the paper, and prose."""
    parts, blocks = [], [block.split("\n") for block in text.strip("\n").split("\n\n")]
    while blocks:
        lines = blocks.pop(0)
        if len(lines) > 1 and set(lines[1]) == {"-"}:
            parts.append(table(lines, blocks))
        elif lines[0].startswith("Paper: "):
            items = "".join(map(verdict, VERDICT.finditer("\n".join(lines))))
            parts.append(f'<ul class="verdicts">{items}</ul>')
        elif not blocks and "lowrank-inverse" in lines[0]:
            parts.append(f'<p class="machine">{html.escape(" ".join(lines))}</p>')
        else:
            parts.append(prose(lines))
    return f'<div class="results">{"".join(parts)}</div>'


def table(lines: list[str], following: list[list[str]]) -> str:
    """Return a table that scrolls beside its first column.

    Rows of several lines have a blank line between them: `following` then begins with the others,
    which are taken from it.
    """
    header, rows = lines[0], [[line] for line in lines[2:]]
    gaps = [(word.start() - 2, word.start()) for word in re.finditer(r"(?<=  )\S", header)]
    if following and continues(following[0], gaps):
        rows = [lines[2:]]
        while following and continues(following[0], gaps):
            rows.append(following.pop(0))
    else:
        gaps = column_gaps([header, *lines[2:]])
    table_rows = [cells(row, gaps) for row in rows]
    kind = "words" if any(len(cell) > 40 for row in table_rows for cell in row) else "figures"
    head = "".join(f'<th scope="col">{html.escape(cell)}</th>' for cell in cells([header], gaps))
    body = "".join(
        f'<tr><th scope="row">{html.escape(first)}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in others)
        + "</tr>"
        for first, *others in table_rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def continues(lines: list[str], gaps: list[tuple[int, int]]) -> bool:
    """Whether the lines are cells of a table whose columns stand apart at `gaps`."""
    return bool(gaps) and (
        max(map(len, lines)) > gaps[0][1]
        and all(not line[start:end].strip() for line in lines for start, end in gaps)
    )


def column_gaps(lines: list[str]) -> list[tuple[int, int]]:
    """Return where all lines have two blanks or more, as starts and ends."""
    width = max(map(len, lines))
    filled = "".join(
        " " if all(line[i : i + 1] in ("", " ") for line in lines) else "x" for i in range(width)
    )
    return [gap.span() for gap in re.finditer(r"(?<=x) {2,}", filled)]


def cells(lines: list[str], gaps: list[tuple[int, int]]) -> list[str]:
    """Return the cells of a row of one or more lines."""
    starts, ends = [0, *(end for _, end in gaps)], [*(start for start, _ in gaps), None]
    columns = zip(starts, ends, strict=True)
    return [" ".join(line[a:b].strip() for line in lines).strip() for a, b in columns]


def verdict(found: re.Match[str]) -> str:
    """Return a claim of the paper, what came out here, and the verdict."""
    paper, here, word = map(html.escape, found.groups())
    kind = word.replace(" ", "-")
    return (
        f'<li><span class="verdict {kind}">{word}</span> <b>Paper:</b> {paper}'
        f"<br><b>Here:</b> {here}</li>"
    )


def prose(lines: list[str]) -> str:
    """Return paragraphs; lines that are indented are the items of lists."""
    parts = []
    for indented, group in itertools.groupby(lines, lambda line: line.startswith("  ")):
        texts = [re.sub(r"`(.*?)`", r"<code>\1</code>", html.escape(s.strip())) for s in group]
        items = "".join(f"<li>{text}</li>" for text in texts)
        parts.append(f"<ul>{items}</ul>" if indented else f"<p>{' '.join(texts)}</p>")
    return "".join(parts)
