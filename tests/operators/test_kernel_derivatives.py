"""Derivatives of kernels: between equal points too, and with respect to every parameter."""

from __future__ import annotations

import numpy as np
import pytest

import lowrank_inverse as li
from lowrank_inverse.operators.kernels.distances import MAX_COMPILED
from tests.conftest import open_backend

torch = pytest.importorskip("torch")

NUM, FEW, MANY = 6, 3, MAX_COMPILED + 4
RADIAL = {
    "rbf": {"kernel": "rbf"},
    "matern 1/2": {"kernel": "matern", "nu": 0.5},
    "matern 3/2": {"kernel": "matern", "nu": 1.5},
    "matern 5/2": {"kernel": "matern", "nu": 2.5},
}
CASES = RADIAL | {
    "laplacian": {"kernel": "laplacian"},
    "polynomial": {"kernel": "polynomial", "degree": 2},
}
RTOL = 1e-12
every_radial_kernel = pytest.mark.parametrize("case", RADIAL)
dimensions = pytest.mark.parametrize("d", [FEW, MANY])


def problem(d=FEW):
    """Return points, of which the last repeats the first, a direction, and weights of entries."""
    rng = np.random.default_rng([d, 5])
    X = rng.standard_normal((NUM, d)) / d**0.5
    X[-1] = X[0]
    return X, rng.standard_normal((NUM, d)), rng.standard_normal((NUM, NUM))


def radial(case, u):
    """Return a kernel's gradient and Hessian in the difference u, by hand; at a kink, 0."""
    r, identity, outer = np.linalg.norm(u), np.eye(u.size), np.outer(u, u)
    if case == "rbf":
        return -u * np.exp(-(r**2) / 2), (outer - identity) * np.exp(-(r**2) / 2)
    c = np.sqrt(2 * RADIAL[case]["nu"])
    s, fall = c * r, np.exp(-c * r)
    if case == "matern 5/2":
        return -5 / 3 * (1 + s) * u * fall, -5 / 3 * ((1 + s) * identity - 5 * outer) * fall
    if r == 0:
        return 0 * u, (-3 if case == "matern 3/2" else 0) * identity
    if case == "matern 3/2":
        return -3 * u * fall, -3 * (identity - c * outer / r) * fall
    return -u / r * fall, (outer / r**3 - identity / r + outer / r**2) * fall


def along(case, d):
    """Return the first and second derivative of a weighted sum of entries, as points move."""
    X, V, w = problem(d)
    first = second = 0.0
    for i in range(NUM):
        for j in range(NUM):
            gradient, hessian = radial(case, X[i] - X[j])
            move = V[i] - V[j]
            first += w[i, j] * (gradient @ move)
            second += w[i, j] * (move @ hessian @ move)
    return first, second


def weighted_sum(xp, case, d, products=True):
    """Return that sum as a function of how far the points move."""
    X, V, w = (xp.asarray(x) for x in problem(d))

    def function(t):
        A = li.KernelOperator(X + t * V, **CASES[case])
        K = A @ xp.eye(NUM, dtype=X.dtype) if products else A.columns(np.arange(NUM))
        return (w * K).sum()

    return function


@dimensions
@every_radial_kernel
def test_first_and_second_derivatives_are_right_where_points_are_equal(case, d):
    first, second = along(case, d)
    function = weighted_sum(torch, case, d)
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(function(t), t, create_graph=True)
    (bend,) = torch.autograd.grad(slope, t)
    assert slope.item() == pytest.approx(first, rel=RTOL)
    assert bend.item() == pytest.approx(second, rel=RTOL)


def test_function_transforms_of_torch_see_the_same_derivatives():
    first, second = along("matern 3/2", MANY)
    t = torch.zeros((), dtype=torch.float64)
    function = weighted_sum(torch, "matern 3/2", MANY, products=False)
    assert torch.func.grad(function)(t).item() == pytest.approx(first, rel=RTOL)
    assert torch.func.hessian(function)(t).item() == pytest.approx(second, rel=RTOL)
    assert torch.func.jvp(function, (t,), (t + 1,))[1].item() == pytest.approx(first, rel=RTOL)


@pytest.mark.slow
@dimensions
@every_radial_kernel
def test_jax_sees_the_same_derivatives(case, d):
    jax = pytest.importorskip("jax")
    first, second = along(case, d)
    with open_backend("jax", "float64") as backend:
        function = weighted_sum(backend.xp, case, d)
        both = jax.jit(lambda t: (jax.grad(function)(t), jax.jacfwd(jax.grad(function))(t)))
        slope, bend = both(0.0)
    assert float(slope) == pytest.approx(first, rel=RTOL)
    assert float(bend) == pytest.approx(second, rel=RTOL)


@pytest.mark.parametrize("d", [1, FEW])
def test_the_kink_of_the_laplacian_kernel_has_the_mean_of_both_slopes(d):
    X = torch.zeros((2, d), dtype=torch.float64, requires_grad=True)
    A = li.KernelOperator(X, "laplacian")
    (slope,) = torch.autograd.grad(A.columns([0])[1, 0], X)
    np.testing.assert_array_equal(slope, 0)


PARAMETERS = [(case, "lengthscale", each) for case in CASES for each in (False, True)]


@pytest.mark.parametrize(("case", "name", "each"), [*PARAMETERS, ("polynomial", "coef0", False)])
def test_parameters_have_the_derivatives_that_differences_show(case, name, each):
    X, _, w = problem()
    value = np.linspace(0.8, 1.3, FEW) if each else np.float64(0.8)

    def function(xp, value):
        settings = CASES[case] | {name: value}
        return xp.asarray(w) * li.KernelOperator(xp.asarray(X), **settings).columns([*range(NUM)])

    def total(value):
        return function(np, value if each else float(value)).sum()

    leaf = torch.tensor(value, requires_grad=True)
    (found,) = torch.autograd.grad(function(torch, leaf).sum(), leaf)
    step = 1e-5
    expected = [
        (total(value + step * e) - total(value - step * e)) / (2 * step)
        for e in (np.eye(FEW) if each else [1.0])
    ]
    np.testing.assert_allclose(np.atleast_1d(found), expected, rtol=1e-7, atol=1e-8)
    assert torch.autograd.gradcheck(lambda v: function(torch, v), leaf)


@pytest.mark.parametrize("name", ["lengthscale", "coef0"])
def test_parameters_of_another_library_are_refused_where_they_have_a_graph(name):
    leaf = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    with pytest.raises(TypeError, match=r"must come from one library.*`X` is numpy"):
        li.KernelOperator(problem()[0], **{name: leaf})


def test_a_traced_lengthscale_has_the_derivative_that_a_tensor_has():
    jax = pytest.importorskip("jax")
    X, _, w = problem()
    leaf = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    A = li.KernelOperator(torch.asarray(X), "matern", lengthscale=leaf)
    (expected,) = torch.autograd.grad((torch.asarray(w) * A.columns([*range(NUM)])).sum(), leaf)
    with open_backend("jax", "float64") as backend:
        jnp = backend.xp

        def function(lengthscale):
            A = li.KernelOperator(jnp.asarray(X), "matern", lengthscale=lengthscale)
            return (jnp.asarray(w) * A.columns(jnp.arange(NUM))).sum()

        found = float(jax.jit(jax.grad(function))(0.7))
    assert found == pytest.approx(expected.item(), rel=RTOL)
