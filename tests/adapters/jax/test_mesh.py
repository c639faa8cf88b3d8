"""Vectors and columns cut over the devices of a mesh: eight of one process, two of two."""

from __future__ import annotations

import json
import os
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
            "PYTHONPATH": os.pathsep.join(sys.path),
            **environment,
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def found() -> Any:
    return run("operators", "hypergradients", "kernels", "refusals")


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


def test_a_kernel_matrix_of_points_cut_by_rows_sends_a_block_at_a_time(found):
    even, uneven = (found["kernels"][n] for n in ("256", "251"))
    assert max(*even["errors"], *uneven["errors"]) < ROUNDING
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
    assert_spread({name: case for name, case in cases["jit"].items() if name != "Exact"})


@pytest.mark.slow
def test_eager_products_lie_as_compiled_ones_do():
    found = run("all_operators")["all_operators"]
    for case in found["found"].values():
        assert max(case["errors"]) < ROUNDING
        assert case["rows"]
    assert "`gradient of the loss` must be finite" in found["NaN"]


@pytest.mark.slow
def test_preconditioned_gradients_take_six_columns_a_rank_even_without_64_bits():
    cases = run("narrow")["narrow"]
    assert_hypergradients(cases, 1e-4)
    assert_spread(cases)
    assert cases["NystromCG"]["memory"] <= 6


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


@pytest.mark.slow
def test_two_processes_find_together_what_one_finds_and_say_where_they_differ(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"PORT": port, "FOLDER": str(tmp_path)}
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
    names = ("params", "indices", "v")
    assert first["differ"] == [
        f"`{name}` must be the same in each process; it differs"[:50] for name in names
    ]
