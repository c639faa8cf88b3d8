"""What networks bring along, in the two ways to differentiate through training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest

import lowrank_inverse as li

torch = pytest.importorskip("torch")

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from lowrank_inverse_torch import hypergradient, implicit_minimizer
from tests.adapters.torch.models import Tied, batchnorm, frozen

# The networks are not trained: the formula holds wherever they are.
pytestmark = pytest.mark.filterwarnings(
    "ignore::lowrank_inverse.bilevel.diagnostics.HypergradientWarning"
)

NUM, DIM = 8, 3


def by_hypergradient(model: nn.Module, inner: Any, outer: Any, h: Tensor) -> Tensor:
    out = hypergradient(
        lambda: inner(model, h), lambda: outer(model), model, h,
        solver=li.Exact(damping=0.2), accumulate_grad=False,
    )  # fmt: skip
    return out.grads


def by_minimizer(model: nn.Module, inner: Any, outer: Any, h: Tensor) -> Tensor:
    def called(params: Any) -> Callable[[Tensor], Tensor]:
        # The twins of tied weights follow, and frozen ones stay as they are.
        return lambda x: functional_call(model, params, (x,))

    def trainable() -> Any:
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    train = implicit_minimizer(
        lambda params, h: inner(called(params), h), solver=li.Exact(damping=0.2), module=model
    )(lambda init, h: trainable())
    return torch.autograd.grad(outer(called(train(None, h))), h)[0]


each_way = pytest.mark.parametrize(
    "gradient", [by_hypergradient, by_minimizer], ids=["hypergradient", "implicit_minimizer"]
)


def problem(dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(1)
    x, clean = torch.randn(2, NUM, DIM, dtype=dtype)
    h = torch.linspace(-1, 1, NUM, dtype=dtype, requires_grad=True)
    y = torch.arange(NUM) % 2

    def inner(model: Any, h: Tensor) -> Tensor:
        losses = F.cross_entropy(model(x).to(dtype), y, reduction="none")
        return (torch.sigmoid(h) * losses).mean()

    def outer(model: Any) -> Tensor:
        return F.cross_entropy(model(clean).to(dtype), y)

    return inner, outer, h


def dense(model: nn.Module, inner: Any, outer: Any, h: Tensor) -> Tensor:
    """Return the formula with dense derivatives by the distinct, trainable parameters."""
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    sizes = [p.numel() for p in params.values()]
    twin = copy.deepcopy(model)

    def called(theta: Tensor) -> Any:
        parts = theta.split(sizes)
        tree = {k: v.view(p.shape) for (k, p), v in zip(params.items(), parts, strict=True)}
        return lambda x: functional_call(twin, tree, (x,))

    theta = torch.cat([p.reshape(-1) for p in params.values()])
    state, t = torch.get_rng_state(), theta.clone().requires_grad_()
    H = torch.autograd.functional.hessian(lambda t: inner(called(t), h.detach()), theta)
    torch.set_rng_state(state)
    (g,) = torch.autograd.grad(inner(called(t), h), t, create_graph=True)
    torch.set_rng_state(state)
    (b,) = torch.autograd.grad(outer(called(t)), t)
    q = torch.linalg.solve(H + 0.2 * torch.eye(len(theta), dtype=theta.dtype), b)
    return -torch.autograd.grad(g @ q, h)[0]


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "tied": Tied,
    "frozen": frozen,
    "batchnorm": batchnorm,
    "layernorm": lambda: nn.Sequential(nn.Linear(DIM, 3), nn.LayerNorm(3), nn.Linear(3, 2)),
}


@each_way
@pytest.mark.parametrize("name", NETWORKS)
def test_tied_and_frozen_parameters_and_normalisation_give_the_dense_formula(gradient, name):
    inner, outer, h = problem()
    model = NETWORKS[name]().double()
    buffers = {key: b.clone() for key, b in model.named_buffers()}
    assert relative(gradient(model, inner, outer, h), dense(model, inner, outer, h)) < 1e-9
    if gradient is by_hypergradient:  # the other outer loss is evaluated by the user
        assert all(torch.equal(b, buffers[key]) for key, b in model.named_buffers())
    assert all(p.grad is None for p in model.parameters())


@each_way
def test_a_dropout_mask_of_the_inner_loss_holds_for_the_whole_solve(gradient):
    inner, outer, h = problem()
    model = nn.Sequential(nn.Linear(DIM, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def noisy(called: Any, h: Tensor) -> Tensor:
        return inner(lambda x: F.dropout(called(x), 0.4), h)

    state = torch.get_rng_state()
    found = gradient(model, noisy, outer, h)
    assert torch.equal(torch.get_rng_state(), state)
    wanted = dense(model, noisy, outer, h)
    assert relative(found, wanted) < 1e-9
    torch.manual_seed(5)  # another mask
    assert relative(gradient(model, noisy, outer, h), wanted) > 1e-2


@each_way
def test_autocast_within_the_loss_gives_the_answer_to_its_few_digits(gradient):
    inner, outer, h = problem(torch.float32)
    model = nn.Sequential(nn.Linear(DIM, 6), nn.Tanh(), nn.Linear(6, 2))
    exact = gradient(model, inner, outer, h)

    def mixed(called: Any, h: Tensor) -> Tensor:
        def half(x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                z = called(x)
            assert z.dtype == torch.bfloat16
            return z

        return inner(half, h)

    found = gradient(model, mixed, outer, h)
    assert found.dtype == torch.float32
    assert 0 < relative(found, exact) < 0.05


class Attention(nn.Module):
    def __init__(self, kernel: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.out, self.kernel = nn.Linear(1, 4), nn.Linear(4, 2), kernel

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.kernel(self.embed(x[:, :, None])).mean(dim=1))


def fused(q: Tensor) -> Tensor:
    heads = q[:, None]
    return F.scaled_dot_product_attention(heads, heads, heads)[:, 0]


def math(q: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return fused(q)


def written_out(q: Tensor) -> Tensor:
    return torch.softmax(q @ q.mT / q.shape[-1] ** 0.5, dim=-1) @ q


@each_way
def test_attention_works_with_the_math_backend(gradient):
    inner, outer, h = problem()
    found = gradient(Attention(math).double(), inner, outer, h)
    inner, outer, h = problem()
    wanted = dense(Attention(written_out).double(), inner, outer, h)
    assert relative(found, wanted) < 1e-9


@each_way
def test_fused_attention_is_refused_with_the_remedy(gradient):
    inner, outer, h = problem(torch.float32)
    with pytest.raises(RuntimeError, match=r"SDPBackend\.MATH"):
        gradient(Attention(fused), inner, outer, h)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own
@each_way
def test_compiled_modules_are_refused_with_the_remedy_and_their_original_serves(gradient):
    inner, outer, h = problem(torch.float32)
    model = nn.Sequential(nn.Linear(DIM, 3), nn.Tanh(), nn.Linear(3, 2))
    compiled = torch.compile(model, backend="aot_eager")

    with pytest.raises(RuntimeError, match=r"compiled\._orig_mod"):
        gradient(compiled, inner, outer, h)
    found = gradient(compiled._orig_mod, inner, outer, h)
    assert relative(found, dense(model, inner, outer, h)) < 1e-4


@each_way
def test_complex_parameters_are_refused_with_the_remedy(gradient):
    _, _, h = problem()
    model = nn.Linear(DIM, 2, dtype=torch.complex128)
    x = torch.randn(NUM, DIM, dtype=torch.complex128)

    def loss(called: Any, h: Tensor | None = None) -> Tensor:
        return (called(x).abs() ** 2).mean() * (1 if h is None else h.sum())

    with pytest.raises(TypeError, match=r"must be real.*Store .*real and imaginary parts"):
        gradient(model, loss, loss, h)
