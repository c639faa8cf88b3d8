"""What the build of the site makes of results, formulas and figures."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest

from tests.documents.test_docstrings import hook

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "docs" / "benchmarks").glob("*.txt"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_keep_every_word_in_rows_of_equal_length(path):
    text = path.read_text(encoding="utf-8")
    page = hook("tables").results(text)
    for table in re.findall(r"<table.*?</table>", page):
        rows = re.findall(r"<tr>.*?</tr>", table)
        assert len({len(re.findall(r"<t[hd]", row)) for row in rows}) == 1
        assert len(rows) > 1
    shown = html.unescape(re.sub(r"<[^>]*>", " ", page)).split()
    written = re.sub(r"^-+$|→|`", " ", text, flags=re.MULTILINE).split()
    assert sorted(shown) == sorted(written)


def test_a_page_has_tables_where_it_includes_results():
    class Config:
        docs_dir = str(ROOT / "docs")

    text = 'Before.\n\n```text\n--8<-- "benchmarks/accuracy.txt"\n```\n\nAfter.'
    page = hook("tables").on_page_markdown(text, config=Config)
    assert page.startswith('Before.\n\n<div class="results"><div class="scroll"')
    assert '<th scope="row">stored (default)</th><td>2e-06</td>' in page
    assert page.endswith("</div>\n\nAfter.")


def test_rows_of_several_lines_are_one_row():
    lines = ["task   claim       found", "-" * 24, "A      a long      yes", "       claim"]
    page = hook("tables").results("\n".join([*lines, "", "B      short       no"]))
    assert page.count("<tr>") == 3
    assert '<th scope="row">A</th><td>a long claim</td><td>yes</td>' in page


def test_formulas_become_mathml():
    pytest.importorskip("latex2mathml", reason="latex2mathml, which renders formulas, is missing")
    source = r'<p>so <span class="arithmatex">\(0 \preceq H_k\)</span></p>'
    page = hook("mathematics").on_page_content(source)
    assert "<mo>&#x02AAF;</mo><msub><mi>H</mi><mi>k</mi></msub>" in page
    assert "arithmatex" not in page
    block = r'<div class="arithmatex">\[\frac{a}{b} &lt; \operatorname{diag}(g)\]</div>'
    page = hook("mathematics").on_page_content(block)
    assert 'display="block"' in page
    assert "<mfrac><mrow><mi>a</mi></mrow><mrow><mi>b</mi></mrow></mfrac>" in page
    assert "<mi>diag</mi>" in page


def test_the_picture_of_the_home_page_shows_the_figures_of_its_benchmark():
    pictures = hook("pictures")
    assert pictures.PICTURE.read_text(encoding="utf-8") == pictures.draw()
    curves = pictures.curves()
    assert len(curves) == 8
    ours = curves.pop(pictures.OURS)
    assert ours[-1][1] < 1e-3 * min(points[-1][1] for points in curves.values())


def test_an_entry_names_the_pages_that_show_it_in_use():
    class Page:
        class file:
            src_uri = "api/core.md"

    class Config:
        docs_dir = str(ROOT / "docs")

    reference = hook("reference")
    text = reference.on_page_markdown("::: lowrank_inverse.logdet\n", page=Page, config=Config)
    assert "[Gaussian processes](../guides/gaussian_processes.md)" in text
    assert "choosing.md" not in text
    text = reference.on_page_markdown("::: lowrank_inverse_jax.hvp\n", page=Page, config=Config)
    assert "torch" not in text.lower()


CLEAN = """<h1 id="top">A</h1><p><a href="#top">up</a> <a href="b.html#end">b</a>
<a href="https://example.org/">away</a> <code>x[i][j]</code> <code>(A + B)</code></p>
<img alt="a picture" src="a.png"><svg role="img" aria-label="a drawing"></svg>
<pre><code>x[i][j] = ":func:"</code></pre>"""


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        ("<p>see :func:<code>solve</code></p>", "role"),
        ("<p>the method of [1]_</p>", "citation"),
        ("<p>.. [2] A. Author.</p>", "citation"),
        ("<li>(<code>(<span>array</span>, shape(n) or (n, m))</code>)</li>", "tuple"),
        ("<td><code>(TypeError, ValueError)</code></td>", "tuple"),
        ("<p>[<code>solve</code>][lowrank_inverse.solve]</p>", "without an end"),
        ("<p>a paragraph {: .lead }</p>", "attributes"),
        (r"<p>\(x^2\)</p>", "formula"),
        ("<p>--8&lt;-- &quot;file&quot;</p>", "inclusion"),
        ('<img src="a.png">', "no words"),
        ('<img alt="" src="a.png">', "no words"),
        ('<svg role="img"></svg>', "no words"),
        ('<a href="missing.html">b</a>', "leads nowhere: missing.html"),
        ('<a href="b.html#missing">b</a>', "leads nowhere: b.html#missing"),
        ('<a href="#missing">b</a>', "leads nowhere: #missing"),
        ('<img alt="a picture" src="missing.png">', "leads nowhere: missing.png"),
        ('<script src="https://example.org/a.js"></script>', "from elsewhere"),
        ('<link rel="stylesheet" href="//example.org/a.css">', "from elsewhere"),
    ],
)
def test_the_checks_of_the_site_find(tmp_path, wrong, problem):
    (tmp_path / "a.png").touch()
    (tmp_path / "b.html").write_text('<p id="end">b</p>')
    (tmp_path / "a.html").write_text(CLEAN)
    assert hook("checks").problems(tmp_path) == []
    (tmp_path / "a.html").write_text(CLEAN + wrong)
    found = hook("checks").problems(tmp_path)
    assert len(found) == 1
    assert found[0].startswith("a.html: ")
    assert problem in found[0]


def test_what_the_checks_find_is_a_warning(tmp_path, caplog):
    class Config:
        site_dir = str(tmp_path)

    (tmp_path / "a.html").write_text("<p>the method of [1]_</p>")
    hook("checks").on_post_build(config=Config)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.name.startswith("mkdocs.")


def test_an_entry_without_words_has_no_dash_and_a_source_is_not_searched():
    item = '<li><code>k</code>\n – \n<div class="doc-md-description">{}</div></li>'
    reference = hook("reference")
    assert reference.on_page_content(item.format("\n ")) == "<li><code>k</code></li>"
    assert reference.on_page_content(item.format("words")) == item.format("words")
    source = '<details class="mkdocstrings-source"><pre>def f(): ...</pre></details>'
    assert "data-search-exclude" in reference.on_page_content(source)


def test_only_long_names_in_tables_may_break():
    name = "tests/low_rank/test_preconditioner.py::test_the_basis"
    cell = hook("tables").on_page_content(f"<td><code>{name}</code> <code>a_b</code></td>")
    assert '<code class="long">tests/<wbr>low_<wbr>rank/<wbr>' in cell
    assert "<code>a_b</code>" in cell
    assert cell.replace("<wbr>", "").replace(' class="long"', "").startswith(f"<td><code>{name}<")
    assert hook("tables").on_page_content(f"<code>{name}</code>") == f"<code>{name}</code>"


def test_every_symbol_of_the_mathematics_has_its_name_in_the_code():
    page = (ROOT / "docs" / "mathematics.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \$.*?\| (`.*?) \|", page, re.MULTILINE)
    names = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert len(names) > 15
    sources = [*(ROOT / "lowrank_inverse").rglob("*.py"), *(ROOT / "adapters").rglob("*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in sources)
    for name in names:
        declared = rf"^ +{name}[:,=]|[(,] ?{name}[:,=)]|self\.{name}\b|^class {name}\b"
        assert re.search(declared, code, re.MULTILINE), name


def test_a_tutorial_that_is_a_script_is_named_by_its_page(tmp_path):
    (tmp_path / "tutorials").mkdir()
    script = "# %% [markdown]\n# # Clean labels\n# With li.solve.\n\n# %%\nli.logdet(A)\n"
    (tmp_path / "tutorials" / "clean.py").write_text(script)
    reference = hook("reference")
    pages = reference.code_of_pages(tmp_path)
    line = reference.seen_in("lowrank_inverse", "logdet", pages)
    assert "[Clean labels](../tutorials/clean.md)" in line
    assert reference.seen_in("lowrank_inverse", "solve", pages) == ""
