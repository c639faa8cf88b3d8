"""Curvature operators of live models against dense oracles on the flattened parameters."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F
from torch import Tensor, nn

from lowrank_inverse_torch.curvature.gauss_newton import GaussNewtonOperator
from lowrank_inverse_torch.curvature.hessian import HessianOperator, hessian_columns, hvp
from lowrank_inverse_torch.parameters import as_parameters
from tests.adapters.torch.models import (
    Tied,
    Unused,
    Written,
    assert_unchanged,
    batchnorm,
    dead_relu,
    frozen,
    mlp,
    same,
    snapshot,
)

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 3, 3)), nn.Conv2d(1, 2, 2), nn.Softplus(), nn.Flatten(), nn.Linear(8, 3)
    )


def cross_entropy(z: Tensor) -> Tensor:
    return F.cross_entropy(z, torch.arange(len(z)) % 3)


class Case(NamedTuple):
    make: Callable[[], nn.Module]
    num_features: int = 3
    loss: Callable[[Tensor], Tensor] = cross_entropy
    training: bool = True

    def build(self, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
        torch.manual_seed(1)
        model = self.make().to(dtype).train(self.training)
        if isinstance(model, Written):
            model.also = model.norm.running_mean  # to(dtype) parts them
        return model, torch.randn(6, self.num_features, dtype=dtype)


CASES = {
    "mlp": Case(mlp),
    "tied": Case(Tied),
    "frozen": Case(frozen),
    "batchnorm": Case(batchnorm),
    "batchnorm_eval": Case(batchnorm, training=False),
    "dropout": Case(lambda: nn.Sequential(nn.Linear(3, 6), nn.Dropout(0.4), nn.Linear(6, 3))),
    "dead_relu": Case(dead_relu),
    "unused": Case(Unused),
    "conv": Case(conv, num_features=9),
    "linear": Case(lambda: nn.Linear(3, 2), loss=lambda z: z.sum()),
    "quartic": Case(mlp, loss=lambda z: (z**4).sum() / 10),
    "buffers": Case(Written),
}

each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
each_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def flat_function(model: nn.Module, f: Callable[[nn.Module], Tensor]) -> tuple[Any, Tensor]:
    """Write f(model) as a function of the flat vector of its distinct, trainable parameters.

    On a fresh copy at each call, with the random state of now. The parameters are set in the
    modules' own dicts, so that nothing of the code under test is used.
    """
    pristine, state = copy.deepcopy(model), torch.get_rng_state()
    values = [p.detach().clone() for p in model.parameters() if p.requires_grad]

    def function(flat: Tensor) -> Tensor:
        torch.set_rng_state(state)
        parts = iter(flat.split([value.numel() for value in values]))
        model, placed = copy.deepcopy(pristine), {}
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and parameter.requires_grad:
                    if id(parameter) not in placed:
                        placed[id(parameter)] = parameter, next(parts).reshape(parameter.shape)
                    del module._parameters[name]
                    object.__setattr__(module, name, placed[id(parameter)][1])
        return f(model)

    return function, torch.cat([value.reshape(-1) for value in values])


def dense_hessian(model: nn.Module, f: Callable[[nn.Module], Tensor]) -> Tensor:
    function, flat = flat_function(model, f)
    state = torch.get_rng_state()
    hessian = torch.autograd.functional.hessian(function, flat)
    torch.set_rng_state(state)
    return hessian


def assert_close(actual: Tensor, expected: Tensor, tolerance: float | None = None) -> None:
    tolerance = TOLERANCE[expected.dtype] if tolerance is None else tolerance
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    scale = max(1.0, expected.abs().max().item() if expected.numel() else 0.0)
    assert (actual - expected).abs().max().item() <= tolerance * scale


# The Hessian


@each_dtype
@each_case
def test_hessian_operator_equals_the_dense_hessian_at_every_chunk_size(case, dtype):
    model, x = case.build(dtype)
    expected = dense_hessian(model, lambda m: case.loss(m(x)))
    n = expected.shape[0]
    v = torch.linspace(-1, 1, n, dtype=dtype)  # moves no random state between the two
    for chunk_size in (1, 3, 1000):
        H = HessianOperator(lambda: case.loss(model(x)), model, chunk_size=chunk_size)
        assert H.shape == (n, n)
        assert H.dtype == dtype
        assert_close(H @ torch.eye(n, dtype=dtype), expected)
        assert_close(H.columns(range(n)), expected)
        assert_close(H @ v, expected @ v)
        assert not (H @ v).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_products_are_right_to_their_few_digits(dtype):
    x = torch.tensor([0.5, 1.0, 1.5], dtype=dtype, requires_grad=True)
    H = HessianOperator(lambda: (x[0] * x[1] * x[2]).sin(), [x])
    double = x.detach().double()
    expected = torch.func.hessian(lambda y: y.prod().sin())(double)
    assert H.dtype == dtype
    columns = H.columns([2, 0])
    assert columns.dtype == dtype
    assert_close(columns.double(), expected[:, [2, 0]], tolerance=0.02)


def test_tensors_without_elements_are_passed_over():
    parts = [torch.ones(2, requires_grad=True), torch.zeros(0, requires_grad=True)]
    parts.append(torch.ones(1, requires_grad=True))
    H = HessianOperator(lambda: torch.cat(parts).pow(3).sum(), parts)
    assert_close(H.columns([2, 0]), torch.tensor([[0.0, 6.0], [0.0, 0.0], [6.0, 0.0]]))


def test_products_are_counted_one_for_each_column():
    x = torch.ones(4, requires_grad=True)
    H = HessianOperator([lambda: (x**3).sum(), lambda: (x**2).sum()], x, chunk_size=2)
    assert H.num_products == 0
    H @ torch.ones(4)
    assert H.num_products == 1
    H @ torch.ones(4, 3)
    assert H.num_products == 4
    H.columns([0, 2])
    assert H.num_products == 6
    assert H.columns(i for i in ()).shape == (H @ torch.ones(4, 0)).shape == (4, 0)
    assert H.num_products == 6


def test_loss_and_gradient_are_those_of_the_loss():
    model, x = CASES["mlp"].build()
    H = HessianOperator(lambda: cross_entropy(model(x)), model)
    loss = cross_entropy(model(x))
    loss.backward()
    assert_close(H.loss, loss.detach())
    assert_close(H.gradient, torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
    assert not H.loss.requires_grad
    assert not H.gradient.requires_grad


def test_an_evaluated_loss_serves_and_its_graph_is_left_to_the_user():
    model, x = CASES["mlp"].build()
    loss = cross_entropy(model(x))
    expected = dense_hessian(model, lambda m: cross_entropy(m(x)))
    H = HessianOperator(loss, model)
    assert_close(H.columns([3]), expected[:, [3]])
    loss.backward()
    assert model[0].weight.grad is not None


def test_a_loss_of_shape_one_is_a_scalar():
    x = torch.ones(2, requires_grad=True)
    assert_close(hvp(lambda: (x**3).sum(0, keepdim=True), x, torch.ones(2)), torch.full((2,), 6.0))


def test_parameters_may_be_tensors_that_are_not_leaves():
    leaf = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    inner = leaf.exp()
    H = HessianOperator(lambda: (inner**3).sum(), [inner])
    assert_close(H @ torch.ones(2, dtype=torch.float64), 6 * inner.detach())


def test_the_operator_works_within_no_grad():
    model, x = CASES["mlp"].build()
    expected = dense_hessian(model, lambda m: cross_entropy(m(x)))
    with torch.no_grad():
        H = HessianOperator(lambda: cross_entropy(model(x)), model)
        assert_close(H.columns([3]), expected[:, [3]])
        assert not torch.is_grad_enabled()


def test_checkpointed_modules_serve_without_reentrance():
    from torch.utils.checkpoint import checkpoint

    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh()).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    expected = dense_hessian(model, lambda m: cross_entropy(m(x)))
    before = snapshot(model)
    H = HessianOperator(lambda: cross_entropy(checkpoint(model, x, use_reentrant=False)), model)
    assert_close(H.columns(range(18)), expected)
    assert_unchanged(model, before)


# Lists of closures


@each_case
def test_a_list_of_closures_is_the_mean_of_their_hessians(case):
    model, x = case.build()

    def mean(m):
        return (case.loss(m(x[:4])) + case.loss(m(x[2:]) * 2) + case.loss(m(x[1:4]))) / 3

    expected = dense_hessian(model, mean)
    closures = [
        lambda: case.loss(model(x[:4])),
        lambda: case.loss(model(x[2:]) * 2),
        lambda: case.loss(model(x[1:4])),
    ]
    H = HessianOperator(closures, model, chunk_size=3)
    n = H.shape[0]
    assert_close(H @ torch.eye(n, dtype=torch.float64), expected)
    assert_close(H.columns(range(n)), expected)
    whole = HessianOperator(lambda: mean(model), model)
    assert_close(H.gradient, whole.gradient)
    assert_close(H.loss, whole.loss)


def test_dropout_masks_of_a_list_stay_the_same_from_product_to_product():
    model, x = CASES["dropout"].build()
    H = HessianOperator([lambda: cross_entropy(model(x)), lambda: cross_entropy(model(x))], model)
    v = torch.randn(H.shape[0], dtype=torch.float64)
    first = H @ v
    torch.randn(5)
    assert torch.equal(H @ v, first)
    assert not torch.equal(H._graphs.losses[0], H._graphs.losses[1])


def test_a_block_builds_the_graph_of_each_batch_once_and_only_one_lives_at_a_time():
    weights = torch.ones(3, requires_grad=True)
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    built: list[int] = []

    class Saved:
        def __init__(self, value: Tensor, batch: int) -> None:
            self.value, self.batch = value, batch

    def closure(batch: int) -> Callable[[], Tensor]:
        def pack(value: Tensor) -> Saved:
            saved = Saved(value, batch)
            alive.add(saved)
            return saved

        def loss() -> Tensor:
            assert not alive  # the graphs of all other batches are gone
            built.append(batch)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.value):
                return ((weights * torch.full((3,), batch + 1.0)) ** 3).sum()

        return loss

    H = HessianOperator([closure(0), closure(1), closure(2)], weights, chunk_size=2)
    assert built == [0, 1, 2]
    result = H @ torch.eye(3)
    assert built == [0, 1, 2] * 2
    assert_close(result, torch.eye(3) * 6 * (1 + 8 + 27) / 3)
    assert not alive


def test_a_closure_that_takes_a_new_batch_at_each_call_is_reported():
    weights = torch.ones(3, requires_grad=True)
    batches = iter(torch.randn(10, 3))
    closures = [lambda: (weights**2).sum(), lambda: ((weights * next(batches)) ** 2).sum()]
    H = HessianOperator(closures, weights)
    with pytest.raises(RuntimeError, match=r"Closure 1 returned the loss .* same batch"):
        H @ torch.ones(3)


# The model comes back


def fill_grads(model: nn.Module) -> None:
    for i, parameter in enumerate(model.parameters()):
        if i % 2 == 0:
            parameter.grad = torch.full_like(parameter, 7.0)


@each_case
def test_the_model_comes_back_as_it_was(case):
    model, x = case.build()
    fill_grads(model)
    before = snapshot(model)
    H = HessianOperator(lambda: case.loss(model(x)), model, chunk_size=2)
    H @ torch.ones(H.shape[0], 3, dtype=H.dtype)
    H.columns([0, 1, 2])
    assert_unchanged(model, before)
    H = HessianOperator([lambda: case.loss(model(x)), lambda: case.loss(model(x[1:]))], model)
    H @ torch.ones(H.shape[0], dtype=H.dtype)
    assert_unchanged(model, before)
    G = GaussNewtonOperator(case.loss, lambda: model(x), model)
    G @ torch.ones(G.shape[0], dtype=G.dtype)
    assert_unchanged(model, before)


@pytest.mark.parametrize("zero_grad", [True, False])
def test_what_a_closure_does_to_the_model_is_undone(zero_grad):
    model, x = CASES["batchnorm"].build()
    fill_grads(model)
    before = snapshot(model)

    def closure() -> Tensor:
        if zero_grad:
            model.zero_grad()
        cross_entropy(model(x)).backward()
        model.eval()
        torch.manual_seed(5)
        return cross_entropy(model(x))

    HessianOperator(closure, model)
    assert_unchanged(model, before)


def test_the_model_comes_back_after_an_error():
    model, x = CASES["batchnorm"].build()
    fill_grads(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match="finite"):
        HessianOperator(lambda: model(x + torch.rand(())).sum() / 0, model)
    assert_unchanged(model, before)


def test_a_module_beside_bare_tensors_is_guarded_when_it_is_named():
    model, x = CASES["batchnorm"].build()
    before = snapshot(model)
    for module in (model, [model]):
        H = HessianOperator(lambda: cross_entropy(model(x)), model.parameters(), module=module)
        H.columns([1])
        hvp(lambda: cross_entropy(model(x)), model.parameters(), H.gradient, module=module)
        hessian_columns(lambda: cross_entropy(model(x)), model.parameters(), [0], module=module)
        assert_unchanged(model, before)
    HessianOperator(lambda: cross_entropy(model(x)), model.parameters())
    assert not same(before["values"], snapshot(model)["values"])


def test_graphs_that_the_user_built_before_stay_usable():
    model, x = CASES["batchnorm"].build()
    loss = cross_entropy(model(x))
    HessianOperator(lambda: cross_entropy(model(x)), model).columns([0])
    loss.backward()
    assert model[0].weight.grad is not None


def test_the_operator_stays_usable_after_the_user_runs_the_model_again():
    model, x = CASES["batchnorm"].build()
    H = HessianOperator(lambda: cross_entropy(model(x)), model)
    first = H.columns([0, 1])
    model(x)
    assert torch.equal(H.columns([0, 1]), first)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_dropout_masks_and_the_random_state_of_a_gpu_are_kept():
    model, x = CASES["dropout"].build()
    model, x = model.cuda(), x.cuda()
    before = torch.cuda.get_rng_state()

    def loss() -> Tensor:
        return F.cross_entropy(model(x), torch.arange(6, device="cuda") % 3)

    H = HessianOperator([loss, loss], model)
    v = torch.randn(H.shape[0], dtype=torch.float64).cuda()
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert_close(H @ v, H @ v)
    assert torch.equal(torch.cuda.get_rng_state(), before)
    assert_close(
        H.columns([0, 5]), torch.stack([H @ e for e in torch.eye(len(v)).to(v)[[0, 5]]], 1)
    )


# vjp, hvp, hessian_columns


def weighted_loss() -> tuple[nn.Module, Tensor, Tensor, Callable[..., Tensor]]:
    model, x = CASES["mlp"].build()
    weights = torch.rand(6, dtype=torch.float64, requires_grad=True)
    targets = torch.arange(6) % 3

    def loss(m: nn.Module, w: Tensor, rows: slice = slice(None)) -> Tensor:
        return (w[rows] * F.cross_entropy(m(x[rows]), targets[rows], reduction="none")).sum()

    return model, x, weights, loss


def mixed_derivative(
    model: nn.Module, w: Tensor, f: Callable[[nn.Module, Tensor], Tensor]
) -> Tensor:
    """The derivative of the gradient by w, shape (n, len(w)), by central differences of it."""
    columns = []
    for i in range(len(w)):
        step = torch.zeros_like(w)
        step[i] = 0.5  # exact: the loss is linear in w
        grads = []
        for sign in (1, -1):
            at = (w + sign * step).detach()
            parts = torch.autograd.grad(f(model, at), list(model.parameters()))
            grads.append(torch.cat([part.reshape(-1) for part in parts]))
        columns.append(grads[0] - grads[1])
    return torch.stack(columns, 1)


def test_vjp_is_the_mixed_derivative_transposed():
    model, _, weights, loss = weighted_loss()
    idle = torch.ones(2, requires_grad=True)
    H = HessianOperator(lambda: loss(model, weights) + idle.sum(), model)
    v = torch.randn(H.shape[0], dtype=torch.float64)
    got, no_path = H.vjp(v, [weights, idle])
    assert no_path is None
    assert not got.requires_grad
    assert_close(got, mixed_derivative(model, weights, loss).mT @ v)
    assert H.num_products == 0


def test_vjp_of_a_list_is_the_mean_and_takes_tensors_of_some_closures_only():
    model, _, weights, loss = weighted_loss()
    extra = torch.ones(6, dtype=torch.float64, requires_grad=True)
    H = HessianOperator(
        [
            lambda: loss(model, weights, slice(0, 3)),
            lambda: loss(model, weights, slice(3, 6)),
            lambda: loss(model, extra),
        ],
        model,
    )
    v = torch.randn(H.shape[0], dtype=torch.float64)
    got = H.vjp(v, [weights, extra])
    assert_close(got[0], mixed_derivative(model, weights, loss).mT @ v / 3)
    assert_close(got[1], mixed_derivative(model, extra, loss).mT @ v / 3)


def test_vjp_reaches_a_buffer_that_requires_grad():
    model, _, weights, loss = weighted_loss()
    model.register_buffer("weights", weights)
    H = HessianOperator(lambda: loss(model, model.weights), model)
    v = torch.randn(H.shape[0], dtype=torch.float64)
    assert_close(H.vjp(v, [weights])[0], mixed_derivative(model, weights, loss).mT @ v)
    assert model.weights is weights


def test_vjp_of_a_loss_with_constant_gradient_has_no_path():
    x, w = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    assert HessianOperator(lambda: x.sum() + w.sum(), x).vjp(torch.ones(2), [w]) == [None]


def test_hvp_answers_in_the_form_of_the_vector():
    model, x = CASES["frozen"].build()
    expected = dense_hessian(model, lambda m: cross_entropy(m(x)))
    v = torch.randn(expected.shape[0], 2, dtype=torch.float64)

    def loss() -> Tensor:
        return cross_entropy(model(x))

    params = as_parameters(model)
    assert_close(hvp(loss, model, v[:, 0]), expected @ v[:, 0])
    assert_close(hvp(loss, model, v), expected @ v)
    product = hvp(loss, model, params.restore(v[:, 0]))
    assert product["0.bias"] is None
    assert_close(params.flatten(params.collect(product)), expected @ v[:, 0])
    product = hvp(loss, model.parameters(), tuple(params.unflatten(v[:, 0])[:1]) + (None,) * 3)
    assert_close(product[0].reshape(-1), expected[:12, :12] @ v[:12, 0])


# Gauss-Newton


def dense_gauss_newton(
    model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """J^T H_L J, and its J^T grad L, from reverse-mode Jacobians."""
    function, flat = flat_function(model, lambda m: m(x).reshape(-1))
    state = torch.get_rng_state()
    outputs = function(flat)
    jacobian = torch.autograd.functional.jacobian(function, flat)
    torch.set_rng_state(state)

    def of_flat(z: Tensor) -> Tensor:
        return loss(z.reshape(len(x), -1))

    inner = torch.func.jacfwd(torch.func.jacrev(of_flat))(outputs.detach())
    slope = torch.func.jacrev(of_flat)(outputs.detach())
    return jacobian.mT @ inner @ jacobian, jacobian.mT @ slope


@each_dtype
@each_case
def test_gauss_newton_operator_equals_the_dense_product(case, dtype):
    model, x = case.build(dtype)
    expected, gradient = dense_gauss_newton(model, x, case.loss)
    for chunk_size in (1, 4):
        G = GaussNewtonOperator(case.loss, lambda: model(x), model, chunk_size=chunk_size)
        n = G.shape[0]
        assert G.dtype == dtype
        assert_close(G @ torch.eye(n, dtype=dtype), expected)
        assert_close(G.columns(range(n)), expected)
        assert_close(G.gradient, gradient)
        assert_close(G @ gradient, expected @ gradient)


def test_lists_of_a_gauss_newton_operator_pair_up_and_average():
    model, x = CASES["dropout"].build()
    scales = (1.0, 3.0)
    state = torch.get_rng_state()
    expected = 0
    for scale, rows in zip(scales, (x[:4], x[2:]), strict=True):
        expected = (
            expected + dense_gauss_newton(model, rows, lambda z, s=scale: s * z.pow(4).sum())[0] / 2
        )
        model(rows)  # moves the random state on as the closure does
    torch.set_rng_state(state)
    G = GaussNewtonOperator(
        [lambda z: z.pow(4).sum(), lambda z: 3 * z.pow(4).sum()],
        [lambda: model(x[:4]), lambda: model(x[2:])],
        model,
    )
    assert_close(G @ torch.eye(G.shape[0], dtype=torch.float64), expected)
    assert G.num_products == G.shape[0]


# Errors


W = torch.ones(3, requires_grad=True)
BAD_LOSSES = [
    (lambda: (W * float("nan")).sum(), ValueError, "`loss` must be finite; got nan"),
    (lambda: 3.0, TypeError, "`loss` must be a scalar tensor, or a closure.*got float"),
    (3.0, TypeError, "got float"),
    (lambda: torch.ones(3, requires_grad=True).sum(), ValueError, "`loss` must depend on `params`"),
    (lambda: W.detach().sum(), ValueError, "`loss` must depend on `params`.*no_grad"),
    ([], ValueError, "`loss` must hold at least one closure"),
    ([lambda: W.sum(), lambda: W], ValueError, "must be a scalar"),
]


@pytest.mark.parametrize(("loss", "kind", "message"), BAD_LOSSES)
def test_a_loss_that_cannot_be_differentiated_is_refused(loss, kind, message):
    with pytest.raises(kind, match=message):
        HessianOperator(loss, W)


@pytest.mark.parametrize(
    ("v", "kind", "message"),
    [
        (torch.ones(4), ValueError, r"`v` must have shape \(3,\) or \(3, m\)"),
        (torch.ones(3, dtype=torch.float64), TypeError, "must have the dtype of the parameters"),
        (torch.ones(3, device="meta"), ValueError, "must be on the device of the parameters"),
    ],
)
def test_a_vector_that_does_not_fit_is_refused(v, kind, message):
    H = HessianOperator(lambda: (W**3).sum(), W)
    for product in (lambda: H @ v, lambda: hvp(lambda: (W**3).sum(), W, v), lambda: H.vjp(v, [W])):
        with pytest.raises(kind, match=message.replace(r" or \(3, m\)", "")):
            product()


@pytest.mark.parametrize(
    ("indices", "kind", "message"),
    [
        (torch.tensor([1, 2, 1]), ValueError, "`indices` must be distinct"),
        (torch.tensor([True, False, False]), TypeError, "sequence of integers; got dtype bool"),
        (torch.tensor(1), TypeError, r"one-dimensional sequence of integers; .* shape \(\)"),
    ],
)
def test_tensors_that_name_no_columns_are_refused(indices, kind, message):
    with pytest.raises(kind, match=message):
        hessian_columns(lambda: (W**3).sum(), W, indices)


def test_vjp_takes_one_vector_only():
    H = HessianOperator(lambda: (W**3).sum(), W)
    with pytest.raises(ValueError, match=r"`v` must have shape \(3,\), one row"):
        H.vjp(torch.ones(3, 2), [W])


def plain_sum(z: Tensor) -> Tensor:
    return z.sum()


@pytest.mark.parametrize(
    ("loss", "outputs", "kind", "message"),
    [
        (plain_sum, lambda: (W, W), TypeError, "`outputs` must return one tensor; got tuple"),
        (
            plain_sum,
            lambda: torch.ones(3).long(),
            TypeError,
            "real and floating-point; got torch.int",
        ),
        (plain_sum, lambda: torch.ones(3), ValueError, "`outputs` must depend on `params`"),
        (lambda z: W.sum(), lambda: W**2, ValueError, "`loss` must depend on `outputs`"),
        ([plain_sum], [lambda: W, lambda: W], ValueError, "lists of the same length; got 1 and 2"),
        ([], [], ValueError, "lists of the same length; got 0 and 0"),
        (W.sum(), lambda: W**2, TypeError, "`loss` must be callable; got Tensor"),
        (plain_sum, W**2, TypeError, "`outputs` must be callable; got Tensor"),
    ],
)
def test_gauss_newton_refuses_what_it_cannot_use(loss, outputs, kind, message):
    with pytest.raises(kind, match=message):
        GaussNewtonOperator(loss, outputs, W)


def test_inference_mode_is_refused_with_the_remedy():
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match=r"inside torch.inference_mode\(\).*no_grad"),
    ):
        HessianOperator(lambda: (W**3).sum(), W)


def test_parameters_changed_after_the_operator_was_made_are_reported():
    w = torch.ones(3, requires_grad=True)
    H = HessianOperator([lambda: (w**3).sum(), lambda: (w**4).sum()], w)
    with torch.no_grad():
        w += 1
    with pytest.raises(RuntimeError, match="changed in place after this operator was made"):
        H @ torch.ones(3)


def test_a_closure_that_writes_to_its_parameters_may_do_so():
    model = nn.Embedding(4, 2, max_norm=1.0).double()
    rows = torch.tensor([0, 2])
    H = HessianOperator([lambda: model(rows).pow(4).sum()] * 2, model)
    first = H.columns([0, 1])
    assert torch.equal(H.columns([0, 1]), first)


class Once(torch.autograd.Function):
    """The square, whose derivative holds once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad * ctx.saved_tensors[0]


