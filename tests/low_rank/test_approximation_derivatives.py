"""Derivatives of a Nyström approximation: those of functions of the matrix."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

import lowrank_inverse as li
from tests.conftest import open_backend
from tests.problems import matrix, rhs

torch = pytest.importorskip("torch")

NUM = 11
INDICES, DISTINCT = [0, 1, 2, 3, 8, 9], [0, 1, 2, 3]
AT = (0.7, 0.3)
FUNCTIONS = (
    "logdet",
    "trace_inverse",
    "effective_dimension",
    "product",
    "inverse",
    "chunked",
    "solve_path",
)
functions = pytest.mark.parametrize("what", FUNCTIONS)


def points():
    """Return points of which the last three repeat the first: W has eigenvalues of zero."""
    X = np.random.default_rng(0).standard_normal((8, 2))
    return np.concatenate([X, X[:3]])


def sides():
    return np.linspace(-1.0, 1.0, NUM), np.cos(np.arange(float(NUM)))


def dense(what, p):
    """Return a function of lengthscale and damping from the distinct columns alone."""
    Z = torch.asarray(points()) / p[0]
    K = torch.exp(-((Z[:, None] - Z[None]) ** 2).sum(-1) / 2)
    C = K[:, DISTINCT]
    H = C @ torch.linalg.solve(C[DISTINCT], C.T)
    M = H + p[1] * torch.eye(NUM, dtype=H.dtype)
    a, b = map(torch.asarray, sides())
    if what == "logdet":
        return torch.linalg.slogdet(M)[1]
    if what == "product":
        return a @ (H @ b)
    if what == "trace_inverse":
        return torch.trace(torch.linalg.inv(M))
    if what == "effective_dimension":
        return torch.trace(torch.linalg.solve(M, H))
    return a @ torch.linalg.solve(M, b)


def found(xp, what, p, dtype="float64"):
    """Return the same by a Nyström approximation that holds some columns twice."""
    a, b, X = (xp.asarray(x.astype(dtype)) for x in (*sides(), points()))
    approx = li.nystrom(li.KernelOperator(X, lengthscale=p[0]), indices=INDICES)
    if what == "product":
        return a @ (approx @ b)
    if what == "solve_path":
        return a @ approx.solve_path(b, [p[1]])[0]
    if what in ("inverse", "chunked"):
        return a @ (approx.inverse(p[1], chunk_size=2 if what == "chunked" else None) @ b)
    return getattr(approx, what)(p[1])


def expected(what):
    p = torch.tensor(AT, dtype=torch.float64)
    return [f(lambda q: dense(what, q))(p).numpy() for f in (torch.func.grad, torch.func.hessian)]


@functions
def test_first_and_second_derivatives_are_those_of_the_dense_formula(what):
    p = torch.tensor(AT, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(found(torch, what, p), p, create_graph=True)
    second = torch.stack([torch.autograd.grad(part, p, retain_graph=True)[0] for part in first])
    for derivative, wanted in zip((first, second), expected(what), strict=True):
        np.testing.assert_allclose(derivative.detach(), wanted, rtol=1e-11, atol=1e-12)
    assert found(torch, what, p).item() == pytest.approx(dense(what, p).item(), rel=1e-12)


def test_function_transforms_of_torch_see_the_same_derivatives():
    p = torch.tensor(AT, dtype=torch.float64)
    first, second = expected("logdet")
    function = partial(found, torch, "logdet")
    np.testing.assert_allclose(torch.func.grad(function)(p), first, rtol=1e-11)
    np.testing.assert_allclose(torch.func.hessian(function)(p), second, rtol=1e-11)


def test_compiled_jax_sees_the_same_slope():
    jax = pytest.importorskip("jax")
    with open_backend("jax", "float64") as backend:
        slope = jax.jit(jax.grad(partial(found, backend.xp, "logdet")))(np.array(AT))
    np.testing.assert_allclose(slope, expected("logdet")[0], rtol=1e-11)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@functions
def test_jax_sees_the_same_derivatives(what, dtype):
    jax = pytest.importorskip("jax")
    with open_backend("jax", dtype) as backend:
        function = partial(found, backend.xp, what, dtype=dtype)
        both = jax.jit(lambda p: (jax.grad(function)(p), jax.hessian(function)(p)))
        derivatives = both(backend.asarray(np.array(AT)))
    for derivative, wanted in zip(derivatives, expected(what), strict=True):
        tolerance = 1e4 * backend.eps * np.max(np.abs(wanted))
        np.testing.assert_allclose(derivative, wanted, rtol=0, atol=tolerance)


@pytest.mark.parametrize("scale", [1.0, 1e-20])
def test_equal_eigenvalues_make_no_nan(scale):
    A = (2 * scale * torch.eye(4, dtype=torch.float64)).requires_grad_()
    approx, damping = li.nystrom(A, indices=range(4)), 0.1 * scale
    (slope,) = torch.autograd.grad(approx.logdet(damping), A, retain_graph=True)
    np.testing.assert_allclose(slope, np.eye(4) / (2.1 * scale), rtol=1e-14)
    (slope,) = torch.autograd.grad(approx.eigenvalues.sum(), A)
    np.testing.assert_allclose(slope, np.eye(4), rtol=1e-14)


def test_numbers_are_tensors_with_a_graph_and_floats_without():
    A = torch.asarray(matrix("linear"))
    assert isinstance(li.nystrom(A, 5, rng=0).logdet(0.1), float)
    damping = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    with_graph = li.nystrom(A, 5, rng=0).logdet(damping)
    assert with_graph.requires_grad and with_graph.ndim == 0
    assert li.nystrom(A.clone().requires_grad_(), 5, rng=0).trace_inverse(0.1).requires_grad
    with torch.no_grad():
        assert isinstance(li.nystrom(A, 5, rng=0).effective_dimension(damping), float)


def test_a_krylov_sketch_of_an_indefinite_matrix_has_the_derivatives_of_its_matrix():
    H, b = torch.asarray(matrix("half")), torch.asarray(rhs())
    n, shift = H.shape[0], 2.0 * float(torch.linalg.matrix_norm(H, 2))
    eye = torch.eye(n, dtype=H.dtype)

    def exact(t):
        M = H + t * eye
        damped = M + shift * eye
        return b @ (M @ b), b @ torch.linalg.solve(damped, b), torch.linalg.slogdet(damped)[1]

    t = torch.zeros((), dtype=H.dtype, requires_grad=True)
    approx = li.nystrom(H + t * eye, n, sampling="krylov", b=b)
    assert approx.keeps_negative
    values = b @ (approx @ b), b @ (approx.inverse(shift) @ b)
    for i, value in enumerate(values):
        (slope,) = torch.autograd.grad(value, t, retain_graph=True)
        (wanted,) = torch.autograd.grad(exact(t)[i], t)
        assert slope.item() == pytest.approx(wanted.item(), rel=1e-8)


@pytest.mark.parametrize("invert", [li.chunked_inverse, li.streamed_inverse])
def test_inverses_that_hold_no_columns_have_the_same_slope(invert):
    a, b = map(torch.asarray, sides())
    p = torch.tensor(AT, dtype=torch.float64, requires_grad=True)
    A = li.KernelOperator(torch.asarray(points()), lengthscale=p[0])
    value = a @ (invert(A, INDICES, damping=p[1], chunk_size=2) @ b)
    (slope,) = torch.autograd.grad(value, p)
    np.testing.assert_allclose(slope, expected("inverse")[0], rtol=1e-11)


def test_the_factor_of_pivoted_cholesky_has_the_slope_of_its_columns():
    X, lengthscale = torch.asarray(points()), torch.tensor(0.7, dtype=torch.float64)
    weights = torch.asarray(np.random.default_rng(1).standard_normal((NUM, 5)))

    def by_factor(lengthscale):
        found = li.pivoted_cholesky(li.KernelOperator(X, lengthscale=lengthscale), 5)
        return (weights * found.factor).sum()

    def by_columns(lengthscale):
        A = li.KernelOperator(X, lengthscale=lengthscale)
        C = A.columns(pivots)
        return (weights * (C @ torch.linalg.inv(torch.linalg.cholesky(C[pivots])).T)).sum()

    pivots = li.pivoted_cholesky(li.KernelOperator(X, lengthscale=0.7), 5).pivots
    found, wanted = (torch.func.grad(f)(lengthscale).item() for f in (by_factor, by_columns))
    assert found == pytest.approx(wanted, rel=1e-10)
