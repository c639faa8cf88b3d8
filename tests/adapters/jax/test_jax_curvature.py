"""Hessian and Gauss-Newton products of functions of pytrees against dense derivatives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp

from lowrank_inverse_jax import GaussNewtonOperator, HessianOperator, hvp
from lowrank_inverse_jax.parameters import as_parameters
from tests.adapters.jax.jax_oracle import Counted, Problem, flat, precisions, relative
from tests.adapters.shared.problem import N, forward

pytestmark = pytest.mark.usefixtures("wide")


# Operation by operation a network compiles a hundred times.


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


def test_indices_may_be_traced():
    def columns(x: Any, indices: Any) -> Any:
        return HessianOperator(quartic, x).columns(indices)

    found = jax.jit(columns)(point(), jnp.asarray([3, 1]))
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


def test_a_constant_loss_has_exactly_zero_products():
    H = HessianOperator(lambda x: 3.0, point())
    np.testing.assert_array_equal(H @ block(5, 2), np.zeros((5, 2)))


def test_a_bare_float_is_a_point_of_one_dimension():
    H = HessianOperator(lambda x: x**3, 2.0)
    assert H.shape == (1, 1)
    assert float((H @ jnp.ones(1))[0]) == 12.0


# Gauss-Newton.


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


# Precision.


def squares(z: Any) -> Any:
    return jnp.sum(z**2)


@pytest.mark.parametrize("default", [None, "bfloat16"])
@pytest.mark.parametrize("kind", ["hessian", "list", "gauss-newton"])
def test_matrix_products_keep_the_precision_of_their_operands(kind, default):
    problem = Problem("float32")
    x = problem.inner_args[0]
    loss = jax.jit(problem.loss)  # and what jit has cached at another precision is not taken

    def operator(params: Any) -> Any:
        if kind == "gauss-newton":
            return GaussNewtonOperator(squares, jax.jit(lambda p: forward(p, x)), params)
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
    "one entry": (lambda x: x[:1], ValueError, r"`loss` must return a scalar; got shape \(1,\)"),
    "an integer": (lambda x: jnp.sum(x).astype(int), TypeError, "floating-point; got int"),
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


def test_a_vector_of_integers_and_no_indices_at_all_are_refused():
    H = HessianOperator(quartic, point())
    with pytest.raises(TypeError, match="real floating dtype"):
        H @ jnp.ones(5, int)
    with pytest.raises(TypeError, match="non-empty one-dimensional"):
        H.columns([])


def test_a_gradient_that_is_not_finite_goes_unchecked_while_tracing():
    found = jax.jit(lambda x: HessianOperator(lambda x: jnp.sqrt(-x[0]), x).gradient)(point())
    assert np.isnan(found[0])


@pytest.mark.parametrize("indices", [np.ones(1), np.ones((1, 1), int)], ids=["floats", "matrix"])
def test_traced_indices_that_are_no_vector_of_integers_are_refused(indices):
    H = HessianOperator(quartic, point())
    with pytest.raises(TypeError, match=r"`indices` must be integers of shape \(k,\)"):
        jax.jit(H.columns)(jnp.asarray(indices))


BAD_PAIRS: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "one for several": (jnp.sum, [jnp.sin, jnp.cos], ValueError, "must pair up; got 1 and 2"),
    "an array": (jnp.sum, np.ones(5), TypeError, "`outputs` must be a function"),
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
