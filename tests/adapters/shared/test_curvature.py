"""Hessian and Gauss-Newton operators of both adapters against dense derivatives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from array_api_compat import array_namespace

import lowrank_inverse as li
from tests.adapters.shared.frameworks import each, flat, mapped, rebuilt, relative
from tests.adapters.shared.problem import N, Problem, forward, numbers, oracle
from tests.conftest import host
from tests.oracles import gradient, jacobian

TOLERANCE = {"float32": 2e-5, "float64": 1e-11}
POINT = np.asarray([0.5, -1.0, 0.25, 2.0, -0.125])

each_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])


def total(x: Any) -> Any:
    return array_namespace(x).sum(x)


def quartic(x: Any) -> Any:
    """A function of five variables with a full Hessian, cheap to compile."""
    return total(x**4) + total(x) ** 3


def quartic_hessian(x: np.ndarray = POINT) -> np.ndarray:
    return np.diag(12 * x**2) + 6 * np.sum(x)


def block(n: int = 5, width: int | None = 3) -> np.ndarray:
    shape = (n,) if width is None else (n, width)
    return np.random.default_rng(1).standard_normal(shape)


def close(found: Any, wanted: Any) -> None:
    np.testing.assert_allclose(host(found), wanted, rtol=0, atol=1e-11)


# The Hessian.


@each_dtype
def test_products_columns_and_gradient_are_those_of_the_dense_hessian(framework, dtype):
    def products(params: Any, V: Any) -> Any:
        H = framework.hessian(problem.loss, params, chunk_size=4)
        assert H.shape == (N, N)
        assert framework.dtype_of(H) == dtype
        return H @ V, H @ V[:, 0], H.columns([3, 0, 7, 5, 13, 1]), H.gradient

    with framework.narrow() if dtype == "float32" else framework.wide():
        problem, V = Problem(framework, dtype), block(N).astype(dtype)
        found = framework.run(products, problem.params, framework.array(V))
    H, product = oracle().hessian, oracle().hessian @ V
    wanted = (product, product[:, 0], H[:, [3, 0, 7, 5, 13, 1]], oracle().inner_grad)
    assert all(framework.dtype_of(part) == dtype for part in found)
    assert all(relative(*pair) < TOLERANCE[dtype] for pair in zip(found, wanted, strict=True))


@each("chunk_size", {"1": 1, "2": 2, "5": 5, "100": 100}, quick=("2", "100"))
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "jit"])
def test_chunk_size_changes_how_many_products_are_taken_at_once_and_not_the_answer(
    framework, chunk_size, eager
):
    def products(x: Any, V: Any) -> Any:
        H = framework.hessian(quartic, x, chunk_size=chunk_size)
        return H @ V, H.columns([4, 0, 2])

    V = framework.array(block(5, 5))
    product, columns = framework.run(products, framework.variables(POINT), V, eager=eager)
    close(product, quartic_hessian() @ block(5, 5))
    close(columns, quartic_hessian()[:, [4, 0, 2]])


INDICES = {
    "list": [3, 1],
    "tuple": (3, 1),
    "range": range(3, 0, -2),
    "int64": np.asarray([3, 1]),
    "uint8": np.asarray([3, 1], np.uint8),
}


@pytest.mark.parametrize("indices", [*INDICES.values(), None], ids=[*INDICES, "own array"])
def test_columns_come_in_the_order_asked_for_and_from_every_kind_of_indices(framework, indices):
    indices = framework.array(np.asarray([3, 1])) if indices is None else indices
    H = framework.hessian(quartic, framework.variables(POINT))
    close(H.columns(indices), quartic_hessian()[:, [3, 1]])


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "jit"])
def test_a_list_of_losses_is_the_mean_of_their_hessians(framework, eager):
    losses = [quartic, lambda x: total(x**3), lambda x: 3 * x[2] - x[4]]

    def products(x: Any, V: Any) -> Any:
        H = framework.hessian(losses, x, chunk_size=2)
        return H @ V, H @ V[:, 0], H.columns([4, 0]), H.gradient

    x, V = framework.variables(POINT), framework.array(block())
    found = framework.run(products, x, V, eager=eager)
    dense = (quartic_hessian() + np.diag(6 * POINT)) / 3
    slope = 4 * POINT**3 + 3 * POINT.sum() ** 2 + 3 * POINT**2 + np.asarray([0, 0, 3, 0, -1])
    product = dense @ block()
    for one, wanted in zip(
        found, (product, product[:, 0], dense[:, [4, 0]], slope / 3), strict=True
    ):
        close(one, wanted)


def test_a_linear_loss_has_exactly_zero_products(framework):
    H = framework.hessian(total, framework.variables(POINT))
    assert not host(H @ framework.array(block())).any()
    assert not host(H.columns(range(5))).any()


@pytest.mark.parametrize("chunk_size", [1, 8])
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "jit"])
def test_a_block_without_columns_gives_one_back(framework, chunk_size, eager):
    def product(x: Any, V: Any) -> Any:
        return framework.hessian(quartic, x, chunk_size=chunk_size) @ V

    V = framework.array(np.zeros((5, 0)))
    assert framework.run(product, framework.variables(POINT), V, eager=eager).shape == (5, 0)


SOLVERS = {
    "exact": li.Exact(),
    "cg": li.CG(rtol=1e-12),
    "nystrom-cg": li.NystromCG(rank=2, rtol=1e-12),
    "nystrom": li.Nystrom(rank=5, damping=0.3),
    "streamed": li.Nystrom(rank=5, damping=0.3, memory="streamed", chunk_size=2),
    "chunked": li.Nystrom(rank=5, damping=0.3, memory="chunked", chunk_size=2),
}


@each("solver", SOLVERS, quick=("cg", "nystrom", "streamed"))
def test_every_solver_of_the_core_takes_the_operator(framework, solver):
    x, b = np.asarray([1.0, 2.0, 0.5, 1.5, 1.0]), np.arange(1.0, 6.0)

    def solve(x: Any, b: Any) -> Any:
        return li.solve(framework.hessian(quartic, x), b, solver=solver, rng=0).value

    found = framework.run(solve, framework.variables(x), framework.array(b))
    wanted = np.linalg.solve(quartic_hessian(x) + solver.damping * np.eye(5), b)
    assert relative(found, wanted) < 1e-9


@pytest.mark.parametrize("kind", ["Hessian", "Gauss-Newton"])
def test_curvature_is_an_operator_like_any_other(framework, kind):
    params = framework.variables(POINT)
    if kind == "Hessian":
        H = framework.hessian(quartic, params)
    else:
        H = framework.gauss_newton(lambda z: total(z**2) / 2, lambda x: x[1:] * x[0], params)
    dense, eye = host(H @ framework.array(np.eye(5))), np.eye(5)
    array = framework.array
    assert li.aslinearoperator(H) is H
    diagonal = np.linspace(0.1, 0.5, 5)
    identity = li.DiagonalOperator(5, like=H.like)
    for operator, expected in (
        (H.T, dense),
        (H + H, 2 * dense),
        (-H, -dense),
        (0.5 * H - H, -0.5 * dense),
        (np.float64(2) * H, 2 * dense),
        (array(2.0) * H, 2 * dense),
        (H + array(eye), dense + eye),
        (array(eye) - H, eye - dense),
        (H + 0.1 * identity, dense + 0.1 * eye),
        (2 * (0.1 * identity + H), 2 * dense + 0.2 * eye),
        (H + li.DiagonalOperator(5, array(diagonal)), dense + np.diag(diagonal)),
    ):
        for v in (diagonal, eye[:, :2] + diagonal[:, None]):
            close(operator @ array(v), expected @ v)
        close(operator.columns([3, 1]), expected[:, [3, 1]])
    close(H.matvec(array(diagonal)), dense @ diagonal)
    with pytest.raises(TypeError, match="has no diagonal"):
        H.diagonal()


def test_products_of_combined_curvature_are_counted_where_it_is_solved(framework):
    H = framework.hessian(lambda x: total(x**4), framework.variables(POINT))
    system = H + 0.1 * li.DiagonalOperator(5, like=H.like)
    b = framework.array(np.ones(5))
    found = li.solve(system, b, solver=li.Nystrom(rank=5, damping=0.0))
    assert found.num_products == 5 + 1
    assert relative(found.value, 1 / (12 * POINT**2 + 0.1)) < 1e-9


def test_the_operator_prints_its_kind_size_and_dtype(framework):
    H = framework.hessian(quartic, framework.variables(POINT))
    assert repr(H).startswith(f"HessianOperator(n=5, dtype={H.dtype}")


# hvp and hessian_columns.


def test_hvp_answers_in_the_form_of_the_vector(framework):
    problem, V = Problem(framework), block(N, 2)
    like = numbers()["params"]

    def products(params: Any, V: Any) -> Any:
        forms = (rebuilt(V[:, 0], like), V[:, 0], V)
        return [framework.hvp(problem.loss, params, v) for v in forms]

    tree, vector, several = framework.run(products, problem.params, framework.array(V))
    assert mapped(lambda x: tuple(x.shape), tree) == mapped(lambda x: x.shape, like)
    for found, wanted in ((tree, V[:, 0]), (vector, V[:, 0]), (several, V)):
        assert relative(found, oracle().hessian @ wanted) < TOLERANCE["float64"]


def test_hvp_takes_a_matrix_parameter_and_a_vector_of_its_shape(framework):
    W = framework.variables(POINT[:4].reshape(2, 2))
    wanted = quartic_hessian(POINT[:4]) @ block(4, None)
    for shape in ((2, 2), (4,)):
        v = framework.array(block(4, None).reshape(shape))
        close(framework.hvp(lambda W: quartic(W.reshape(-1)), W, v), wanted.reshape(shape))


@pytest.mark.parametrize("chunk_size", [1, 2])
def test_hessian_columns_equal_the_dense_columns(framework, chunk_size):
    x = framework.variables(POINT)
    found = framework.hessian_columns(quartic, x, [4, 1, 0], chunk_size=chunk_size)
    close(found, quartic_hessian()[:, [4, 1, 0]])


# Gauss-Newton.


def convex(z: Any) -> Any:
    """A loss of the outputs whose Hessian is neither constant nor diagonal."""
    xp = array_namespace(z)
    return xp.mean(xp.log(xp.sum(xp.exp(z), axis=1))) + 0.1 * xp.sum(z**2)


def dense_gauss_newton(loss: Any, outputs: Any, theta: np.ndarray) -> tuple[Any, Any]:
    """Return ``J.T H J`` and ``J.T g`` by complex steps and differences."""
    z = outputs(theta)
    J = gradient(outputs, theta)
    H = jacobian(lambda z: gradient(loss, z), z)
    return J.T @ H @ J, J.T @ gradient(loss, z)


@each_dtype
def test_gauss_newton_operator_equals_the_dense_product(framework, dtype):
    def products(params: Any, x: Any, V: Any) -> Any:
        G = framework.gauss_newton(convex, lambda p: forward(p, x), params, chunk_size=2)
        return G @ V, G @ V[:, 0], G.columns([5, 0, 9]), G.gradient

    with framework.narrow() if dtype == "float32" else framework.wide():
        problem, V = Problem(framework, dtype), block(N).astype(dtype)
        x = problem.inner_args[0]
        found = framework.run(products, problem.params, x, framework.array(V))
    params, (x, y) = numbers()["params"], numbers()["inner"]
    G, slope = dense_gauss_newton(
        lambda z: convex(z.reshape(y.shape)),
        lambda t: forward(rebuilt(t, params), x).reshape(-1),
        flat(params),
    )
    product = G @ V
    for one, wanted in zip(found, (product, product[:, 0], G[:, [5, 0, 9]], slope), strict=True):
        assert framework.dtype_of(one) == dtype
        assert relative(one, wanted) < TOLERANCE[dtype]


def test_gauss_newton_is_positive_semidefinite_where_the_hessian_is_not(framework):
    problem = Problem(framework)
    x, y = problem.inner_args

    def error(z: Any) -> Any:
        return total((z - 3 * y) ** 2)

    def matrices(params: Any) -> Any:
        H = framework.hessian(lambda p: error(forward(p, x)), params)
        G = framework.gauss_newton(error, lambda p: forward(p, x), params)
        return H.columns(range(N)), G.columns(range(N)), H.gradient, G.gradient

    *dense, slope, other = framework.run(matrices, problem.params)
    eigenvalues = [np.linalg.eigvalsh(host(A)) for A in dense]
    assert eigenvalues[0][0] < -1e-2 * eigenvalues[0][-1]
    assert eigenvalues[1][0] > -1e-12 * eigenvalues[1][-1]
    assert relative(other, slope) < 1e-12


def test_gauss_newton_of_linear_outputs_is_the_hessian(framework):
    dense = block(7, 5)
    A = framework.array(dense)
    G = framework.gauss_newton(lambda z: total(z**4), lambda x: A @ x, framework.variables(POINT))
    close(G.columns(range(5)), dense.T @ np.diag(12 * (dense @ POINT) ** 2) @ dense)


def test_gauss_newton_of_a_linear_loss_is_exactly_zero(framework):
    G = framework.gauss_newton(total, lambda x: x**3, framework.variables(POINT))
    assert not host(G @ framework.array(block())).any()


def test_lists_of_a_gauss_newton_operator_pair_up_and_average(framework):
    xp = array_namespace(framework.array(POINT))
    losses = [lambda z: total(z**2), lambda z: 0.5 * total(z**4)]
    outputs = [xp.sin, lambda x: x**2]
    G = framework.gauss_newton(losses, outputs, framework.variables(POINT), chunk_size=2)
    x = POINT
    close(G.columns(range(5)), (np.diag(2 * np.cos(x) ** 2) + np.diag(24 * x**6)) / 2)
    close(G.gradient, (2 * np.sin(x) * np.cos(x) + 4 * x**7) / 2)


# Errors.

BAD_LOSSES: dict[str, tuple[Any, type[Exception], str]] = {
    "a vector": (lambda x: x, ValueError, r"`loss` must (be|return) a scalar; got shape \(5,\)"),
    "NaN": (lambda x: (-1 - total(x**2)) ** 0.5, ValueError, "must be finite"),
    "Inf": (lambda x: total(x / 0), ValueError, "must be finite"),
    "None": (lambda x: None, TypeError, "a scalar .*; got .*NoneType"),
    "complex": (lambda x: total(x) * 1j, TypeError, "real and floating-point; got .*complex"),
}


@pytest.mark.parametrize(("loss", "kind", "message"), BAD_LOSSES.values(), ids=BAD_LOSSES)
def test_a_loss_that_cannot_be_differentiated_is_refused(framework, loss, kind, message):
    with pytest.raises(kind, match=message):
        framework.hessian(loss, framework.variables(POINT))


BAD_BLOCKS: dict[str, tuple[Any, type[Exception], str]] = {
    "rows": (np.ones(4), ValueError, r"must have .* got .*\(4,\)"),
    "dimensions": (np.ones((5, 1, 1)), ValueError, r"got .*\(5, 1, 1\)"),
    "precision": (np.ones(5, np.float32), TypeError, "float64.*float32"),
}


@pytest.mark.parametrize(("v", "kind", "message"), BAD_BLOCKS.values(), ids=BAD_BLOCKS)
def test_a_vector_that_does_not_fit_is_refused(framework, v, kind, message):
    with pytest.raises(kind, match=message):
        framework.hessian(quartic, framework.variables(POINT)) @ framework.array(v)


def test_a_vector_of_another_library_is_refused(framework):
    with pytest.raises(TypeError, match=r"must (come from one library|be a torch\.Tensor)"):
        framework.hessian(quartic, framework.variables(POINT)) @ np.ones(5)


BAD_INDICES: dict[str, tuple[Any, type[Exception], str]] = {
    "repeated": ([1, 1], ValueError, "`indices` must be distinct"),
    "negative": ([0, -1], ValueError, r"must lie in 0 … 4; got values from -1 to 0"),
    "too large": ([0, 5], ValueError, r"must lie in 0 … 4; got values from 0 to 5"),
    "floats": ([0.0], TypeError, "one-dimensional sequence of integers"),
    "truth values": (np.asarray([True, False]), TypeError, "sequence of integers"),
    "a matrix": (np.asarray([[0, 1]]), TypeError, "one-dimensional sequence of integers"),
    "a number": (0, TypeError, "one-dimensional sequence of integers"),
}


@pytest.mark.parametrize(("indices", "kind", "message"), BAD_INDICES.values(), ids=BAD_INDICES)
def test_indices_that_name_no_columns_are_refused(framework, indices, kind, message):
    with pytest.raises(kind, match=message):
        framework.hessian(quartic, framework.variables(POINT)).columns(indices)


@pytest.mark.parametrize(
    ("chunk_size", "kind"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)]
)
def test_a_chunk_size_that_is_no_positive_int_is_refused(framework, chunk_size, kind):
    with pytest.raises(kind, match="`chunk_size` must be"):
        framework.hessian(quartic, framework.variables(POINT), chunk_size=chunk_size)


def squared(x: Any) -> Any:
    return x**2


BAD_PAIRS: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "lengths": ([total], [squared, squared], ValueError, "1 and 2"),
    "no loss": (None, squared, TypeError, "`loss` must be (callable|a function)"),
    "no scalar": (squared, squared, ValueError, "`loss` must (be|return) a scalar"),
    "not finite": (lambda z: total(z) / 0, squared, ValueError, "must be finite"),
}


@pytest.mark.parametrize(("loss", "outputs", "kind", "message"), BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_gauss_newton_refuses_what_it_cannot_use(framework, loss, outputs, kind, message):
    with pytest.raises(kind, match=message):
        framework.gauss_newton(loss, outputs, framework.variables(POINT))
