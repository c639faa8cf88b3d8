"""A state carried through outer steps in jax: eager, compiled, scanned and mapped."""

from __future__ import annotations

import numpy as np
import pytest

import lowrank_inverse as li

jax = pytest.importorskip("jax")

import jax.numpy as jnp

from lowrank_inverse_jax import hypergradient

pytestmark = pytest.mark.usefixtures("wide")

RIDGE, N, RANK = 0.01, 12, 6
NEW = li.HypergradientState()
SOLVER = li.NystromCG(rank=RANK, max_steps=4, rtol=1e-10)


def data():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((30, N)) * np.logspace(0, -1.5, N)
    return jnp.asarray(X), jnp.asarray(X @ np.ones(N)), jnp.asarray(rng.standard_normal(N))


def inner(theta, h, scale=1.0):
    X, y, _ = data()
    weights = jax.nn.sigmoid(scale * h)
    return 0.5 * jnp.mean(weights * (X @ theta - y) ** 2)


def outer(theta, h):
    return 0.5 * jnp.sum((theta - data()[2]) ** 2)


def minimiser(h, scale=1.0):
    X, y, _ = data()
    weights = jax.nn.sigmoid(scale * h)[:, None] / len(y)
    return jnp.linalg.solve(X.T @ (weights * X) + RIDGE * jnp.eye(N), X.T @ (weights[:, 0] * y))


def step(h, state=NEW, scale=1.0, **options):
    theta = minimiser(h, scale)
    options = {"solver": SOLVER, "ridge": RIDGE, "rng": 0, **options}
    return hypergradient(inner, outer, theta, h, inner_args=(scale,), state=state, **options)


def start():
    return jnp.linspace(-1, 1, 30)


def relative(found, wanted):
    return float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted))


@pytest.mark.slow
@pytest.mark.slow
def test_compiled_and_eager_loops_keep_one_state():
    compiled = jax.jit(step)
    h, state, jitted = start(), NEW, NEW
    for i in range(4):
        out, fast = step(h, state), compiled(h, jitted)
        assert relative(fast.grads, out.grads) < 1e-9
        assert int(fast.info.recycled) == int(out.info.recycled)
        assert (int(out.info.recycled) > 0) == (i > 0)
        assert int(fast.info.num_products) == int(out.info.num_products)
        state, jitted = out.state, fast.state
        for a, b in zip(state, jitted, strict=True):
            assert (a.dtype, a.shape, a.weak_type) == (b.dtype, b.shape, b.weak_type)
        h = h - 0.1 * out.grads


@pytest.mark.slow
def test_a_scan_over_outer_steps_carries_the_state():
    first = step(start())

    def body(carry, _):
        h, state = carry
        out = step(h, state)
        return (h - 0.1 * out.grads, out.state), out.info.recycled

    (h, state), recycled = jax.jit(lambda c: jax.lax.scan(body, c, length=5))(
        (start() - 0.1 * first.grads, first.state)
    )
    loop_h, loop_state = start() - 0.1 * first.grads, first.state
    for _ in range(5):
        out = step(loop_h, loop_state)
        loop_h, loop_state = loop_h - 0.1 * out.grads, out.state
    assert (recycled > 0).all()
    assert relative(h, loop_h) < 1e-9
    assert relative(state.value, loop_state.value) < 1e-9


@pytest.mark.slow
def test_each_of_a_batch_of_problems_has_a_state_of_its_own():
    scales = jnp.asarray([0.5, 1.0, 2.0])
    first = jax.vmap(lambda s: step(start(), NEW, s))(scales)
    second = jax.vmap(lambda state, s: step(start() + 0.1, state, s))(first.state, scales)
    for i, scale in enumerate(scales):
        single = step(
            start() + 0.1, jax.tree_util.tree_map(lambda x, i=i: x[i], first.state), scale
        )
        assert relative(second.grads[i], single.grads) < 1e-8


@pytest.mark.slow
@pytest.mark.parametrize("ridge", [RIDGE, np.linspace(0.01, 0.02, N)], ids=["number", "for each"])
def test_a_run_interrupted_and_resumed_has_the_same_trajectory_bit_for_bit(ridge, tmp_path):
    compiled = jax.jit(lambda h, state: step(h, state, ridge=jnp.asarray(ridge)))
    h, state, trajectory = start(), NEW, []
    for i in range(6):
        if i == 2:
            state.save(tmp_path / "state.npz")
            saved = np.asarray(h)
        out = compiled(h, state)
        h, state = h - 0.1 * out.grads, out.state
        trajectory.append(h)
    h, state = jnp.asarray(saved), li.HypergradientState.load(tmp_path / "state.npz")
    for i in range(2, 6):
        out = compiled(h, state)
        h, state = h - 0.1 * out.grads, out.state
        assert jnp.array_equal(h, trajectory[i])


def test_the_record_explains_itself_outside_of_jit_only():
    out = jax.jit(lambda h: step(h, solver=li.CG()))(start())
    assert out.explain().endswith("nothing to warn of")
    assert "products with the Hessian" in out.info.explain()
    with pytest.raises(TypeError, match="while jax traces"):
        jax.jit(lambda h: step(h).explain())(start())
    batch = jax.tree.map(lambda x: jnp.stack([x, x]), out.info)
    with pytest.raises(ValueError, match=r"that of a batch.*jax\.tree\.map"):
        batch.explain()
