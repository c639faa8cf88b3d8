"""The flat vector of a structure's parameters, and the way back."""

from __future__ import annotations

from collections import OrderedDict, deque

import pytest

torch = pytest.importorskip("torch")

from lowrank_inverse_torch.parameters import Parameters, as_parameters


def mlp() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh(), torch.nn.Linear(2, 1))


def tensor(*shape: int, **kwargs: object) -> torch.Tensor:
    return torch.zeros(*shape, **{"requires_grad": True, **kwargs})


def test_a_module_gives_its_parameters_in_order_under_their_names():
    model = mlp()
    params = as_parameters(model)
    assert params.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    assert all(a is b for a, b in zip(params.tensors, model.parameters(), strict=True))
    assert params.sizes == (6, 2, 2, 1)
    assert params.n == 11
    assert params.dtype is torch.float32
    assert params.device == torch.device("cpu")
    assert params.modules == (model,)


def test_a_module_comes_back_as_a_dict_with_the_keys_of_named_parameters():
    model = mlp()
    model[0].bias.requires_grad_(False)
    params = as_parameters(model)
    vector = torch.arange(9.0)
    restored = params.restore(vector)
    assert list(restored) == [name for name, _ in model.named_parameters()]
    assert restored["0.bias"] is None
    assert restored["0.weight"].shape == (2, 3)
    torch.testing.assert_close(restored["2.weight"], torch.tensor([[6.0, 7.0]]))
    torch.testing.assert_close(params.flatten(params.collect(restored)), vector, rtol=0, atol=0)


def test_an_iterator_that_is_used_up_is_remembered_as_a_list():
    model = mlp()
    params = as_parameters(model.parameters())
    assert params.n == 11
    restored = params.restore(torch.arange(11.0))
    assert [tuple(part.shape) for part in restored] == [(2, 3), (2,), (1, 2), (1,)]


def test_a_view_of_a_dict_is_an_iterable_like_another():
    assert as_parameters({"a": tensor(2), "b": tensor(3)}.values()).sizes == (2, 3)


def test_a_single_tensor_comes_back_as_a_tensor():
    params = as_parameters(tensor(2, 3))
    assert params.names == ("params",)
    assert params.restore(torch.arange(6.0)).shape == (2, 3)


def test_a_nested_structure_comes_back_nested():
    tree = {"w": (tensor(2), [tensor(1), None]), "o": OrderedDict(b=tensor(1, 2))}
    params = as_parameters(tree)
    assert params.names == ("w.0", "w.1.0", "o.b")
    restored = params.restore(torch.arange(5.0))
    assert isinstance(restored["w"], tuple)
    assert restored["w"][1][1] is None
    assert isinstance(restored["o"], OrderedDict)
    torch.testing.assert_close(restored["o"]["b"], torch.tensor([[3.0, 4.0]]))


def test_modules_and_tensors_may_stand_in_one_list():
    head, temperature = torch.nn.Linear(2, 1), tensor(1)
    params = as_parameters([head, temperature])
    assert params.names == ("0.weight", "0.bias", "1")
    assert params.modules == (head,)
    restored = params.restore(torch.arange(4.0))
    assert list(restored[0]) == ["weight", "bias"]


def test_tied_tensors_count_once_and_share_their_value():
    shared, other = tensor(2), tensor(1)
    params = as_parameters({"first": shared, "other": other, "again": shared})
    assert params.n == 3
    restored = params.restore(torch.arange(3.0))
    assert restored["again"] is restored["first"]
    torch.testing.assert_close(
        params.flatten(params.collect(restored)), torch.arange(3.0), rtol=0, atol=0
    )


def test_tied_parameters_of_a_module_count_once():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1].weight = model[0].weight
    assert as_parameters(model).names == ("0.weight", "0.bias", "1.bias")


def test_tensors_that_are_not_leaves_of_the_graph_are_welcome():
    leaf = tensor(2)
    inner = leaf * 2
    assert as_parameters([inner]).tensors[0] is inner


def test_tensors_without_elements_take_no_place():
    params = as_parameters([tensor(2), tensor(0), tensor(3)])
    assert params.offsets == (0, 2, 2, 5)
    assert params.restore(torch.arange(5.0))[1].shape == (0,)


def test_parameters_are_passed_through():
    params = as_parameters(tensor(2))
    assert as_parameters(params) is params


def test_flatten_undoes_unflatten_for_vectors_and_blocks():
    params = as_parameters(mlp())
    vector, block = torch.randn(11), torch.randn(11, 3)
    torch.testing.assert_close(params.flatten(params.unflatten(vector)), vector, rtol=0, atol=0)
    stacks = params.unflatten(block)
    assert [tuple(stack.shape) for stack in stacks] == [(3, 2, 3), (3, 2), (3, 1, 2), (3, 1)]
    torch.testing.assert_close(params.flatten(stacks, num_columns=3), block, rtol=0, atol=0)
    assert params.flatten(params.unflatten(block[:, :0]), num_columns=0).shape == (11, 0)


def test_flatten_takes_none_for_zeros_and_detaches():
    params = as_parameters([tensor(2), tensor(1)])
    flat = params.flatten([None, tensor(1) + 5])
    torch.testing.assert_close(flat, torch.tensor([0.0, 0.0, 5.0]))
    assert not flat.requires_grad


def test_collect_accepts_another_order_of_keys_a_tuple_for_a_list_and_none_for_zeros():
    params = as_parameters({"a": tensor(1), "b": tensor(2)})
    values = params.collect({"b": torch.ones(2), "a": None})
    torch.testing.assert_close(params.flatten(values), torch.tensor([0.0, 1.0, 1.0]))
    params = as_parameters([tensor(1), tensor(2)])
    values = params.collect((torch.ones(1), torch.zeros(2)))
    torch.testing.assert_close(params.flatten(values), torch.tensor([1.0, 0.0, 0.0]))
    params = as_parameters(tensor(2))
    torch.testing.assert_close(params.flatten(params.collect(torch.ones(2))), torch.ones(2))