class Detached(torch.autograd.Function):
    """The square, whose derivative is computed outside of autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return (2 * grad * ctx.saved_tensors[0]).detach()


class Unbatchable(torch.autograd.Function):
    """The identity, whose second derivative looks at a number and so cannot be batched."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (1.0 if grad.sum().item() < 1e9 else 2.0)


def attention() -> Tensor:
    q = W.reshape(1, 1, 3, 1)
    return F.scaled_dot_product_attention(q, q, q).sum()


def reentrant() -> Tensor:
    from torch.utils.checkpoint import checkpoint

    return checkpoint(lambda x: (x * W).sum(), W * 2, use_reentrant=True)


@pytest.mark.parametrize(
    ("loss", "remedy"),
    [
        (lambda: Once.apply(W).sum(), "Write its backward with differentiable operations"),
        (
            lambda: Once.apply(W**2).pow(2).sum(),
            "Write its backward with differentiable operations",
        ),
        (lambda: Detached.apply(W).sum(), "Write that backward with differentiable operations"),
        (attention, r"SDPBackend.MATH"),
        (reentrant, r"use_reentrant=False"),
    ],
)
def test_operations_without_a_second_derivative_raise_with_the_remedy(loss, remedy):
    with pytest.raises(RuntimeError, match=remedy):
        HessianOperator(loss, W) @ torch.ones(3)
    with pytest.raises(RuntimeError, match=remedy):
        HessianOperator(loss, W, chunk_size=2) @ torch.ones(3, 2)


