"""The formula of the hypergradient by itself, on NumPy arrays, against closed-form derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

import lowrank_inverse as li
from lowrank_inverse.bilevel.implicit_gradient import implicit_gradient
from lowrank_inverse.bilevel.info import HypergradientInfo, hypergradient_info
from lowrank_inverse.bilevel.ridge import inverse_product
from tests.conftest import host
from tests.oracles import damped_solve, nystrom
from tests.oracles import relative_error as relative
from tests.problems import CountingOperator, rhs, symmetric

N, M = 12, 5
EIGENVALUES = {
    "positive definite": np.linspace(0.1, 1, N),
    "low rank": np.where(np.arange(N) < 4, 1 / np.arange(1, N + 1), 0.0),
    "indefinite": np.linspace(-0.3, 1, N),
}


def hessian(kind: str = "positive definite") -> np.ndarray:
    """A symmetric matrix of order N, its largest eigenvalue 1."""
    return symmetric(EIGENVALUES[kind])


def richardson(matvec: Callable[[np.ndarray], np.ndarray], b: np.ndarray) -> np.ndarray:
    """Three steps of a solver that a user might bring."""
    x = np.zeros_like(b)
    for _ in range(3):
        x = x + 0.3 * (b - matvec(x))
    return x


def dense_richardson(B: np.ndarray, b: np.ndarray, num_terms: int, step: float) -> np.ndarray:
    """The same as a polynomial of B in its eigenbasis."""
    w, V = np.linalg.eigh(B)
    return V @ ((1 - (1 - step * w) ** num_terms) / w * (V.T @ b))


def dense_solve(B: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.linalg.solve(B, b)


class Way(NamedTuple):
    """Settings, and what they compute from the dense ``B = H + ridge + damping``."""

    solver: Any
    dense: Callable[[np.ndarray, np.ndarray], np.ndarray] = dense_solve

    @property
    def damping(self) -> float:
        return getattr(self.solver, "damping", 0.0)


WAYS = {
    "exact": Way(li.Exact()),
    "exact, damped": Way(li.Exact(damping=0.2)),
    "cg": Way(li.CG(rtol=1e-13)),
    "cg, damped": Way(li.CG(rtol=1e-13, damping=0.2)),
    "nystrom-cg": Way(li.NystromCG(rank=4, rtol=1e-13)),
    "nystrom-cg, damped": Way(li.NystromCG(rank=4, rtol=1e-13, damping=0.2)),
    "nystrom of rank n": Way(li.Nystrom(rank=N, damping=0.2)),
    "nystrom of rank n, chunked": Way(li.Nystrom(rank=N, damping=0.2, memory="chunked")),
    "nystrom of rank n, streamed": Way(li.Nystrom(rank=N, damping=0.2, memory="streamed")),
    "neumann": Way(
        li.Neumann(num_terms=5, step_size=0.4, damping=0.2),
        lambda B, b: dense_richardson(B, b, 5, 0.4),
    ),
    "identity": Way(li.Identity(scale=0.7), lambda B, b: 0.7 * b),
    "callable": Way(richardson, lambda B, b: dense_richardson(B, b, 3, 0.3)),
}
RIDGES = {
    "none": None,
    "float": 0.3,
    "int": 1,
    "zero": 0.0,
    "0-d": np.asarray(0.3),
    "scalar of numpy": np.float64(0.3),
    "one for each": np.linspace(0.05, 0.9, N),
}

each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
each_ridge = pytest.mark.parametrize("ridge", RIDGES.values(), ids=RIDGES)


def right_hand_side(dtype: Any = np.float64) -> np.ndarray:
    return rhs(N).astype(dtype)


def dense_system(H: np.ndarray, ridge: Any, damping: float) -> np.ndarray:
    return H + np.diag(np.zeros(N) + (0.0 if ridge is None else ridge) + damping)


# The inverse product.


@each_ridge
@each_way
def test_the_product_with_the_inverse_has_the_ridge_and_the_damping_in_it(way, ridge):
    H, b = hessian(), right_hand_side()
    solution, inverse, *_ = inverse_product(H, b, solver=way.solver, ridge=ridge, rng=0)
    B = dense_system(H, ridge, way.damping)
    assert relative(solution.value, way.dense(B, b)) < 1e-10
    residual = np.linalg.norm(b - B @ solution.value)
    assert float(solution.residual_norm) == pytest.approx(residual, rel=1e-8, abs=1e-13)
    assert inverse.shape == (N, N)


@each_ridge
@each_way
def test_products_with_the_hessian_are_counted_all_told(way, ridge):
    H = CountingOperator(hessian())
    solution, *_ = inverse_product(H, right_hand_side(), solver=way.solver, ridge=ridge, rng=0)
    assert solution.num_products == H.num_products


@each_ridge
@each_way
def test_float32_stays_float32(way, ridge):
    H, b = hessian().astype(np.float32), right_hand_side(np.float32)
    if ridge is RIDGES["one for each"]:
        ridge = ridge.astype(np.float32)
    solution, *_ = inverse_product(H, b, solver=way.solver, ridge=ridge, rng=0)
    assert solution.value.dtype == np.float32
    B = dense_system(H.astype(np.float64), ridge, way.damping)
    assert relative(solution.value, way.dense(B, b.astype(np.float64))) < 1e-5


@pytest.mark.parametrize("memory", ["stored", "chunked", "streamed"])
def test_with_a_ridge_for_each_nystrom_approximates_the_hessian_scaled_from_both_sides(memory):
    H, b, ridge = hessian(), right_hand_side(), np.logspace(-2, 1, N)
    indices = [7, 2, 9]
    s = 1 / np.sqrt(ridge + 0.1)
    scaled = s[:, None] * H * s
    wanted = s * damped_solve(nystrom(scaled, indices), 1.0, s * b)
    solver = li.Nystrom(damping=0.1, indices=indices, memory=memory)
    solution, inverse, *_ = inverse_product(H, b, solver=solver, ridge=ridge)
    assert relative(solution.value, wanted) < 1e-10
    assert inverse.rank == 3


def test_one_ridge_joins_the_damping_and_stays_out_of_the_approximation():
    H, b, indices = hessian(), right_hand_side(), [7, 2, 9]
    solver = li.Nystrom(damping=0.1, indices=indices)
    solution, *_ = inverse_product(H, b, solver=solver, ridge=0.4)
    assert relative(solution.value, damped_solve(nystrom(H, indices), 0.5, b)) < 1e-12


@pytest.mark.parametrize("kind", ["none", "float", "one for each"])
def test_the_formula_is_the_same_in_every_library(library, kind):
    ridge = RIDGES[kind] if kind != "one for each" else library.asarray(RIDGES[kind])
    g = library.asarray(right_hand_side())
    solver = li.NystromCG(damping=0.1, indices=(7, 2, 9))
    solution, *_ = inverse_product(library.asarray(hessian()), g, solver=solver, ridge=ridge)
    wanted = np.linalg.solve(dense_system(hessian(), RIDGES[kind], 0.1), right_hand_side())
    assert relative(host(solution.value), wanted) < 1e-3
    assert solution.value.dtype == g.dtype


@pytest.mark.parametrize("sampling", ["uniform", "diagonal", "diagonal_squared"])
def test_with_a_ridge_for_each_columns_are_drawn_by_the_diagonal_of_the_scaled_hessian(sampling):
    H, b, ridge = hessian(), right_hand_side(), np.logspace(-3, 2, N)
    s = 1 / np.sqrt(ridge + 0.1)
    scaled = s[:, None] * H * s
    for seed in range(5):
        solver = li.Nystrom(rank=3, damping=1.0, sampling=sampling)
        wanted = s * li.solve((scaled + scaled.T) / 2, s * b, solver=solver, rng=seed).value
        solver = li.Nystrom(rank=3, damping=0.1, sampling=sampling)
        found = inverse_product(H, b, solver=solver, ridge=ridge, rng=seed)[0].value
        assert relative(found, wanted) < 1e-10


@pytest.mark.parametrize("ridge", [0.5, np.logspace(-1, 1, N)], ids=["one", "one for each"])
def test_a_known_ridge_is_exact_where_a_sampled_one_is_far_off(ridge):
    H, b = hessian("low rank"), right_hand_side()
    B = dense_system(H, ridge, 0.0)
    wanted = np.linalg.solve(B, b)
    solver = li.Nystrom(rank=4, damping=1e-8)
    known = inverse_product(H, b, solver=solver, ridge=ridge, rng=0)[0]
    sampled = inverse_product(B, b, solver=solver, rng=0)[0]
    assert relative(known.value, wanted) < 1e-6
    assert relative(sampled.value, wanted) > 1.0


@pytest.mark.parametrize("solver", [li.CG(), li.NystromCG(rank=3)], ids=["cg", "nystrom-cg"])
@pytest.mark.parametrize("ridge", [None, 0.5, np.logspace(-1, 1, N)], ids=["none", "one", "each"])
def test_a_state_is_where_the_next_solve_starts(solver, ridge):
    H, b = hessian(), right_hand_side()
    cold = inverse_product(H, b, solver=solver, ridge=ridge, rng=0)[0]
    warm = inverse_product(H, b, solver=solver, ridge=ridge, rng=1, state=cold)[0]
    assert int(cold.num_steps) > 0
    assert int(warm.num_steps) == 0
    assert warm.num_products < cold.num_products
    assert relative(warm.value, cold.value) < 1e-14


def test_one_seed_gives_one_answer():
    def answer(rng: Any) -> np.ndarray:
        solver = li.Nystrom(rank=3, sampling="uniform", damping=1e-2)
        ridge = np.linspace(0.1, 1, N)
        H, b = hessian(), right_hand_side()
        return inverse_product(H, b, solver=solver, ridge=ridge, rng=rng)[0].value

    assert np.array_equal(answer(3), answer(3))
    assert np.array_equal(answer(3), answer(np.random.default_rng(3)))
    assert relative(answer(4), answer(3)) > 1e-3


@pytest.mark.parametrize(
    "solver",
    [
        li.CG(rtol=1e-4),
        li.NystromCG(rank=2, rtol=1e-4),
        li.Nystrom(rank=2, refine=20, damping=1e-2),
        li.Nystrom(rank=N, damping=1e-2),
    ],
    ids=["cg", "nystrom-cg", "nystrom, refined", "nystrom of rank n"],
)
@pytest.mark.parametrize("spread", [1, 4, 8])
def test_converged_means_that_the_residual_of_the_system_asked_for_meets_rtol(solver, spread):
    b, rtol = right_hand_side(), getattr(solver, "rtol", 1e-5)
    for seed in range(5):
        ridge = np.random.default_rng(seed).permutation(np.logspace(-spread, 2, N))
        solution, *_ = inverse_product(hessian(), b, solver=solver, ridge=ridge, rng=seed)
        relative_residual = float(solution.residual_norm) / np.linalg.norm(b)
        assert bool(solution.converged) <= (relative_residual <= rtol)


# The gradient.


class Quadratic(NamedTuple):
    """Inner loss ``θᵀHθ/2 - θᵀBφ`` and a ridge; outer loss ``|θ - t|²/2 + |φ|²/2``.

    ``θ(φ) = (H + ridge)^{-1} B φ`` is linear, and so the total derivative is plain algebra.
    """

    H: np.ndarray
    B: np.ndarray
    phi: np.ndarray
    target: np.ndarray
    ridge: Any

    @classmethod
    def draw(cls, ridge: Any, kind: str = "positive definite") -> Quadratic:
        rng = np.random.default_rng(2)
        B, phi = rng.standard_normal((N, M)), rng.standard_normal(M)
        return cls(hessian(kind), B, phi, rng.standard_normal(N), ridge)

    @property
    def response(self) -> np.ndarray:
        """The derivative of θ by φ."""
        return np.linalg.solve(dense_system(self.H, self.ridge, 0.0), self.B)

    @property
    def theta(self) -> np.ndarray:
        return self.response @ self.phi

    @property
    def total(self) -> np.ndarray:
        return self.response.T @ (self.theta - self.target) + self.phi

    def implicit_gradient(self, **options: Any) -> Any:
        return implicit_gradient(
            self.H,
            self.theta - self.target,
            lambda q: [-(self.B.T @ q)],
            [self.phi],
            ridge=self.ridge,
            **options,
        )


@each_ridge
@pytest.mark.parametrize(
    "solver",
    [li.Exact(), li.CG(rtol=1e-13), li.NystromCG(rank=4, rtol=1e-13)],
    ids=["exact", "cg", "nystrom-cg"],
)
def test_the_hypergradient_is_the_derivative_of_the_minimiser_in_closed_form(solver, ridge):
    problem = Quadratic.draw(ridge)
    result = problem.implicit_gradient(solver=solver, rng=0)
    assert relative(result.grads[0], problem.total) < 1e-10
    assert relative(result.implicit[0], problem.total - problem.phi) < 1e-10


def test_the_derivative_by_a_ridge_for_each_is_that_of_finite_differences():
    problem = Quadratic.draw(np.linspace(0.1, 1, N))
    theta, h = problem.theta, 1e-6
    steps = h * np.eye(N)

    def value(ridge: np.ndarray) -> float:
        at = problem._replace(ridge=ridge).theta
        return float(0.5 * np.sum((at - problem.target) ** 2))

    wanted = [(value(problem.ridge + s) - value(problem.ridge - s)) / (2 * h) for s in steps]
    result = implicit_gradient(
        problem.H,
        theta - problem.target,
        lambda q: [q * theta],
        [None],
        solver=li.NystromCG(rank=4, rtol=1e-13),
        ridge=problem.ridge,
        rng=0,
    )
    assert relative(result.grads[0], np.array(wanted)) < 1e-7


def test_missing_parts_count_as_zero_and_stay_missing_where_both_are():
    one, two = np.ones(2), np.full(3, 2.0)
    result = implicit_gradient(
        np.eye(N),
        right_hand_side(),
        lambda q: [None, two, two, None],
        [one, None, two, None],
        solver=li.Identity(),
    )
    assert result.grads[0] is one
    assert np.array_equal(result.grads[1], -two)
    assert np.array_equal(result.grads[2], np.zeros(3))
    assert result.grads[3] is None
    assert result.implicit[0] is None
    assert np.array_equal(result.implicit[1], -two)


def test_parts_that_do_not_pair_up_are_refused():
    with pytest.raises(ValueError, match="zip"):
        implicit_gradient(
            np.eye(N), right_hand_side(), lambda q: [q, q], [None], solver=li.Identity()
        )


# The record.


def record(H: np.ndarray, **options: Any) -> HypergradientInfo:
    b = right_hand_side()
    result = implicit_gradient(H, b, lambda q: [q], [None], **options)
    return hypergradient_info(result, b, np.array([3.0, 4.0]), ("idle",))


@each_ridge
@each_way
def test_the_record_holds_cost_residual_and_the_norm_of_the_inner_gradient(way, ridge):
    H, b = hessian(), right_hand_side()
    info = record(H, solver=way.solver, ridge=ridge, rng=0)
    q = inverse_product(H, b, solver=way.solver, ridge=ridge, rng=0)[0].value
    residual = b - dense_system(H, ridge, way.damping) @ q
    wanted = np.linalg.norm(residual) / np.linalg.norm(b)
    assert float(info.relative_residual) == pytest.approx(wanted, rel=1e-8, abs=1e-13)
    assert float(info.inner_grad_norm) == pytest.approx(5.0, rel=1e-15)
    assert info.hparams_without_path == ("idle",)
    assert info.num_products >= 1
    assert not info.negative_curvature


def test_the_record_knows_the_rank_where_there_is_one():
    H = hessian("low rank")
    assert record(H, solver=li.Nystrom(rank=6, damping=1e-2), rng=0).rank == 4
    assert record(H, solver=li.Nystrom(rank=6, damping=1e-2), ridge=np.ones(N), rng=0).rank == 4
    assert record(H, solver=li.NystromCG(rank=3), ridge=1.0, rng=0).rank == 3
    assert record(H, solver=li.Exact()).rank == 4
    assert record(H, solver=li.Exact(), ridge=1.0).rank == N
    assert record(H, solver=li.CG(), ridge=1.0).rank is None


@pytest.mark.parametrize(
    "solver",
    [
        li.Exact(),
        li.CG(),
        li.NystromCG(rank=N, damping=0.01),
        li.Nystrom(rank=N, damping=1e-2),
        li.Nystrom(rank=N, memory="streamed", sampling="uniform", damping=1e-2),
    ],
    ids=["exact", "cg", "nystrom-cg", "nystrom", "streamed"],
)
def test_negative_curvature_is_that_of_hessian_and_ridge(solver):
    H = hessian("indefinite")
    assert record(H, solver=solver, rng=0).negative_curvature
    assert record(H, solver=solver, ridge=0.1, rng=0).negative_curvature
    assert record(H, solver=solver, ridge=np.linspace(0.05, 0.1, N), rng=0).negative_curvature
    assert not record(H, solver=solver, ridge=0.4, rng=0).negative_curvature
    assert not record(H, solver=solver, ridge=np.linspace(0.4, 1, N), rng=0).negative_curvature


def test_an_outer_gradient_of_zero_has_the_residual_zero():
    zero = np.zeros(N)
    for way in WAYS.values():
        for ridge in (None, 0.1, np.ones(N)):
            result = implicit_gradient(
                hessian(), zero, lambda q: [q], [None], solver=way.solver, ridge=ridge, rng=0
            )
            info = hypergradient_info(result, zero, zero, ())
            assert info.relative_residual == 0
            assert info.inner_grad_norm == 0
            assert not result.grads[0].any()


# Errors.

BAD = {
    "outer gradient NaN": (
        {"b": np.full(N, np.nan)},
        ValueError,
        "`gradient of the outer loss` must be finite",
    ),
    "ridge negative": ({"ridge": -0.1}, ValueError, "`ridge` must be finite and >= 0; got -0.1"),
    "ridge NaN": ({"ridge": np.nan}, ValueError, "`ridge` must be finite and >= 0; got nan"),
    "ridge negative, without damping": (
        {"ridge": -0.1, "solver": li.Identity()},
        ValueError,
        "`ridge` must be finite and >= 0; got -0.1",
    ),
    "ridge a list": ({"ridge": [0.1] * N}, TypeError, "`ridge` must be a real number; got .*list"),
    "ridge a word": ({"ridge": "strong"}, TypeError, "`ridge` must be a real number; got .*str"),
    "ridge of wrong shape": (
        {"ridge": np.ones(N - 1)},
        ValueError,
        r"`ridge` must be a number or match the parameters, shape \(12,\).*got shape \(11,\)",
    ),
    "ridge of wrong dtype": (
        {"ridge": np.ones(N, dtype=np.float32)},
        ValueError,
        "`ridge` must .* dtype float64; got .* dtype float32",
    ),
    "ridge negative somewhere": (
        {"ridge": np.linspace(-1, 1, N)},
        ValueError,
        "`ridge` must be >= 0 everywhere; it holds negative entries",
    ),
    "ridge infinite somewhere": (
        {"ridge": np.full(N, np.inf)},
        ValueError,
        "`ridge` must be finite; it holds NaN or Inf",
    ),
    "ridge zero somewhere": (
        {"ridge": np.arange(N, dtype=float), "solver": li.NystromCG(rank=3)},
        ValueError,
        "`ridge` plus the damping of the solver must be > 0 everywhere; some entries are 0",
    ),
    "solver a class": ({"solver": li.CG}, TypeError, "`solver` must be settings"),
    "Hessian of another order": (
        {"H": np.eye(N - 1)},
        ValueError,
        r"`b` must have 11 rows to match the operator of shape \(11, 11\)",
    ),
}


@pytest.mark.parametrize(("options", "kind", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_by_name(options, kind, message):
    arguments = {"H": hessian(), "b": right_hand_side(), "solver": li.CG(), **options}
    H, b = arguments.pop("H"), arguments.pop("b")
    with pytest.raises(kind, match=message):
        implicit_gradient(H, b, lambda q: [q], [None], **arguments)


@pytest.mark.parametrize(
    "solver",
    [li.CG(), li.Nystrom(rank=2, sampling="uniform", damping=1e-2)],
    ids=["cg", "nystrom"],
)
def test_a_ridge_of_zeros_is_none_where_the_damping_does_without(solver):
    H, b = hessian(), right_hand_side()
    found = inverse_product(H, b, solver=solver, ridge=np.zeros(N), rng=0)[0].value
    wanted = inverse_product(H, b, solver=solver, rng=0)[0].value
    assert relative(found, wanted) < 1e-5
