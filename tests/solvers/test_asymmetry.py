"""Matrices that are known by products alone, and are not symmetric."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import lowrank_inverse as li
from lowrank_inverse.estimators.asymmetry import warn_of_asymmetry


def matrix(n: int, asymmetry: float, dtype: str, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    X, Y = rng.standard_normal((2, n, n)) / n**0.5
    return (np.eye(n) + 0.2 * (X + X.T) + asymmetry * (Y - Y.T)).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scale", [1e-18, 1.0, 1e18])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n", [2, 50])
def test_one_product_more_tells_symmetric_from_other_matrices(dtype, scale, seed, n):
    b = np.random.default_rng(seed).standard_normal(n).astype(dtype)
    A = matrix(n, 0.0, dtype, seed) * np.asarray(scale, dtype)
    warn_of_asymmetry(lambda v: A @ v, b, A @ b)
    A = matrix(n, 0.1, dtype, seed) * np.asarray(scale, dtype)
    with pytest.warns(RuntimeWarning, match=r"`matvec` is not symmetric.*A\.T A x = A\.T b"):
        warn_of_asymmetry(lambda v: A @ v, b, A @ b)


@pytest.mark.parametrize("solver", [li.Exact(), li.CG(), li.NystromCG(rank=3)])
def test_as_solve_warns_of_a_matrix_that_is_not_symmetric(solver):
    b = np.ones(6)
    A = matrix(6, 0.0, "float64", 0)
    x = li.as_solve(solver)(lambda v: A @ v, b)
    np.testing.assert_allclose(A @ x, b, rtol=1e-4)
    A = matrix(6, 0.3, "float64", 0)
    with pytest.warns(RuntimeWarning, match="is not symmetric"):
        li.as_solve(solver, sign=None)(lambda v: A @ v, b)


def test_a_right_hand_side_of_zeros_is_no_trouble():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not li.as_solve(li.CG())(lambda v: 2 * v, np.zeros(3)).any()