def test_reentrant_checkpoints_are_refused_even_where_they_only_hide_parameters():
    from torch.utils.checkpoint import checkpoint

    layer, x = nn.Linear(3, 3), torch.ones(1, 3, requires_grad=True)
    loss = checkpoint(layer, x, use_reentrant=True).pow(2).sum() + (W**2).sum()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        HessianOperator(loss, [W, *layer.parameters()])


def test_compiled_modules_raise_with_the_remedy():
    model = torch.compile(mlp(), backend="aot_eager")
    x = torch.randn(6, 3)
    with pytest.raises(RuntimeError, match=r"compiled\._orig_mod"):
        HessianOperator(lambda: cross_entropy(model(x)), model).columns([0])


def test_gauss_newton_refuses_outputs_whose_backward_cannot_be_differentiated():
    for function in (Once, Detached):
        with pytest.raises(RuntimeError, match="with differentiable operations"):
            GaussNewtonOperator(plain_sum, lambda f=function: f.apply(W), W)


def test_steps_have_zero_curvature_and_are_no_error():
    H = HessianOperator(lambda: (W.sign() * 3).sum(), W)
    assert torch.count_nonzero(H @ torch.ones(3)) == 0
    assert_close(hvp(lambda: (W.round() * W**2).sum(), W, torch.ones(3)), torch.full((3,), 2.0))


