"""Every solver under every transformation, kind of leaf and mode of jax, in one table."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import lowrank_inverse as li

jax = pytest.importorskip("jax")

import jax.numpy as jnp

from lowrank_inverse_jax import (
    GaussNewtonOperator,
    HessianOperator,
    check_hessian,
    hypergradient,
    implicit_minimizer,
)
from tests.conftest import x64

N, DAMPING = 3, 0.3
SOLVERS = {
    "cg": li.CG(damping=DAMPING, rtol=1e-6),
    "nystrom-cg": li.NystromCG(rank=N, damping=DAMPING, rtol=1e-6),
    "nystrom": li.Nystrom(rank=N, damping=DAMPING),
    "gaussian": li.NystromCG(rank=N, damping=DAMPING, sampling="gaussian", rtol=1e-6),
    "streamed": li.Nystrom(rank=N, damping=DAMPING, memory="streamed"),
    "chunked": li.Nystrom(rank=N, damping=DAMPING, memory="chunked", chunk_size=2),
    "refined": li.Nystrom(rank=N, damping=DAMPING, refine=3),
    "neumann": li.Neumann(damping=DAMPING, num_terms=100, rtol=1e-6),
    "exact": li.Exact(damping=DAMPING),
}
SAMPLED = ("nystrom-cg", "nystrom", "streamed", "chunked", "refined")

# f = w.D w / 2 - (h c).w and g = |w - t|^2 / 2: the hypergradient is c (D + ρ)^{-1} (w - t).
D, C, T = jnp.array([1.0, 2.0, 4.0]), jnp.array([1.0, -1.0, 2.0]), jnp.array([0.5, 1.0, -1.0])
W, H = jnp.array([1.0, -2.0, 0.5]), jnp.array([0.2, 0.4, 0.6])


def inner(w: Any, h: Any) -> Any:
    return 0.5 * (w * D.astype(w.dtype) * w).sum() - (h * C.astype(w.dtype) * w).sum()


def outer(w: Any, h: Any) -> Any:
    return 0.5 * ((w - T.astype(w.dtype)) ** 2).sum()


def right(w: Any) -> np.ndarray:
    w = np.asarray(w, np.float64)
    return np.asarray(C) / (np.asarray(D) + DAMPING) * (w - np.asarray(T))


def close(found: Any, wanted: Any, rtol: float = 2e-5) -> None:
    np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=rtol, atol=rtol)


def grads(solver: Any, w: Any = W, h: Any = H, **options: Any) -> Any:
    return hypergradient(inner, outer, w, h, solver=solver, **options).grads


# Transformations.


def eager(solver: Any) -> None:
    close(grads(solver), right(W))


def jit(solver: Any) -> None:
    close(jax.jit(lambda w, h: grads(solver, w, h))(W, H), right(W))


def vmap(solver: Any) -> None:
    stacked = jnp.stack([W, 2 * W])
    found = jax.jit(jax.vmap(lambda w: grads(solver, w)))(stacked)
    close(found, np.stack([right(w) for w in stacked]))


def scan(solver: Any) -> None:
    def step(w: Any, _: Any) -> Any:
        return w - 0.1 * grads(solver, w), None

    found, _ = jax.lax.scan(step, W, length=2)
    wanted = np.asarray(W, np.float64)
    for _ in range(2):
        wanted = wanted - 0.1 * right(wanted)
    close(found, wanted)


def jacfwd(solver: Any) -> None:
    jacobian = jax.jacfwd(lambda w: grads(solver, w))(W)
    close(jacobian, np.diag(np.asarray(C) / (np.asarray(D) + DAMPING)), rtol=1e-3)


def minimizer(solver: Any) -> Callable[[Any], Any]:
    train = implicit_minimizer(inner, solver=solver)(lambda init, h: h * C / D)
    return lambda h: outer(train(W, h), h)


def grad(solver: Any) -> None:
    close(jax.grad(minimizer(solver))(H), right(H * C / D))


def grad_of_jit(solver: Any) -> None:
    close(jax.grad(jax.jit(minimizer(solver)))(H), right(H * C / D))


def forward_mode(solver: Any) -> None:
    close(jax.jit(jax.jacfwd(minimizer(solver)))(H), right(H * C / D))


def remat(solver: Any) -> None:
    close(jax.grad(jax.checkpoint(minimizer(solver)))(H), right(H * C / D))


def donated(solver: Any) -> None:
    run = jax.jit(lambda w: grads(solver, w), donate_argnums=0)
    close(run(jnp.array(W)), right(W))


# Kinds of leaves and keys.


def odd_leaves(solver: Any) -> None:
    tree = {"w": W, "none": None, "steps": 3, "empty": jnp.zeros((0, 2)), "name": jnp.arange(2)}
    out = hypergradient(
        lambda p, h: inner(p["w"], h["h"]), lambda p, h: outer(p["w"], h["h"]),
        tree, {"h": H, "none": None, "empty": jnp.zeros(0)}, solver=solver,
    )  # fmt: skip
    close(out.grads["h"], right(W))
    assert out.ihvp["steps"] is None
    assert out.ihvp["empty"].shape == (0, 2)


@dataclasses.dataclass
class Layer:
    """Parameters as a dataclass."""

    w: Any


jax.tree_util.register_dataclass(Layer, data_fields=["w"], meta_fields=[])


def dataclass(solver: Any) -> None:
    out = hypergradient(
        lambda p, h: inner(p.w, h.w), lambda p, h: outer(p.w, h.w), Layer(W), Layer(H),
        solver=solver,
    )  # fmt: skip
    close(out.grads.w, right(W))


def typed_key(solver: Any) -> None:
    close(grads(solver, key=jax.random.key(0)), right(W))


def raw_key(solver: Any) -> None:
    close(jax.jit(lambda key: grads(solver, key=key))(jax.random.PRNGKey(0)), right(W))


# Modes.


def debug_nans(solver: Any) -> None:
    with jax.debug_nans(True):
        eager(solver)


def rank_promotion(solver: Any) -> None:
    with jax.numpy_rank_promotion("raise"):
        eager(solver)


def dtype_promotion(solver: Any) -> None:
    with jax.numpy_dtype_promotion("strict"):
        eager(solver)


def checkify(solver: Any) -> None:
    from jax.experimental import checkify

    checked = checkify.checkify(lambda: grads(solver), errors=checkify.all_checks)
    error, found = checked()
    error.throw()
    close(found, right(W))


def bfloat16(solver: Any) -> None:
    w, h = W.astype(jnp.bfloat16), H.astype(jnp.bfloat16)
    found = grads(solver, w, h)
    assert found.dtype == jnp.bfloat16
    close(found, right(w), rtol=0.1)


def float16(solver: Any) -> None:
    w, h = W.astype(jnp.float16), H.astype(jnp.float16)
    found = grads(solver, w, h)
    assert found.dtype == jnp.float16
    close(found, right(w), rtol=0.02)


@jax.custom_vjp
def double(x: Any) -> Any:
    return 2 * x


@jax.custom_vjp
def square(x: Any) -> Any:
    return x**2


double.defvjp(lambda x: (double(x), None), lambda _, u: (double(u),))
square.defvjp(lambda x: (square(x), x), lambda x, u: (double(x) * u,))


def without_forward_mode(solver: Any) -> None:
    def loss(w: Any, h: Any) -> Any:
        return 0.5 * jax.jit(lambda w: (D * square(w)).sum())(w) - (h * C * w).sum()

    close(hypergradient(loss, outer, W, H, solver=solver).grads, right(W))


ROWS = {
    row.__name__: row
    for row in (
        eager,
        jit,
        vmap,
        scan,
        jacfwd,
        grad,
        grad_of_jit,
        forward_mode,
        remat,
        donated,
        odd_leaves,
        dataclass,
        typed_key,
        raw_key,
        debug_nans,
        rank_promotion,
        dtype_promotion,
        checkify,
        bfloat16,
        float16,
        without_forward_mode,
    )
}
SLOW_ROWS = ("checkify", "forward_mode", "jacfwd", "grad_of_jit", "vmap", "raw_key", "float16")


def cases() -> list[Any]:
    chosen = []
    for row in ROWS:
        for name in SAMPLED if row.endswith("_key") else SOLVERS:
            quick = row not in SLOW_ROWS and name == "cg"
            marks = [] if quick else [pytest.mark.slow]
            chosen.append(pytest.param(row, name, id=f"{row}-{name}", marks=marks))
    return chosen


@pytest.mark.parametrize(("row", "solver"), cases())
def test_each_solver_gives_the_hypergradient_in_each_way_to_run_it(row, solver):
    with x64(False):
        ROWS[row](SOLVERS[solver])


# What the table has no column for.


@pytest.mark.slow
def test_sharded_parameters_and_data_give_the_hypergradient_of_one_device():
    code = """
