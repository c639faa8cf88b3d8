"""Second derivatives that torch by itself gets wrong, or hides."""

from __future__ import annotations

import threading
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils import weight_norm as old_weight_norm

import lowrank_inverse as li
from lowrank_inverse_torch import GaussNewtonOperator, HessianOperator, hypergradient

F64 = torch.float64
EPS = torch.finfo(F64).eps


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def dense(operator: Any) -> Tensor:
    return operator @ torch.eye(operator.shape[0], dtype=operator.dtype)


# Gradient hooks.


@pytest.mark.parametrize("hook", [lambda g: 0 * g, lambda g: 0.1 * g, lambda g: g.clamp(-1, 1)])
@pytest.mark.parametrize("is_leaf", [True, False])
def test_hooks_on_parameters_and_hyperparameters_are_set_aside(hook, is_leaf):
    w = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)
    w = w if is_leaf else w * 1
    h = torch.tensor([0.5, 0.5], dtype=F64, requires_grad=True)
    for tensor in (w, h):
        tensor.register_hook(hook)

    def inner() -> Tensor:
        return ((w - h) ** 2).sum() + (w**4).sum()

    out = hypergradient(inner, lambda: (w**2 + h).sum(), w, h, solver=li.CG(damping=1.0))
    curvature = torch.tensor([14.0, 50.0], dtype=F64)
    # ∂²f/∂w∂h = -2, ∂g/∂w = 2 w and ∂g/∂h = 1.
    assert relative(out.grads, 1 + 2 * 2 * w.detach() / (curvature + 1)) < 1e-9
    assert relative(dense(HessianOperator(inner, w)), curvature.diag()) < 10 * EPS
    assert out.info.inner_grad_norm == pytest.approx((2 * (w - h) + 4 * w**3).norm().item())
    (grad,) = torch.autograd.grad((3 * w).sum(), w)
    assert torch.equal(grad, hook(torch.full_like(w, 3.0)))  # and are back again


def test_hooks_come_back_after_an_error():
    w = torch.ones(2, dtype=F64, requires_grad=True)
    w.register_hook(lambda g: 2 * g)
    with pytest.raises(ZeroDivisionError):
        HessianOperator(lambda: 1 / 0, w)
    assert torch.equal(torch.autograd.grad(w.sum(), w)[0], torch.full_like(w, 2.0))


# Weight normalisation: the fused kernel takes its norms for constants.


def normalised(kind: str, dim: int) -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    layer = nn.Linear(5, 4, dtype=F64)
    layer = parametrizations.weight_norm(layer, dim=dim) if kind == "new" else old_norm(layer, dim)
    return layer, dict(layer.named_parameters())


def old_norm(layer: nn.Module, dim: int) -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return old_weight_norm(layer, dim=dim)


@pytest.mark.parametrize("kind", ["new", "old"])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("num_closures", [1, 2])
def test_weight_norm_has_the_hessian_of_its_formula(kind, dim, num_closures):
    layer, params = normalised(kind, dim)
    keys = {"new": ("parametrizations.weight.original0", "parametrizations.weight.original1")}
    g, v = (params[key] for key in keys.get(kind, ("weight_g", "weight_v")))
    x = torch.randn(6, 5, dtype=F64)

    def by_hand() -> Tensor:
        weight = g * v / v.norm(dim=1 - dim, keepdim=True)
        return torch.tanh(x @ weight.mT + params["bias"]).square().sum()

    closures = [lambda: torch.tanh(layer(x)).square().sum()] * num_closures
    H = dense(HessianOperator(closures, layer))
    assert relative(H, dense(HessianOperator(by_hand, layer))) < 100 * EPS


def test_an_evaluated_loss_of_a_weight_norm_is_refused_and_its_gauss_newton_matrix_is_right():
    layer, params = normalised("new", 0)
    x = torch.randn(6, 5, dtype=F64)
    with pytest.raises(RuntimeError, match=r"weight_norm treats its norms as constants.*closure"):
        HessianOperator(layer(x).square().sum(), layer)
    G = dense(GaussNewtonOperator(lambda z: z.square().sum() / 2, lambda: layer(x), layer))
    J = torch.autograd.functional.jacobian(
        lambda *tensors: torch.func.functional_call(
            layer, dict(zip(params, tensors, strict=True)), x
        ),
        tuple(params.values()),
    )
    J = torch.cat([part.reshape(24, -1) for part in J], dim=1)
    assert relative(G, J.mT @ J) < 100 * EPS


# Embeddings.


def embedded(**options: Any) -> tuple[nn.Embedding, Any, Tensor]:
    torch.manual_seed(0)
    embedding = nn.Embedding(7, 3, dtype=F64, **options)
    tokens = torch.randint(0, 7, (6, 2))
    h = torch.zeros(6, dtype=F64, requires_grad=True)

    def inner() -> Tensor:
        return (h.sigmoid() * (embedding(tokens).sum(1) ** 4).sum(1)).mean()

    return embedding, inner, h


def test_sparse_gradients_of_an_embedding_equal_dense_ones():
    def answers(sparse: bool) -> tuple[Tensor, Tensor]:
        embedding, inner, h = embedded(sparse=sparse)
        out = hypergradient(
            inner, lambda: embedding(torch.arange(4)).square().sum(), embedding, h,
            solver=li.Exact(damping=1.0),
        )  # fmt: skip
        return out.grads, dense(HessianOperator(inner, embedding))

    for found, wanted in zip(answers(True), answers(False), strict=True):
        assert relative(found, wanted) < 100 * EPS


def test_an_embedding_that_scales_its_rows_may_appear_in_both_losses():
    embedding, inner, h = embedded(max_norm=0.5)
    tokens = torch.arange(7)
    out = hypergradient(
        inner, lambda: embedding(tokens).sum(), embedding, h, solver=li.CG(damping=1.0)
    )
    assert (embedding.weight.norm(dim=1) < 0.5 + 1e-6).all()
    again = hypergradient(
        inner, lambda: embedding(tokens).sum(), embedding, h, solver=li.CG(damping=1.0)
    )
    assert relative(out.grads, again.grads) < 1e-9


# One model, several threads.


def test_threads_that_share_a_module_get_the_answer_of_one_and_leave_the_module_as_it_was():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)
    ).double()
    x, h = torch.randn(8, 4, dtype=F64), torch.zeros(8, dtype=F64, requires_grad=True)

    def inner() -> Tensor:
        model.train()
        return (h.sigmoid() * model(x).square().sum(1)).mean()

    def run() -> Tensor:
        return hypergradient(
            inner, lambda: model(x).sum(), model, h, solver=li.CG(damping=1.0, max_steps=5)
        ).grads

    model.eval()
    buffers = {name: (id(b), b.clone()) for name, b in model.named_buffers()}
    wanted, answers = run(), []
    threads = [threading.Thread(target=lambda: answers.append(run())) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 6
    assert all(torch.equal(answer, wanted) for answer in answers)
    assert not model.training
    for name, b in model.named_buffers():
        assert id(b) == buffers[name][0]
        assert torch.equal(b, buffers[name][1])
