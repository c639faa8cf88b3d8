"""Operators, hypergradients and influence over several processes: the same as in one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
if torch.torch_version.TorchVersion(torch.__version__) < "2.11":
    pytest.skip("a mesh needs PyTorch 2.11", allow_module_level=True)

from tests.adapters.torch import mesh_cases
from tests.adapters.torch.processes import Group

if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)


ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def two():
    group = Group(2)
    yield group
    group.close()


def equal_to_one_process(found, expected, bound=1e-12):
    for name, value in expected.items():
        for one in found:
            assert torch.equal(one[name], found[0][name]), name
            assert torch.linalg.norm(one[name] - value) <= bound * torch.linalg.norm(value), name


def test_operators_are_the_mean_over_processes(two):
    equal_to_one_process(two.run("operators"), mesh_cases.operators(None))


def same_solutions(group, names, held, width=1):
    found = group.run("solutions", names=names, width=width)
    expected = mesh_cases.solutions(None, names, width)
    for name in names:
        value, num_products, steps, _ = expected[name]
        equal_to_one_process([{name: one[name][0]} for one in found], {name: value})
        for one in found:
            # Near the rounding of float64 another order of sums may cost a step.
            assert abs(one[name][1] - num_products) <= width, name
            assert np.max(np.abs(np.subtract(one[name][2], steps))) <= 1, name
        assert [one[name][3] for one in found] == held


def test_eigenvectors_are_those_of_the_first_process(two):
    equal_to_one_process(two.run("other_signs"), mesh_cases.other_signs(None))


@pytest.mark.slow
def test_all_solvers_equal_those_of_one_process(two):
    same_solutions(two, list(mesh_cases.SOLVERS), [29, 28])
    same_solutions(two, list(mesh_cases.SOLVERS), [29, 28], width=3)


def same_hypergradients(group, **options):
    expected = mesh_cases.hypergradients(None, **options)
    equal_to_one_process(group.run("hypergradients", **options), expected)


def test_hypergradients_equal_those_of_one_process(two):
    same_hypergradients(two, names=["columns"])


@pytest.mark.slow
def test_hypergradients_of_all_solvers_and_a_ridge_equal_those_of_one_process(two):
    same_hypergradients(two, names=list(mesh_cases.SOLVERS))
    same_hypergradients(two, names=["CG", "NystromCG"], ridge=True)


@pytest.mark.slow
def test_three_processes_are_as_good_as_two():
    group = Group(3)
    try:
        equal_to_one_process(group.run("operators"), mesh_cases.operators(None))
        same_solutions(group, list(mesh_cases.SOLVERS), [19, 19, 19])
        same_hypergradients(group, names=["CG", "columns"])
        equal_to_one_process(group.run("empty_process"), mesh_cases.empty_process(None))
        # Of four points the third process has none.
        equal_to_one_process(group.run("kernels", num=4), mesh_cases.kernels(None, num=4))
    finally:
        group.close()


@pytest.mark.slow
def test_a_state_is_recycled_over_processes(two):
    equal_to_one_process(two.run("chain"), mesh_cases.chain(None))


@pytest.mark.slow
def test_a_bilevel_minimum_is_that_of_one_process(two, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    found = two.run("minimum", folder=str(tmp_path / "two"))
    # Steps of L-BFGS, whose tolerances are not of rounding.
    equal_to_one_process(found, mesh_cases.minimum(None, str(tmp_path / "one")), bound=1e-6)
    files = sorted(path.name for path in (tmp_path / "two").iterdir())
    assert files == ["minimum-0-of-2.npz", "minimum-1-of-2.npz"]


def test_a_parallel_module_keeps_its_training(two):
    equal_to_one_process(two.run("parallel_module"), mesh_cases.parallel_module(None))


@pytest.mark.slow
def test_a_fully_sharded_module_is_as_a_whole_one(two):
    equal_to_one_process(two.run("sharded_module"), mesh_cases.sharded_module(None))


@pytest.mark.slow
def test_a_process_without_data_takes_part(two):
    equal_to_one_process(two.run("empty_process"), mesh_cases.empty_process(None))


def test_a_product_sends_two_vectors_and_a_step_four_numbers_more(two):
    n, size = 57, 2
    most = n + 2 * size  # a number for each process, and parts of equal length
    answers = two.run("sent")
    for found in answers:
        assert len(found["product"]) == 2 and max(found["product"]) <= most
        few, many = found["2 steps"], found["4 steps"]
        assert sum(many) - sum(few) <= 2 * (2 * most + 4)
        assert max(many) <= most
        # A column is not gathered; beside the columns there is what is k×k.
        assert max(found["columns"]) <= max(most, 20 * 20)
        assert sum(x for x in found["columns"] if n <= x <= most) <= 20 * most
    assert [found["held"] for found in answers] == [(29, 20), (28, 20)]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("parameters", "RuntimeError: the processes disagree on the parameters: those of rank [1]"),
        ("shapes", "RuntimeError: the processes disagree on the shapes of the parameters"),
        (
            "columns",
            "RuntimeError: the processes disagree on the columns: those of rank [1]",
        ),
        ("vector", "RuntimeError: the processes disagree on the vector: those of rank [1]"),
        ("rng", "RuntimeError: the processes disagree on the rng: those of rank [1]"),
        ("no rng", "ValueError: `rng` must be a whole number with a `mesh`; got None."),
        ("rtol", "RuntimeError: the processes disagree on the solver: those of rank [1]"),
        ("raises 1", "RuntimeError: process 1 of 2: MemoryError: no memory for that"),
        ("raises 2", "RuntimeError: process 1 of 2: MemoryError: no memory for that"),
        ("nan", "ValueError: `b` must be finite; it holds NaN or Inf."),
        (
            "no data",
            "ValueError: at least one process must have a closure; all of them have an empty",
        ),
    ],
)
def test_what_goes_wrong_in_one_process_is_said_in_all(two, what, message):
    errors = two.errors("wrong", what=what)
    assert errors[0] == errors[1]
    assert errors[0].startswith(message)


@pytest.mark.slow
def test_a_process_that_ends_ends_the_others():
    group = Group(2)
    try:
        (fine, answer), (_, other) = group.answers("dies")
        assert not fine and answer.startswith("RuntimeError") and other == "the process ended"
    finally:
        group.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(mesh_cases.INFLUENCES))
def test_influence_equals_that_of_one_process(two, name):
    # The default solver has a tolerance of its own; that of the others is near rounding.
    bound = {"default": 1e-4, "NystromCG": 1e-12}.get(name, 1e-11)
    found, expected = two.run("influence", names=[name]), mesh_cases.influence(None, [name])
    equal_to_one_process(found, expected, bound)


@pytest.mark.slow
def test_scores_go_on_from_a_folder_for_each_process(two, tmp_path):
    expected = mesh_cases.resumed(None, str(tmp_path / "one"))
    equal_to_one_process(two.run("resumed", folder=str(tmp_path / "two")), expected)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("nan", "ValueError: process 1 of 2: `loss` must be finite; it is nan for example 3 of"),
        ("no examples", "ValueError: process 1 of 2: `train` must hold at least one example"),
        ("rng", "RuntimeError: the processes disagree on the rng: those of rank [1]"),
        ("changed", "RuntimeError: process 1 of 2: The loss of example 0 of `train` was"),
        ("queries", "RuntimeError: the processes disagree on the queries: those of rank [1]"),
        ("self", "ValueError: `self_influence` is for an influence function of one process"),
    ],
)
def test_what_goes_wrong_with_influence_in_one_process_is_said_in_all(two, what, message):
    errors = two.errors("wrong_influence", what=what)
    assert errors[0] == errors[1]
    assert errors[0].startswith(message)


@pytest.mark.slow
def test_no_solver_holds_more_than_six_times_its_columns_or_sends_more_than_a_product(two):
    for found in two.run("taken"):
        for name, (held, sent) in found.items():
            assert held <= 6, (name, held)
            assert sent <= 2.01, (name, sent)  # 2 n and a few numbers


def test_kernel_matrices_of_spread_points_are_those_of_one_process(two):
    equal_to_one_process(two.run("kernels"), mesh_cases.kernels(None))
    expected = mesh_cases.kernels(None, num=5)
    equal_to_one_process(two.run("kernels", num=5), expected)


def test_systems_of_spread_points_are_solved_as_in_one_process(two):
    found = two.run("kernel_solutions")
    equal_to_one_process(found, mesh_cases.kernel_solutions(None), bound=1e-11)


@pytest.mark.slow
def test_the_script_of_the_guide_runs_in_two_processes_as_in_one(tmp_path):
    page = (ROOT / "docs" / "guides" / "several_devices.md").read_text(encoding="utf-8")
    (script,) = re.findall(r'```python title="influence.py"\n(.*?)```', page, re.DOTALL)
    (tmp_path / "influence.py").write_text(script, encoding="utf-8")
    outputs = []
    for size in (1, 2):
        command = ["-m", "torch.distributed.run", "--nproc-per-node", str(size), "--standalone"]
        done = subprocess.run(
            [sys.executable, *command, str(tmp_path / "influence.py")],
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr[-2000:]
        outputs.append(done.stdout.split())
    one, two = outputs
    assert one[: one.index("hypergradient")] == two[: two.index("hypergradient")]
    assert float(two[-2]) == pytest.approx(float(one[-2]), rel=1e-3)
