"""What the documents show is run, and what they list is complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lowrank_inverse as li
from tests.conftest import kept_types_of_jax
from tests.documents import pages

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "docs" / "concepts.md",
    *(
        page
        for folder in ("quickstart", "guides", "migrating")
        for page in sorted((ROOT / "docs" / folder).glob("*.md"))
    ),
]
ONCE = {"gradients", "gaussian_processes", "language_models", "several_devices_jax"}
"""Costly, and run by a test that looks at the answers."""
SLOW = {
    ROOT / "docs" / "quickstart" / "jax.md",
    ROOT / "docs" / "guides" / "jax.md",
    ROOT / "docs" / "migrating" / "jaxopt.md",
}
"""Costly, and with nothing to look at but what it prints."""
TASKS = {"minimize", "hypercleaning", "weight_decay", "loss_weights", "imaml", "distillation"}
FRAMEWORKS = {"torch", "jax", "jaxopt", "optax", "equinox", "flax", "sklearn"}


@pytest.fixture(autouse=True)
def types_of_jax_as_each_page_found_them():
    yield from kept_types_of_jax()


def run_blocks(page):
    """Run the blocks of a page, compare what they print with what it shows, and yield their names.

    A block knows the names of those before, unless it is a program of its own.
    """
    names = {}
    for block in pages.blocks(page.read_text(encoding="utf-8")):
        for framework in FRAMEWORKS.intersection(re.findall(r"\w+", block.code)):
            pytest.importorskip(framework, reason=f"the page shows {framework}")
        if block.starts_anew:
            names = {}
        printed = pages.run(block, names, page.name)
        if block.shown is not None:
            assert pages.agree(block.shown, printed), (
                f"{page.name} shows another output:\n{printed}"
            )
        yield names


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            p, id=f"{p.parent.name}/{p.stem}", marks=[pytest.mark.slow] if p in SLOW else []
        )
        for p in PAGES
        if p.stem not in TASKS | ONCE
    ],
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
    torch_, jax_, further = answers(ROOT / "docs" / "guides" / "gradients.md")
    grads = torch_["lengthscale"].grad, torch_["noise"].grad
    for found, expected in zip(grads, torch_["exact"], strict=True):
        assert float(found / expected) == pytest.approx(1, abs=1e-7)
    for found, expected in zip(jax_["found"], jax_["right"], strict=True):
        assert float(found / expected) == pytest.approx(1, abs=1e-3)
    assert float(further["second"] * 101**3) == pytest.approx(5000, rel=1e-4)


def test_the_guide_to_gaussian_processes_has_one_likelihood_in_three_libraries():
    for name in ("torch", "jax", "sklearn"):
        pytest.importorskip(name, reason=f"the guide shows {name}")
    *_, names = run_blocks(ROOT / "docs" / "guides" / "gaussian_processes.md")
    assert abs(float(names["value"]) - names["exact"]) < 1e-6
    assert abs(names["theta"].grad.numpy() - names["slope"]).max() < 1e-4
    assert abs(names["gradient"] - names["slope"]).max() < 1e-6


@pytest.mark.slow
def test_the_guide_to_language_models_finds_the_sequences_behind_an_answer():
    *_, names = run_blocks(ROOT / "docs" / "guides" / "language_models.md")
    assert names["influence"].info.relative_residual <= 1e-2
    # Training again ends elsewhere on each processor; without its source the answer is unlikely.
    assert max(names["random"]) < names["before"] + 1
    assert names["after"] > max(names["random"]) + 2


def answers(page):
    """Return the names after each program of a page."""
    for name in ("torch", "jax", "optax"):
        pytest.importorskip(name, reason=f"the page shows {name}")
    found = []
    for names in run_blocks(page):
        if not found or names is not found[-1]:
            found.append(names)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("task", sorted(TASKS))
def test_what_the_guide_to_a_task_promises_holds_in_both_frameworks(task):
    found = answers(ROOT / "docs" / "guides" / f"{task}.md")
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


def test_outputs_agree_in_words_and_in_the_digits_shown():
    assert pages.agree("loss 0.12, 3e-12 off, 7 steps", "loss  0.125, 9e-13 off,\n7 steps\n")
    assert pages.agree("[-0.50, 1.5e-08] x2", "[-0.496, 4.2e-08] x2")
    for printed in ("loss 0.14", "lost 0.12", "loss 0.12 0.12", "loss"):
        assert not pages.agree("loss 0.12", printed)
    assert pages.agree("20 steps", "18 steps")
    assert not pages.agree("7 steps", "8 steps")
    assert not pages.agree("3e-12", "3e-10")
    assert not pages.agree("x2", "x3")


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
