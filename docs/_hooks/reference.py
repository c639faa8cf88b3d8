"""The reference names the pages that show an entry in use, and keeps sources out of the search."""

import re
from pathlib import Path
from typing import Any

PAGES = ("quickstart", "guides", "tutorials")
SHORT = {"lowrank_inverse": "li", "lowrank_inverse_torch": "lit", "lowrank_inverse_jax": "lij"}
ENTRY = re.compile(r"^::: (\w+)((?:\.\w+)*)\.(\w+)$", re.MULTILINE)
CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)
NO_WORDS = re.compile(r'\s*–\s*<div class="doc-md-description">\s*</div>')
SOURCE = '<details class="mkdocstrings-source">'


def on_page_markdown(markdown: str, page: Any, config: Any, **kwargs: object) -> str:
    """Add to each entry of the reference where it is seen in use."""
    if not page.file.src_uri.startswith("api/"):
        return markdown
    pages = code_of_pages(Path(config.docs_dir))
    return ENTRY.sub(lambda entry: entry[0] + seen_in(entry[1], entry[3], pages), markdown)


def on_page_content(text: str, **kwargs: object) -> str:
    """Leave sources out of the search, and dashes where no words follow."""
    text = NO_WORDS.sub("", text)
    return text.replace(SOURCE, SOURCE.replace(">", " data-search-exclude>"))


def code_of_pages(docs: Path) -> dict[str, tuple[str, str]]:
    """Return title and code of the pages that show the package in use, by their address.

    Tutorials are scripts, with a title in a comment, of which the build makes pages.
    """
    found = {}
    for path in sorted(path for folder in PAGES for path in (docs / folder).glob("*.[mp][dy]")):
        text = path.read_text(encoding="utf-8")
        heading = r"^# # (.*)$" if path.suffix == ".py" else r"^# (.*)$"
        title = re.search(heading, text, re.MULTILINE)
        address = f"../{path.relative_to(docs).with_suffix('.md').as_posix()}"
        code = text if path.suffix == ".py" else "\n".join(CODE.findall(text))
        found[address] = title[1] if title else path.stem, re.sub(r"^#.*", "", code, flags=re.M)
    return found


def seen_in(package: str, name: str, pages: dict[str, tuple[str, str]]) -> str:
    """Return a line with links to the pages whose code names an entry."""
    use = re.compile(rf"\b{SHORT[package]}\.{name}\b|import [\w, ]*\b{name}\b")
    links = [f"[{title}]({path})" for path, (title, code) in pages.items() if use.search(code)]
    return f"\n\nSeen in: {', '.join(links)}.\n{{: .seen-in }}" if links else ""
