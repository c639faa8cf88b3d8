"""The built site is looked through: what is wrong is a warning, and fails a strict build."""

import html
import logging
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

log = logging.getLogger("mkdocs.hooks.checks")

SOURCE = re.compile(r'<details class="mkdocstrings-source".*?</details>', re.DOTALL)
UNSEEN = re.compile(r"(<(script|style|template)\b[^>]*>).*?</\2>|<!--.*?-->", re.DOTALL)
TUPLE = re.compile(r"\((?:array|ndarray|Tensor|operator|int|float|\w*Error), ")
FETCHED = re.compile(r'<(?:script|img|link|iframe)\b[^>]*\b(?:src|href)="(?:https?:)?//[^>]*>')
CODE = re.compile(r"<(pre|code)\b.*?</\1>", re.DOTALL)
MARKUP = {
    "role of a docstring": r":(?:func|class|meth|attr|mod|exc|data):",
    "citation of a docstring": r"\[\d\]_|\.\. \[\d\]",
    "link without an end": r"\]\[[\w.]*\]",
    "list of attributes": r"\{: ?[#.]",
    "formula": r"\\[(\[]|\$\$",
    "inclusion": r"--8<--",
}


def on_post_build(config: Any) -> None:
    """Warn of all that is wrong in the site."""
    for problem in problems(Path(config.site_dir)):
        log.warning(problem)


def problems(site: Path) -> list[str]:
    """Return what is wrong: markup that shows, links that lead nowhere, pictures without words."""
    pages = {path: read(path) for path in sorted(site.rglob("*.html"))}
    ids = {path: set(re.findall(r'\bid="([^"]+)"', text)) for path, text in pages.items()}
    found = []
    for path, text in pages.items():
        name = path.relative_to(site).as_posix()
        found += [f"{name}: {problem}" for problem in shown_markup(text)]
        found += [f"{name}: no words for a picture: {tag[:80]}" for tag in silent_pictures(text)]
        found += [f"{name}: fetched from elsewhere: {tag[:80]}" for tag in FETCHED.findall(text)]
        if name != "404.html":  # whose links are those of the address that is missing
            found += [f"{name}: leads nowhere: {link}" for link in dead_links(path, text, ids)]
    return found


def read(path: Path) -> str:
    """Return what a page shows, without the sources of the reference."""
    return UNSEEN.sub(r"\1", SOURCE.sub("", path.read_text(encoding="utf-8")))


def shown_markup(text: str) -> list[str]:
    """Return markup that was not rendered, and types that the parser took for tuples."""
    types = [re.sub(r"<[^>]*>", "", code) for code in re.findall(r"<code>(.*?)</code>", text)]
    found = [f"shows a type read as a tuple: {name}" for name in types if TUPLE.match(name)]
    words = html.unescape(re.sub(r"<[^>]*>", "", CODE.sub("", text)))
    for kind, pattern in MARKUP.items():
        for match in re.finditer(pattern, words):
            near = " ".join(words[max(0, match.start() - 40) : match.end() + 40].split())
            found.append(f"shows a {kind}: {match[0]} in {near!r}")
    return found


def silent_pictures(text: str) -> list[str]:
    """Return pictures that say nothing to who does not see them."""
    images = re.findall(r"<img\b[^>]*>", text)
    drawings = re.findall(r"<svg\b[^>]*\brole=\"img\"[^>]*>", text)
    return [tag for tag in images if not re.search(r'\balt="[^"]+"', tag)] + [
        tag for tag in drawings if not re.search(r'\baria-label="[^"]+"', tag)
    ]


def dead_links(path: Path, text: str, ids: dict[Path, set[str]]) -> list[str]:
    """Return the links of a page to what is not there."""
    found = []
    for link in sorted(set(re.findall(r'<(?:a|img|link)\b[^>]*?\b(?:href|src)="([^"]*)"', text))):
        parts = urlsplit(html.unescape(link))
        if parts.scheme or parts.netloc:
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        target = target / "index.html" if target.is_dir() else target
        anchor = unquote(parts.fragment)
        missing = anchor and target in ids and anchor not in ids[target] and anchor != "__top"
        if not target.exists() or missing:
            found.append(link)
    return found
