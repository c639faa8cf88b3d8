"""Columns, products and hypergradients on every device, against a dense answer on the CPU."""

from __future__ import annotations

import numpy as np
import pytest

import lowrank_inverse as li

jax = pytest.importorskip("jax")

import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

import lowrank_inverse_jax as lij
from tests.conftest import x64

DEVICES = ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)]
SOLVERS = {
    "Nyström": li.Nystrom(rank=20, damping=0.1),
    "streamed": li.Nystrom(rank=20, damping=0.1, memory="streamed"),
    "CG": li.CG(damping=0.1, rtol=1e-12),
    "Nyström-CG": li.NystromCG(rank=20, damping=0.1, rtol=1e-12),
}


def arrays(device):
    """Return parameters, weights and examples on a device."""
    try:
        where = jax.devices(device)[0]
    except RuntimeError:
        pytest.skip(f"jax has no {device}")
    rng = np.random.default_rng(0)
    params = [0.5 * rng.standard_normal((5, 6)), 0.5 * rng.standard_normal((6, 3))]
    x, y = rng.standard_normal((40, 5)), np.arange(40) % 3
    return jax.device_put((params, np.zeros(40), x, y), where)


def losses(params, x, y):
    outputs = jnp.tanh(x @ params[0]) @ params[1]
    return -jnp.take_along_axis(jax.nn.log_softmax(outputs), y[:, None], axis=1)[:, 0]


def inner(params, weight, x, y):
    decay = sum((p**2).sum() for p in params)
    return (jax.nn.sigmoid(weight) * losses(params, x, y)).mean() + 0.05 * decay


def outer(params, weight, x, y):
    return losses(params, x, y)[:10].mean()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_columns_products_and_hypergradients_equal_the_dense_answers(device, solver):
    with x64(True):
        params, weight, x, y = arrays(device)
        host, host_weight, host_x, host_y = arrays("cpu")
        flat, build = ravel_pytree(host)
        A = jax.hessian(lambda v: inner(build(v), host_weight, host_x, host_y))(flat)
        H = lij.HessianOperator(lambda p: inner(p, weight, x, y), params)
        np.testing.assert_allclose(H.columns([0, 7, 40]), A[:, [0, 7, 40]], rtol=1e-9, atol=1e-12)
        v = np.random.default_rng(1).standard_normal(len(flat))
        on_device = jax.device_put(v, next(iter(weight.devices())))
        np.testing.assert_allclose(H @ on_device, A @ v, rtol=1e-9, atol=1e-12)

        @jax.jit
        def compiled(params, weight, x, y):
            return lij.hypergradient(
                inner,
                outer,
                params,
                weight,
                inner_args=(x, y),
                outer_args=(x, y),
                solver=solver,
                rng=0,
            ).grads

        g = jax.grad(lambda v: outer(build(v), host_weight, host_x, host_y))(flat)
        q = li.solve(np.asarray(A), np.asarray(g), solver=solver, rng=0).value
        mixed = jax.jacobian(
            lambda w: jax.grad(lambda v: inner(build(v), w, host_x, host_y))(flat)
        )(host_weight)
        found = compiled(params, weight, x, y)
        assert next(iter(found.devices())).platform == device
        np.testing.assert_allclose(found, -np.asarray(mixed).T @ q, rtol=1e-6, atol=1e-9)
