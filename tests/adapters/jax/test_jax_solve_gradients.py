"""Derivatives of solutions in jax, against those of the dense formula."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import lowrank_inverse as li

jax = pytest.importorskip("jax")

import jax.numpy as jnp

pytestmark = pytest.mark.usefixtures("wide")

N = 4
SOLVERS: dict[str, Callable[[Any], Any]] = {
    "CG": lambda d: li.CG(damping=d, rtol=1e-14),
    "NystromCG": lambda d: li.NystromCG(rank=2, damping=d, rtol=1e-14),
    "Nystrom": lambda d: li.Nystrom(rank=N, damping=d, sampling="uniform"),
    "Exact": lambda d: li.Exact(damping=d),
    "Neumann": lambda d: li.Neumann(damping=d, num_terms=300, rtol=1e-14),
}
SLOW = [name if name == "Exact" else pytest.param(name, marks=pytest.mark.slow) for name in SOLVERS]


def system() -> tuple[jax.Array, jax.Array, jax.Array]:
    """A matrix that is symmetric in its entries alone, a right-hand side and a damping."""
    rng = np.random.default_rng(0)
    B = rng.standard_normal((N, N))
    return (
        jnp.asarray(B @ B.T / N + np.eye(N) / 2),
        jnp.asarray(rng.standard_normal(N)),
        jnp.asarray(0.3),
    )


def points() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Points of which two are equal, lengthscales, a right-hand side and a damping."""
    rng = np.random.default_rng(0)
    X = rng.standard_normal((N, 2))
    X[1] = X[0]
    b = jnp.asarray(rng.standard_normal(N))
    return jnp.asarray(X), jnp.asarray([0.9, 1.3]), b, jnp.asarray(0.3)


def dense(B: jax.Array, b: jax.Array, damping: jax.Array) -> jax.Array:
    return jnp.linalg.solve((B + B.T) / 2 + damping * jnp.eye(N), b)


def dense_kernel(X: jax.Array, lengthscale: jax.Array, b: jax.Array, d: jax.Array) -> jax.Array:
    squares = (((X[:, None] - X[None]) / lengthscale) ** 2).sum(-1)
    return dense(jnp.exp(-squares / 2), b, d)


def solution(name: str) -> Callable[..., jax.Array]:
    def solve(B: jax.Array, b: jax.Array, damping: jax.Array) -> jax.Array:
        return li.solve((B + B.T) / 2, b, solver=SOLVERS[name](damping)).value

    return solve


def kernel_solution(name: str, chunk_size: int = 3) -> Callable[..., jax.Array]:
    def solve(X: jax.Array, lengthscale: jax.Array, b: jax.Array, d: jax.Array) -> jax.Array:
        A = li.KernelOperator(X, lengthscale=lengthscale, chunk_size=chunk_size)
        return li.solve(A, b, solver=SOLVERS[name](d)).value

    return solve


