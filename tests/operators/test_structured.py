"""Kronecker products and block diagonals."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.linalg import block_diag

import lowrank_inverse as li
from tests.conftest import host
from tests.oracles import relative_error
from tests.problems import WIDTH, rhs

P, Q = 4, 6
N = P * Q
INDICES = np.array([11, 0, 5, 23, 6])


def kernels(x, z):
    return li.KernelOperator(x, lengthscale=2.0), li.KernelOperator(z, "matern")


def dense(x, z):
    return (A.columns(np.arange(A.shape[0])) for A in kernels(x, z))


MAKE = {
    "kron": (lambda A, B: li.kron(A, B), np.kron),
    "block_diag": (
        lambda A, B: li.block_diag(A, B, A, B, B),
        lambda A, B: block_diag(A, B, A, B, B),
    ),
}
kinds = pytest.mark.parametrize("kind", MAKE)


def points():
    rng = np.random.default_rng(0)
    return rng.standard_normal((P, 1)), rng.standard_normal((Q, 2))


@kinds
def test_products_and_entries_are_those_of_the_dense_matrix(kind, backend):
    ours, theirs = MAKE[kind]
    n = N if kind == "kron" else 2 * P + 3 * Q

    def parts(x, z, v, V):
        A = ours(*kernels(x, z))
        return A @ v, A @ V, A.columns(INDICES), A.submatrix(INDICES), A.diagonal()

    x, z = points()
    v, V = np.random.default_rng(1).standard_normal((2, n, WIDTH))
    v = v[:, 0]
    found = backend.run(parts, x, z, v, V)
    K = theirs(*dense(backend.seen(x), backend.seen(z)))
    expected = (K @ v, K @ V, K[:, INDICES], K[np.ix_(INDICES, INDICES)], np.diagonal(K))
    for part, wanted in zip(found, expected, strict=True):
        assert np.max(relative_error(host(part), wanted)) < 20 * n**0.5 * backend.eps


@kinds
@pytest.mark.parametrize("sampling", ["uniform", "auto"])
def test_they_are_solved_with_as_any_other(kind, sampling):
    ours, theirs = MAKE[kind]
    A, K = ours(*kernels(*points())), theirs(*dense(*points()))
    b = np.random.default_rng(2).standard_normal(len(K))
    for solver in (
        li.NystromCG(rank=8, damping=0.1, rtol=1e-10, sampling=sampling),
        li.Nystrom(rank=len(K), damping=0.1, sampling=sampling),
        li.Exact(damping=0.1),
    ):
        found = li.solve(A, b, solver=solver, rng=0).value
        np.testing.assert_allclose(found, np.linalg.solve(K + 0.1 * np.eye(len(K)), b), rtol=1e-6)


@kinds
def test_solves_have_derivatives_by_the_parameters_of_their_parts(kind):
    torch = pytest.importorskip("torch")
    ours, _ = MAKE[kind]
    x, z = (torch.tensor(part) for part in points())
    n = ours(*kernels(*points())).shape[0]
    b = torch.tensor(np.random.default_rng(3).standard_normal(n), requires_grad=True)
    scales = [torch.tensor(s, dtype=torch.float64, requires_grad=True) for s in (1.5, 0.7)]

    def solved(b, first, second):
        A = li.KernelOperator(x, lengthscale=first), li.KernelOperator(z, lengthscale=second)
        return li.solve(ours(*A), b, solver=li.CG(damping=0.5, rtol=1e-12)).value

    assert torch.autograd.gradcheck(solved, (b, *scales))


def test_a_product_takes_one_for_each_row_of_the_other():
    rng = np.random.default_rng(0)
    widths = {"A": 0, "B": 0}

    def counting(name, matrix):
        def product(block):
            widths[name] += block.shape[1]
            return matrix @ block

        return li.FunctionOperator(lambda v: matrix @ v, len(matrix), matmat=product)

    A, B = (np.diag(rng.random(n)) for n in (P, Q))
    found = li.kron(counting("A", A), counting("B", B)) @ rhs(N)
    np.testing.assert_allclose(found, np.kron(A, B) @ rhs(N), rtol=1e-12)
    assert widths == {"A": Q, "B": P}


def test_bad_operands_are_refused():
    with pytest.raises(TypeError, match="must have the same library and dtype"):
        li.kron(np.eye(2), np.eye(3, dtype=np.float32))
    with pytest.raises(TypeError, match="must have the same library and dtype"):
        li.block_diag(np.eye(2), np.eye(3), np.eye(3, dtype=np.float32))
    with pytest.raises(TypeError, match="needs at least one block"):
        li.block_diag()
    with pytest.raises(ValueError, match="square"):
        li.kron(np.eye(2), np.ones((2, 3)))
