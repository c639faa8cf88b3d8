"""The logarithm of a determinant, and traces with the inverse, against dense ones."""

from __future__ import annotations

import numpy as np
import pytest

import lowrank_inverse as li
from lowrank_inverse.spectral.quadrature import log_quadrature
from tests.conftest import host, open_backend
from tests.oracles import relative_error
from tests.problems import rhs, symmetric

NUM, DAMPING, SCALE = 60, 0.1, 1.3
PROBED = {"damping": DAMPING, "exact": False, "rank": 12, "rng": 1}
STANDARD_ERRORS = 6.0
"""A mean of 16 probes is further away about once in ten million seeds."""


def points(n=NUM):
    return np.random.default_rng([n, 3]).standard_normal((n, 2))


def kernel(X, lengthscale=SCALE):
    return li.KernelOperator(X, "matern", lengthscale=lengthscale)


def dense(lengthscale=SCALE, n=NUM):
    return kernel(points(n), lengthscale).columns(np.arange(n))


def slope(n=NUM):
    """Return the derivative of the kernel matrix with respect to its lengthscale."""
    step = 1e-6
    return (dense(SCALE + step, n) - dense(SCALE - step, n)) / (2 * step)


def log_det(A, damping=DAMPING):
    sign, value = np.linalg.slogdet(A + damping * np.eye(len(A)))
    assert sign == 1
    return value


def by_products(A):
    return li.FunctionOperator(lambda v: A @ v, A.shape[0], like=A.like, matmat=lambda v: A @ v)


# The quadrature

SPECTRUM = np.linspace(0.5, 4.0, 12)


def quadrature(B, W):
    return log_quadrature(lambda v: B @ v, W, max_steps=50, rtol=0.0, traced=True)[:3]


def test_as_many_steps_as_rows_make_the_quadrature_exact(backend):
    """Exact for polynomials of degree 2 n - 1: for the logarithm on n eigenvalues, that is."""
    B, W = symmetric(SPECTRUM), rhs(SPECTRUM.size, 3)
    forms, solutions, residual = backend.run(quadrature, B, W)
    B, W = backend.seen(B), backend.seen(W)
    w, V = np.linalg.eigh(B)
    expected = np.sum((V.T @ W) ** 2 * np.log(w)[:, None], axis=0)
    bound = 8 * B.shape[0] * backend.eps  # times the norm and the condition number
    assert np.all(np.abs(forms - expected) < 4 * bound * np.sum(W * W, axis=0))
    assert np.max(relative_error(solutions, np.linalg.solve(B, W))) < 8 * bound
    assert np.all(residual < bound)


def test_two_eigenvalues_take_two_steps():
    B = symmetric(np.where(np.arange(20) < 5, 1.0, 3.0))
    found = log_quadrature(lambda v: B @ v, rhs(20, 2), max_steps=20, rtol=1e-10)
    assert found.num_steps == 2
    W = rhs(20, 2)
    w, V = np.linalg.eigh(B)
    expected = np.sum((V.T @ W) ** 2 * np.log(w)[:, None], axis=0)
    np.testing.assert_allclose(found.forms, expected, rtol=1e-12)


# The determinant


def estimate(X, B):
    found = li.logdet(kernel(X), **PROBED)
    trace = found.inverse_trace(B)
    return found.value, found.standard_error, found.converged, trace.value, trace.standard_error


def test_estimates_are_within_their_errors_on_every_backend(backend):
    B = slope()
    value, error, converged, trace, trace_error = backend.run(estimate, points(), B)
    K = kernel(backend.seen(points())).columns(np.arange(NUM))
    rounding = 40 * NUM * backend.eps / DAMPING
    assert converged
    assert 0 < error < 2
    assert abs(value - log_det(K)) < STANDARD_ERRORS * error + NUM * rounding
    expected = np.trace(np.linalg.solve(K + DAMPING * np.eye(NUM), B))
    assert abs(trace - expected) < STANDARD_ERRORS * trace_error + NUM * rounding


def test_all_columns_leave_nothing_to_estimate(library):
    K = dense()
    found = li.logdet(library.asarray(K), **PROBED | {"rank": NUM})
    rounding = 40 * NUM * library.eps / DAMPING
    assert abs(float(found.value) - log_det(library.seen(K))) < rounding
    assert float(found.standard_error) < rounding


