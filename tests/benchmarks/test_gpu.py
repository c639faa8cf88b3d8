"""What is run on a GPU, tried on the CPU: parts, what they keep, and the report."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from benchmarks.gpu import busy, everything, suite
from benchmarks.gpu.part import Part
from benchmarks.harness import processes
from benchmarks.systems import accuracy
from tests.benchmarks.conftest import text, written

APART = ("tests", "jax")
"""Parts that choose the devices of a framework before it is imported."""


def test_a_part_keeps_what_it_found_and_tries_again_what_failed(tmp_path):
    outcomes: list[Any] = [ValueError("no"), 3]

    def measured(x: int) -> dict[str, int]:
        outcome = outcomes.pop(0)
        if isinstance(outcome, Exception):
            raise outcome
        return {"y": x * outcome}

    about = {"device": "none"}
    path = str(tmp_path / "gpu-part.json")
    assert Part(path, about, True).measure("a", measured, x=2) == {"failed": "ValueError: no"}
    assert Part(path, about, True).measure("a", measured, x=2) == {"y": 6}
    assert Part(path, about, True).measure("a", measured, x=2) == {"y": 6}
    assert written(tmp_path, "gpu-part")["runs"] == {"a": {"y": 6}}
    assert "a" not in Part(path, {"device": "another"}, True).records


def test_a_part_that_is_cut_short_keeps_what_it_had_and_the_others_follow(tmp_path, monkeypatch):
    called: list[tuple[str, float]] = []

    def apart(target: str, settings: dict[str, Any], timeout: float) -> Any:
        called.append((target, timeout))
        part = Part(settings["path"], settings["about"], settings["small"])
        if target.endswith("in_jax"):
            one = {"seconds": 0.5, "in products": 12.0, "program mib": 7.0}
            part.measure("mlp, CG (jax)", lambda: one)
            return {"failed": f"more than {timeout:g} s"}
        return (
            {"failed": "ended by signal 11"} if target.startswith("benchmarks.gpu.busy") else None
        )

    monkeypatch.setattr(processes, "apart", apart)
    options = ["--dry-run", "--limit", "300", "--output", str(tmp_path)]
    assert everything.main(options) == 1  # a part ended ill
    assert [target.rsplit(".", 1)[1] for target, _ in called] == [
        call.target for call in everything.CALLS.values()
    ]
    assert all(timeout <= 120 for _, timeout in called)
    lines = text(tmp_path, "gpu")
    assert "mlp, CG (jax)   0.5000         12.0            7" in lines
    assert "jax: more than 120 s" in lines
    assert "busy: ended by signal 11" in lines
    assert "not run yet" in lines
    called.clear()
    assert everything.main([*options[:2], "1", *options[3:]]) == 0
    assert not called
    assert "sizes: no time left" in text(tmp_path, "gpu")


def test_without_a_gpu_the_report_has_the_figures_of_the_paper_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch finds no CUDA device"):
        everything.main(["--output", str(tmp_path)])
    assert everything.main(["--limit", "0", "--output", str(tmp_path)]) == 0
    lines = text(tmp_path, "gpu")
    row = next(line for line in lines.splitlines() if line.startswith("CG, k = 20"))
    assert row.split()[-5:] == ["2.46", "3.82", "not", "run", "yet"]
    assert "device none: not run yet" in lines


def test_large_problems_are_measured_in_small(tmp_path, calls):
    assert everything.main(["--dry-run", "--parts", "sizes", "--output", str(tmp_path)]) == 0
    ended_well("sizes", tmp_path)
    found = written(tmp_path, "gpu-sizes")["runs"]
    assert found["influence"]["residual"] < 1e-2
    assert found["kernel, n = 100, cpu"]["converged"]
    assert "258        50" in text(tmp_path, "gpu")


def test_the_time_without_any_kernel_is_that_between_spans():
    assert busy.gaps([]) == {}
    found = busy.gaps([(0.0, 2000.0), (1000.0, 3000.0), (9000.0, 10_000.0), (500.0, 600.0)])
    assert found == {"ms": 10.0, "busy": pytest.approx(0.4), "longest": 6.0}


def test_outcomes_of_tests_are_counted_by_file(tmp_path):
    class Report:
        nodeid, when, outcome, longreprtext = "tests/a.py::test_b", "call", "passed", "why"

    part = Part(str(tmp_path / "gpu-tests.json"), {}, True)
    outcomes, report = suite.Outcomes(part), Report()
    outcomes.pytest_runtest_logreport(report)
    report.when = "setup"
    outcomes.pytest_runtest_logreport(report)
    report.outcome = "skipped"
    outcomes.pytest_runtest_logreport(report)
    report.when, report.outcome = "call", "failed"
    outcomes.pytest_runtest_logreport(report)
    wanted = {"passed": 1, "skipped": 1, "failed tests": {"tests/a.py::test_b": "why"}}
    assert written(tmp_path, "gpu-tests")["runs"] == {"a.py": wanted}


@pytest.mark.slow
def test_a_network_in_jax_has_the_loss_and_the_gradient_that_torch_has():
    jax = pytest.importorskip("jax")
    from benchmarks.speed import jax_methods, measure
    from benchmarks.speed.networks import Reweighting, wide_resnet

    model = wide_resnet(16, 1)  # two blocks a stage, with and without another shape
    problem = Reweighting(model, (3, 32, 32), 3, seed=0, device="cpu")
    inner, outer, params, w = jax_methods.losses({"model": "wrn", **measure.arrays(problem)})
    loss, gradient = jax.jit(jax.value_and_grad(inner))(params, w)
    assert float(loss) == pytest.approx(problem.inner().item(), rel=1e-5)
    assert float(outer(params, w)) == pytest.approx(problem.outer().item(), rel=1e-5)
    expected = torch.autograd.grad(problem.inner(), problem.params)
    for found, wanted in zip(gradient, expected, strict=True):
        scale = float(wanted.abs().max())
        np.testing.assert_allclose(found, wanted.numpy(), rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize(
    "name", [name for name in everything.CALLS if name not in (*APART, "sizes")]
)
def test_the_dry_run_of_each_part_ends_well(name, tmp_path, monkeypatch, calls):
    monkeypatch.setattr(accuracy, "SIZE", accuracy.SIZE)  # a dry run makes it smaller
    options = ["--dry-run", "--parts", name, "--limit", "100000", "--output", str(tmp_path)]
    assert everything.main(options) == 0
    ended_well(name, tmp_path)


def test_the_dry_run_of_parts_in_processes_of_their_own_ends_well(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "gpu", "--dry-run", "--limit", "100000"]
    options = ["--parts", *APART, "--output", str(tmp_path)]
    subprocess.run([*command, *options], cwd=processes.ROOT, check=True)
    for name in APART:
        ended_well(name, tmp_path)


def ended_well(name, folder):
    runs = written(folder, f"gpu-{everything.FILES.get(name, name)}")["runs"]
    assert runs
    failed = {key for key, one in runs.items() if "failed" in one}
    assert failed <= {"product, mlp, CUDA graph"}