def test_what_vmap_cannot_batch_works_one_by_one_and_says_so():
    def loss() -> Tensor:
        return Unbatchable.apply(W**2).pow(2).sum()

    expected = torch.diag(12 * W.detach() ** 2)
    assert_close(HessianOperator(loss, W) @ torch.eye(3), expected)
    with pytest.raises(RuntimeError, match="chunk_size=1 takes them one by one"):
        HessianOperator(loss, W, chunk_size=3) @ torch.eye(3)


def test_a_loss_whose_graph_was_freed_raises_with_the_remedy():
    loss = (W**3).sum()
    loss.backward()
    W.grad = None
    with pytest.raises(RuntimeError, match=r"does not call backward\(\)"):
        HessianOperator(loss, W)


def test_a_tensor_of_the_loss_changed_in_place_raises_with_the_remedy():
    data = torch.ones(3)
    H = HessianOperator(lambda: ((W * data) ** 3).sum(), W)
    data += 1
    with pytest.raises(RuntimeError, match="Create a new operator"):
        H @ torch.ones(3)


def test_scipy_takes_curvature_by_a_function_of_its_own_arrays():
    linalg = pytest.importorskip("scipy.sparse.linalg")
    x = torch.linspace(0.5, 1.5, 5, dtype=torch.float64, requires_grad=True)
    H = HessianOperator(lambda: (x**4).sum() + x.prod(), x)
    dense = (H @ torch.eye(5, dtype=torch.float64)).numpy()
    assert repr(H) == "HessianOperator(n=5, dtype=torch.float64, num_products=5)"
    A = linalg.LinearOperator(
        H.shape, matvec=lambda v: H.matvec(torch.from_numpy(v)).numpy(), dtype="float64"
    )
    largest = linalg.eigsh(A, k=1, return_eigenvectors=False)[0]
    assert largest == pytest.approx(np.linalg.eigvalsh(dense)[-1])
    x, info = linalg.cg(A, np.ones(5), rtol=1e-12)
    assert info == 0
    np.testing.assert_allclose(x, np.linalg.solve(dense, np.ones(5)), rtol=1e-8)
