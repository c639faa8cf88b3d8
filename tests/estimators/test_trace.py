"""The trace of an operator."""

from __future__ import annotations

import numpy as np
import pytest

import lowrank_inverse as li
from tests.problems import matrix, symmetric

NUM = 40


def by_products(A):
    return li.FunctionOperator(lambda v: A @ v, A.shape[0], like=A[:0, 0], matmat=lambda v: A @ v)


def test_a_diagonal_that_is_known_is_added_up(library):
    A = matrix("linear", NUM)
    found = li.trace(library.asarray(A))
    assert float(found.value) == pytest.approx(np.trace(library.seen(A)), rel=NUM * library.eps)
    assert (found.standard_error, found.num_products) == (0, 0)


@pytest.mark.parametrize("num_products", [30, NUM, 3 * NUM])
def test_a_low_rank_or_a_product_for_each_row_leaves_nothing_to_estimate(num_products, library):
    A = symmetric(np.where(np.arange(NUM) < 10, 1.0, 0.0))
    found = li.trace(by_products(library.asarray(A)), num_products)
    assert float(found.value) == pytest.approx(10, rel=100 * NUM * library.eps)
    assert float(found.standard_error) < 100 * NUM * library.eps
    assert found.num_products == min(num_products, NUM)


def hutch(A):
    found = li.trace(by_products(A), 18)
    return found.value, found.standard_error


def test_estimates_are_within_their_errors_on_every_backend(backend):
    A = matrix("polynomial", NUM)
    value, error = backend.run(hutch, A)
    assert 0 < error < 0.05
    assert abs(value - np.trace(A)) < 6 * error


def test_errors_fall_with_products_faster_than_those_of_samples_alone():
    A = by_products(matrix("polynomial", 400))
    few, many = (li.trace(A, m).standard_error for m in (15, 60))
    assert few > 4 * many


def test_the_gradient_is_an_estimate_of_the_trace_of_the_derivative():
    torch = pytest.importorskip("torch")
    A = torch.asarray(matrix("polynomial", NUM)).requires_grad_()
    value = li.trace(by_products(A), 2 * NUM).value
    (gradient,) = torch.autograd.grad(value, A)
    np.testing.assert_allclose(gradient, np.eye(NUM), atol=1e-12)
    c = torch.tensor(2.0, dtype=A.dtype, requires_grad=True)
    found = li.trace(by_products(c * A.detach()), 12)
    (slope,) = torch.autograd.grad(found.value, c)
    assert slope.item() == pytest.approx(found.value.item() / 2, rel=1e-10)


def test_fewer_than_two_products_are_refused():
    with pytest.raises(ValueError, match="`num_products` must be at least 2"):
        li.trace(by_products(np.eye(3)), 1)
