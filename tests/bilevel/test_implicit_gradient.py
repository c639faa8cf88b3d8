"""The formula of the hypergradient, free of any framework."""

from __future__ import annotations

import numpy as np
import pytest

import lowrank_inverse as li
from lowrank_inverse.bilevel.implicit_gradient import implicit_gradient
from lowrank_inverse.bilevel.info import hypergradient_info
from lowrank_inverse.bilevel.ridge import inverse_product
from tests.conftest import host
from tests.oracles import damped_solve, norm, nystrom, relative_error
from tests.problems import CountingOperator, N, indices, matrix, rhs

K = tuple(indices().tolist())
H = matrix("linear")
G = rhs(seed=21)
F = rhs(width=4, seed=22)
DIRECT = np.arange(4.0)
RIDGE = np.linspace(0.1, 2.0, N)


def mixed_vjp(q):
    return [F.T @ q, None, q[:3]]


def gradient(solver, **arguments):
    direct = [DIRECT, np.ones(2), None]
    return implicit_gradient(H, G, mixed_vjp, direct, solver=solver, **arguments)


@pytest.mark.parametrize("ridge", [None, 0.5, np.array(0.5), RIDGE], ids=["none", "0", "0d", "n"])
@pytest.mark.parametrize(
    "solver",
    [
        li.Exact(damping=0.1),
        li.CG(damping=0.1, rtol=1e-12),
        li.NystromCG(damping=0.1, rtol=1e-12, indices=K),
        li.Nystrom(rank=N, damping=0.1),
        li.Nystrom(rank=N, damping=0.1, memory="streamed"),
        li.Neumann(damping=0.1, num_terms=2000),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_the_hypergradient_is_the_dense_implicit_formula(solver, ridge):
    dense = H + np.diag(np.broadcast_to(0.0 if ridge is None else ridge, N))
    q = damped_solve(dense, 0.1, G)
    result = gradient(solver, ridge=ridge, rng=0)
    tolerance = 1e-4 if isinstance(solver, li.Neumann) else 1e-10
    assert relative_error(result.solution.value, q) < tolerance
    assert relative_error(result.grads[0], DIRECT - F.T @ q) < tolerance
    assert relative_error(result.grads[2], -q[:3]) < tolerance
    assert relative_error(result.implicit[0], -(F.T @ q)) < tolerance


def test_a_hyperparameter_on_one_path_alone_has_that_part_as_its_gradient():
    result = gradient(li.Exact(damping=0.1))
    np.testing.assert_array_equal(result.grads[1], np.ones(2))
    assert result.implicit[1] is None
    result = implicit_gradient(H, G, lambda q: [None], [None], solver=li.Exact(damping=0.1))
    assert result.grads == [None]


def test_a_scalar_ridge_joins_the_damping():
    result = inverse_product(H, G, solver=li.Nystrom(damping=0.1, indices=K), ridge=0.4)
    expected = damped_solve(nystrom(H, K), 0.5, G)
    assert relative_error(result[0].value, expected) < 1e-12


def test_a_ridge_for_each_parameter_is_kept_out_of_the_approximation():
    solution, inverse, *_ = inverse_product(
        H, G, solver=li.Nystrom(damping=0.1, indices=K), ridge=RIDGE
    )
    s = (RIDGE + 0.1) ** -0.5
    scaled = s[:, None] * H * s
    expected = s * damped_solve(nystrom(scaled, K), 1.0, s * G)
    assert relative_error(solution.value, expected) < 1e-12
    residual = norm(G - (H + np.diag(RIDGE + 0.1)) @ solution.value)
    assert relative_error(solution.residual_norm, residual) < 1e-9
    assert inverse.rank == len(K)


@pytest.mark.parametrize("ridge", [None, 0.5, RIDGE], ids=["none", "scalar", "vector"])
@pytest.mark.parametrize(
    "solver",
    [
        li.Exact(damping=0.1),
        li.CG(damping=0.1),
        li.NystromCG(damping=0.1, indices=K),
        li.Nystrom(damping=0.1, indices=K),
        li.Nystrom(damping=0.1, indices=K, memory="streamed"),
        li.Neumann(damping=0.1),
        li.Identity(),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_num_products_is_what_the_hessian_counted(solver, ridge):
    operator = CountingOperator(H)
    solution, *_ = inverse_product(operator, G, solver=solver, ridge=ridge)
    assert solution.num_products == operator.num_products


@pytest.mark.parametrize("spread", [1.0, 1e3, 1e6])
def test_success_with_a_ridge_for_each_parameter_means_a_small_true_residual(spread):
    ridge = np.geomspace(1.0, spread, N)
    solver = li.NystromCG(damping=0.1, indices=K, rtol=1e-3)
    solution, *_ = inverse_product(H, G, solver=solver, ridge=ridge)
    true = norm(G - (H + np.diag(ridge + 0.1)) @ solution.value)
    assert relative_error(solution.residual_norm, true) < 1e-6
    assert bool(solution.converged) == (true <= 1e-3 * norm(G))


@pytest.mark.parametrize("ridge", [None, 0.5, RIDGE], ids=["none", "scalar", "vector"])
def test_a_state_saves_the_steps(ridge):
    solver = li.NystromCG(damping=0.1, indices=K)
    cold, *_ = inverse_product(H, G, solver=solver, ridge=ridge)
    warm, *_ = inverse_product(H, G, solver=solver, ridge=ridge, state=cold)
    assert cold.num_steps > 0
    assert warm.num_steps == 0
    assert relative_error(warm.value, cold.value) < 1e-12


@pytest.mark.parametrize("kind", [None, 0.5, RIDGE], ids=["none", "scalar", "vector"])
def test_the_formula_is_the_same_in_every_library(library, kind):
    ridge = kind if kind is None or isinstance(kind, float) else library.asarray(kind)
    operator, g = library.asarray(H), library.asarray(G)
    solution, *_ = inverse_product(
        operator, g, solver=li.NystromCG(damping=0.1, indices=K), ridge=ridge
    )
    dense = library.seen(H) + np.diag(np.broadcast_to(0.0 if kind is None else kind, N))
    assert relative_error(host(solution.value), damped_solve(dense, 0.1, G)) < 1e-3
    assert solution.value.dtype == g.dtype


def test_the_record_tells_cost_residual_and_curvature():
    result = gradient(li.CG(damping=0.1))
    info = hypergradient_info(result, G, 0.25 * np.ones(4), ("unused",))
    assert info.num_products == result.solution.num_products
    relative = norm(G - (H + 0.1 * np.eye(N)) @ result.solution.value) / norm(G)
    assert float(info.relative_residual) == pytest.approx(float(relative), rel=1e-6)
    assert float(info.inner_grad_norm) == pytest.approx(0.5)
    assert not info.negative_curvature
    assert info.hparams_without_path == ("unused",)
    assert info.rank is None

    result = implicit_gradient(
        matrix("half"), G, mixed_vjp, [None] * 3, solver=li.Nystrom(damping=0.01, indices=K)
    )
    info = hypergradient_info(result, G, np.zeros(4), ())
    assert bool(info.negative_curvature)
    assert 0 < info.rank < len(K)
    assert info.inner_grad_norm == 0


def test_an_outer_gradient_of_zero_has_a_record_without_nan():
    result = implicit_gradient(H, 0 * G, mixed_vjp, [None] * 3, solver=li.CG(damping=0.1))
    info = hypergradient_info(result, 0 * G, np.zeros(4), ())
    assert info.relative_residual == 0
    assert not np.any(result.grads[0])


@pytest.mark.parametrize(
    ("ridge", "error", "message"),
    [
        (-0.1, ValueError, "`ridge` must be finite and >= 0"),
        (np.nan, ValueError, "`ridge` must be finite and >= 0"),
        ("0.1", TypeError, "`ridge` must be a real number"),
        (np.ones(N - 1), ValueError, "`ridge` must be a number or match the parameters"),
        (np.ones(N, dtype="float32"), ValueError, "`ridge` must be a number or match"),
        (np.full(N, np.inf), ValueError, "`ridge` must be finite"),
        (-np.ones(N), ValueError, "`ridge` must be >= 0 everywhere"),
    ],
)
def test_a_ridge_that_does_not_fit_is_refused(ridge, error, message):
    with pytest.raises(error, match=message):
        inverse_product(H, G, solver=li.NystromCG(damping=0.1, indices=K), ridge=ridge)


def test_a_ridge_and_damping_that_are_both_zero_are_refused_where_they_divide():
    with pytest.raises(ValueError, match="`ridge` plus the damping of the solver must be > 0"):
        inverse_product(H, G, solver=li.NystromCG(indices=K), ridge=np.zeros(N))


def test_an_outer_gradient_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="`gradient of the outer loss` must be finite"):
        implicit_gradient(H, np.full(N, np.nan), mixed_vjp, [None] * 3, solver=li.CG())
