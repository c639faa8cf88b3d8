"""Second derivatives that are not those of the loss are found by differences of gradients."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn
from torch.nn.utils import parametrizations

import lowrank_inverse as li
from lowrank_inverse.bilevel.hessian_check import compare, directions
from lowrank_inverse_torch import check_hessian, hypergradient

F32, F64 = torch.float32, torch.float64


def regression(dtype: torch.dtype, first: nn.Module | None = None) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(first or nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)
    x, y = torch.randn(40, 8, dtype=dtype), torch.randn(40, 3, dtype=dtype)
    return model, lambda: ((model(x) - y) ** 2).mean()


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("seed", range(3))
def test_the_hessian_of_a_smooth_loss_agrees(dtype, seed):
    model, loss = regression(dtype)
    for losses in (loss, [loss, lambda: 2 * loss()]):
        check = check_hessian(losses, model, seed=seed)
        assert check.ok
        assert check.relative_error <= check.tolerance == torch.finfo(dtype).eps ** 0.25
        assert check.explain().startswith("products with the Hessian agree")


@pytest.mark.parametrize("dtype", [F32, F64])
def test_weights_from_a_detached_loss_are_found(dtype):
    x, y = torch.randn(30, 3, dtype=dtype), torch.randn(30, dtype=dtype)
    w = torch.zeros(3, dtype=dtype, requires_grad=True)

    def inner() -> Tensor:
        losses = (x @ w - y) ** 2
        return (torch.sigmoid(-losses.detach()) * losses).mean()

    check = check_hessian(inner, w)
    assert not check.ok
    assert "differ by" in check.explain()
    assert "detached" in check.explain()


class SavesANumber(torch.autograd.Function):
    """The cube, with a derivative that takes x**2 for a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = 3 * x.detach() ** 2
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.slope


def test_the_block_that_disagrees_is_named():
    params = {name: torch.ones(2, dtype=F64, requires_grad=True) for name in "abc"}

    def loss() -> Tensor:
        return sum((p**4).sum() for p in params.values()) + SavesANumber.apply(params["b"]).sum()

    check = check_hessian(loss, params)
    assert not check.ok
    assert check.worst == "b"
    assert check.blocks["a"] < 1e-6
    assert "most in 'b'" in check.explain()


def test_spectral_normalisation_is_another_function_in_training_mode():
    model, loss = regression(F64, parametrizations.spectral_norm(nn.Linear(8, 16)))
    buffers = [b.clone() for b in model.buffers()]
    check = check_hessian(loss, model)
    assert not check.ok
    assert check.worst == "0.parametrizations.weight.original"
    assert all(map(torch.equal, buffers, model.buffers()))
    model.eval()
    assert check_hessian(loss, model).ok


def test_dropout_has_one_mask_and_a_moving_loss_is_unclear():
    model, loss = regression(F64)
    model.append(nn.Dropout(0.5))
    assert check_hessian(loss, model).ok
    w, factors = torch.ones(2, requires_grad=True), itertools.count(1.0)
    check = check_hessian(lambda: (next(factors) * w**2).sum(), w)
    assert not check.ok
    assert check.explain().startswith("unclear")


def test_a_kink_beside_the_point_makes_it_unclear_and_not_wrong():
    w = torch.full((50,), 1e-9, dtype=F64, requires_grad=True)
    x = torch.randn(50, 50, dtype=F64)
    check = check_hessian(
        lambda: (torch.relu(x @ w) + w).square().sum() + torch.relu(x @ w).sum(), w
    )
    assert check.uncertainty > 0.1
    assert "kinks" in check.explain()


def test_a_linear_loss_has_no_error():
    w = torch.ones(3, dtype=F64, requires_grad=True)
    check = check_hessian(lambda: w.sum(), w)
    assert check.ok
    assert check.relative_error == 0


def test_parameters_come_back_with_their_memory_versions_graphs_and_grads():
    model, loss = regression(F64)
    own = loss()
    own.backward(retain_graph=True)
    before = [(p.data_ptr(), p._version, p.grad) for p in model.parameters()]
    check_hessian(loss, model)
    assert [(p.data_ptr(), p._version, p.grad) for p in model.parameters()] == before
    own.backward()  # the user's graph is as good as before
    with pytest.raises(ZeroDivisionError):
        check_hessian(lambda: own / 0 if False else 1 / 0, model)
    assert [p.data_ptr() for p in model.parameters()] == [pointer for pointer, *_ in before]


def test_a_tensor_in_the_place_of_a_closure_and_parameters_that_are_no_leaves_are_refused():
    w = torch.ones(3, dtype=F64, requires_grad=True)
    with pytest.raises(TypeError, match="`loss` must be a closure"):
        check_hessian((w**2).sum(), w)
    v = 2 * w
    with pytest.raises(ValueError, match="`params` must be leaf tensors"):
        check_hessian(lambda: (v**2).sum(), v)


