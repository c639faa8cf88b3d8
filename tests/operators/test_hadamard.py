"""Products of operators entry by entry."""

from __future__ import annotations

import numpy as np
import pytest

import lowrank_inverse as li
from lowrank_inverse.operators import hadamard
from tests.conftest import host
from tests.oracles import relative_error
from tests.problems import WIDTH, matrix, rhs

NUM = 24
INDICES = np.array([5, 0, 11])


def kernels(X):
    return li.KernelOperator(X[:, :1], lengthscale=2.0), li.KernelOperator(X[:, 1:], "laplacian")


def parts(X, v, V):
    A = li.hadamard(*kernels(X))
    return A @ v, A @ V, A.columns(INDICES), A.submatrix(INDICES), A.diagonal()


@pytest.mark.parametrize("numbers", [3 * NUM, hadamard.TILE_NUMBERS])
def test_products_and_entries_are_those_of_the_dense_product(numbers, library, monkeypatch):
    monkeypatch.setattr(hadamard, "TILE_NUMBERS", numbers)
    X = np.random.default_rng(0).standard_normal((NUM, 3))
    v, V = rhs(NUM), rhs(NUM, WIDTH)
    found = host(parts(*map(library.asarray, (X, v, V))))
    first, second = (A.columns(np.arange(NUM)) for A in kernels(library.seen(X)))
    K = first * second
    expected = (K @ v, K @ V, K[:, INDICES], K[np.ix_(INDICES, INDICES)], np.diagonal(K))
    for part, wanted in zip(found, expected, strict=True):
        assert np.max(relative_error(part, wanted)) < 20 * NUM**0.5 * library.eps


def test_a_product_of_kernels_is_solved_with_as_any_other():
    X = np.random.default_rng(0).standard_normal((NUM, 3))
    A = li.hadamard(*kernels(X))
    solution = li.solve(A, rhs(NUM), solver=li.NystromCG(rank=8, damping=0.1, rtol=1e-8))
    K = A.columns(np.arange(NUM))
    expected = np.linalg.solve(K + 0.1 * np.eye(NUM), rhs(NUM))
    np.testing.assert_allclose(solution.value, expected, rtol=1e-6)


def test_what_cannot_be_multiplied_by_entries_is_refused():
    A = matrix("linear")
    with pytest.raises(TypeError, match="`B` must have entries that can be read"):
        li.hadamard(A, li.FunctionOperator(lambda v: v, len(A)))
    with pytest.raises(ValueError, match=r"must have the same shape; got \(24, 24\) and \(3, 3\)"):
        li.hadamard(A, np.eye(3))
    with pytest.raises(TypeError, match="must have the same library and dtype"):
        li.hadamard(A, A.astype(np.float32))
