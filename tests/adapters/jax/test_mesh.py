"""Vectors and columns cut over the devices of a mesh: eight of one process, two of two."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

jax = pytest.importorskip("jax")
if not hasattr(jax.sharding, "AxisType"):
    pytest.skip("this version of jax has one kind of axes", allow_module_level=True)

ROOT = Path(__file__).parents[3]
ROUNDING = 1e-12
THREADS = {"NPROC": "32"}
"""Of XLA: with one for each of eight devices, sums over them may wait for a thread for ever."""


def run(*names: str, devices: int = 8, timeout: float = 600, **environment: str) -> Any:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, "-m", "tests.adapters.jax.mesh_cases", *names],
        capture_output=True,
        text=True,
        timeout=timeout,
        cwd=ROOT,
        env={
            **os.environ,
            "XLA_FLAGS": flags,
            **THREADS,
            "PYTHONPATH": os.pathsep.join(sys.path),
            **environment,
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture(scope="module")
def found() -> Any:
    return run("operators", "hypergradients", "indivisible", "kernels", "refusals")


def test_products_and_columns_on_a_mesh_are_those_of_one_device_and_cut_by_rows(found):
    for case in found["operators"].values():
        assert max(case["errors"]) < ROUNDING
        assert case["rows"]
        assert case["gathered"] <= case["weights"]


def assert_hypergradients(cases: Any, tolerance: float = ROUNDING) -> None:
    assert cases
    for name, case in cases.items():
        assert max(case["grads"], case["ihvp"]) < tolerance, name
        assert case["laid"], name


def assert_spread(cases: Any) -> None:
    for name, case in cases.items():
        assert case["rows"] == 1 / 8, name
        assert case["gathered"] <= case["weights"], name


def test_a_compiled_hypergradient_on_a_mesh_gathers_no_more_than_a_weight_matrix(found):
    cases = found["hypergradients"]
    assert_hypergradients(cases)
    assert_spread(cases)
    for case in cases.values():
        assert case["memory"] <= 6


def test_rows_that_some_of_the_devices_divide_may_leave_a_program(found):
    for errors in found["indivisible"].values():
        assert max(errors) < ROUNDING


def test_a_kernel_matrix_of_points_cut_by_rows_sends_a_block_at_a_time(found):
    even = found["kernels"]["256"]
    for case in found["kernels"].values():
        assert max(case["errors"]) < ROUNDING
    assert even["held"] == 1 / 8
    assert even["sent"] <= 64  # of the 512 numbers of a product


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("kind", "TypeError: `mesh` must be a jax.sharding.Mesh; got builtins.str"),
        ("explicit mesh", "TypeError: `mesh` must have automatic axes"),
        ("explicit arrays", "\"['a']\" lies on Mesh(x=8, explicit) of devices 0 … 7"),
        ("one device", "\"['a']\" lies on cpu:0. Move it with jax.device_put"),
        ("half", "\"['a']\" lies on Mesh(x=4) of devices 0 … 3"),
        ("axes", "of `mesh`, Mesh(x=2, y=4) of devices 0 … 7; \"['a']\" lies on Mesh(x=8)"),
        ("data", "`inner_args` must lie on the devices and axes of `mesh`"),
        ("examples", "`train` must lie on the devices and axes of `mesh`"),
    ],
)
def test_what_does_not_fit_the_mesh_is_refused_by_name(found, case, message):
    assert message in found["refusals"][case]


@pytest.mark.slow
def test_every_solver_gives_on_a_mesh_what_it_gives_on_one_device():
    cases = run("all_solvers")["all_solvers"]
    assert_hypergradients(cases["jit"])
    assert_hypergradients(cases["eager"])
    assert_hypergradients(cases["uneven"])
    assert_spread(cases["jit"])
    assert cases["jit"]["NystromCG"]["memory"] <= 6


@pytest.mark.slow
def test_eager_products_lie_as_compiled_ones_do():
    found = run("all_operators")["all_operators"]
    for case in found["found"].values():
        assert max(case["errors"]) < ROUNDING
        assert case["rows"]
    assert "`gradient of the loss` must be finite" in found["NaN"]


@pytest.mark.slow
def test_columns_are_gathered_by_no_device_where_there_are_no_64_bits():
    cases = run("narrow")["narrow"]
    assert_hypergradients(cases, 1e-4)
    assert_spread(cases)
    for case in cases.values():
        assert case["memory"] <= 6


@pytest.mark.slow
def test_influence_on_a_mesh_is_that_of_one_device_for_any_number_of_examples():
    found = run("curvatures", "checkpoint")
    for case in found["curvatures"].values():
        assert max(case["scores"], case["self"]) < ROUNDING
        assert case["top"] and case["counted"]
        assert case["rows"] == 1 / 8
    assert found["checkpoint"] == {"again": 0.0, "message": "read from the checkpoint"}


@pytest.mark.slow
def test_a_bilevel_minimum_on_a_mesh_is_that_of_one_device():
    found = run("minimum")["minimum"]
    assert max(found["hparams"], found["params"]) < 1e-9
    assert found["laid"]


def guide(kind: str, folder: Path) -> str:
    """Write the first block of a kind in the guide to a file."""
    page = (ROOT / "docs" / "guides" / "several_devices_jax.md").read_text(encoding="utf-8")
    script = folder / "script.py"
    found = re.findall(rf"```{kind}\n(.*?)```", page, re.DOTALL)[0]
    script.write_text(found, encoding="utf-8")
    return str(script)


def start(*arguments: str, devices: int = 1) -> subprocess.Popen[str]:
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": flags,
            **THREADS,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "adapters"), *sys.path]),
        },
    )


def last_lines(*processes: subprocess.Popen[str]) -> list[str]:
    try:
        return [one.communicate(timeout=300)[0].splitlines()[-1] for one in processes]
    finally:
        for one in processes:
            one.kill()


@pytest.mark.slow
def test_the_example_of_the_guide_lies_as_it_says_on_eight_devices(tmp_path):
    (said,) = last_lines(start(guide("python", tmp_path), devices=8))
    assert re.fullmatch(r"\w+\('devices',\) \w+\(None, 'devices'\) \d+", said)


@pytest.mark.slow
def test_the_script_of_the_guide_runs_in_two_processes_with_one_answer(tmp_path):
    script, address = guide("py", tmp_path), f"127.0.0.1:{free_port()}"
    said = last_lines(*(start(script, address, "2", index) for index in ("0", "1")))
    first, second = (line.split() for line in said)
    assert (first[0], second[0]) == ("0", "1")
    assert first[1:] == second[1:]
    assert float(first[2]) < 1e-4  # of the linear system


@pytest.mark.slow
def test_two_processes_find_together_what_one_finds_and_say_where_they_differ(tmp_path):
    common = {"PORT": free_port(), "FOLDER": str(tmp_path)}
    with ThreadPoolExecutor(2) as pool:
        both = [
            pool.submit(run, "processes", devices=2, timeout=300, INDEX=index, **common)
            for index in ("0", "1")
        ]
        first, second = (one.result()["processes"] for one in both)
    assert first == second
    assert_hypergradients({"NystromCG": first["jit"]})
    assert first["scores"] < ROUNDING
    assert first["top"]
    assert first["folders"] == ["0-of-2", "1-of-2"]
    for text, name in zip(first["differ"], ("params", "indices", "v"), strict=True):
        assert text.startswith(f"`{name}` must be the same in each process")