def test_explain_tells_of_the_check_where_a_solve_looks_wrong():
    d = torch.logspace(-4, 0, 30, dtype=F64)
    w, h = (torch.ones(30, dtype=F64, requires_grad=True) for _ in range(2))

    def explained(solver: Any) -> str:
        out = hypergradient(
            lambda: (0.5 * d * (w - h) ** 2).sum(), lambda: w.sum(), w, h, solver=solver
        )
        return out.explain()

    assert "check_hessian" not in explained(li.Exact())
    assert "check_hessian(inner_loss, params)" in explained(li.CG(max_steps=1))


def test_a_direction_is_as_large_as_each_part_of_the_parameters():
    theta = np.concatenate([np.full(500, 1e-3), np.full(500, 1e3), np.zeros(500)])
    v = directions(theta, [500, 0, 500, 500], 0)
    small, large, zero = (np.sqrt(np.mean(part**2)) for part in np.split(v, 3))
    assert small == pytest.approx(1e-3, rel=0.2)
    assert large == pytest.approx(1e3, rel=0.2)
    assert zero == pytest.approx(np.sqrt(np.mean(theta**2)), rel=0.2)


def test_the_error_is_relative_to_the_larger_of_product_and_difference():
    g = np.zeros(2)
    check = compare(np.array([1.0, 0.0]), (g, g, g), 1e-3, ["a", "b"], [1, 1], 2.0**-52)
    assert check.relative_error == 1
    assert check.blocks == {"a": 1.0, "b": 0.0}


@pytest.mark.parametrize(
    "solver", [li.Exact(damping=1.0), li.Nystrom(rank=8, damping=1.0), li.NystromCG(rank=8)]
)
def test_a_solver_that_sees_entries_finds_them_asymmetric(solver):
    torch.manual_seed(0)
    x = torch.randn(6, 4, dtype=F64)
    h = torch.ones(6, dtype=F64, requires_grad=True)
    w = torch.randn(4, 2, dtype=F64, requires_grad=True)

    class Scaled(torch.autograd.Function):
        """Each column over its norm, which the derivative takes for a constant."""

        @staticmethod
        def forward(ctx: Any, w: Tensor) -> Tensor:
            ctx.norm = w.detach().norm(dim=0)
            ctx.save_for_backward(w)
            return w / ctx.norm

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            (w,) = ctx.saved_tensors
            return (g - w * (w * g).sum(0) / ctx.norm**2) / ctx.norm

    def run(scaled: Any) -> Any:
        return hypergradient(
            lambda: (h * torch.tanh(x @ scaled(w)).sum(1) ** 2).mean() + (w**2).sum(),
            lambda: w.sum(), w, h, solver=solver,
        ).info  # fmt: skip

    names = [one.name for one in run(Scaled.apply).findings()]
    assert "asymmetric" in names
    right = run(lambda w: w / w.norm(dim=0))
    assert right.asymmetry < 1e-12
    assert "asymmetric" not in [one.name for one in right.findings()]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_weight_that_depends_on_a_detached_loss_is_a_finding(dtype):
    torch.manual_seed(0)
    x, y = torch.randn(30, 3, dtype=dtype), torch.randn(30, dtype=dtype)
    a = torch.tensor(0.3, dtype=dtype, requires_grad=True)
    w = torch.randn(3, dtype=dtype, requires_grad=True)
    at = w.detach().clone()

    def weighted(detached: bool) -> Any:
        losses = (x @ w - y) ** 2
        kept = losses.detach() if detached else losses
        assert losses.detach().shape == losses.shape  # to look at: no fault
        return (torch.sigmoid(-a * kept) * losses).mean() + 0.05 * (w**2).sum()

    def run(detached: bool) -> Any:
        return hypergradient(
            lambda: weighted(detached), lambda: ((w - 1) ** 2).sum(), w, a, solver=li.Exact()
        ).info

    wrong, right = run(True), run(False)
    assert "wrong_hessian" in [one.name for one in wrong.findings()]
    assert wrong.hessian_check.relative_error > 0.1
    assert right.hessian_check.ok
    assert "wrong_hessian" not in [one.name for one in right.findings()]
    assert torch.equal(w, at)


def test_a_loss_that_detaches_nothing_is_not_checked():
    w = torch.randn(3, dtype=F64, requires_grad=True)
    a = torch.tensor(0.3, dtype=F64, requires_grad=True)
    out = hypergradient(lambda: (w**2).sum() * a, lambda: w.sum(), w, a)
    assert out.info.hessian_check is None
