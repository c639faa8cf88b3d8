"""The transformations of jax: compiled equals eager, and mapped equals one by one."""

from __future__ import annotations

import numpy as np
import pytest

import lowrank_inverse as li
from lowrank_inverse import Reason
from tests.conftest import host, open_backend
from tests.oracles import damped_solve, relative_error
from tests.problems import RANK, WIDTH, conditioned, indices, matrix, rhs

jax = pytest.importorskip("jax")

K = indices()


def by_cg(A, b, damping):
    return li.cg(A, b, damping=damping, block_size=1)


def by_neumann(A, b, damping):
    return li.neumann(A, b, damping=damping)


def by_nystrom(A, b, damping):
    return li.solve(A, b, solver=li.Nystrom(damping=damping, indices=K))


def by_nystrom_with_a_seed(A, b, damping):
    solver = li.Nystrom(rank=RANK, damping=damping, sampling="uniform")  # "auto" sees tracing
    return li.solve(A, b, solver=solver, rng=3)


def by_refined_nystrom(A, b, damping):
    return li.solve(A, b, solver=li.Nystrom(damping=damping, indices=K, refine=2), certify=True)


def by_streamed_nystrom(A, b, damping):
    solver = li.Nystrom(damping=damping, indices=K, memory="streamed", chunk_size=4)
    return li.solve(A, b, solver=solver, certify=True)


def by_nystrom_cg(A, b, damping):
    return li.solve(A, b, solver=li.NystromCG(damping=damping, indices=K), certify=True)


def by_exact(A, b, damping):
    return li.solve(A, b, solver=li.Exact(damping=damping))


slow = pytest.mark.slow
SOLVERS = [
    by_cg,
    pytest.param(by_nystrom_cg, marks=slow),
    pytest.param(by_neumann, marks=slow),
    pytest.param(by_streamed_nystrom, marks=slow),
    pytest.param(by_nystrom, marks=slow),
    pytest.param(by_nystrom_with_a_seed, marks=slow),
    pytest.param(by_refined_nystrom, marks=slow),
    pytest.param(by_exact, marks=slow),
]
every_solver = pytest.mark.parametrize("function", SOLVERS)


@every_solver
def test_compiled_solutions_equal_eager_ones_in_every_field(function):
    with open_backend("jax", "float64") as backend:
        arguments = [backend.asarray(x) for x in (conditioned(10), rhs(width=WIDTH), 0.25)]
        eager, compiled = host(function(*arguments)), host(jax.jit(function)(*arguments))
    assert relative_error(compiled.value, eager.value) < 1e-12
    np.testing.assert_array_equal(compiled.num_steps, eager.num_steps)
    np.testing.assert_array_equal(compiled.reason, eager.reason)
    np.testing.assert_array_equal(compiled.converged, eager.converged)
    assert compiled.num_products == eager.num_products
    assert compiled.value.dtype == eager.value.dtype == np.float64
    if eager.error_bound is not None:
        np.testing.assert_allclose(compiled.error_bound, eager.error_bound, rtol=0.1)


@pytest.mark.parametrize(
    "function", [by_cg, pytest.param(by_neumann, marks=slow), pytest.param(by_nystrom, marks=slow)]
)
def test_right_hand_sides_may_be_mapped_over(function):
    A, B = conditioned(10), rhs(width=WIDTH)
    with open_backend("jax", "float64") as backend:
        mapped = host(
            jax.jit(jax.vmap(function, in_axes=(None, 1, None)))(
                backend.asarray(A), backend.asarray(B), backend.asarray(0.25)
            )
        )
    together = function(A, B, 0.25)  # by NumPy
    assert relative_error(mapped.value.T, together.value) < 1e-11
    np.testing.assert_array_equal(mapped.num_steps, together.num_steps)
    np.testing.assert_array_equal(mapped.reason, together.reason)


@pytest.mark.parametrize(
    "function", [by_cg, pytest.param(by_neumann, marks=slow), pytest.param(by_nystrom, marks=slow)]
)
def test_matrices_and_dampings_may_be_mapped_over(function):
    stack = np.stack([conditioned(10, seed=seed) for seed in range(WIDTH)])
    dampings = np.array([0.1, 0.2, 0.4])
    with open_backend("jax", "float64") as backend:
        arguments = [backend.asarray(x) for x in (stack, rhs(width=WIDTH).T, dampings)]
        mapped = host(jax.jit(jax.vmap(function))(*arguments))
    for j in range(WIDTH):
        alone = function(stack[j], rhs(width=WIDTH)[:, j], dampings[j])  # by NumPy
        assert relative_error(mapped.value[j], alone.value) < 1e-11
        assert mapped.num_steps[j] == alone.num_steps


def approximate(A, block, damping):
    approx = li.nystrom(A, indices=K)
    inverse = approx.inverse(damping)
    parts = (approx.rank, approx.num_dropped, approx.num_negative, approx.eigenvalues)
    return inverse @ block, approx.logdet(damping), *parts


