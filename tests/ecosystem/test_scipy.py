"""Inverses, approximations and operators where SciPy and JAX take their own."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.sparse.linalg as sla

import lowrank_inverse as li
from lowrank_inverse.low_rank.preconditioner import NystromPreconditioner
from tests.conftest import open_backend
from tests.oracles import damped_solve, relative_error
from tests.problems import WIDTH, N, indices, matrix, rhs

DAMPING = 1e-2
A = matrix("exponential")
DAMPED = A + DAMPING * np.eye(N)
APPROX = li.nystrom(A, indices=indices())
INVERSES = {
    "inverse": APPROX.inverse(DAMPING),
    "Algorithm 1": APPROX.inverse(DAMPING, chunk_size=3),
    "streamed": li.streamed_inverse(A, indices(), damping=DAMPING),
    "prepared Nyström": li.Nystrom(damping=DAMPING, indices=indices()).prepare(A),
    "prepared exact": li.Exact(damping=DAMPING).prepare(A),
    "preconditioner": NystromPreconditioner(APPROX, DAMPING),
}
every_inverse = pytest.mark.parametrize("name", INVERSES)


def steps(solver, M):
    count = []
    x, info = solver(DAMPED, rhs(), M=M, rtol=1e-10, callback=lambda x: count.append(1))
    assert info == 0
    assert relative_error(x, damped_solve(A, DAMPING, rhs())) < 1e-7
    return len(count)


@every_inverse
@pytest.mark.parametrize("solver", [sla.cg, sla.minres], ids=["cg", "minres"])
def test_every_inverse_is_a_preconditioner_of_scipy(solver, name):
    assert steps(solver, INVERSES[name]) < 0.8 * steps(solver, None)


@every_inverse
def test_every_inverse_becomes_a_scipy_operator(name):
    inverse, operator = INVERSES[name], sla.aslinearoperator(INVERSES[name])
    dense = inverse @ np.eye(N)
    assert operator.shape == (N, N)
    assert operator.dtype == np.float64
    for block in (rhs(), rhs(width=WIDTH)):
        assert relative_error(operator @ block, dense @ block) < 1e-12
        assert relative_error(operator.T @ block, dense @ block) < 1e-12
        assert relative_error((2 * operator + operator) @ block, 3 * dense @ block) < 1e-12


def test_float32_goes_through_scipy_as_float32():
    approx = li.nystrom(A.astype("float32"), indices=indices())
    operator = sla.aslinearoperator(approx.inverse(DAMPING))
    assert operator.dtype == np.float32
    b = rhs().astype("float32")
    x, info = sla.cg(DAMPED.astype("float32"), b, M=operator, rtol=1e-4)
    assert info == 0 and x.dtype == np.float32
    assert relative_error(x, damped_solve(A, DAMPING, b)) < 1e-3


def test_operators_of_the_package_are_systems_of_scipy():
    kernel = li.KernelOperator(np.linspace(0, 1, N)[:, None], lengthscale=0.3)
    for operator in (kernel, li.shifted(kernel, DAMPING), li.aslinearoperator(DAMPED)):
        x, info = sla.cg(li.shifted(operator, 0.1), rhs(), rtol=1e-10)
        assert info == 0
        assert relative_error(x, damped_solve(operator.columns(range(N)), 0.1, rhs())) < 1e-7
    largest = sla.eigsh(sla.aslinearoperator(kernel), k=1, return_eigenvectors=False)[0]
    assert largest == pytest.approx(np.linalg.eigvalsh(kernel.columns(range(N)))[-1])


@pytest.mark.parametrize("form", [sp.csr_array, sp.csc_matrix, sla.aslinearoperator])
@pytest.mark.parametrize(
    "solver", [li.CG(damping=0.1), li.NystromCG(damping=0.1, indices=indices())]
)
def test_what_scipy_makes_goes_in(form, solver):
    found = li.solve(form(A), rhs(), solver=solver)
    assert relative_error(found.value, damped_solve(A, 0.1, rhs())) < 1e-4


def test_an_incomplete_factorisation_of_scipy_is_a_preconditioner():
    poisson = sp.diags_array([-1.0, 2.0, -1.0], offsets=[-1, 0, 1], shape=(N, N)).tocsc()
    M = sla.LinearOperator((N, N), matvec=sla.splu(poisson).solve, dtype=np.float64)
    assert li.cg(poisson, rhs(), preconditioner=M, rtol=1e-10).num_steps <= 2


def test_an_inverse_is_a_preconditioner_of_jax():
    with open_backend("jax", "float64") as jax_backend:
        from jax.scipy.sparse.linalg import cg

        inverse = li.nystrom(jax_backend.asarray(A), indices=indices()).inverse(DAMPING)
        b, system = jax_backend.asarray(rhs()), jax_backend.asarray(DAMPED)
        x, _ = cg(lambda v: system @ v, b, M=inverse, tol=1e-10)
    assert relative_error(x, damped_solve(A, DAMPING, rhs())) < 1e-7
