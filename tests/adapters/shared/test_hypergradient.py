"""Hypergradients of both adapters against the implicit formula written out with dense matrices."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from array_api_compat import array_namespace

import lowrank_inverse as li
from lowrank_inverse.bilevel.implicit_gradient import implicit_gradient
from lowrank_inverse.bilevel.info import hypergradient_info
from tests.adapters.shared.frameworks import (
    each,
    flat,
    leaves,
    mapped,
    rebuilt,
    relative,
    slow_in_jax,
)
from tests.adapters.shared.problem import N, Problem, decay_of, forward, numbers, oracle

WEIGHTS = slice(1, None)
"""Where the weights lie in the flat vector of the hyperparameters, after the decay."""


def richardson(matvec: Any, b: Any) -> Any:
    """Four steps of a solver that a user might bring."""
    x = 0 * b
    for _ in range(4):
        x = x + 0.2 * (b - matvec(x))
    return x


def series(num_terms: int, step: float) -> Callable[..., np.ndarray]:
    """Return a Neumann series as a polynomial of B in its eigenbasis."""

    def solve(B: np.ndarray, b: np.ndarray) -> np.ndarray:
        w, V = np.linalg.eigh(B)
        return V @ ((1 - (1 - step * w) ** num_terms) / w * (V.T @ b))

    return solve


class Way(NamedTuple):
    """Settings, and what they compute from the dense ``B = H + ridge + damping``."""

    solver: Any
    dense: Callable[[np.ndarray, np.ndarray], np.ndarray] = np.linalg.solve

    def ihvp(self, ridge: Any = 0.0) -> np.ndarray:
        added = np.broadcast_to(ridge, N) + getattr(self.solver, "damping", 0.0)
        return self.dense(oracle().hessian + np.diag(added), oracle().outer_grad)


WAYS = {
    "exact": Way(li.Exact()),
    "exact, damped": Way(li.Exact(damping=0.1)),
    "cg": Way(li.CG(rtol=1e-13)),
    "cg, damped": Way(li.CG(rtol=1e-13, damping=0.1)),
    "nystrom-cg": Way(li.NystromCG(sampling="uniform", rank=5, rtol=1e-13)),
    "nystrom-cg, damped": Way(li.NystromCG(sampling="uniform", rank=5, rtol=1e-13, damping=0.1)),
    "nystrom of rank n": Way(li.Nystrom(rank=N, damping=0.1)),
    "nystrom of rank n, chunked": Way(
        li.Nystrom(rank=N, damping=0.1, memory="chunked", chunk_size=5)
    ),
    "nystrom of rank n, streamed": Way(li.Nystrom(rank=N, damping=0.1, memory="streamed")),
    "neumann": Way(li.Neumann(num_terms=6, step_size=0.3, damping=0.1), series(6, 0.3)),
    "identity": Way(li.Identity(scale=0.7), lambda B, b: 0.7 * b),
    "callable": Way(richardson, series(4, 0.2)),
}


# The value: the dense formula, finite differences, Theorem 1.


@each("way", WAYS, quick=("exact", "nystrom-cg, damped", "nystrom of rank n, streamed", "callable"))
def test_the_hypergradient_equals_the_dense_implicit_formula(framework, way):
    assert np.linalg.eigvalsh(oracle().hessian)[0] > 0
    out = Problem(framework).hypergradient(solver=way.solver)
    assert relative(out.grads, oracle().at(way.ihvp())) < 1e-8
    assert relative(out.ihvp, way.ihvp()) < 1e-8


@each("way", WAYS, quick=("cg, damped", "nystrom of rank n", "nystrom-cg"))
def test_the_hypergradient_in_float32_agrees_with_the_dense_formula_to_rounding(framework, way):
    with framework.narrow():
        out = Problem(framework, "float32").hypergradient(solver=way.solver)
    parts = leaves([out.grads, out.ihvp])
    assert all(framework.dtype_of(part) == "float32" for part in parts)
    assert relative(out.grads, oracle().at(way.ihvp())) < 2e-5


def test_grads_and_ihvp_have_the_structure_of_hparams_and_params(framework):
    problem = Problem(framework)
    out = problem.hypergradient(solver=li.CG(), eager=True)
    for found, like in (
        *((part, problem.hparams) for part in (out.grads, out.direct, out.implicit)),
        (out.ihvp, problem.params),
    ):
        assert mapped(lambda x: tuple(x.shape), found) == mapped(lambda x: tuple(x.shape), like)


def test_grads_are_the_sum_of_the_direct_and_the_implicit_part(framework):
    out = Problem(framework).hypergradient(solver=li.CG(rtol=1e-12), eager=True)
    dense = oracle()
    assert np.linalg.norm(dense.direct) > 0
    assert relative(out.direct, dense.direct) < 1e-12
    assert relative(out.implicit, -dense.mixed.T @ dense.ihvp()) < 1e-8
    assert relative(out.grads, flat(out.direct) + flat(out.implicit)) < 1e-15


@slow_in_jax
def test_neumann_finds_a_step_size_that_converges(framework):
    out = Problem(framework).hypergradient(solver=li.Neumann(num_terms=200))
    assert out.solution.message == "converged"
    assert relative(out.grads, oracle().at(oracle().ihvp())) < 1e-4


def spread() -> np.ndarray:
    return np.linspace(0.3, 1.5, N)


CORE = {
    "cg, few steps": (li.CG(max_steps=4), None),
    "cg, one ridge": (li.CG(rtol=1e-6), 0.4),
    "nystrom": (li.Nystrom(sampling="uniform", rank=7, damping=0.05), None),
    "nystrom, chunked": (
        li.Nystrom(sampling="uniform", rank=7, damping=0.05, memory="chunked", chunk_size=3),
        None,
    ),
    "nystrom, streamed": (
        li.Nystrom(sampling="uniform", rank=7, damping=0.05, memory="streamed", chunk_size=3),
        None,
    ),
    "nystrom, refined": (li.Nystrom(sampling="uniform", rank=7, damping=0.05, refine=3), None),
    "nystrom, one ridge": (li.Nystrom(sampling="uniform", rank=7, damping=0.05), 0.4),
    "nystrom, a ridge for each": (li.Nystrom(sampling="uniform", rank=7, damping=0.05), spread()),
    "nystrom-cg, few steps": (
        li.NystromCG(sampling="uniform", rank=7, damping=0.05, max_steps=2),
        None,
    ),
    "nystrom-cg, a ridge for each": (li.NystromCG(sampling="uniform", rank=7, rtol=1e-6), spread()),
    "neumann, step size found": (li.Neumann(num_terms=7), None),
    "neumann, one ridge": (li.Neumann(num_terms=7, step_size=0.5), 0.4),
    "exact, a ridge for each": (li.Exact(damping=0.05), spread()),
    "identity": (li.Identity(scale=0.3), None),
    "callable": (richardson, 0.4),
}


@each(
    "case",
    CORE,
    quick=("cg, few steps", "nystrom", "nystrom, refined", "nystrom, a ridge for each"),
)
def test_answer_and_record_for_one_seed_are_those_of_the_core_on_the_dense_hessian(framework, case):
    solver, ridge = case
    dense = oracle()
    wanted = implicit_gradient(
        dense.hessian,
        dense.outer_grad,
        lambda q: [dense.mixed.T @ q],
        [dense.direct],
        solver=solver,
        ridge=ridge,
        rng=0,
    )
    shift = 0.0 if ridge is None else ridge * flat(numbers()["params"])
    info = hypergradient_info(wanted, dense.outer_grad, dense.inner_grad + shift, ())
    given = framework.array(ridge) if isinstance(ridge, np.ndarray) else ridge
    out = Problem(framework).hypergradient(solver=solver, ridge=given)
    assert relative(out.grads, wanted.grads[0]) < 1e-8
    assert relative(out.ihvp, wanted.solution.value) < 1e-8
    for field in ("num_products", "rank", "num_steps", "reason", "negative_curvature"):
        found, expected = getattr(out.info, field), getattr(info, field)
        assert found is expected is None or int(found) == int(expected), field
    assert out.solution.num_products == info.num_products
    for field in ("relative_residual", "inner_grad_norm"):
        assert float(getattr(out.info, field)) == pytest.approx(
            float(getattr(info, field)), rel=1e-6, abs=1e-11
        )


def mean_errors(framework: Any, solvers: list[Any]) -> list[float]:
    """Errors of hypergradients at damping 0.01, the decay a ridge, over five seeds."""
    problem, wanted = Problem(framework), oracle().at(oracle().ihvp(0.01))

    def error(solver: Any, seed: int) -> float:
        options = {"inner": problem.data_term, "ridge": decay_of, "rng": seed}
        return relative(problem.hypergradient(solver=solver, eager=True, **options).grads, wanted)

    return [float(np.mean([error(solver, seed) for seed in range(5)])) for solver in solvers]


@slow_in_jax
def test_nystrom_comes_closer_to_the_exact_hypergradient_as_its_rank_grows(framework):
    errors = mean_errors(
        framework, [li.Nystrom(sampling="uniform", rank=k, damping=0.01) for k in (1, 5, N)]
    )
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1
    assert errors[-1] < 0.01


@slow_in_jax
def test_refining_steps_bring_nystrom_closer(framework):
    errors = mean_errors(
        framework,
        [li.Nystrom(sampling="uniform", rank=5, damping=0.01, refine=steps) for steps in (0, 2, 8)],
    )
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-2 * errors[0]


class Ridged:
    """Weighted least squares with a decay for each coefficient, solved in closed form."""

    def __init__(self) -> None:
        rng = np.random.default_rng(5)
        self.x, self.y = rng.standard_normal((9, 4)), rng.standard_normal(9)
        self.clean_x, self.clean_y = rng.standard_normal((7, 4)), rng.standard_normal(7)
        self.phi = np.concatenate([rng.standard_normal(9), 0.3 * rng.standard_normal(4)])

    def minimiser(self, phi: np.ndarray) -> np.ndarray:
        weights, decay = np.exp(phi[:9]), np.exp(phi[9:])
        normal = (self.x.T * weights) @ self.x + np.diag(decay)
        return np.linalg.solve(normal, self.x.T @ (weights * self.y))

    def outer_value(self, phi: np.ndarray) -> float:
        residual = self.clean_x @ self.minimiser(phi) - self.clean_y
        return float(0.5 * residual @ residual + 0.1 * np.sum(phi**3))

    def finite_differences(self, h: float = 1e-5) -> np.ndarray:
        value, steps = self.outer_value, h * np.eye(self.phi.size)
        return np.array([value(self.phi + s) - value(self.phi - s) for s in steps]) / (2 * h)


CLOSED = {
    "exact, decay in the loss": (li.Exact(), True),
    "cg, decay in the loss": (li.CG(rtol=1e-12), True),
    "cg, decay as ridge": (li.CG(rtol=1e-12), False),
    "nystrom-cg, decay as ridge": (li.NystromCG(sampling="uniform", rank=2, rtol=1e-12), False),
}


@each("case", CLOSED, quick=("cg, decay in the loss", "nystrom-cg, decay as ridge"))
def test_at_the_minimiser_it_equals_finite_differences_of_the_problem_solved_anew(framework, case):
    (solver, inside), problem = case, Ridged()
    x, y, clean_x, clean_y = map(
        framework.array, (problem.x, problem.y, problem.clean_x, problem.clean_y)
    )
    xp = array_namespace(x)

    def inner(theta: Any, phi: Any) -> Any:
        loss = 0.5 * xp.sum(xp.exp(phi[:9]) * (x @ theta - y) ** 2)
        return loss + 0.5 * xp.sum(xp.exp(phi[9:]) * theta**2) if inside else loss

    def outer(theta: Any, phi: Any) -> Any:
        return 0.5 * xp.sum((clean_x @ theta - clean_y) ** 2) + 0.1 * xp.sum(phi**3)

    out = framework.hypergradient(
        inner,
        outer,
        framework.variables(problem.minimiser(problem.phi)),
        framework.variables(problem.phi),
        solver=solver,
        ridge=None if inside else lambda phi: xp.exp(phi[9:]),
        rng=0,
    )
    assert float(out.info.inner_grad_norm) < 1e-12
    assert relative(out.grads, problem.finite_differences()) < 1e-8


@slow_in_jax
def test_the_error_of_nystrom_stays_below_the_bound_of_theorem_1(framework):
    rng = np.random.default_rng(2)
    X, B = rng.standard_normal((7, N)) * np.linspace(1, 0.01, N), rng.standard_normal((N, 3))
    data, mixed = framework.array(X), framework.array(B)
    theta = rng.standard_normal(N)
    params, hparams = framework.variables(theta), framework.variables(np.ones(3))
    xp = array_namespace(params)

    def inner(theta: Any, phi: Any) -> Any:
        return 0.5 * xp.sum((data @ theta) ** 2) + xp.sum(theta * (mixed @ phi))

    def outer(theta: Any, phi: Any) -> Any:
        return xp.sum(theta**3) / 3

    H, gradient, norm = X.T @ X, theta**2, np.linalg.norm
    tightest = math.inf
    for seed in range(6):
        for rank in (2, 5):
            indices = np.random.default_rng(seed).choice(N, rank, replace=False)
            C, W = H[:, indices], H[np.ix_(indices, indices)]
            missed = norm(H - C @ np.linalg.pinv(W, rcond=1e-12, hermitian=True) @ C.T, 2)
            for damping in (1e-3, 1e-2, 1e-1, 1.0):
                solver = li.Nystrom(damping=damping, indices=tuple(indices))
                out = framework.hypergradient(
                    inner, outer, params, hparams, solver=solver, eager=True
                )
                exact = -B.T @ np.linalg.solve(H + damping * np.eye(N), gradient)
                error = norm(flat(out.grads) - exact)
                bound = norm(gradient) * norm(B, 2) * missed / (damping * (damping + missed))
                assert error <= bound + 1e-12
                tightest = min(tightest, bound / error)
    assert tightest < 20  # the bound says something on this problem


def test_a_scalar_problem_has_the_textbook_answer(framework):
    # argmin (w - 3)² / 2 + h w² / 2 is 3 / (1 + h); the derivative of its square is known.
    out = framework.hypergradient(
        lambda w, h: 0.5 * (w - 3) ** 2,
        lambda w, h: w**2,
        framework.variables(1.0),
        framework.variables(2.0),
        solver=li.Nystrom(rank=1, damping=1e-7),
        ridge=lambda h: h,
        eager=True,
    )
    assert float(out.grads) == pytest.approx(-2 * 3**2 / 3**3, rel=1e-5)
    assert float(out.ihvp) == pytest.approx(2 / 3, rel=1e-5)
    assert out.grads.shape == out.ihvp.shape == ()


# Forms of the hyperparameters.

FORMS: dict[str, tuple[Any, Any]] = {
    "list": (lambda h: [h["weights"], h["log_decay"]], lambda h: {"weights": h[0], "d": h[1]}),
    "nested": (
        lambda h: ((h["weights"],), {"d": h["log_decay"]}),
        lambda h: {"weights": h[0][0], **h[1]},
    ),
}


@pytest.mark.parametrize(("as_form", "as_dict"), FORMS.values(), ids=FORMS)
def test_hparams_may_have_any_structure(framework, as_form, as_dict):
    problem = Problem(framework)

    def names(h: Any) -> Any:
        found = as_dict(h)
        return {"weights": found["weights"], "log_decay": found["d"]}

    out = problem.hypergradient(
        inner=lambda p, h: problem.inner(p, names(h)),
        outer=lambda p, h: problem.outer(p, names(h)),
        hparams=as_form(problem.hparams),
        solver=li.CG(rtol=1e-12),
        eager=True,
    )
    assert type(out.grads) is type(as_form(problem.hparams))
    wanted = oracle().at(oracle().ihvp())
    assert relative(out.grads, np.append(wanted[WEIGHTS], wanted[0])) < 1e-8


def test_a_single_array_is_a_hyperparameter(framework):
    problem = Problem(framework)
    decay = problem.hparams["log_decay"]
    out = problem.hypergradient(
        inner=lambda p, h: problem.inner(p, {"weights": h, "log_decay": decay}),
        outer=lambda p, h: problem.outer(p, {"weights": h}),
        hparams=problem.hparams["weights"],
        solver=li.CG(rtol=1e-12),
        eager=True,
    )
    assert relative(out.grads, oracle().at(oracle().ihvp())[WEIGHTS]) < 1e-8


@pytest.mark.parametrize(("of_params", "of_hparams"), [("float32", "float64"), ("float64",) * 2])
def test_hparams_may_have_another_dtype_than_the_parameters(framework, of_params, of_hparams):
    problem = Problem(framework, of_params)
    other = "float32" if of_hparams == of_params else of_hparams
    hparams = framework.variables(numbers()["hparams"], other)
    out = problem.hypergradient(hparams=hparams, solver=li.CG(rtol=1e-6), eager=True)
    assert all(framework.dtype_of(leaf) == other for leaf in leaves(out.grads))
    assert all(framework.dtype_of(leaf) == of_params for leaf in leaves(out.ihvp))
    assert relative(out.grads, oracle().at(oracle().ihvp())) < 1e-4


def test_hparams_without_path_are_named_and_have_zeros(framework):
    problem = Problem(framework)
    idle = framework.variables({"more": [np.ones(1)], "unused": np.ones((2, 3))})
    out = problem.hypergradient(
        hparams={**problem.hparams, **idle}, solver=li.CG(rtol=1e-12), eager=True
    )
    names = {"torch": ("more.0", "unused"), "jax": ("['more'][0]", "['unused']")}
    assert out.info.hparams_without_path == names[framework.name]
    for part in (out.grads, out.direct, out.implicit):
        assert not flat([part["unused"], part["more"]]).any()
    found = {name: out.grads[name] for name in problem.hparams}
    assert relative(found, oracle().at(oracle().ihvp())) < 1e-8
    assert problem.hypergradient(solver=li.CG(), eager=True).info.hparams_without_path == ()


def test_hparams_of_the_outer_loss_alone_have_a_direct_part_and_no_implicit_one(framework):
    problem = Problem(framework)
    late = framework.variables({"late": np.asarray([3.0, -1.0])})
    out = problem.hypergradient(
        outer=lambda p, h: problem.outer(p, h) + array_namespace(h["late"]).sum(h["late"] ** 2),
        hparams={**problem.hparams, **late},
        solver=li.CG(),
        eager=True,
    )
    assert out.info.hparams_without_path == ()
    np.testing.assert_allclose(flat(out.grads["late"]), [6.0, -2.0])
    assert not flat(out.implicit["late"]).any()


# The ridge.


class Ridge(NamedTuple):
    """A form of the ridge made of the hyperparameters and of an array of the framework.

    With its coefficients, times the decay where that is differentiated.
    """

    make: Callable[[Any, Any], Any]
    coefficients: Any
    depends: bool = False


RIDGES = {
    "float": Ridge(lambda h, s: 0.4, 0.4),
    "zero": Ridge(lambda h, s: 0.0, 0.0),
    "int": Ridge(lambda h, s: 1, 1.0),
    "numpy scalar": Ridge(lambda h, s: np.float32(0.375), 0.375),
    "array of no dimension": Ridge(lambda h, s: 0 * s[0] + 0.4, 0.4),
    "flat": Ridge(lambda h, s: s, spread()),
    "structure": Ridge(lambda h, s: rebuilt(s, numbers()["params"]), spread()),
    "number of hparams": Ridge(lambda h, s: decay_of(h), 1.0, True),
    "flat of hparams": Ridge(lambda h, s: decay_of(h) * s, spread(), True),
    "structure of hparams": Ridge(
        lambda h, s: rebuilt(decay_of(h) * s, numbers()["params"]), spread(), True
    ),
}
RIDGED = {
    f"{name} - {label}": (ridge, WAYS[label])
    for name, ridge in RIDGES.items()
    for label in WAYS
    if ", damped" in label or name not in ("int", "numpy scalar", "array of no dimension")
}


@each(
    "case",
    RIDGED,
    quick=(
        "float - cg",
        "flat - cg",
        "structure of hparams - cg",
        "number of hparams - nystrom-cg, damped",
        "flat of hparams - nystrom of rank n",
    ),
)
def test_a_ridge_equals_a_further_term_of_the_inner_loss_in_the_dense_formula(framework, case):
    ridge, way = case
    if (
        way.solver == li.NystromCG(sampling="uniform", rank=5, rtol=1e-13)
        and ridge is RIDGES["zero"]
    ):
        way = WAYS["nystrom-cg, damped"]
    problem, theta, dense = Problem(framework), flat(numbers()["params"]), oracle()
    decay = np.exp(numbers()["hparams"]["log_decay"]) if ridge.depends else 1.0
    coefficients = decay * np.broadcast_to(ridge.coefficients, N)
    array = framework.array(spread())
    out = problem.hypergradient(solver=way.solver, ridge=lambda h: ridge.make(h, array))
    q, mixed = way.ihvp(coefficients), dense.mixed.copy()
    if ridge.depends:
        mixed[:, 0] += coefficients * theta  # by the logarithm of the decay
    assert relative(out.ihvp, q) < 1e-8
    assert relative(out.grads, dense.direct - mixed.T @ q) < 1e-8
    wanted = np.linalg.norm(dense.inner_grad + coefficients * theta)
    assert float(out.info.inner_grad_norm) == pytest.approx(wanted)


def test_a_ridge_for_a_single_matrix_may_be_flat_or_of_its_shape(framework):
    W, ridge = np.asarray([[1.0, 2.0, 0.5], [0.3, 1.0, 2.0]]), np.arange(1.0, 7.0).reshape(2, 3)
    params, h = framework.variables(W), framework.variables(1.0)
    xp = array_namespace(params)
    for shape, dtype in (((2, 3), "float64"), ((6,), "float64"), ((6,), "float32")):
        found = framework.hypergradient(
            lambda W, h: xp.sum(h * W),
            lambda W, h: xp.sum(W**2),
            params,
            h,
            solver=li.CG(),
            ridge=framework.array(ridge.reshape(shape), dtype),
            eager=True,
        ).ihvp
        np.testing.assert_allclose(np.asarray(found), 2 * W / ridge, rtol=1e-12)


@pytest.mark.parametrize("for_each", [False, True], ids=["one number", "one for each"])
def test_a_ridge_treated_exactly_is_far_better_than_one_that_is_sampled(framework, for_each):
    problem, exact = Problem(framework), oracle().at(oracle().ihvp(1e-6))
    solver, ones = li.Nystrom(sampling="uniform", rank=8, damping=1e-6), framework.array(np.ones(N))
    known = problem.hypergradient(
        inner=problem.data_term,
        ridge=lambda h: decay_of(h) * (ones if for_each else 1.0),
        solver=solver,
        eager=True,
    )
    sampled = problem.hypergradient(solver=solver, eager=True)
    assert relative(sampled.grads, exact) > 100 * relative(known.grads, exact)


def test_hparams_may_act_through_the_ridge_alone(framework):
    problem = Problem(framework)
    out = problem.hypergradient(
        inner=problem.data_term, ridge=decay_of, solver=li.CG(rtol=1e-12), eager=True
    )
    assert out.info.hparams_without_path == ()
    assert relative(out.grads, oracle().at(oracle().ihvp())) < 1e-8


# What the record says.

COUNTED = {
    "cg": li.CG(max_steps=4),
    "nystrom": li.Nystrom(sampling="uniform", rank=5, damping=1e-2, refine=2),
    "nystrom, streamed": li.Nystrom(sampling="uniform", rank=5, damping=1e-2, memory="streamed"),
    "nystrom-cg": li.NystromCG(sampling="uniform", rank=5, max_steps=2),
    "neumann": li.Neumann(num_terms=3),
    "exact": li.Exact(),
    "identity": li.Identity(),
    "callable": richardson,
}


@pytest.mark.parametrize("for_each", [False, True], ids=["no ridge", "one for each"])
@each("solver", COUNTED, quick=("cg", "nystrom"))
def test_num_products_is_what_the_hessian_was_asked_for(framework, monkeypatch, solver, for_each):
    made = framework.counted(monkeypatch)
    ridge = framework.array(spread()) if for_each else None
    out = Problem(framework).hypergradient(solver=solver, ridge=ridge, eager=True)
    (operator,) = made
    assert out.info.num_products == operator.count


def test_the_inner_gradient_is_zero_at_the_minimum(framework):
    out = framework.hypergradient(
        lambda w, h: array_namespace(w).sum((w - h) ** 2),
        lambda w, h: array_namespace(w).sum(w),
        framework.variables(np.ones(3)),
        framework.variables(1.0),
        solver=li.Identity(),
        eager=True,
    )
    assert float(out.info.inner_grad_norm) == 0


def saddle(framework: Any, solver: Any, lowest: float = -1.0, **options: Any) -> Any:
    """An inner loss with three curvatures, and an outer gradient along all of them."""
    curvatures = framework.array(np.asarray([2.0, 1.0, lowest]))
    slopes = framework.array(np.asarray([1.0, 1.0, 3.0]))
    xp = array_namespace(slopes)
    return framework.hypergradient(
        lambda w, h: 0.5 * xp.sum(curvatures * w**2) + xp.sum(h * w),
        lambda w, h: xp.sum(slopes * w),
        framework.variables(np.asarray([0.5, -1.0, 1.0])),
        framework.variables(np.ones(3)),
        solver=solver,
        rng=0,
        **options,
    )


CURVED = {
    "exact": li.Exact(),
    "cg": li.CG(),
    "nystrom-cg": li.NystromCG(sampling="uniform", rank=2),
    "nystrom-cg, column of it": li.NystromCG(indices=(2,)),
    "nystrom-cg, other column": li.NystromCG(indices=(0,)),
    "nystrom": li.Nystrom(sampling="uniform", rank=3, damping=0.1),
    "nystrom, other column": li.Nystrom(damping=0.1, indices=(0,)),
    "nystrom, streamed": li.Nystrom(sampling="uniform", rank=3, damping=0.1, memory="streamed"),
    "neumann": li.Neumann(),
    "identity": li.Identity(),
    "callable": lambda matvec, b: b,
}


@each("solver", CURVED, quick=("cg", "nystrom, streamed"))
def test_negative_curvature_is_reported_where_the_ridge_does_not_make_up_for_it(framework, solver):
    assert bool(saddle(framework, solver, eager=True).info.negative_curvature)
    assert not bool(saddle(framework, solver, 3.0, eager=True).info.negative_curvature)
    for ridge in (4.0, framework.array(np.full(3, 4.0))):
        out = saddle(framework, solver, ridge=ridge, eager=True)
        assert not bool(out.info.negative_curvature)
        if isinstance(solver, (li.Exact, li.CG, li.NystromCG)):
            np.testing.assert_allclose(flat(out.grads), [-1 / 6, -1 / 5, -1.0], rtol=1e-4)


def test_the_exact_inverse_of_an_indefinite_hessian_is_exact_all_the_same(framework):
    out = saddle(framework, li.Exact(), eager=True)
    np.testing.assert_allclose(flat(out.grads), [-0.5, -1.0, 3.0], rtol=1e-12)


RANKED = {
    "nystrom": (li.Nystrom(sampling="uniform", rank=3, damping=1e-2), 2),
    "streamed": (li.Nystrom(sampling="uniform", rank=3, damping=1e-2, memory="streamed"), 2),
    "exact": (li.Exact(), 2),
    "nystrom-cg": (li.NystromCG(sampling="uniform", rank=3, damping=0.1), 2),
    "cg": (li.CG(damping=0.1), None),
}


@each("case", RANKED, quick=("nystrom", "cg"))
def test_rank_is_the_number_of_columns_that_were_of_use(framework, case):
    solver, rank = case
    found = saddle(framework, solver, lowest=0.0, eager=True).info.rank
    assert found is rank is None or int(found) == rank


@each(
    "solver",
    {
        name: COUNTED.get(name, li.Nystrom(sampling="uniform", rank=5, damping=0.1))
        for name in ("exact", "cg", "nystrom", "nystrom-cg", "neumann")
    },
    quick=("cg", "nystrom"),
)
def test_an_outer_gradient_of_zero_leaves_the_direct_part(framework, solver):
    problem = Problem(framework)
    out = problem.hypergradient(
        outer=lambda p, h: (
            0 * problem.outer(p, h) + array_namespace(h["weights"]).sum(h["weights"] ** 2)
        ),
        solver=solver,
        eager=True,
    )
    np.testing.assert_allclose(flat(out.grads["weights"]), 2 * flat(problem.hparams["weights"]))
    assert float(out.grads["log_decay"]) == 0.0
    assert float(out.info.relative_residual) == 0.0
    assert not flat(out.ihvp).any()


# State, seeds and chunks.


@pytest.mark.parametrize("ridge", [None, 0.5, spread()], ids=["no ridge", "one number", "for each"])
@each(
    "solver", {"cg": li.CG(), "nystrom-cg": li.NystromCG(sampling="uniform", rank=5)}, quick=("cg",)
)
def test_a_warm_start_from_the_solution_takes_no_steps(framework, solver, ridge):
    problem = Problem(framework)
    options = {"solver": solver, "eager": True}
    options["ridge"] = framework.array(ridge) if isinstance(ridge, np.ndarray) else ridge
    cold = problem.hypergradient(**options)
    warm = problem.hypergradient(state=cold.state, **options)
    assert int(cold.solution.num_steps) > 2
    assert int(warm.solution.num_steps) == 0
    assert bool(warm.solution.converged)
    assert relative(warm.grads, cold.grads) < 1e-12


def test_a_warm_start_from_a_similar_problem_saves_steps(framework):
    problem = Problem(framework)
    before = problem.hypergradient(solver=li.CG(), eager=True)
    moved = mapped(lambda x: np.asarray(x) + 1e-4, numbers()["hparams"])
    options = {"solver": li.CG(), "hparams": framework.variables(moved), "eager": True}
    cold = problem.hypergradient(**options)
    warm = problem.hypergradient(state=before.state, **options)
    assert int(warm.solution.num_steps) <= int(cold.solution.num_steps) - 2
    assert int(warm.info.num_products) < int(cold.info.num_products)
    assert relative(warm.grads, cold.grads) < 1e-4


@each(
    "solver",
    {name: COUNTED[name] for name in ("exact", "nystrom", "neumann", "identity", "callable")},
    quick=("nystrom", "callable"),
)
def test_solvers_without_a_start_leave_the_state_alone(framework, solver):
    problem = Problem(framework)
    state = problem.hypergradient(solver=li.CG(), eager=True).state
    cold, warm = (
        problem.hypergradient(solver=solver, state=one, eager=True) for one in (None, state)
    )
    assert relative(warm.grads, cold.grads) < 1e-14
    assert warm.info.num_products == cold.info.num_products


def test_the_seed_draws_the_columns_that_numpy_draws(framework):
    problem = Problem(framework)

    def grads(rng: Any = 0, **settings: Any) -> np.ndarray:
        solver = li.Nystrom(damping=1e-2, sampling="uniform", **settings)
        return flat(problem.hypergradient(solver=solver, rng=rng, eager=True).grads)

    indices = np.random.default_rng(7).choice(N, 5, replace=False)
    wanted = grads(indices=tuple(indices))
    generator = np.random.default_rng(7)
    for rng in (7, generator):
        assert np.array_equal(grads(rng, rank=5), wanted)
    assert relative(grads(generator, rank=5), wanted) > 1e-3
    assert relative(grads(8, rank=5), wanted) > 1e-3
    assert np.array_equal(grads(8, indices=tuple(indices)), wanted)


def test_no_global_generator_of_numpy_is_read_or_moved(framework):
    problem = Problem(framework)

    def grads(rng: Any) -> np.ndarray:
        solver = li.Nystrom(sampling="uniform", rank=5, damping=1e-2)
        return flat(problem.hypergradient(solver=solver, rng=rng, eager=True).grads)

    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()  # noqa: NPY002
    grads(None)
    first = grads(0)
    after = np.random.get_state()  # noqa: NPY002
    assert np.array_equal(before[1], after[1])
    assert before[2] == after[2]
    np.random.seed(1)  # noqa: NPY002
    assert np.array_equal(grads(0), first)


@pytest.mark.parametrize("chunk_size", [2, 100])
def test_chunk_size_changes_how_many_products_are_taken_at_once_and_not_the_answer(
    framework, chunk_size
):
    problem = Problem(framework)
    solver = li.Nystrom(sampling="uniform", rank=9, damping=0.3)
    wanted, out = (problem.hypergradient(solver=solver, chunk_size=c) for c in (1, chunk_size))
    assert relative(out.grads, wanted.grads) < 1e-12
    assert out.info.num_products == wanted.info.num_products


# Errors.


def of_hparams(problem: Problem, p: Any, h: Any) -> Any:
    return array_namespace(h["weights"]).sum(h["weights"] ** 2)


def of_params(problem: Problem, p: Any, h: Any) -> Any:
    return array_namespace(p["out"][1]).mean(forward(p, problem.outer_args[0]) ** 2)


def root_of(loss: Any) -> Any:
    return lambda problem, p, h: (-1 - getattr(problem, loss)(p, h)) ** 0.5


SCALAR = r" must (be|return) a scalar; got shape \(6,\)"
LOSSES: dict[str, tuple[dict[str, Any], str]] = {
    "inner a vector": ({"inner": lambda q, p, h: h["weights"]}, "`inner_loss`" + SCALAR),
    "outer a vector": ({"outer": lambda q, p, h: h["weights"]}, "`outer_loss`" + SCALAR),
    "inner NaN": ({"inner": root_of("inner")}, "must be finite"),
    "outer NaN": ({"outer": root_of("outer")}, "must be finite"),
    "gradient NaN": (
        {"outer": lambda q, p, h: array_namespace(h["weights"]).sum((0 * p["out"][1]) ** 2) ** 0.5},
        "`gradient of the outer loss` must be finite",
    ),
    "hparams that reach nothing": (
        {"inner": of_params, "outer": of_params},
        "`hparams` must reach one of the losses; .*log_decay.*weights",
    ),
    "inner without params": ({"inner": of_hparams}, "`inner_loss` must depend on `params`"),
    "outer without params": ({"outer": of_hparams}, "`outer_loss` must depend on `params`"),
}


@pytest.mark.parametrize(("losses", "message"), LOSSES.values(), ids=LOSSES)
def test_losses_that_have_no_hypergradient_are_refused_by_name(framework, losses, message):
    problem = Problem(framework)
    options = {name: lambda p, h, f=f: f(problem, p, h) for name, f in losses.items()}
    with pytest.raises(ValueError, match=message):
        problem.hypergradient(solver=li.CG(), eager=True, **options)


def solution(n: int, value: float = 0.0) -> Any:
    def make(array: Any) -> li.Solution:
        zero = array(np.asarray(0))
        return li.Solution(array(np.full(n, value)), zero, zero, 0, zero, zero)

    return make


BAD: dict[str, tuple[dict[str, Any], Any, str]] = {
    "solver a number": ({"solver": 3}, TypeError, "`solver` must be settings.*got builtins.int"),
    "solver a class": ({"solver": li.CG}, TypeError, "`solver` must be settings"),
    "solver a name": ({"solver": "cg"}, TypeError, "`solver` must be settings"),
    "solver of another shape": (
        {"solver": lambda matvec, b: b[:2]},
        ValueError,
        r"`solver` must return an array of the shape of b, \(14,\); got .*\(2,\)",
    ),
    "index above n": (
        {"solver": li.Nystrom(indices=(0, N), damping=1e-2)},
        ValueError,
        "`indices` must lie in 0",
    ),
    "a diagonal that is not known": (
        {"solver": li.Nystrom(rank=3, sampling="diagonal", damping=1e-2)},
        TypeError,
        "has no diagonal. Sample columns uniformly",
    ),
    "ridge negative": ({"ridge": -1.0}, ValueError, "`ridge` must be finite and >= 0"),
    "ridge NaN": ({"ridge": math.nan}, ValueError, "`ridge` must be finite"),
    "ridge negative somewhere": (
        {"ridge": np.linspace(-1, 1, N)},
        ValueError,
        "`ridge` must be >= 0 everywhere; it holds negative entries",
    ),
    "ridge infinite somewhere": (
        {"ridge": np.full(N, math.inf)},
        ValueError,
        "`ridge` must be finite",
    ),
    "ridge too short": ({"ridge": np.ones(N - 1)}, ValueError, "`ridge` must have"),
    "ridge of another structure": (
        {"ridge": {"hidden": np.ones(2)}},
        ValueError,
        "`ridge` must have the structure of the parameters",
    ),
    "ridge no number": (
        {"ridge": "strong"},
        (TypeError, ValueError),
        "`ridge` must|could not convert string",
    ),
    "ridge zero where Nyström must divide by it": (
        {"ridge": np.arange(N) * 1.0, "solver": li.NystromCG(sampling="uniform", rank=3)},
        ValueError,
        "`ridge` plus the damping of the solver must be > 0 everywhere",
    ),
    "state of another shape": ({"state": solution(N - 1)}, ValueError, r"`state`.*\(14,\).*\(13,"),
    "state of another shape, with a ridge for each": (
        {
            "state": solution(N - 1),
            "solver": li.NystromCG(sampling="uniform", rank=3),
            "ridge": np.ones(N),
        },
        ValueError,
        r"`state`.*\(14,\).*\(13,\)",
    ),
    "state NaN": ({"state": solution(N, math.nan)}, ValueError, "`state`.*finite"),
    "state a number": ({"state": 3}, TypeError, "`state` must be "),
    "chunk size zero": ({"chunk_size": 0}, ValueError, "`chunk_size` must be at least 1; got 0"),
}


@pytest.mark.parametrize(("options", "kind", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_by_name(framework, options, kind, message):
    options = {"solver": li.CG(), "eager": True, **options}
    if isinstance(options.get("ridge"), (np.ndarray, dict)):
        options["ridge"] = mapped(framework.array, options["ridge"])
    if callable(options.get("state")):
        options["state"] = options["state"](framework.array)
    with pytest.raises(kind, match=message):
        Problem(framework).hypergradient(**options)