@pytest.mark.slow
@pytest.mark.parametrize("name", ["polynomial", "rank one", "half"])
def test_a_compiled_approximation_equals_the_eager_one(jax_backend, name):
    arguments = [jax_backend.asarray(x) for x in (matrix(name), rhs(width=WIDTH), 0.25)]
    eager, compiled = host(approximate(*arguments)), host(jax.jit(approximate)(*arguments))
    assert relative_error(compiled[0], eager[0]) < 1e3 * jax_backend.eps
    for one, other in zip(compiled[1:], eager[1:], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e3 * jax_backend.eps)


def test_approximations_may_be_mapped_over_matrices(jax_backend):
    names = ["polynomial", "linear", "rank one"]
    stack = jax_backend.asarray(np.stack([matrix(name) for name in names]))
    b, damping = jax_backend.asarray(rhs(width=WIDTH)), jax_backend.asarray(0.25)
    compiled = jax.jit(approximate)
    mapped = host(jax.jit(jax.vmap(approximate, in_axes=(0, None, None)))(stack, b, damping))
    for j in range(len(names)):
        alone = host(compiled(stack[j], b, damping))
        for one, other in zip(mapped, alone, strict=True):
            np.testing.assert_allclose(one[j], other, rtol=1e-4, atol=1e3 * jax_backend.eps)


def test_indices_may_be_traced():
    def solve(A, b, chosen):
        return li.solve(A, b, solver=li.NystromCG(damping=0.25, indices=chosen))

    A, b = matrix("polynomial"), rhs(width=WIDTH)
    with open_backend("jax", "float64") as backend:
        found = host(jax.jit(solve)(backend.asarray(A), backend.asarray(b), backend.asarray(K)))
    expected = solve(A, b, K)  # by NumPy
    assert relative_error(found.value, expected.value) < 1e-11
    np.testing.assert_array_equal(found.num_steps, expected.num_steps)


@every_solver
@pytest.mark.parametrize("constant", ["A", pytest.param("b", marks=slow)])
def test_a_matrix_or_right_hand_side_may_be_a_constant_of_the_compiled_function(function, constant):
    with open_backend("jax", "float32") as backend:
        A, b, damping = (backend.asarray(x) for x in (conditioned(10), rhs(width=WIDTH), 0.25))
        if constant == "A":
            found = jax.jit(lambda b: function(A, b, damping))(b)
        else:
            found = jax.jit(lambda A: function(A, b, damping))(A)
    expected = function(conditioned(10), rhs(width=WIDTH), 0.25)  # by NumPy
    assert relative_error(host(found.value), expected.value) < 1e-3


@pytest.mark.parametrize(
    "function",
    [by_nystrom_cg, pytest.param(by_cg, marks=slow), pytest.param(by_neumann, marks=slow)],
)
def test_float32_works_beside_64_bit_types(function):
    with open_backend("jax", "float32", wide=True) as backend:
        arguments = [backend.asarray(x) for x in (conditioned(10), rhs(width=WIDTH), 0.25)]
        solution = host(jax.jit(function)(*arguments))
        assert solution.value.dtype == solution.residual_norm.dtype == np.float32
        exact = damped_solve(backend.seen(conditioned(10)), 0.25, rhs(width=WIDTH))
        assert relative_error(solution.value, exact) < (0.1 if function is by_neumann else 1e-4)


def test_64_bit_types_are_left_as_they_were():
    before = jax.config.jax_enable_x64
    with open_backend("jax", "float64"):
        assert jax.config.jax_enable_x64
    assert jax.config.jax_enable_x64 == before


def test_values_that_tracing_hides_are_flags_of_the_result(jax_backend):
    """What is an error for known values: NaN in A and b, here one at a time."""
    for function in (by_cg, by_nystrom_cg, by_nystrom):
        compiled = jax.jit(function)
        for where in ("A", "b"):
            A, B = conditioned(10), rhs(width=WIDTH)
            (A if where == "A" else B)[3, 1] = np.nan
            A[1, 3] = A[3, 1]
            solution = host(compiled(*(jax_backend.asarray(x) for x in (A, B, 0.25))))
            assert not solution.converged[1]
            assert solution.reason[1] == Reason.NONFINITE


def test_the_message_of_a_traced_solution_says_that_it_is_traced():
    messages = []

    def solve(A, b):
        solution = li.cg(A, b)
        messages.append(solution.message)
        return solution.value

    jax.jit(solve)(jax.numpy.eye(3), jax.numpy.ones(3))
    assert messages == ["unknown while tracing"]


def test_one_compiled_function_serves_every_damping_and_right_hand_side(jax_backend):
    traces = []

    def solve(A, b, damping):
        traces.append(None)
        return li.cg(A, b, damping=damping).value

    compiled = jax.jit(solve)
    for seed, damping in ((1, 0.1), (2, 1.0), (3, 10.0)):
        A, b = conditioned(10), rhs(seed=seed)
        found = compiled(*(jax_backend.asarray(x) for x in (A, b, damping)))
        assert relative_error(host(found), damped_solve(A, damping, b)) < 1e-3
    assert len(traces) == 1


@pytest.mark.slow
def test_one_column_of_a_matrix_of_one_row_is_no_special_case(jax_backend):
    A, b = jax_backend.asarray(np.array([[4.0]])), jax_backend.asarray(np.array([2.0]))
    for function in (by_cg, by_exact):
        assert float(jax.jit(function)(A, b, jax_backend.asarray(0.0)).value[0]) == 0.5