import jax, jax.numpy as jnp, numpy as np
import lowrank_inverse as li
from lowrank_inverse_jax import hypergradient
auto = getattr(jax.sharding, "AxisType", None)
kind = {} if auto is None else {"axis_types": (auto.Auto,)}
where = jax.NamedSharding(jax.make_mesh((2,), ("d",), **kind), jax.sharding.PartitionSpec("d"))
x, w = jnp.reshape(jnp.sin(jnp.arange(24.0)), (6, 4)), jnp.arange(1.0, 5.0)
for solver in (li.CG(damping=0.3, rtol=1e-6), li.Nystrom(rank=4, damping=0.3),
               li.NystromCG(rank=4, damping=0.3, rtol=1e-6),
               li.NystromCG(rank=2, damping=0.3, rtol=1e-6, sampling="gaussian"),
               li.Neumann(damping=0.3), li.Exact(damping=0.3)):
    def run(x, w):
        return np.asarray(hypergradient(
            lambda w, h: ((x @ w - 1) ** 2).mean() + h * (w**2).sum(),
            lambda w, h: ((x @ w) ** 2).mean(), w, jnp.asarray(0.1), solver=solver).grads)
    wanted = run(x, w)
    for a, b in ((jax.device_put(x, where), w), (x, jax.device_put(w, where))):
        np.testing.assert_allclose(run(a, b), wanted, rtol=1e-4)
