"""The site, built as readers get it: strictly, complete, and as a browser shows it."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.documents import browser
from tests.documents.test_docstrings import hook

ROOT = Path(__file__).parents[2]
PACKAGES = [
    "lowrank_inverse",
    "lowrank_inverse.sklearn",
    "lowrank_inverse_torch",
    "lowrank_inverse_jax",
]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason="mkdocs, which builds the site, is missing")
    folder = tmp_path_factory.mktemp("site")
    paths = os.pathsep.join([str(ROOT), str(ROOT / "adapters")])
    environment = {**os.environ, "PYTHONPATH": paths, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_the_site_has_no_raw_markup_no_dead_link_and_no_picture_without_words(site):
    assert hook("checks").problems(site) == []
    assert len(list(site.rglob("*.html"))) > 30


def public_members(cls):
    """Return the public methods and properties that a class has from this project.

    Other names of a method, such as those by which SciPy looks for it, are left out.
    """
    for name in dir(cls):
        member = inspect.getattr_static(cls, name)
        if name.startswith("_"):
            continue
        home = next(base for base in cls.__mro__ if name in vars(base))
        if not home.__module__.startswith("lowrank_inverse"):
            continue
        is_method = inspect.isroutine(member) and getattr(member, "__name__", "") == name
        if is_method or isinstance(member, property):
            yield name


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_and_method_has_an_entry_of_its_own(site, package):
    module = pytest.importorskip(package, reason=f"{package} cannot be imported here")
    pages = [path.read_text(encoding="utf-8") for path in (site / "api").glob("*.html")]
    anchors = {anchor for page in pages for anchor in re.findall(r'\bid="([\w.]+)"', page)}
    names = [f"{package}.{name}" for name in module.__all__]
    assert set(names) <= anchors
    classes = [getattr(module, name) for name in module.__all__]
    missing = [
        f"{package}.{cls.__name__}.{method}"
        for cls in filter(inspect.isclass, classes)
        for method in public_members(cls)
        if f"{package}.{cls.__name__}.{method}" not in anchors
    ]
    assert missing == []


def test_every_class_of_the_reference_is_complete(site):
    pages = [path.read_text(encoding="utf-8") for path in (site / "api").glob("*.html")]
    anchors = {anchor for page in pages for anchor in re.findall(r'\bid="([\w.]+)"', page)}
    sources = "\n".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    for path in re.findall(r"^::: ([\w.]+)$", sources, re.MULTILINE):
        assert path in anchors
        module, _, name = path.rpartition(".")
        package = pytest.importorskip(module, reason=f"{module} cannot be imported here")
        entry = getattr(package, name)
        if inspect.isclass(entry):
            members = {f"{path}.{member}" for member in public_members(entry)}
            assert members <= anchors, members - anchors


@pytest.fixture(scope="module")
def report(site, tmp_path_factory):
    program = browser.find()
    if program is None:
        pytest.skip(f"none of {', '.join(browser.NAMES)} is installed")
    pages = sorted(f"/{path.relative_to(site).as_posix()}" for path in site.rglob("*.html"))
    pages.remove("/404.html")
    report = browser.look(program, site, pages, tmp_path_factory.mktemp("profile"), timeout=900)
    assert report["errors"] == []
    assert len(report["looks"]) == 2 * len(pages)
    return report


def test_no_page_is_cut_at_1280_and_390_pixels(report):
    for look in report["looks"]:
        assert look["overflow"] <= 0, look
        assert look["beyond"] == [], look


def test_no_code_is_cut_beside_two_sidebars(report):
    for look in report["looks"]:
        assert look["width"] != 1280 or look["cut"] == [], look


def test_tables_scroll_beside_a_first_column_that_stays(report):
    assert sum(look["slides"] for look in report["looks"]) > 20
    for look in report["looks"]:
        assert look["slipped"] == look["unscrolled"] == 0, look


def test_mathematics_are_rendered(report):
    (page,) = (
        look
        for look in report["looks"]
        if look["page"] == "/mathematics.html" and look["width"] == 1280
    )
    assert page["formulas"] > 100
    assert page["fractions"] > 10
    for look in report["looks"]:
        assert look["flat"] == look["unstacked"] == 0, look


def test_the_search_finds_hypergradients(report):
    assert {"/guides/hypergradients.html", "/api/torch.html"} <= set(report["search"])


def test_light_is_light_and_dark_is_dark(report):
    def brightness(color):
        return sum(float(part) for part in re.findall(r"[\d.]+", color)[:3]) / (3 * 255)

    (light, light_words), (dark, dark_words) = report["schemes"]
    assert brightness(light) > 0.9 > 0.3 > brightness(light_words)
    assert brightness(dark) < 0.2 < 0.7 < brightness(dark_words)
