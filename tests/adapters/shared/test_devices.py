"""Columns, products and hypergradients on an accelerator, against a dense answer on the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import lowrank_inverse as li
from tests.adapters.shared.frameworks import relative
from tests.adapters.shared.problem import N, Problem, oracle

pytestmark = pytest.mark.gpu

SOLVERS: dict[str, Any] = {
    "stored": li.Nystrom(rank=N, damping=0.1),
    "chunked": li.Nystrom(rank=N, damping=0.1, memory="chunked", chunk_size=4),
    "streamed": li.Nystrom(rank=N, damping=0.1, memory="streamed"),
    "CG": li.CG(damping=0.1, rtol=1e-12),
    "CG, seldom checked": li.CG(damping=0.1, rtol=1e-12, check_every=5),
    "Nyström-CG": li.NystromCG(rank=5, damping=0.1, rtol=1e-12),
    "exact": li.Exact(damping=0.1),
}


@pytest.fixture
def problem(framework: Any) -> Problem:
    framework.to_accelerator()
    return Problem(framework)


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_products_and_columns_equal_the_dense_hessian(problem, chunk_size):
    framework, V = problem.framework, np.random.default_rng(1).standard_normal((N, 3))
    H = framework.hessian(problem.loss, problem.params, chunk_size=chunk_size)
    product = H @ framework.array(V)
    assert framework.is_on_accelerator(product)
    assert relative(product, oracle().hessian @ V) < 1e-9
    assert relative(H.columns([0, 7, 12]), oracle().hessian[:, [0, 7, 12]]) < 1e-9


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_hypergradients_are_those_of_the_dense_formula(problem, solver):
    out = problem.hypergradient(solver=solver)
    assert problem.framework.is_on_accelerator(out.grads["weights"])
    assert relative(out.grads, oracle().at(oracle().ihvp(0.1))) < 1e-6
