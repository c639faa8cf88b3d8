"""What importing the core loads, and what it offers."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

import lowrank_inverse as li

HEAVY = ["torch", "jax", "cupy", "scipy.sparse.linalg", "matplotlib", "sklearn"]


def run_alone(code):
    """Run `code` in a fresh interpreter with warnings as errors."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def loaded_after(code):
    finished = run_alone(f"{code}\nimport sys\nprint(*[m for m in {HEAVY} if m in sys.modules])")
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
    return finished.stdout.split()


def test_importing_the_core_loads_no_framework_and_prints_nothing():
    assert loaded_after("import lowrank_inverse") == []


def test_importing_every_module_of_the_core_loads_no_framework():
    code = (
        "import importlib, pkgutil, lowrank_inverse\n"
        "for module in pkgutil.iter_modules(lowrank_inverse.__path__):\n"
        "    if module.name != 'sklearn':  # estimators, for who has scikit-learn\n"
        "        importlib.import_module(f'lowrank_inverse.{module.name}')"
    )
    assert loaded_after(code) == []


def test_solving_with_numpy_loads_no_framework():
    code = (
        "import numpy as np, lowrank_inverse as li\n"
        "A, b = np.diag([1.0, 2.0, 3.0]), np.ones(3)\n"
        "for solver in (None, li.Nystrom(damping=0.1), li.NystromCG(), li.CG(), li.Exact()):\n"
        "    li.solve(A, b, solver=solver, rng=0)\n"
        "li.streamed_inverse(A, [0], damping=0.1) @ b; li.certify(A, b, b, damping=0.1)"
    )
    assert loaded_after(code) == []


def test_the_check_above_would_notice_a_framework():
    pytest.importorskip("torch")
    assert loaded_after("import lowrank_inverse, torch") == ["torch"]


def test_every_public_name_is_there_and_documented():
    assert sorted(li.__all__) == list(li.__all__)
    for name in li.__all__:
        assert getattr(li, name).__doc__, name


def test_the_public_names_are_those_of_the_design():
    expected = {
        *("aslinearoperator", "FunctionOperator", "shifted", "columns", "diagonal"),
        "KernelOperator",
        *("nystrom", "NystromApproximation"),
        *("woodbury_inverse", "chunked_inverse", "streamed_inverse"),
        *("cg", "neumann", "solve", "as_solve", "certify"),
        *("Nystrom", "NystromCG", "CG", "Neumann", "Exact", "Identity"),
        *("Solution", "Certificate", "Reason", "SolveError"),
        *("save", "load"),
    }
    assert expected <= set(li.__all__)


def test_the_version_is_a_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+([a-z]+\d+|\.dev\d+)?", li.__version__)
