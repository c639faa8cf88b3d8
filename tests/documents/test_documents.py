"""What the documents show is run, and what they list is complete."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

import lowrank_inverse as li
from tests.conftest import kept_types_of_jax

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]
ONCE = {"gradients", "gaussian_processes"}
"""Costly, and run by a test that looks at the answers."""
TASKS = {"minimize", "hypercleaning", "weight_decay", "loss_weights", "imaml", "distillation"}
FRAMEWORKS = {"torch", "jax", "optax", "equinox", "flax", "sklearn"}
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.fixture(autouse=True)
def types_of_jax_as_each_page_found_them():
    yield from kept_types_of_jax()


def run_blocks(page):
    """Run the Python blocks of a page one after the other, each in the names of those before."""
    names = {}
    for block in map(textwrap.dedent, BLOCK.findall(page.read_text(encoding="utf-8"))):
        for framework in FRAMEWORKS.intersection(re.findall(r"\w+", block)):
            pytest.importorskip(framework, reason=f"the page shows {framework}")
        if re.search(r"^import numpy", block, re.MULTILINE):
            names = {}
        exec(compile(block, page.name, "exec"), names)
        yield names


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, id=p.stem) for p in PAGES if p.stem not in TASKS | ONCE],
)
def test_every_python_block_of_a_page_runs_and_leaves_finite_answers(page):
    for names in run_blocks(page):
        for solution in (value for value in names.values() if isinstance(value, li.Solution)):
            assert float(abs(solution.value).max()) < float("inf")


def test_the_readme_system_has_an_error_below_its_certificate():
    names = next(run_blocks(ROOT / "README.md"))
    assert 0 < names["error"] <= names["x"].error_bound < 0.1 * abs(names["x"].value).sum()


def test_the_guide_to_hypergradients_ends_with_a_small_residual():
    pytest.importorskip("torch", reason="the guide shows PyTorch, which is not installed")
    *_, names = run_blocks(ROOT / "docs" / "guides" / "hypergradients.md")
    assert names["out"].info.relative_residual < 0.1
    assert names["decayed"].info.relative_residual < 0.1


def test_the_gradients_of_the_guide_are_those_of_the_dense_formula():
    *_, names = run_blocks(ROOT / "docs" / "guides" / "gradients.md")
    grads = names["lengthscale"].grad, names["noise"].grad
    for found, expected in zip(grads, names["exact"], strict=True):
        assert float(found / expected) == pytest.approx(1, abs=1e-7)
    for found, expected in zip(names["found"], names["right"], strict=True):
        assert float(found / expected) == pytest.approx(1, abs=1e-3)
    assert float(names["second"] * 101**3) == pytest.approx(5000, rel=1e-4)


def test_the_guide_to_gaussian_processes_has_one_likelihood_in_three_libraries():
    for name in ("torch", "jax", "sklearn"):
        pytest.importorskip(name, reason=f"the guide shows {name}")
    *_, names = run_blocks(ROOT / "docs" / "guides" / "gaussian_processes.md")
    assert abs(float(names["value"]) - names["exact"]) < 1e-6
    assert abs(names["theta"].grad.numpy() - names["slope"]).max() < 1e-4
    assert abs(names["gradient"] - names["slope"]).max() < 1e-6


def answers(page):
    """Return the names after the last block of each framework."""
    for name in ("torch", "jax", "optax"):
        pytest.importorskip(name, reason=f"the page shows {name}")
    blocks = map(textwrap.dedent, BLOCK.findall(page.read_text(encoding="utf-8")))
    for block in blocks:
        names = {}
        exec(compile(block, page.name, "exec"), names)
        yield names


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(TASKS))
def test_what_the_guide_to_a_task_promises_holds_in_both_frameworks(task):
    found = list(answers(ROOT / "docs" / "guides" / f"{task}.md"))
    assert len(found) == 2
    for names in found:
        if task == "minimize":
            assert names["found"].converged
        elif task == "hypercleaning":
            assert names["right_weight"] > names["wrong_weight"] + 0.2
        else:
            assert names["values"][-1] < 0.8 * names["values"][0]
        if task in ("weight_decay", "minimize"):
            assert names["useless"] > names["useful"] + 1
        if task == "weight_decay":
            assert names["out"].info.relative_residual < 0.05
        if task == "loss_weights":
            assert names["helpful"] > names["noise"]
        if task == "distillation":
            assert names["accuracy"] > 0.9
        if task in ("hypercleaning", "distillation"):
            assert names["out"].info.findings() == ()


@pytest.mark.parametrize(
    "package", ["lowrank_inverse", "lowrank_inverse_torch", "lowrank_inverse_jax"]
)
def test_every_public_name_has_its_place_in_the_reference(package):
    module = pytest.importorskip(package, reason=f"{package} cannot be imported here")
    pages = (ROOT / "docs" / "api").glob("*.md")
    listed = set(re.findall(r"^::: ([\w.]+)$", "\n".join(p.read_text() for p in pages), re.M))
    missing = [
        name
        for name in module.__all__
        if not any(
            entry.startswith(package + ".") and entry.endswith(f".{name}") for entry in listed
        )
    ]
    assert missing == []


def test_every_test_that_a_page_names_is_there():
    for page in sorted((ROOT / "docs").rglob("*.md")):
        for path, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text()):
            source = ROOT / path
            assert source.exists(), (page.name, path)
            assert f"def {name}(" in source.read_text(encoding="utf-8"), (page.name, name)