FROZEN = torch.zeros(2)
BAD_PARAMS = [
    (lambda: FROZEN, ValueError, "`params` must hold a tensor that requires grad; got 1 leaves"),
    (lambda: torch.nn.ReLU(), ValueError, "requires grad; got 0 leaves"),
    (lambda: [], ValueError, "requires grad; got 0 leaves"),
    (lambda: None, ValueError, "requires grad; got 1 leaves"),
    (lambda: [tensor(0)], ValueError, "requires grad; got 1 leaves"),
    (lambda: [tensor(1), 2.0], TypeError, "hold tensors; got float at '1'"),
    (lambda: mlp().named_parameters(), TypeError, "hold tensors; got str at '0.0'"),
    (lambda: "weights", TypeError, r"hold tensors; got str\."),
    (lambda: {"a": [tensor(1), object()]}, TypeError, "got object at 'a.1'"),
    (lambda: tensor(1, dtype=torch.complex64), TypeError, "must be real; 'params' is torch.comp"),
    (
        lambda: {"a": tensor(1), "b": tensor(1, dtype=torch.float64)},
        TypeError,
        "one dtype; 'a' is torch.float32 and 'b' is torch.float64",
    ),
    (
        lambda: [tensor(1), tensor(1, device="meta")],
        ValueError,
        "one device; '0' is on cpu and '1' on meta",
    ),
]


@pytest.mark.parametrize(("make", "kind", "message"), BAD_PARAMS)
def test_params_that_cannot_be_differentiated_by_are_refused(make, kind, message):
    with pytest.raises(kind, match=message):
        as_parameters(make())


def test_messages_call_the_argument_by_the_name_given():
    with pytest.raises(ValueError, match="`hparams` must hold a tensor"):
        as_parameters(FROZEN, name="hparams")


def test_frozen_tensors_may_have_another_dtype_and_device():
    frozen = torch.zeros(2, dtype=torch.int64, device="meta")
    assert as_parameters([frozen, tensor(3)]).n == 3


BAD_VALUES = [
    ([torch.ones(1)], ValueError, "`v` must have the structure.* tuple of 3; got list of 1"),
    ({"a": torch.ones(1)}, ValueError, "`v` must have the structure.*; got dict of 1"),
    (3.0, ValueError, r"`v` must have the structure.*; got 3.0"),
    ([torch.ones(2), None, None], ValueError, r"`v` at '0' must have shape \(1,\); got \(2,\)"),
    ([None, torch.ones(2), None], ValueError, "`v` at '1' must be None: the parameter there"),
    ([1.0, None, None], TypeError, "`v` at '0' must be a torch.Tensor; got float"),
    (
        [torch.ones(1, dtype=torch.float64), None, None],
        TypeError,
        "`v` at '0' must have the dtype of the parameters, torch.float32; got torch.float64",
    ),
    ([torch.ones(1), None, torch.zeros(1)], ValueError, "`v` at '2' must equal that at '0'"),
    ([torch.ones(1, device="meta"), None, None], ValueError, "`v` at '0' must be on the device"),
]


@pytest.mark.parametrize(("values", "kind", "message"), BAD_VALUES)
def test_values_unlike_the_parameters_are_refused(values, kind, message):
    tied = tensor(1)
    params = as_parameters([tied, FROZEN, tied])
    with pytest.raises(kind, match=message):
        params.collect(values)


BAD_VECTORS = [
    (torch.ones(4), ValueError, r"`v` must have shape \(3,\) or \(3, m\).*got \(4,\)"),
    (torch.ones(1, 3), ValueError, r"got \(1, 3\)"),
    (torch.ones(3, 1, 1), ValueError, r"got \(3, 1, 1\)"),
    (torch.ones(()), ValueError, r"got \(\)"),
    ([1.0, 2.0, 3.0], TypeError, "`v` must be a torch.Tensor; got list"),
    (torch.ones(3, dtype=torch.float64), TypeError, r"Convert it with .to\(torch.float32\)"),
    (torch.ones(3, device="meta"), ValueError, "parameters, cpu; got meta"),
]


@pytest.mark.parametrize(("vector", "kind", "message"), BAD_VECTORS)
def test_vectors_that_do_not_fit_are_refused(vector, kind, message):
    with pytest.raises(kind, match=message):
        as_parameters(tensor(3)).check_vector(vector)


def test_a_value_of_another_structure_is_named_with_its_place():
    params = as_parameters({"a": [tensor(1), {"b": tensor(1)}]})
    with pytest.raises(ValueError, match=r"a dict with the keys \['b'\] at 'a.1'; got dict of 1"):
        params.collect({"a": [None, {"c": None}]})
    params = as_parameters({"a": deque([tensor(1), tensor(2)])})
    assert params.names == ("a.0", "a.1")
    values = params.collect({"a": deque([torch.ones(1), None])})
    torch.testing.assert_close(params.flatten(values), torch.tensor([1.0, 0.0, 0.0]))
    with pytest.raises(ValueError, match="a deque of the same structure at 'a'; got list of 2"):
        params.collect({"a": [None, None]})


def test_restore_refuses_values_of_another_length():
    params: Parameters = as_parameters([tensor(3), tensor(1)])
    with pytest.raises(ValueError, match=r"`values` must have shape \(4,\).*got \(3,\)"):
        params.restore(torch.ones(3))
    with pytest.raises(ValueError, match=r"`values` must have shape \(2,\).*got \(1,\)"):
        params.restore([torch.ones(3)])