def weighted(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda *args: jnp.arange(1.0, N + 1) @ f(*args)


def all_derivatives(f: Callable[..., jax.Array], args: Any) -> Any:
    """First derivatives, and second ones along directions, in reverse and forward mode."""
    by = tuple(range(len(args)))

    def along(*args: Any) -> Any:
        first = jax.grad(weighted(f), argnums=by)(*args)
        return sum((g * jnp.cos(jnp.arange(g.size).reshape(g.shape))).sum() for g in first), first

    def both(*args: Any) -> Any:
        _, moved = jax.jvp(weighted(f), args, jax.tree.map(jnp.cos, args))
        return moved, jax.grad(along, argnums=by, has_aux=True)(*args)

    return jax.jit(both)(*args)


def close(found: Any, expected: Any, rtol: float = 1e-9) -> None:
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", SLOW)
def test_both_derivatives_are_those_of_the_dense_formula(name):
    close(all_derivatives(solution(name), system()), all_derivatives(dense, system()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CG", "Nystrom", "Exact"])
def test_both_derivatives_by_a_kernel_are_those_of_the_dense_formula(name):
    found = all_derivatives(kernel_solution(name), points())
    close(found, all_derivatives(dense_kernel, points()))


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLVERS)
def test_eager_and_batched_derivatives_are_those_of_the_dense_formula(name):
    B, b, damping = system()

    def run(f: Any) -> Any:
        by_damping = jax.grad(weighted(f), argnums=2)
        several = jax.vmap(by_damping, in_axes=(None, None, 0))(B, b, jnp.asarray([0.1, 0.4]))
        return by_damping(B, b, damping), several, jax.jacfwd(f, argnums=1)(B, b, damping)

    close(run(solution(name)), run(dense))


def test_the_gradient_of_conjugate_gradients_is_that_of_the_solution():
    B, b, _ = system()
    A = (B + B.T) / 2

    def value(t: jax.Array, b: jax.Array) -> jax.Array:
        return li.solve(t * A, b, solver=li.CG(rtol=1e-14)).value.sum()

    found = jax.jit(jax.grad(value, argnums=(0, 1)))(1.0, b)
    expected = jax.grad(lambda t, b: jnp.linalg.solve(t * A, b).sum(), argnums=(0, 1))(1.0, b)
    close(found, expected)


def test_every_eigenvalue_may_be_equal_and_the_host_still_decides():
    b = jnp.arange(1.0, N + 1)
    seen: list[Any] = []

    def value(t: jax.Array) -> jax.Array:
        found = li.solve(t * 2 * jnp.eye(N), b)
        seen.append(found)
        return found.value.sum()

    assert jax.grad(value)(1.0) == pytest.approx(-float(b.sum()) / 2, rel=1e-12)
    assert seen[0].method.startswith("Exact: n = 4 is small")
    assert seen[0].num_products == N + 1


@pytest.mark.slow
def test_a_scan_and_what_a_function_reads_are_differentiated():
    B, b, _ = system()
    A = (B + B.T) / 2

    def chain(t: jax.Array, solve: Any) -> jax.Array:
        return jax.lax.scan(lambda x, s: (solve(s * t, x), None), b, jnp.asarray([1.0, 2.0]))[
            0
        ].sum()

    def by_function(t: jax.Array, b: jax.Array) -> jax.Array:
        operator = li.FunctionOperator(lambda v: t * (A @ v) + v, N, like=b)
        return li.solve(operator, b, solver=li.CG(rtol=1e-14)).value

    found = jax.grad(lambda t: chain(t, by_function))(1.5)
    expected = jax.grad(lambda t: chain(t, lambda t, b: jnp.linalg.solve(t * A + jnp.eye(N), b)))(
        1.5
    )
    close(found, expected)
    # Where nothing but the function knows of the trace:
    close(
        jax.grad(lambda t: by_function(t, b).sum())(1.5),
        jax.grad(lambda t: jnp.linalg.solve(t * A + jnp.eye(N), b).sum())(1.5),
    )


@pytest.mark.slow
def test_a_start_serves_the_first_solve_alone():
    B, b, damping = system()
    A, exact = (B + B.T) / 2, dense(*system())

    def value(b: jax.Array) -> Any:
        found = li.cg(A, b, damping=damping, x0=exact, rtol=1e-13)
        return found.value.sum(), found.num_steps

    found, steps = jax.jit(jax.grad(value, has_aux=True))(b)
    assert steps == 0
    close(found, dense(B, jnp.ones(N), damping))


@pytest.mark.slow
def test_an_approximate_inverse_stands_for_the_inverse_in_both_places():
    B, b, damping = system()
    A, g = (B + B.T) / 2, jnp.cos(jnp.arange(N))
    solver = li.Nystrom(rank=2, damping=damping)
    S = solver.prepare(A) @ jnp.eye(N)
    found = jax.grad(lambda A, b: g @ (solver.prepare(A) @ b), argnums=(0, 1))(A, b)
    close(found, (-jnp.outer(S @ g, S @ b), S @ g))


def test_what_else_a_solution_has_is_constant():
    A, b = jnp.eye(N) * 2, jnp.ones(N)
    found = jax.grad(lambda b: li.solve(A, b, solver=li.Exact()).residual_norm)(b)
    assert not found.any()