if auto is not None:
    mesh = jax.make_mesh((2,), ("d",), axis_types=(auto.Explicit,))
    try:
        run(x, jax.device_put(w, jax.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))))
    except TypeError as error:
        assert "`params` must not have explicit axes of a mesh" in str(error), error
    else:
        raise AssertionError
"""
    flags = "--xla_force_host_platform_device_count=2"
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key": 0}, r"`key` must be one PRNG key, .* Pass a seed as `rng`"),
        ({"key": jnp.arange(2.0)}, "`key` must be one PRNG key"),
        ({"rng": jax.random.key(0)}, r"`rng` must be a whole number .* as `key`"),
        ({"rng": jax.random.PRNGKey(0)}, r"`rng` must be a whole number .* as `key`"),
    ],
    ids=["int key", "float key", "typed rng", "raw rng"],
)
def test_keys_and_seeds_of_another_kind_are_refused_by_name(options, message):
    with pytest.raises(TypeError, match=message):
        grads(li.Nystrom(rank=2, damping=DAMPING), **options)


def test_flax_collections_beside_the_parameters_are_refused():
    variables = {"params": {"w": W}, "batch_stats": {"mean": jnp.zeros(3)}}
    with pytest.raises(ValueError, match=r"collections 'batch_stats' .* variables\['params'\]"):
        HessianOperator(lambda v: (v["params"]["w"] ** 2).sum(), variables)
    assert HessianOperator(lambda v: (v["params"] ** 2).sum(), {"params": W}).shape == (3, 3)


def test_gauss_newton_needs_no_forward_mode():
    rng = np.random.default_rng(0)
    A = jnp.asarray(rng.standard_normal((4, N)), jnp.float32)
    G = GaussNewtonOperator(lambda z: 0.5 * square(z).sum(), lambda w: A @ square(w), W)
    J = 2 * np.asarray(A) * np.asarray(W)
    close(G @ jnp.eye(N), J.T @ J)


# Hessians that are not the derivative of the gradient.


def stopped(w: Any) -> Any:
    losses = (jnp.outer(D, C) @ w["a"] - 1) ** 2 + (w["b"] ** 2).sum()
    return (jax.nn.sigmoid(-jax.lax.stop_gradient(losses)) * losses).mean() + (w["b"] ** 4).sum()


@jax.custom_vjp
def saved(x: Any) -> Any:
    return (x**3).sum()


saved.defvjp(
    lambda x: ((x**3).sum(), (x, jax.lax.stop_gradient(x))), lambda r, u: (3 * r[0] * r[1] * u,)
)


def test_a_hessian_that_is_not_the_derivative_of_the_gradient_is_found_and_its_block_named():
    w = {"a": W, "b": jnp.ones(2)}
    for dtype in (jnp.float32, jnp.float64):
        with x64(dtype == jnp.float64):
            at = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), w)
            check = check_hessian(lambda w: saved(w["a"]) + (w["b"] ** 4).sum(), at)
            assert not check.ok
            assert check.worst == "['a']"
            assert check.blocks["['b']"] < 1e-6
            assert "differ by" in check.explain()
            assert "'a'" in check.explain()
            assert not check_hessian(stopped, at).ok
            assert check_hessian(lambda w: (w["a"] ** 4).sum() + jnp.cos(w["b"]).sum(), at).ok


def test_a_loss_that_mixes_its_dtypes_by_hand_is_checked_in_its_own():
    def loss(w: Any) -> Any:
        return jax.lax.mul(w, jnp.ones(N, jnp.float32)).sum() ** 4

    check = check_hessian(loss, W)
    assert check.ok
    assert check.tolerance > 1e-2


# The minimiser's options.


@pytest.mark.slow
@pytest.mark.parametrize(
    "ridge",
    [lambda h: h[0], lambda h: jnp.full(N, h[0])],
    ids=["one number", "one for each parameter"],
)
def test_a_ridge_of_implicit_minimizer_equals_the_term_inside_the_loss(ridge):
    def train(init: Any, h: Any) -> Any:
        return h * C / (D + h[0])

    with x64(True):
        known = implicit_minimizer(inner, solver=li.CG(rtol=1e-12), ridge=ridge)(train)
        inside = implicit_minimizer(
            lambda w, h: inner(w, h) + 0.5 * h[0] * (w**2).sum(), solver=li.CG(rtol=1e-12)
        )(train)
        h = H.astype(jnp.float64)
        found, wanted = (jax.grad(lambda h, f=f: outer(f(W, h), h))(h) for f in (known, inside))
        close(found, wanted, rtol=1e-9)
        close(jax.jacfwd(lambda h: known(W, h))(h), jax.jacfwd(lambda h: train(W, h))(h), rtol=1e-9)


@pytest.mark.slow
def test_keywords_go_to_the_training_function_alone():
    @implicit_minimizer(inner, solver=li.CG())
    def train(init: Any, h: Any, steps: int = 3) -> Any:
        assert steps == 5
        return h * C / D

    close(jax.jacrev(lambda h: train(W, h, steps=5))(H), np.diag(np.asarray(C / D)), rtol=1e-4)