def test_small_matrices_are_factored(library):
    K, B = dense(), slope()
    found = li.logdet(library.asarray(K), damping=DAMPING)
    assert (found.standard_error, found.converged, found.num_steps) == (0, True, 0)
    seen = library.seen(K)
    assert abs(float(found.value) - log_det(seen)) < 40 * NUM * library.eps / DAMPING
    trace = found.inverse_trace(library.asarray(B))
    expected = np.trace(np.linalg.solve(seen + DAMPING * np.eye(NUM), library.seen(B)))
    assert float(trace.value) == pytest.approx(expected, rel=40 * NUM * library.eps / DAMPING)
    assert trace.standard_error == 0


def test_errors_fall_with_rank_and_with_probes():
    A = kernel(points(300))
    errors = [
        li.logdet(A, damping=0.1, exact=False, rank=k, num_probes=32).standard_error
        for k in (2, 16, 64)
    ]
    assert errors[0] > 2 * errors[1] > 8 * errors[2]
    many = li.logdet(A, damping=0.1, exact=False, rank=16, num_probes=512).standard_error
    assert errors[1] / many == pytest.approx(4, rel=0.4)


def test_the_determinant_of_the_approximation_is_a_bound_from_below():
    K = dense()
    below = [li.nystrom(K, k, rng=0).logdet(DAMPING) for k in (5, 20, NUM)]
    assert below[0] < below[1] < log_det(K)
    assert below[2] == pytest.approx(log_det(K), rel=1e-12)


@pytest.mark.parametrize("form", ["readable", "by products"])
def test_noise_for_each_point_and_operators_known_by_products(form):
    A = kernel(points())
    A = A if form == "readable" else by_products(A)
    noise = np.random.default_rng(2).uniform(0.1, 0.5, NUM)
    M = dense() + np.diag(noise)
    found = li.logdet(A + li.DiagonalOperator(NUM, noise), exact=False, rank=20)
    assert abs(found.value - np.linalg.slogdet(M)[1]) < STANDARD_ERRORS * found.standard_error
    trace = found.inverse_trace(slope())
    expected = np.trace(np.linalg.solve(M, slope()))
    assert abs(trace.value - expected) < STANDARD_ERRORS * trace.standard_error
    exact = li.logdet(A + li.DiagonalOperator(NUM, noise), exact=True)
    assert exact.value == pytest.approx(np.linalg.slogdet(M)[1], rel=1e-12)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_units_of_the_matrix_change_nothing_else(scale):
    A = symmetric(np.linspace(1.0, 30.0, NUM))
    found = li.logdet(scale * A, exact=False, rank=10)
    expected = np.linalg.slogdet(A)[1] + NUM * np.log(scale)
    assert abs(found.value - expected) < STANDARD_ERRORS * found.standard_error
    assert found.standard_error == pytest.approx(
        li.logdet(A, exact=False, rank=10).standard_error, rel=1e-6
    )


def test_one_seed_gives_one_answer_and_another_another(library):
    A = library.asarray(points())
    first, second = (li.logdet(kernel(A), **PROBED).value for _ in range(2))
    assert float(first) == float(second)
    assert float(first) != float(li.logdet(kernel(A), **PROBED | {"rng": 7}).value)
    reference = li.logdet(kernel(library.seen(points())), **PROBED).value
    assert float(first) == pytest.approx(reference, rel=1e5 * library.eps)


def test_products_are_counted():
    A, count = kernel(points()), 0

    def product(v):
        nonlocal count
        count += 1 if v.ndim == 1 else v.shape[1]
        return A @ v

    counted = li.FunctionOperator(product, NUM, matmat=product)
    found = li.logdet(counted, **PROBED)
    assert found.num_products == count == 12 + 16 * found.num_steps
    count = 0
    assert found.inverse_trace(counted).num_products == count == 12 + 16


@pytest.mark.parametrize("exact", [True, False])
def test_a_matrix_that_is_not_positive_definite_has_no_logarithm(exact):
    found = li.logdet(symmetric(np.r_[-1.0, np.ones(9)]), damping=0.1, exact=exact, rank=3)
    assert np.isnan(found.value)
    assert not found.converged


def test_few_steps_are_said_not_to_converge():
    A = symmetric(np.geomspace(1.0, 1e6, NUM))
    assert not li.logdet(A, exact=False, rank=2, max_steps=2).converged
    assert li.logdet(A, exact=False, rank=2).converged


def test_looser_tolerances_take_fewer_steps():
    A = kernel(points())
    loose, tight = (li.logdet(A, **PROBED | {"rtol": rtol}).num_steps for rtol in (0.1, 1e-8))
    assert loose < tight


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_probes": 1}, "`num_probes` must be at least 2"),
        ({"rank": 0}, "`rank` must be at least 1"),
        ({"rtol": 0.0}, "`rtol` must be finite and > 0"),
        ({"damping": -1.0}, "`damping` must be finite and >= 0"),
    ],
)
def test_numbers_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        li.logdet(np.eye(3), **settings)


