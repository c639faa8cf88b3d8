"""Solvers inside TorchOpt, and the operators of curvlinops inside the solvers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import lowrank_inverse as li

torch = pytest.importorskip("torch")

from torch import Tensor, nn

from lowrank_inverse_torch import HessianOperator, as_solve, hypergradient

F64 = torch.float64
DIM, NUM = 4, 12


# Ridge regression with a penalty for each coefficient: what custom_root is to differentiate.


def data() -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(1)
    return torch.from_numpy(rng.standard_normal((NUM, DIM))), torch.from_numpy(
        rng.standard_normal(NUM)
    )


def stationarity(params: tuple[Tensor, Tensor], penalty: Tensor) -> Any:
    X, y = data()
    w = torch.cat(params)
    gradient = X.mT @ (X @ w - y) / NUM + penalty.exp() * w
    return gradient[:1], gradient[1:]


def fit(init: Any, penalty: Tensor) -> tuple[Tensor, Tensor]:
    X, y = data()
    w = torch.linalg.solve(X.mT @ X / NUM + torch.diag(penalty.exp()), X.mT @ y / NUM)
    return w[:1], w[1:]


def exact_gradient(penalty: Tensor) -> Tensor:
    penalty = penalty.clone().requires_grad_()
    value = (torch.cat(fit(None, penalty)) ** 3).sum()
    return torch.autograd.grad(value, penalty)[0]


def custom_root_of_its_signature(optimality_fn: Any, argnums: int, solve: Any) -> Any:
    """Stand in for TorchOpt's decorator where it is not installed: ``u = solve(matvec, -g)``."""

    def decorator(solver_fn: Any) -> Any:
        class Root(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, init: Any, penalty: Tensor) -> Any:
                ctx.out = tuple(t.detach() for t in solver_fn(init, penalty))
                ctx.save_for_backward(penalty)
                return tuple(t.clone() for t in ctx.out)

            @staticmethod
            def backward(ctx: Any, *grads: Tensor) -> Any:
                (penalty,) = ctx.saved_tensors
                _, pull = torch.func.vjp(lambda p: optimality_fn(p, penalty), ctx.out)
                u = solve(lambda v: pull(v)[0], tuple(-g for g in grads))
                _, by_penalty = torch.func.vjp(lambda h: optimality_fn(ctx.out, h), penalty)
                return None, by_penalty(u)[0]

        return Root.apply

    assert argnums == 1
    return decorator


@pytest.mark.parametrize("whose", ["TorchOpt's", "its signature"])
@pytest.mark.parametrize("solver", [li.CG(rtol=1e-12), li.NystromCG(rank=2, rtol=1e-12)], ids=str)
def test_custom_root_of_torchopt_differentiates_with_it(solver, whose):
    if whose == "TorchOpt's":
        implicit = pytest.importorskip(
            "torchopt.diff.implicit", reason="TorchOpt is not installed: pip install torchopt"
        )
        custom_root = implicit.custom_root
    else:
        custom_root = custom_root_of_its_signature
    train = custom_root(stationarity, argnums=1, solve=as_solve(solver, rng=0, sign=1))(fit)
    penalty = torch.linspace(-2, 0, DIM, dtype=F64, requires_grad=True)
    init = (torch.zeros(1, dtype=F64), torch.zeros(DIM - 1, dtype=F64))
    (torch.cat(train(init, penalty)) ** 3).sum().backward()
    assert torch.allclose(penalty.grad, exact_gradient(penalty.detach()), rtol=1e-8)


# curvlinops.


def network() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return model, torch.randn(10, 3, dtype=F64), torch.arange(10) % 2


@pytest.mark.parametrize("kind", ["HessianLinearOperator", "GGNLinearOperator"])
def test_the_operators_of_curvlinops_are_solved_with(kind):
    curvlinops = pytest.importorskip(
        "curvlinops", reason="it is not installed: pip install curvlinops-for-pytorch"
    )
    model, x, y = network()
    params = [p for p in model.parameters() if p.requires_grad]
    H = getattr(curvlinops, kind)(model, nn.CrossEntropyLoss(), params, [(x, y)])
    n = H.shape[0]
    b = torch.linspace(-1, 1, n, dtype=F64)
    dense = H @ torch.eye(n, dtype=F64)
    if kind == "HessianLinearOperator":
        ours = HessianOperator(lambda: nn.functional.cross_entropy(model(x), y), model)
        assert torch.allclose(dense, ours @ torch.eye(n, dtype=F64), atol=1e-12)
    wanted = torch.linalg.solve(dense + 5 * torch.eye(n, dtype=F64), b)
    solvers: list[Any] = [
        li.CG(damping=5.0, rtol=1e-12),
        li.NystromCG(rank=5, damping=5.0, rtol=1e-12),
    ]
    if kind.startswith("GGN"):  # semidefinite
        solvers.append(li.Nystrom(rank=n, damping=5.0))
    for solver in solvers:
        found = li.solve(H, b, solver=solver, rng=0).value
        assert isinstance(found, Tensor)
        assert float((found - wanted).norm() / wanted.norm()) < 1e-8


# Optimizers.


def test_the_gradients_accumulate_for_any_optimizer_of_torch():
    X, y = data()
    penalty = torch.zeros(DIM, dtype=F64, requires_grad=True)
    for optimizer in (torch.optim.SGD([penalty], lr=0.1), torch.optim.AdamW([penalty], lr=0.1)):
        w = torch.cat(fit(None, penalty.detach())).requires_grad_()
        optimizer.zero_grad()
        hypergradient(
            lambda w=w: 0.5 * ((X @ w - y) ** 2).mean() + 0.5 * (penalty.exp() * w**2).sum(),
            lambda w=w: (w**3).sum(),
            w,
            penalty,
            solver=li.CG(rtol=1e-12),
            accumulate_grad=True,
        )
        assert torch.allclose(penalty.grad, exact_gradient(penalty.detach()), rtol=1e-8)
        before = penalty.detach().clone()
        optimizer.step()
        assert not torch.equal(penalty, before)


def test_a_matrix_that_is_not_symmetric_is_warned_of():
    A = torch.tensor([[2.0, 1.0], [-1.0, 2.0]], dtype=torch.float64)
    b = torch.ones(2, dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match="`matvec` is not symmetric"):
        as_solve(li.CG())(lambda v: A @ v, b)
