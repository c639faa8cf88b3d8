"""Pytrees as one vector of their float leaves, and back."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from lowrank_inverse_jax.parameters import Parameters, as_parameters
from tests.conftest import x64

pytestmark = pytest.mark.usefixtures("wide")


class Layer(NamedTuple):
    weight: Any
    bias: Any
    activation: Any = None


def floats() -> dict[str, Any]:
    """Nested containers of every kind, all leaves of floats."""
    return {
        "layers": [Layer(jnp.arange(6.0).reshape(3, 2), jnp.ones(2)), Layer(jnp.eye(2), None)],
        "scale": jnp.asarray(0.5),
        "empty": jnp.zeros((0, 2)),
        "pair": (jnp.full((1, 2, 1), 7.0), {}),
    }


def mixed() -> dict[str, Any]:
    """Leaves of every kind among two of floats."""
    return {
        "bias": jnp.asarray([1.0, 2.0]),
        "count": jnp.asarray(3),
        "flag": True,
        "function": jnp.tanh,
        "host": np.asarray([[4.0], [5.0]]),
        "key": jax.random.key(0),
        "mask": jnp.asarray([True, False]),
        "name": "mlp",
        "nothing": None,
        "number": 0.25,
        "steps": 5,
    }


def test_the_vector_holds_the_float_leaves_in_row_major_order_as_ravel_pytree_does(dtype):
    tree = jax.tree_util.tree_map(lambda leaf: leaf.astype(dtype), floats())
    params = as_parameters(tree)
    wanted, _ = ravel_pytree(tree)
    assert params.vector.dtype == params.dtype == dtype
    assert params.n == 6 + 2 + 4 + 1 + 0 + 2
    np.testing.assert_array_equal(params.vector, wanted)


def test_arrays_splits_a_vector_into_the_shapes_of_the_leaves():
    params = as_parameters(floats())
    v = jnp.arange(float(params.n))
    parts = params.arrays(v)
    leaves = jax.tree_util.tree_leaves(floats())
    assert [part.shape for part in parts] == [leaf.shape for leaf in leaves]
    np.testing.assert_array_equal(np.concatenate([part.reshape(-1) for part in parts]), v)


def test_replace_puts_a_vector_in_the_users_structure():
    tree = floats()
    _, unravel = ravel_pytree(tree)
    params = as_parameters(tree)
    v = jnp.arange(float(params.n)) ** 2
    found, wanted = params.replace(v), unravel(v)
    assert isinstance(found["layers"][0], Layer)
    assert jax.tree_util.tree_structure(found) == jax.tree_util.tree_structure(tree)
    for one, other in zip(*map(jax.tree_util.tree_leaves, (found, wanted)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_only_arrays_of_floats_are_differentiated_by():
    params = as_parameters(mixed())
    assert params.names == ("['bias']", "['host']")
    np.testing.assert_array_equal(params.vector, [1.0, 2.0, 4.0, 5.0])


def test_replace_carries_all_other_leaves_along_as_they_are():
    tree = mixed()
    params = as_parameters(tree)
    found = params.replace(2 * params.vector)
    assert found.keys() == tree.keys()
    np.testing.assert_array_equal(found["bias"], [2.0, 4.0])
    np.testing.assert_array_equal(found["host"], [[8.0], [10.0]])
    for name in tree.keys() - {"bias", "host"}:
        assert found[name] is tree[name]


def test_restore_has_none_in_the_place_of_all_other_leaves():
    tree = mixed()
    params = as_parameters(tree)
    found = params.restore(params.vector)
    assert found.keys() == tree.keys()
    np.testing.assert_array_equal(found["bias"], tree["bias"])
    np.testing.assert_array_equal(found["host"], tree["host"])
    assert all(found[name] is None for name in tree.keys() - {"bias", "host"})


@pytest.mark.parametrize("make", [floats, mixed], ids=["floats", "mixed"])
def test_collect_undoes_restore_and_replace(make):
    params = as_parameters(make())
    v = jnp.arange(float(params.n)) - 2
    np.testing.assert_array_equal(params.collect(params.restore(v)), v)
    np.testing.assert_array_equal(params.collect(params.replace(v)), v)
    np.testing.assert_array_equal(as_parameters(params.replace(v)).vector, v)


def test_collect_converts_to_the_dtype_of_the_parameters():
    params = as_parameters({"w": jnp.ones(2, jnp.float32)})
    assert params.collect({"w": np.asarray([1.0, 2.0])}).dtype == jnp.float32


def test_arrays_and_scalars_of_numpy_are_arrays():
    params = as_parameters([np.float64(3.0), np.asarray([1.0]), np.int64(2)])
    np.testing.assert_array_equal(params.vector, [3.0, 1.0])
    assert isinstance(params.vector, jax.Array)


def test_without_64_bit_types_arrays_of_numpy_become_float32():
    with x64(False):
        params = as_parameters({"w": np.asarray([1.0, 2.0]), "b": jnp.ones(1)})
        assert params.dtype == jnp.float32


def test_a_bare_python_float_is_a_scalar_as_jax_grad_takes_it():
    params = as_parameters(2.5)
    assert params.n == 1
    assert params.replace(params.vector).shape == ()
    assert float(params.restore(3 * params.vector)) == 7.5


def test_half_precision_leaves_stay_what_they_are():
    assert as_parameters([jnp.ones(2, jnp.bfloat16)]).vector.dtype == jnp.bfloat16


def test_names_say_where_the_leaves_lie():
    assert as_parameters(floats()).names == (
        "['empty']",
        "['layers'][0].weight",
        "['layers'][0].bias",
        "['layers'][1].weight",
        "['pair'][0]",
        "['scale']",
    )
    assert as_parameters(jnp.ones(2), name="hparams").names == ("hparams",)


def test_parameters_are_taken_as_they_are():
    params = as_parameters(floats())
    assert isinstance(params, Parameters)
    assert as_parameters(params) is params


def test_an_equinox_module_follows_the_convention_of_its_filters():
    eqx = pytest.importorskip("equinox")
    model = eqx.nn.MLP(2, 1, width_size=3, depth=1, key=jax.random.key(0))
    params = as_parameters(model)
    wanted = eqx.filter(model, eqx.is_inexact_array)
    assert params.n == 3 * 3 + 4
    assert eqx.tree_equal(params.restore(params.vector), wanted)
    np.testing.assert_array_equal(params.collect(wanted), params.vector)
    doubled = eqx.apply_updates(model, params.restore(params.vector))
    assert eqx.tree_equal(doubled, params.replace(2 * params.vector))
    x = jnp.asarray([0.3, -0.2])
    assert float(params.replace(params.vector)(x)[0]) == float(model(x)[0])
    assert params.names[0] == ".layers[0].weight"


def test_traced_leaves_are_taken_inside_jit_and_vmap():
    def double(tree: Any) -> Any:
        params = as_parameters(tree)
        return params.restore(2 * params.vector)

    tree = {"w": jnp.arange(6.0).reshape(2, 3), "steps": jnp.asarray([1, 2])}
    found = jax.jit(double)(tree)
    assert found["steps"] is None
    np.testing.assert_array_equal(found["w"], 2 * tree["w"])
    np.testing.assert_array_equal(jax.vmap(double)(tree)["w"], 2 * tree["w"])


BAD_TREES: dict[str, tuple[Any, type[Exception], str]] = {
    "no array": ({"a": 1, "b": "x"}, ValueError, "must hold a floating-point array"),
    "nothing": ((), ValueError, "must hold a floating-point array"),
    "None": (None, ValueError, "must hold a floating-point array"),
    "integers": (np.arange(3), ValueError, "must hold a floating-point array"),
    "without elements": ([np.zeros(0)], ValueError, "must hold a floating-point array"),
    "nested Python floats": ({"a": 0.1}, ValueError, r"jax\.numpy\.asarray\(0\.1\)"),
    "complex": ([np.ones(1), np.ones(1, complex)], TypeError, r"must be real; '\[1\]'"),
    "two dtypes": (
        {"a": np.ones(1, np.float32), "b": np.ones(1)},
        TypeError,
        r"one dtype; .*'\]\" is float32 and .*'b'\]\" is float64",
    ),
}


@pytest.mark.parametrize(("tree", "kind", "message"), BAD_TREES.values(), ids=BAD_TREES)
def test_what_cannot_be_differentiated_by_is_refused_by_name(tree, kind, message):
    with pytest.raises(kind, match=message) as raised:
        as_parameters(tree, name="theta")
    assert "`theta`" in str(raised.value)


BAD_VALUES: dict[str, tuple[Any, str]] = {
    "another key": ({"w": np.ones(2), "c": np.ones(1)}, "structure of the parameters"),
    "a leaf too few": ({"w": np.ones(2)}, "structure of the parameters"),
    "a bare vector": (np.ones(3), "structure of the parameters"),
    "another shape": ({"w": np.ones(2), "b": np.ones(2)}, r"'b'.* shape \(1,\); got \(2,\)"),
    "a number for an array": ({"w": 1.0, "b": np.ones(1)}, r"'w'.* shape \(2,\); got \(\)"),
}


@pytest.mark.parametrize(("values", "message"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_values_of_another_structure_are_refused(values, message):
    params = as_parameters({"w": jnp.ones(2), "b": jnp.ones(1)})
    with pytest.raises(ValueError, match=message):
        params.collect(values, name="v")