# Derivatives


@pytest.mark.parametrize("exact", [True, False])
def test_the_gradient_is_the_trace_that_the_same_probes_estimate(exact):
    torch = pytest.importorskip("torch")
    p = torch.tensor([SCALE, DAMPING], dtype=torch.float64, requires_grad=True)
    settings = PROBED | {"damping": p[1], "exact": exact}
    found = li.logdet(kernel(torch.asarray(points()), p[0]), **settings)
    (gradient,) = torch.autograd.grad(found.value, p)
    reference = li.logdet(kernel(points()), **PROBED | {"exact": exact})
    assert found.value.item() == pytest.approx(reference.value, rel=1e-12)
    assert gradient[0].item() == pytest.approx(reference.inverse_trace(slope()).value, rel=1e-6)
    inverse = np.linalg.inv(dense() + DAMPING * np.eye(NUM))
    assert gradient[1].item() == pytest.approx(np.trace(inverse), rel=0.05)
    with torch.no_grad():
        assert isinstance(li.logdet(kernel(torch.asarray(points()), p[0]), **settings).value, float)
    assert torch.func.grad(
        lambda q: (
            li.logdet(kernel(torch.asarray(points()), q[0]), **settings | {"damping": q[1]}).value
        )
    )(p.detach()) == pytest.approx(gradient.numpy(), rel=1e-12)


def test_the_noise_of_each_point_has_a_gradient():
    torch = pytest.importorskip("torch")
    noise = torch.linspace(0.1, 0.5, NUM, dtype=torch.float64, requires_grad=True)
    A = kernel(torch.asarray(points())) + li.DiagonalOperator(NUM, noise)
    (gradient,) = torch.autograd.grad(li.logdet(A, exact=False, num_probes=64).value, noise)
    inverse = np.linalg.inv(dense() + np.diag(noise.detach().numpy()))
    assert gradient.sum().item() == pytest.approx(np.trace(inverse), rel=0.05)
    (exact,) = torch.autograd.grad(li.logdet(A, exact=True).value, noise)
    np.testing.assert_allclose(exact, np.diagonal(inverse), rtol=1e-10)


def test_second_derivatives_are_right_or_refused():
    torch = pytest.importorskip("torch")

    def value(p, exact):
        settings = PROBED | {"damping": p, "exact": exact}
        return li.logdet(kernel(torch.asarray(points())), **settings).value

    p = torch.tensor(DAMPING, dtype=torch.float64, requires_grad=True)
    inverse = np.linalg.inv(dense() + DAMPING * np.eye(NUM))
    (slope,) = torch.autograd.grad(value(p, True), p, create_graph=True)
    (bend,) = torch.autograd.grad(slope, p)
    assert bend.item() == pytest.approx(-np.sum(inverse * inverse), rel=1e-8)
    (slope,) = torch.autograd.grad(value(p, False), p, create_graph=True)
    with pytest.raises(NotImplementedError, match="an estimated log determinant has first"):
        torch.autograd.grad(slope, p)


@pytest.mark.slow
def test_second_derivatives_are_refused_in_jax():
    jax = pytest.importorskip("jax")
    with open_backend("jax", "float64") as backend:
        A = kernel(backend.asarray(points()))

        def value(p):
            return li.logdet(A, **PROBED | {"damping": p}).value

        for second in (jax.grad(jax.grad(value)), jax.hessian(value)):
            with pytest.raises(NotImplementedError, match="an estimated log determinant"):
                jax.jit(second)(DAMPING)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("exact", [True, False])
def test_jax_has_the_gradient_of_the_trace(exact, dtype):
    jax = pytest.importorskip("jax")
    with open_backend("jax", dtype) as backend:
        X = backend.asarray(points())

        def value(p):
            settings = PROBED | {"damping": p[1], "exact": exact}
            return li.logdet(kernel(X, p[0]), **settings).value

        gradient = host(jax.jit(jax.grad(value))(backend.asarray(np.array([SCALE, DAMPING]))))
    inverse = np.linalg.inv(dense() + DAMPING * np.eye(NUM))
    tolerance = 1e-2 if not exact else 1e4 * backend.eps
    assert gradient[0] == pytest.approx(np.sum(inverse * slope()), rel=20 * tolerance)
    assert gradient[1] == pytest.approx(np.trace(inverse), rel=5 * tolerance)
