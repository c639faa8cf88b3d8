"""Both adapters on an accelerator, against dense answers and those of the CPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from array_api_compat import array_namespace

import lowrank_inverse as li
from tests.adapters.shared.frameworks import mapped, relative
from tests.adapters.shared.problem import N, Problem, forward, numbers, oracle

pytestmark = pytest.mark.gpu

SOLVERS: dict[str, Any] = {
    "Krylov": li.Nystrom(rank=N, damping=0.1),
    "stored": li.Nystrom(rank=N, damping=0.1, sampling="uniform"),
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


def test_a_state_is_carried_on_the_accelerator(problem):
    solver, state = li.CG(damping=0.1, rtol=1e-12), li.HypergradientState()
    for _ in range(2):
        out = problem.hypergradient(solver=solver, state=state)
        state = out.state
    assert problem.framework.is_on_accelerator(state.value)
    assert relative(out.grads, oracle().at(oracle().ihvp(0.1))) < 1e-6


@pytest.mark.parametrize("curvature", ["ggn", "hessian", "empirical_fisher"])
def test_influence_is_that_of_the_cpu(framework, curvature):
    def squares(z: Any, y: Any) -> Any:
        return array_namespace(z).sum((z - y) ** 2, axis=1)

    def scores() -> Any:
        params = mapped(framework.array, numbers()["params"])
        flat = {"weight": params["hidden"]["weight"], "bias": params["hidden"]["bias"]}
        flat |= {"out": params["out"][0], "shift": params["out"][1]}
        train = mapped(framework.array, numbers()["inner"])
        influence = framework.influence(
            lambda p, x: forward({"hidden": p, "out": (p["out"], p["shift"])}, x),
            *(squares, flat, train),
            curvature=curvature,
            damping=1.0,
            rng=0,
        )
        return influence.scores(train)

    framework.to_host()
    expected = scores()
    framework.to_accelerator()
    assert relative(scores(), expected) < 1e-6


def test_a_compiled_hypergradient_sends_nothing_to_the_host(framework):
    if framework.name != "jax":
        pytest.skip("torch is counted, operation by operation, in its own tests")
    framework.to_accelerator()
    jax, problem = framework.framework, Problem(framework)
    call = jax.jit(
        lambda params, hparams: framework.adapter.hypergradient(
            *(problem.inner, problem.outer, params, hparams), solver=li.CG(damping=0.1)
        )
    )
    jax.block_until_ready(call(problem.params, problem.hparams))
    with jax.transfer_guard_device_to_host("disallow"):
        jax.block_until_ready(call(problem.params, problem.hparams))
