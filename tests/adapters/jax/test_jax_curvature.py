"""Hessian and Gauss-Newton products of functions of pytrees against dense derivatives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

import lowrank_inverse as li
from lowrank_inverse_jax import GaussNewtonOperator, HessianOperator, hessian_columns, hvp
from lowrank_inverse_jax.parameters import as_parameters
from tests.adapters.jax.jax_oracle import Counted, N, Problem, flat, forward, inner, relative
from tests.conftest import x64

pytestmark = pytest.mark.usefixtures("wide")

TOLERANCE = {"float32": 2e-5, "float64": 1e-12}


# Operation by operation a network compiles a hundred times.
either_way = pytest.mark.parametrize(
    "traced",
    [pytest.param(False, marks=pytest.mark.slow, id="eager"), pytest.param(True, id="jit")],
)


def quartic(x: Any) -> Any:
    """A function of five variables with a full Hessian, cheap to compile."""
    return jnp.sum(x**4) + jnp.sum(x) ** 3


def quartic_hessian(x: Any) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return np.diag(12 * x**2) + 6 * np.sum(x)


def point() -> Any:
    return jnp.asarray([0.5, -1.0, 0.25, 2.0, -0.125])


def block(n: int, width: int, dtype: str = "float64") -> Any:
    return jnp.asarray(np.random.default_rng(1).standard_normal((n, width)), dtype)


# The Hessian.


@either_way
def test_hessian_operator_equals_the_dense_hessian_of_a_network_in_nested_pytrees(traced, dtype):
    def products(params: Any, hparams: Any, args: Any, V: Any, indices: Any) -> Any:
        H = HessianOperator(lambda params: inner(params, hparams, *args), params, chunk_size=4)
        assert H.shape == (N, N)
        assert H.dtype == dtype
        return H @ V, H @ V[:, 0], H.columns([3, 0, 7, 5, 13, 1]), H.columns(indices), H.gradient

    problem = Problem(dtype)
    oracle = problem.dense()
    V, indices = block(N, 3, dtype), [9, 2, 4]
    arguments = (problem.params, problem.hparams, problem.inner_args, V)
    found = (jax.jit(products) if traced else products)(*arguments, jnp.asarray(indices))
    product = oracle.hessian @ np.asarray(V)
    wanted = (
        product,
        product[:, 0],
        oracle.hessian[:, [3, 0, 7, 5, 13, 1]],
        oracle.hessian[:, indices],
        oracle.inner_grad,
    )
    assert all(part.dtype == dtype for part in found)
    assert all(relative(*pair) < TOLERANCE[dtype] for pair in zip(found, wanted, strict=True))


@pytest.mark.parametrize(
    ("chunk_size", "traced"),
    [
        *[pytest.param(size, True, id=f"{size}, jit") for size in (1, 2, 5, 100)],
        pytest.param(2, False, id="2, eager"),
        *[
            pytest.param(size, False, id=f"{size}, eager", marks=pytest.mark.slow)
            for size in (1, 5, 100)
        ],
    ],
)
def test_chunk_size_changes_how_many_products_are_taken_at_once_and_not_the_answer(
    chunk_size, traced
):
    def products(x: Any, V: Any) -> Any:
        H = HessianOperator(quartic, x, chunk_size=chunk_size)
        return H @ V, H.columns([4, 0, 2])

    H, V = quartic_hessian(point()), block(5, 5)
    product, columns = (jax.jit(products) if traced else products)(point(), V)
    np.testing.assert_allclose(product, H @ np.asarray(V), rtol=0, atol=1e-12)
    np.testing.assert_allclose(columns, H[:, [4, 0, 2]], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "indices",
    [[3, 1], (3, 1), range(3, 0, -2), np.asarray([3, 1]), np.asarray([3, 1], np.uint8), "jax"],
    ids=["list", "tuple", "range", "int64", "uint8", "jax"],
)
def test_columns_come_in_the_order_asked_for_and_from_every_kind_of_indices(indices):
    indices = jnp.asarray([3, 1]) if isinstance(indices, str) else indices
    found = HessianOperator(quartic, point()).columns(indices)
    np.testing.assert_allclose(found, quartic_hessian(point())[:, [3, 1]], atol=1e-12)


def test_traced_indices_may_be_mapped_over_outside_jit():
    H = HessianOperator(quartic, point())
    indices = jnp.asarray([[3, 1], [0, 4], [2, 3]])
    wanted = [quartic_hessian(point())[:, row] for row in np.asarray(indices)]
    np.testing.assert_allclose(jax.vmap(H.columns)(indices), wanted, atol=1e-12)


def test_the_operator_may_be_mapped_over_points():
    points = jnp.stack([point(), 2 * point(), -point()])
    v = block(5, 1)[:, 0]
    found = jax.vmap(lambda x: HessianOperator(quartic, x) @ v)(points)
    wanted = [quartic_hessian(x) @ np.asarray(v) for x in points]
    np.testing.assert_allclose(found, wanted, atol=1e-12)


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "jit"])
def test_a_list_of_losses_is_the_mean_of_their_hessians(traced):
    losses = [quartic, lambda x: jnp.sum(x**3), lambda x: 3 * x[2] - x[4]]

    def products(x: Any, V: Any) -> Any:
        H = HessianOperator(losses, x, chunk_size=2)
        return H @ V, H @ V[:, 0], H.columns([4, 0]), H.gradient

    x, V = point(), block(5, 3)
    found = (jax.jit(products) if traced else products)(x, V)
    x = np.asarray(x)
    dense = (quartic_hessian(x) + np.diag(6 * x)) / 3
    gradient = (4 * x**3 + 3 * np.sum(x) ** 2 + 3 * x**2 + np.asarray([0, 0, 3, 0, -1])) / 3
    product = dense @ np.asarray(V)
    for one, wanted in zip(
        found, (product, product[:, 0], dense[:, [4, 0]], gradient), strict=True
    ):
        np.testing.assert_allclose(one, wanted, atol=1e-12)


def test_a_single_loss_is_linearized_once_whatever_the_number_of_products():
    loss = Counted(quartic)
    H = HessianOperator(loss, point())
    made = loss.calls
    assert made >= 1
    for _ in range(3):
        H @ block(5, 3)
        H.columns([0, 1])
    assert loss.calls == made


def test_a_list_of_losses_is_linearized_again_so_that_one_is_in_memory_at_a_time():
    losses = [Counted(quartic), Counted(jnp.sum)]
    H = HessianOperator(losses, point(), chunk_size=2)
    made = [loss.calls for loss in losses]
    H @ block(5, 4)
    assert [loss.calls for loss in losses] == [2 * made[0] + made[0], 2 * made[1] + made[1]]


def test_leaves_that_are_no_arrays_of_floats_are_no_rows_of_the_hessian():
    def loss(params: Any) -> Any:
        return params["f"](params["x"]) * params["power"] + params["count"]

    params = {"x": point(), "f": quartic, "power": 2, "count": jnp.asarray(3), "none": None}
    H = HessianOperator(loss, params)
    assert H.shape == (5, 5)
    np.testing.assert_allclose(H.columns(range(5)), 2 * quartic_hessian(point()), atol=1e-12)
    found = hvp(loss, params, {**params, "x": jnp.ones(5)})
    assert found["f"] is found["power"] is found["count"] is found["none"] is None
    np.testing.assert_allclose(found["x"], 2 * quartic_hessian(point()).sum(axis=1), atol=1e-12)


def test_a_bare_float_is_a_point_of_one_dimension():
    H = HessianOperator(lambda x: x**3, 2.0)
    assert H.shape == (1, 1)
    assert float((H @ jnp.ones(1))[0]) == 12.0


def test_constant_and_linear_losses_have_exactly_zero_products():
    for loss in (lambda x: 3.0, jnp.sum):
        np.testing.assert_array_equal(
            HessianOperator(loss, point()) @ block(5, 2), np.zeros((5, 2))
        )


@pytest.mark.parametrize("traced", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("chunk_size", [1, 8])
def test_a_block_without_columns_gives_one_back(chunk_size, traced):
    def product(x: Any, V: Any) -> Any:
        return HessianOperator(quartic, x, chunk_size=chunk_size) @ V

    found = (jax.jit(product) if traced else product)(point(), jnp.zeros((5, 0)))
    assert found.shape == (5, 0)


def test_every_solver_of_the_core_takes_the_operator():
    x, b = jnp.asarray([1.0, 2.0, 0.5, 1.5, 1.0]), jnp.arange(1.0, 6.0)
    dense = quartic_hessian(x)
    for solver, damping in (
        (li.Exact(), 0.0),
        (li.CG(rtol=1e-12), 0.0),
        (li.NystromCG(rank=2, rtol=1e-12), 0.0),
        (li.Nystrom(rank=5, damping=0.3), 0.3),
        (li.Nystrom(rank=5, damping=0.3, memory="streamed", chunk_size=2), 0.3),
        (li.Nystrom(rank=5, damping=0.3, memory="chunked", chunk_size=2), 0.3),
    ):
        wanted = np.linalg.solve(dense + damping * np.eye(5), np.asarray(b))

        def solve(x: Any, b: Any, solver: Any = solver) -> Any:
            return li.solve(HessianOperator(quartic, x), b, solver=solver, rng=0).value

        assert relative(jax.jit(solve)(x, b), wanted) < 1e-9


def test_the_operator_prints_its_kind_and_size():
    H = HessianOperator(quartic, point())
    assert repr(H) == f"HessianOperator(n=5, dtype={H.dtype})"


# hvp and hessian_columns.


def test_hvp_answers_in_the_form_of_the_vector(dtype):
    problem = Problem(dtype)
    dense = problem.dense().hessian
    V = block(N, 2, dtype)
    _, unravel = ravel_pytree(problem.params)

    @jax.jit
    def products(params: Any, V: Any) -> Any:
        forms = (unravel(V[:, 0]), V[:, 0], V)
        return [hvp(problem.loss, params, v) for v in forms]

    tree, vector, several = products(problem.params, V)
    assert jax.tree_util.tree_structure(tree) == jax.tree_util.tree_structure(problem.params)
    shapes = [jax.tree_util.tree_map(jnp.shape, one) for one in (tree, problem.params)]
    assert shapes[0] == shapes[1]
    assert relative(tree, dense @ np.asarray(V[:, 0])) < TOLERANCE[dtype]
    assert relative(vector, dense @ np.asarray(V[:, 0])) < TOLERANCE[dtype]
    assert relative(several, dense @ np.asarray(V)) < TOLERANCE[dtype]


def test_hvp_takes_a_matrix_parameter_and_a_vector_of_its_shape():
    W = point()[:4].reshape(2, 2)
    V = block(2, 2)
    found = jax.jit(lambda W, V: hvp(lambda W: quartic(W.reshape(-1)), W, V))(W, V)
    wanted = quartic_hessian(W.reshape(-1)) @ np.asarray(V).reshape(-1)
    np.testing.assert_allclose(found, wanted.reshape(2, 2), atol=1e-12)


def test_hessian_columns_equal_the_dense_columns():
    found = hessian_columns([quartic, quartic], point(), [4, 1, 0], chunk_size=2)
    np.testing.assert_allclose(found, quartic_hessian(point())[:, [4, 1, 0]], atol=1e-12)


# Gauss-Newton.


def convex(z: Any) -> Any:
    """A loss of the outputs whose Hessian is neither constant nor diagonal."""
    return jnp.log(jnp.sum(jnp.exp(z), axis=1)).mean() + 0.1 * jnp.sum(z**2)


@jax.jit
def _gauss_newton(params: Any, x: Any) -> Any:
    theta, unravel = ravel_pytree(params)
    out = forward(params, x)
    J = jax.jacfwd(lambda t: forward(unravel(t), x).reshape(-1))(theta)
    H = jax.hessian(lambda z: convex(z.reshape(out.shape)))(out.reshape(-1))
    return J.T @ H @ J, J.T @ jax.grad(convex)(out).reshape(-1)


@either_way
def test_gauss_newton_operator_equals_the_dense_product(traced, dtype):
    def products(params: Any, x: Any, V: Any) -> Any:
        G = GaussNewtonOperator(convex, lambda p: forward(p, x), params, chunk_size=2)
        return G @ V, G @ V[:, 0], G.columns([5, 0, 9]), G.gradient

    problem = Problem(dtype)
    V, x = block(N, 3, dtype), problem.inner_args[0]
    found = (jax.jit(products) if traced else products)(problem.params, x, V)
    with x64(True):
        params, x = jax.tree_util.tree_map(
            lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), (problem.params, x)
        )
        G, gradient = map(np.asarray, _gauss_newton(params, x))
    product = G @ np.asarray(V)
    for one, wanted in zip(found, (product, product[:, 0], G[:, [5, 0, 9]], gradient), strict=True):
        assert one.dtype == dtype
        assert relative(one, wanted) < TOLERANCE[dtype]


def test_gauss_newton_is_positive_semidefinite_where_the_hessian_is_not():
    problem = Problem()
    x, y = problem.inner_args

    def error(z: Any) -> Any:
        return jnp.sum((z - 3 * y) ** 2)

    @jax.jit
    def matrices(params: Any) -> Any:
        H = HessianOperator(lambda p: error(forward(p, x)), params)
        G = GaussNewtonOperator(error, lambda p: forward(p, x), params)
        return H.columns(range(N)), G.columns(range(N)), H.gradient, G.gradient

    *dense, gradient, other = matrices(problem.params)
    eigenvalues = [np.linalg.eigvalsh(np.asarray(A)) for A in dense]
    assert eigenvalues[0][0] < -1e-2 * eigenvalues[0][-1]
    assert eigenvalues[1][0] > -1e-12 * eigenvalues[1][-1]
    assert relative(other, gradient) < 1e-12


def test_gauss_newton_of_linear_outputs_is_the_hessian():
    A = block(7, 5)

    @jax.jit
    def matrices(x: Any) -> Any:
        H = HessianOperator(lambda x: jnp.sum((A @ x) ** 4), x)
        G = GaussNewtonOperator(lambda z: jnp.sum(z**4), lambda x: A @ x, x)
        return G.columns(range(5)), H.columns(range(5))

    dense = np.asarray(A)
    wanted = dense.T @ np.diag(12 * (dense @ np.asarray(point())) ** 2) @ dense
    assert all(relative(found, wanted) < 1e-12 for found in matrices(point()))


def test_gauss_newton_of_a_linear_loss_is_exactly_zero():
    G = GaussNewtonOperator(jnp.sum, jnp.sin, point())
    np.testing.assert_array_equal(G @ block(5, 2), np.zeros((5, 2)))


def test_outputs_may_be_a_pytree():
    def outputs(x: Any) -> Any:
        return {"a": jnp.sin(x), "b": (jnp.sum(x) ** 2,)}

    def loss(z: Any) -> Any:
        return jnp.sum(z["a"] ** 2) * z["b"][0] + z["b"][0] ** 2

    def joined(x: Any) -> Any:
        return jnp.concatenate([jnp.sin(x), jnp.sum(x)[None] ** 2])

    @jax.jit
    def matrices(x: Any) -> Any:
        J = jax.jacobian(joined)(x)
        H = jax.hessian(lambda z: loss({"a": z[:5], "b": (z[5],)}))(joined(x))
        return GaussNewtonOperator(loss, outputs, x).columns(range(5)), J.T @ H @ J

    assert relative(*matrices(point())) < 1e-12


def test_lists_of_a_gauss_newton_operator_pair_up_and_average():
    losses = [lambda z: jnp.sum(z**2), lambda z: 0.5 * jnp.sum(z**4)]
    outputs = [jnp.sin, lambda x: x**2]
    G = GaussNewtonOperator(losses, outputs, point(), chunk_size=2)
    x = np.asarray(point())
    wanted = (np.diag(2 * np.cos(x) ** 2) + np.diag(6 * x**4 * 4 * x**2)) / 2
    np.testing.assert_allclose(G.columns(range(5)), wanted, atol=1e-12)
    gradient = (2 * np.sin(x) * np.cos(x) + 2 * x**6 * 2 * x) / 2
    np.testing.assert_allclose(G.gradient, gradient, atol=1e-12)


# Precision.


def precisions(jaxpr: Any) -> list[Any]:
    """Precisions of all matrix products in a jaxpr and in what it calls."""
    found = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            found.append(equation.params["precision"])
        for value in equation.params.values():
            inside = getattr(value, "jaxpr", value)
            if hasattr(inside, "eqns"):
                found += precisions(inside)
    return found


@pytest.mark.parametrize("default", [None, "bfloat16"])
@pytest.mark.parametrize("kind", ["hessian", "list", "gauss-newton"])
def test_matrix_products_keep_the_precision_of_their_operands(kind, default):
    problem = Problem("float32")
    x = problem.inner_args[0]
    loss = jax.jit(problem.loss)  # and what jit has cached at another precision is not taken

    def operator(params: Any) -> Any:
        if kind == "gauss-newton":
            return GaussNewtonOperator(convex, jax.jit(lambda p: forward(p, x)), params)
        return HessianOperator([loss, loss] if kind == "list" else loss, params)

    def products(params: Any, V: Any) -> Any:
        H = operator(params)
        return H @ V, H.columns([0, 1]), H.gradient

    with jax.default_matmul_precision(default):
        loss(problem.params)
        found = precisions(jax.make_jaxpr(products)(problem.params, block(N, 2, "float32")).jaxpr)
    assert len(found) > 4
    highest = jax.lax.Precision.HIGHEST
    assert all(one == (highest, highest) for one in found)


# Errors.

BAD_LOSSES: dict[str, tuple[Any, type[Exception], str]] = {
    "a vector": (lambda x: x, ValueError, r"`loss` must return a scalar; got shape \(5,\)"),
    "one entry": (lambda x: x[:1], ValueError, r"`loss` must return a scalar; got shape \(1,\)"),
    "an integer": (lambda x: jnp.sum(x).astype(int), TypeError, "floating-point; got int"),
    "complex": (lambda x: jnp.sum(x) * 1j, TypeError, "real and floating-point; got complex"),
    "None": (lambda x: None, TypeError, r"must return a scalar array; got .*NoneType"),
    "a pair": (lambda x: (jnp.sum(x), 1), TypeError, "must return a scalar array; got .*tuple"),
    "no function": (3.0, TypeError, "`loss` must be a function.* pass the function and not its"),
    "no functions": ([], TypeError, "non-empty list of functions"),
    "one of them": ([quartic, 3.0], TypeError, "non-empty list of functions"),
    "NaN": (lambda x: jnp.sqrt(-1 - jnp.sum(x**2)), ValueError, "`gradient of the loss` must be f"),
    "Inf": (lambda x: jnp.log(0 * x[0]), ValueError, "`gradient of the loss` must be finite"),
}


@pytest.mark.parametrize(("loss", "kind", "message"), BAD_LOSSES.values(), ids=BAD_LOSSES)
def test_a_loss_that_cannot_be_differentiated_is_refused(loss, kind, message):
    with pytest.raises(kind, match=message):
        HessianOperator(loss, point())


def test_a_gradient_that_is_not_finite_goes_unchecked_while_tracing():
    found = jax.jit(lambda x: HessianOperator(lambda x: jnp.sqrt(-x[0]), x).gradient)(point())
    assert np.isnan(found[0])


BAD_BLOCKS: dict[str, tuple[Any, type[Exception], str]] = {
    "rows": (np.ones(4), ValueError, r"`block` must have 5 rows .* got shape \(4,\)"),
    "dimensions": (np.ones((5, 1, 1)), ValueError, r"got shape \(5, 1, 1\)"),
    "integers": (np.ones(5, int), TypeError, "real floating dtype"),
    "precision": (np.ones(5, np.float32), TypeError, "float64 and `block` float32"),
}


@pytest.mark.parametrize(("v", "kind", "message"), BAD_BLOCKS.values(), ids=BAD_BLOCKS)
def test_a_vector_that_does_not_fit_is_refused(v, kind, message):
    with pytest.raises(kind, match=message):
        HessianOperator(quartic, point()) @ jnp.asarray(v)


def test_a_vector_of_another_library_is_refused():
    with pytest.raises(TypeError, match="must come from one library"):
        HessianOperator(quartic, point()) @ np.ones(5)


BAD_INDICES: dict[str, tuple[Any, type[Exception], str]] = {
    "repeated": ([1, 1], ValueError, "`indices` must be distinct"),
    "negative": ([-1], ValueError, r"must lie in 0 … 4; got values from -1 to -1"),
    "too large": ([0, 5], ValueError, r"must lie in 0 … 4; got values from 0 to 5"),
    "none": ([], TypeError, "non-empty one-dimensional"),
    "floats": ([0.0], TypeError, "one-dimensional sequence of integers"),
    "a number": (0, TypeError, "one-dimensional sequence of integers"),
}


@pytest.mark.parametrize(("indices", "kind", "message"), BAD_INDICES.values(), ids=BAD_INDICES)
def test_indices_that_name_no_columns_are_refused(indices, kind, message):
    with pytest.raises(kind, match=message):
        HessianOperator(quartic, point()).columns(indices)


@pytest.mark.parametrize("indices", [np.ones(1), np.ones((1, 1), int)], ids=["floats", "matrix"])
def test_traced_indices_that_are_no_vector_of_integers_are_refused(indices):
    H = HessianOperator(quartic, point())
    with pytest.raises(TypeError, match=r"`indices` must be integers of shape \(k,\)"):
        jax.jit(H.columns)(jnp.asarray(indices))


@pytest.mark.parametrize(
    ("chunk_size", "kind"), [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)]
)
def test_a_chunk_size_that_is_no_positive_int_is_refused(chunk_size, kind):
    with pytest.raises(kind, match="`chunk_size` must be"):
        HessianOperator(quartic, point(), chunk_size=chunk_size)


BAD_PAIRS: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "lengths": ([jnp.sum], [jnp.sin, jnp.cos], ValueError, "must pair up; got 1 and 2"),
    "one for several": (jnp.sum, [jnp.sin, jnp.cos], ValueError, "must pair up; got 1 and 2"),
    "an array": (jnp.sum, np.ones(5), TypeError, "`outputs` must be a function"),
    "no loss": (None, jnp.sin, TypeError, "`loss` must be a function"),
    "no scalar": (jnp.sin, jnp.sin, ValueError, "`loss` must return a scalar"),
}


@pytest.mark.parametrize(("loss", "outputs", "kind", "message"), BAD_PAIRS.values(), ids=BAD_PAIRS)
def test_gauss_newton_refuses_what_it_cannot_use(loss, outputs, kind, message):
    with pytest.raises(kind, match=message):
        GaussNewtonOperator(loss, outputs, point())


def test_hvp_refuses_a_vector_of_another_structure():
    with pytest.raises(ValueError, match=r"`v` must have the structure of the parameters"):
        hvp(lambda p: quartic(p["x"]), {"x": point()}, {"y": point()})
    with pytest.raises(ValueError, match=r"`v` at 'params' must have shape \(5,\)"):
        hvp(quartic, point(), jnp.ones(4))


def test_flat_vectors_of_the_oracle_and_of_the_operator_agree():
    problem = Problem()
    np.testing.assert_array_equal(as_parameters(problem.params).vector, flat(problem.params))
