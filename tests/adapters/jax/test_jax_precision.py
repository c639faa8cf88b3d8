"""Matrix products of the core in jax, float32: never in TF32, which a GPU takes by default."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp

import lowrank_inverse as li
from tests.adapters.jax.jax_oracle import precisions

N, WIDTH, RANK = 30, 3, 4
HIGHEST = jax.lax.Precision.HIGHEST
UNIFORM = {"rank": RANK, "damping": 0.1, "sampling": "uniform"}

SOLVERS: dict[str, Any] = {
    "CG": li.CG(damping=0.1),
    "Neumann": li.Neumann(damping=0.1),
    "Krylov": li.Nystrom(rank=RANK, damping=0.1),
    "refined": li.Nystrom(refine=1, **UNIFORM),
    "streamed": li.Nystrom(memory="streamed", **UNIFORM),
    "chunked": li.Nystrom(memory="chunked", chunk_size=2, **UNIFORM),
    "Nyström-CG": li.NystromCG(**UNIFORM),
    "exact": li.Exact(damping=0.1),
}


def operator(b: Any) -> Any:
    """An operator that multiplies no matrices itself."""
    d = jnp.arange(1.0, N + 1)
    return li.FunctionOperator(lambda v: (d * v.T).T, N, like=b)


def solved(solver: Any) -> Callable[[Any], Any]:
    return lambda b: li.solve(operator(b), b, solver=solver, certify=True)


def applied(solver: Any) -> Callable[[Any], Any]:
    def call(b: Any) -> Any:
        inverse = solver.prepare(operator(b), b=b[:, 0])
        return inverse @ b, inverse.solve(b)

    return call


def approximated(b: Any) -> Any:
    approx = li.nystrom(operator(b), RANK, sampling="uniform", rng=0)
    return approx @ b, approx.inverse(0.1) @ b, approx.solve_path(b, [0.1, 1.0])


def recycled(b: Any) -> Any:
    solver, state = li.CG(damping=0.1, max_steps=5), li.HypergradientState()
    for column in (b[:, 0], b[:, 1]):
        solution = li.solve(operator(b), column, solver=solver, state=state)
        state = solution.state
    return solution


CALLS: dict[str, Callable[[Any], Any]] = {
    **{f"solve, {name}": solved(solver) for name, solver in SOLVERS.items()},
    **{f"apply, {name}": applied(solver) for name, solver in SOLVERS.items()},
    "approximation": approximated,
    "state": recycled,
    "cg": lambda b: li.cg(operator(b), b),
    "certify": lambda b: li.certify(operator(b), b, b, damping=0.1),
    "dense": lambda b: li.aslinearoperator(jnp.eye(N)) @ b,
    "kernel": lambda b: li.KernelOperator(jnp.asarray(b), lengthscale=1.0) @ b,
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_algebra_of_the_core_has_the_full_precision_of_its_operands(call):
    b = np.random.default_rng(0).standard_normal((N, WIDTH)).astype(np.float32)
    found = precisions(jax.make_jaxpr(call)(b).jaxpr)
    assert found
    assert set(found) == {(HIGHEST, HIGHEST)}
