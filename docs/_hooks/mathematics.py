"""Mathematics become MathML when the site is built: a reader needs no script, font or network."""

import html
import re

from latex2mathml.converter import convert

FORMULA = re.compile(
    r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL
)  # as pymdownx.arithmatex leaves it
RELATION = re.compile(r"<mi>(&#x02AAF;|&#x02AB0;)</mi>")  # ⪯ and ⪰, which are operators
FUNCTION = re.compile(r"<mo>(diag|tr)</mo>")  # which have no space behind


def on_page_content(text: str, **kwargs: object) -> str:
    """Turn the formulas of a page into MathML."""
    return FORMULA.sub(mathml, text)


def mathml(formula: re.Match[str]) -> str:
    """Return a formula of LaTeX as MathML."""
    tag, bracket, latex = formula.groups()
    latex = html.unescape(latex).strip()
    display = "block" if bracket == "[" else "inline"
    found = RELATION.sub(r"<mo>\1</mo>", convert(latex, display=display))
    found = FUNCTION.sub(r'<mspace width="0.17em"/><mi>\1</mi>', found)
    return f'<{tag} class="formula">{found}</{tag}>'
