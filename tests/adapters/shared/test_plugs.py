"""``as_solve`` of both adapters: solvers for libraries that take ``solve(matvec, b)``."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from array_api_compat import array_namespace

import lowrank_inverse as li
from tests.adapters.shared.frameworks import each, relative
from tests.conftest import host

N = 4
X = np.random.default_rng(0).standard_normal((6, N))
MATRIX, B = X.T @ X + 0.5 * np.eye(N), np.arange(1.0, 5.0)


def joined(tree: Any) -> Any:
    xp = array_namespace(tree["b"])
    return xp.concat([xp.reshape(tree["a"], (-1,)), tree["b"]])


def in_blocks(v: Any) -> Any:
    return {"a": v[:2].reshape(1, 2), "b": v[2:]}


SOLVERS = {
    "cg": li.CG(rtol=1e-13),
    "exact": li.Exact(),
    "nystrom-cg, damped": li.NystromCG(sampling="uniform", rank=2, rtol=1e-13, damping=0.2),
    "nystrom": li.Nystrom(rank=N, damping=0.2),
    "callable": lambda matvec, b: (
        li.cg(li.FunctionOperator(matvec, N, like=b), b, rtol=1e-13).value
    ),
}


@pytest.mark.parametrize("given", [False, True], ids=["sign found", "sign given"])
@pytest.mark.parametrize("scale", [1.0, -0.3])
@each("solver", SOLVERS, quick=("cg", "nystrom"))
def test_it_solves_systems_of_either_sign_and_damps_away_from_zero(framework, solver, scale, given):
    A, sign = framework.array(scale * MATRIX), int(np.sign(scale))
    solve = framework.adapter.as_solve(solver, rng=0, sign=sign if given else None)
    x = framework.run(lambda b: solve(lambda v: A @ v, b), framework.array(B))
    damped = scale * MATRIX + sign * getattr(solver, "damping", 0.0) * np.eye(N)
    assert relative(x, np.linalg.solve(damped, B)) < 1e-9


def test_it_answers_in_the_structure_of_b_and_ignores_what_else_it_is_told(framework):
    A, b = framework.array(MATRIX), in_blocks(framework.array(B))
    solve = framework.adapter.as_solve(li.CG(rtol=1e-13))
    x = solve(lambda v: in_blocks(A @ joined(v)), b, init=b, ridge=0.5, tol=1.0)
    assert tuple(x["a"].shape) == (1, 2)
    assert relative(joined(x), np.linalg.solve(MATRIX, B)) < 1e-10


@pytest.mark.parametrize("sign", [1, -1])
def test_the_answer_to_zero_is_zero_whatever_the_sign(framework, sign):
    A = framework.array(sign * MATRIX)
    assert not host(framework.adapter.as_solve(li.CG())(lambda v: A @ v, 0 * A[0])).any()


def test_seeds_reproduce_and_differ(framework):
    A, b = framework.array(MATRIX), framework.array(np.ones(N))

    def run(rng: Any) -> np.ndarray:
        solve = framework.adapter.as_solve(
            li.Nystrom(sampling="uniform", rank=2, damping=0.1), rng=rng
        )
        return host(solve(lambda v: A @ v, b))

    assert np.array_equal(run(3), run(np.random.default_rng(3)))
    assert relative(run(0), run(3)) > 1e-3


@pytest.mark.parametrize("sign", [0, 2, -1.5, "1"])
def test_a_sign_that_is_none_is_refused(framework, sign):
    with pytest.raises(ValueError, match="`sign` must be 1, -1 or None"):
        framework.adapter.as_solve(li.CG(), sign=sign)


def test_a_solver_that_is_none_is_refused(framework):
    with pytest.raises(TypeError, match="`solver` must be settings"):
        framework.adapter.as_solve("cg")


def test_a_right_hand_side_without_floats_is_refused(framework):
    with pytest.raises((TypeError, ValueError), match=r"`b` must (be|hold) .*float"):
        framework.adapter.as_solve(li.CG())(lambda v: v, framework.array(np.arange(3)))
