"""The solvers inside jaxopt, lineax and optimistix."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

import lowrank_inverse as li

jax = pytest.importorskip("jax")

import jax.numpy as jnp

from lowrank_inverse_jax import as_lineax, as_solve
from tests.adapters.jax.jax_oracle import relative

pytestmark = pytest.mark.usefixtures("wide")

NUM_ROWS, N = 6, 4


@pytest.fixture
def jaxopt() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "JAXopt is no longer maintained", DeprecationWarning)
        return pytest.importorskip("jaxopt")


@pytest.fixture
def lineax() -> Any:
    return pytest.importorskip("lineax")


def matrix(seed: int = 0) -> np.ndarray:
    X = np.random.default_rng(seed).standard_normal((NUM_ROWS, N))
    return X.T @ X + 0.5 * np.eye(N)


def target() -> np.ndarray:
    return np.random.default_rng(1).standard_normal(N)


# A ridge regression and the derivative of its solution.


def loss(params: Any, log_decay: Any) -> Any:
    """A quadratic with a decay for each coefficient, of parameters in two leaves."""
    x = jnp.concatenate([params["a"], params["b"].reshape(-1)])
    return 0.5 * x @ (matrix() @ x) - target() @ x + 0.5 * jnp.sum(jnp.exp(log_decay) * x**2)


def system(log_decay: Any) -> np.ndarray:
    return matrix() + np.diag(np.exp(np.asarray(log_decay)))


def minimiser(log_decay: Any) -> Any:
    x = jnp.linalg.solve(matrix() + jnp.diag(jnp.exp(log_decay)), target())
    return {"a": x[:1], "b": x[1:].reshape(1, 3)}


def point() -> Any:
    return jnp.linspace(-0.5, 0.5, N)


def jacobian(damping: float = 0.0) -> np.ndarray:
    """The derivative of the minimiser, with a damping in the inverse."""
    x = np.linalg.solve(system(point()), target())
    damped = system(point()) + damping * np.eye(N)
    return -np.linalg.solve(damped, np.diag(np.exp(np.asarray(point())) * x))


def value(params: Any) -> Any:
    return jnp.sum(params["a"] ** 3) + jnp.sum(params["b"] ** 2)


def gradient(damping: float = 0.0) -> np.ndarray:
    """The derivative of `value` at the minimiser."""
    x = np.linalg.solve(system(point()), target())
    return np.append(3 * x[:1] ** 2, 2 * x[1:]) @ jacobian(damping)


SOLVERS = {
    "cg": (li.CG(rtol=1e-13), 0.0),
    "nystrom-cg": (li.NystromCG(rank=2, rtol=1e-13, damping=0.2), 0.2),
    "nystrom": (li.Nystrom(rank=N, damping=0.2), 0.2),
    "exact": (li.Exact(), 0.0),
    "callable": (lambda A, b: jax.scipy.sparse.linalg.cg(A, b, tol=1e-13)[0], 0.0),
}

each_solver = pytest.mark.parametrize(
    ("solver", "damping"),
    [
        pytest.param(*case, id=name, marks=[] if name in ("cg", "nystrom") else [pytest.mark.slow])
        for name, case in SOLVERS.items()
    ],
)


# jaxopt.


@pytest.mark.parametrize("sign", [1, None])
@each_solver
def test_in_custom_root_of_a_gradient_both_modes_are_those_of_the_theorem(
    jaxopt, solver, damping, sign
):
    solve = as_solve(solver, rng=0, sign=sign)
    fit = jaxopt.implicit_diff.custom_root(jax.grad(loss), solve=solve)(
        lambda init, log_decay: minimiser(log_decay)
    )
    found = jax.jit(jax.grad(lambda h: value(fit(None, h))))(point())
    assert relative(found, gradient(damping)) < 1e-9


@pytest.mark.parametrize("sign", [-1, None])
@each_solver
def test_in_custom_fixed_point_of_a_gradient_step_the_sign_is_minded(jaxopt, solver, damping, sign):
    step = 0.05

    def descend(params: Any, log_decay: Any) -> Any:
        gradients = jax.grad(loss)(params, log_decay)
        return jax.tree_util.tree_map(lambda p, g: p - step * g, params, gradients)

    solve = as_solve(solver, rng=0, sign=sign)
    fit = jaxopt.implicit_diff.custom_fixed_point(descend, solve=solve)(
        lambda init, log_decay: minimiser(log_decay)
    )
    found = jax.jit(jax.grad(lambda h: value(fit(None, h))))(point())
    assert relative(found, gradient(damping / step)) < 1e-9  # the matrix is step times the Hessian


@pytest.mark.slow
def test_jaxopt_solvers_take_it_too(jaxopt):
    descent = jaxopt.GradientDescent(
        loss, maxiter=2000, tol=1e-12, implicit_diff_solve=as_solve(li.CG(rtol=1e-12))
    )
    start = {"a": jnp.zeros(1), "b": jnp.zeros((1, 3))}
    found = jax.grad(lambda h: value(descent.run(start, h).params))(point())
    assert relative(found, gradient()) < 1e-6


# as_solve by itself.


def test_as_solve_may_be_mapped_over_matrices_of_either_sign():
    solve = as_solve(li.CG(rtol=1e-13))
    signs, b = jnp.asarray([1.0, -2.0]), jnp.arange(1.0, 5.0)
    A = jnp.asarray(matrix())
    found = jax.jit(jax.vmap(lambda s, b: solve(lambda x: s * (A @ x), b), (0, None)))(signs, b)
    wanted = np.linalg.solve(matrix(), np.asarray(b))
    assert relative(found, np.stack([wanted, -wanted / 2])) < 1e-9


# lineax.


def tagged(lineax: Any, sign: int, A: Any = None) -> Any:
    tag = lineax.positive_semidefinite_tag if sign == 1 else lineax.negative_semidefinite_tag
    return lineax.MatrixLinearOperator(sign * jnp.asarray(matrix() if A is None else A), tag)


@each_solver
@pytest.mark.parametrize("sign", [1, -1], ids=["positive", "negative"])
def test_as_lineax_solves_semidefinite_operators_of_either_sign(lineax, solver, damping, sign):
    b = jnp.arange(1.0, 5.0)
    found = lineax.linear_solve(tagged(lineax, sign), b, as_lineax(solver, rng=0))
    wanted = np.linalg.solve(sign * (matrix() + damping * np.eye(N)), np.asarray(b))
    assert relative(found.value, wanted) < 1e-9
    assert found.result == lineax.RESULTS.successful


@pytest.mark.parametrize(
    "sign",
    [pytest.param(1, marks=pytest.mark.slow, id="positive"), pytest.param(-1, id="negative")],
)
def test_linear_solves_are_differentiated_and_mapped_over(lineax, sign):
    solver = as_lineax(li.NystromCG(rank=2, rtol=1e-13), rng=0)
    b = jnp.arange(1.0, 5.0)

    def run(A: Any, b: Any) -> Any:
        return cubes(lineax.linear_solve(tagged(lineax, sign, A), b, solver).value)

    def cubes(x: Any) -> Any:
        return jnp.sum(x**3)

    A = jnp.asarray(matrix())
    grads, mapped, forward = jax.jit(
        lambda A, b: (
            jax.grad(run, argnums=(0, 1))(A, b),
            jax.vmap(run, (None, 0))(A, jnp.stack([b, 2 * b])),
            jax.jvp(lambda b: run(A, b), (b,), (b,))[1],
        )
    )(A, b)
    x = sign * np.linalg.solve(matrix(), np.asarray(b))
    by_b = sign * np.linalg.solve(matrix(), 3 * x**2)
    assert relative(grads[1], by_b) < 1e-9
    assert relative(grads[0], -sign * np.outer(by_b, x)) < 1e-9
    assert relative(mapped, np.sum(x**3) * np.asarray([1.0, 8.0])) < 1e-9
    assert float(forward) == pytest.approx(by_b @ np.asarray(b))


def test_function_operators_on_pytrees_are_solved(lineax):
    structure = {
        "a": jax.ShapeDtypeStruct((1,), jnp.float64),
        "b": jax.ShapeDtypeStruct((3,), jnp.float64),
    }

    def multiply(x: Any) -> Any:
        product = matrix() @ jnp.concatenate([x["a"], x["b"]])
        return {"a": product[:1], "b": product[1:]}

    operator = lineax.FunctionLinearOperator(multiply, structure, lineax.positive_semidefinite_tag)
    b = {"a": jnp.asarray([1.0]), "b": jnp.asarray([2.0, 3.0, 4.0])}
    found = lineax.linear_solve(operator, b, as_lineax(li.CG(rtol=1e-13))).value
    assert found["b"].shape == (3,)
    assert relative(found, np.linalg.solve(matrix(), [1.0, 2.0, 3.0, 4.0])) < 1e-11


def test_the_statistics_say_what_a_solve_cost_and_how_it_ended(lineax):
    b = jnp.arange(1.0, 5.0)
    for solver, products in (
        (li.CG(), None),
        (li.Nystrom(rank=3, damping=0.1, sampling="uniform"), 3 + 1),
    ):
        stats = lineax.linear_solve(tagged(lineax, 1), b, as_lineax(solver, rng=0)).stats
        wanted = li.solve(matrix(), np.asarray(b), solver=solver, rng=0)
        assert int(stats["num_products"]) == wanted.num_products
        assert products is None or wanted.num_products == products
        assert int(stats["num_steps"]) == int(wanted.num_steps)
        assert int(stats["reason"]) == int(wanted.reason)
        assert float(stats["residual_norm"]) == pytest.approx(
            float(wanted.residual_norm), rel=1e-6, abs=1e-12
        )


def test_solvers_that_end_as_their_settings_say_succeed(lineax):
    b = jnp.arange(1.0, 5.0)
    for solver in (li.CG(max_steps=1), li.Neumann(num_terms=2), li.Nystrom(rank=1, damping=0.1)):
        found = lineax.linear_solve(tagged(lineax, 1), b, as_lineax(solver, rng=0))
        assert found.result == lineax.RESULTS.successful
        assert float(found.stats["residual_norm"]) > 1e-3


def test_negative_curvature_is_a_breakdown(lineax):
    operator = tagged(lineax, 1, np.diag([1.0, -1.0, 2.0, 3.0]))
    solver = as_lineax(li.CG())
    found = lineax.linear_solve(operator, jnp.ones(N), solver, throw=False)
    assert found.result == lineax.RESULTS.breakdown
    assert int(found.stats["reason"]) == li.Reason.NEGATIVE_CURVATURE
    with pytest.raises(RuntimeError, match="breakdown"):
        lineax.linear_solve(operator, jnp.ones(N), solver).value.block_until_ready()


def test_an_unreachable_tolerance_is_a_stagnation(lineax):
    found = lineax.linear_solve(
        tagged(lineax, 1, np.diag([1.0, 1e-14, 2.0, 3.0])),
        jnp.ones(N),
        as_lineax(li.CG(rtol=0.0)),
        throw=False,
    )
    assert int(found.stats["reason"]) == li.Reason.STAGNATED
    assert found.result == lineax.RESULTS.stagnation


@pytest.mark.parametrize("tag", ["none", "symmetric_tag"])
def test_operators_without_a_tag_of_their_sign_are_refused(lineax, tag):
    tags = () if tag == "none" else (getattr(lineax, tag),)
    operator = lineax.MatrixLinearOperator(jnp.asarray(matrix()), tags)
    with pytest.raises(ValueError, match=r"positive_semidefinite_tag or lineax\.negative"):
        lineax.linear_solve(operator, jnp.ones(N), as_lineax(li.CG()))


# optimistix.


@pytest.mark.parametrize(
    ("solver", "damping"),
    [
        (li.CG(rtol=1e-13), 0.0),
        pytest.param(li.NystromCG(rank=2, rtol=1e-13, damping=0.2), 0.2, marks=pytest.mark.slow),
    ],
    ids=["cg", "nystrom-cg"],
)
def test_gradients_of_an_optimistix_minimiser_go_through(lineax, solver, damping):
    optimistix = pytest.importorskip("optimistix")
    start = {"a": jnp.zeros(1), "b": jnp.zeros((1, 3))}

    def run(log_decay: Any) -> Any:
        solution = optimistix.minimise(
            loss,
            optimistix.BFGS(rtol=1e-10, atol=1e-10),
            start,
            args=log_decay,
            adjoint=optimistix.ImplicitAdjoint(linear_solver=as_lineax(solver, rng=0)),
            tags=frozenset({lineax.positive_semidefinite_tag}),
        )
        return value(solution.value)

    assert relative(jax.jit(jax.grad(run))(point()), gradient(damping)) < 1e-7


def test_gradients_of_an_optimistix_root_go_through(lineax):
    optimistix = pytest.importorskip("optimistix")
    start = {"a": jnp.zeros(1), "b": jnp.zeros((1, 3))}

    def run(log_decay: Any) -> Any:
        solution = optimistix.root_find(
            jax.grad(loss),
            optimistix.Newton(rtol=1e-10, atol=1e-10),
            start,
            args=log_decay,
            adjoint=optimistix.ImplicitAdjoint(linear_solver=as_lineax(li.CG(rtol=1e-13))),
            tags=frozenset({lineax.positive_semidefinite_tag}),
        )
        return value(solution.value)

    assert relative(jax.jit(jax.grad(run))(point()), gradient()) < 1e-9


def test_as_lineax_refuses_what_is_no_solver():
    with pytest.raises(TypeError, match="`solver` must be settings"):
        as_lineax("cg")


def test_a_matrix_that_is_not_symmetric_is_warned_of_unless_jax_traces():
    A, b = jnp.array([[2.0, 1.0], [-1.0, 2.0]]), jnp.ones(2)
    with pytest.warns(RuntimeWarning, match="`matvec` is not symmetric"):
        as_solve(li.CG())(lambda v: A @ v, b)
    jax.jit(lambda b: as_solve(li.CG())(lambda v: A @ v, b))(b)
