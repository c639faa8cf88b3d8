"""Columns, products and hypergradients on every device, against a dense answer on the CPU."""

from __future__ import annotations

import numpy as np
import pytest

import lowrank_inverse as li

torch = pytest.importorskip("torch")

import torch.nn.functional as F
from torch import nn

import lowrank_inverse_torch as lit

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SOLVERS = {
    "stored": li.Nystrom(rank=20, damping=0.1),
    "chunked": li.Nystrom(rank=20, damping=0.1, memory="chunked", chunk_size=4),
    "streamed": li.Nystrom(rank=20, damping=0.1, memory="streamed"),
    "CG": li.CG(damping=0.1, rtol=1e-12),
    "CG, seldom checked": li.CG(damping=0.1, rtol=1e-12, check_every=5),
    "Nyström-CG": li.NystromCG(rank=20, damping=0.1, rtol=1e-12),
    "Neumann": li.Neumann(damping=0.1, num_terms=5, step_size=0.1),
    "exact": li.Exact(damping=0.1),
}


class Problem:
    """A small network with weighted examples, made on the CPU and moved to a device."""

    def __init__(self, device):
        if device == "cuda" and not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.params = [(0.5 * draw(5, 6)).to(device), (0.5 * draw(6, 3)).to(device)]
        for p in self.params:
            p.requires_grad_()
        self.x, self.y = draw(40, 5).to(device), (torch.arange(40) % 3).to(device)
        self.weight = torch.zeros(40, dtype=torch.float64, device=device, requires_grad=True)

    def losses(self):
        outputs = torch.tanh(self.x @ self.params[0]) @ self.params[1]
        return F.cross_entropy(outputs, self.y, reduction="none")

    def inner(self):
        decay = sum((p**2).sum() for p in self.params)
        return (torch.sigmoid(self.weight) * self.losses()).mean() + 0.05 * decay

    def outer(self):
        return self.losses()[:10].mean()


def dense():
    """Return the Hessian of the problem by torch.func, shape (n, n)."""
    problem = Problem("cpu")
    shapes = [p.shape for p in problem.params]
    sizes = [p.numel() for p in problem.params]

    def loss(flat):
        parts = [part.reshape(s) for part, s in zip(flat.split(sizes), shapes, strict=True)]
        outputs = torch.tanh(problem.x @ parts[0]) @ parts[1]
        losses = F.cross_entropy(outputs, problem.y, reduction="none")
        return (torch.sigmoid(problem.weight.detach()) * losses).mean() + 0.05 * (flat**2).sum()

    flat = torch.cat([p.detach().reshape(-1) for p in problem.params])
    return torch.func.hessian(loss)(flat)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("chunk_size", [1, 4])
def test_products_and_columns_equal_the_dense_hessian(device, chunk_size):
    problem = Problem(device)
    H = lit.HessianOperator(problem.inner, problem.params, chunk_size=chunk_size)
    A = dense()
    V = torch.randn(len(A), 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    product = H @ V.to(device)
    assert product.device.type == device
    torch.testing.assert_close(product.cpu(), A @ V, rtol=1e-10, atol=1e-12)
    chosen = [0, 7, 29, 40]
    torch.testing.assert_close(H.columns(chosen).cpu(), A[:, chosen], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_hypergradients_are_those_of_the_dense_formula(device, solver):
    problem = Problem(device)
    out = lit.hypergradient(
        problem.inner, problem.outer, problem.params, problem.weight, solver=solver, rng=0
    )
    assert out.grads.device.type == device
    A = dense().detach().numpy()
    reference = Problem("cpu")
    g = torch.autograd.grad(reference.outer(), reference.params)
    g = torch.cat([part.reshape(-1) for part in g]).numpy()
    q = li.solve(A, g, solver=solver, rng=0).value
    if not isinstance(solver, (li.Nystrom, li.Neumann)):
        np.testing.assert_allclose(q, np.linalg.solve(A + 0.1 * np.eye(len(A)), g), rtol=1e-8)
    inner = torch.autograd.grad(reference.inner(), reference.params, create_graph=True)
    flat = torch.cat([part.reshape(-1) for part in inner])
    (expected,) = torch.autograd.grad(flat @ torch.from_numpy(q), reference.weight)
    torch.testing.assert_close(out.grads.cpu(), -expected, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_with_dropout_and_normalisation_is_left_as_it_was(device):
    problem = Problem(device)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
    model = model.double().to(device)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()
    H = lit.HessianOperator(lambda: F.cross_entropy(model(problem.x), problem.y), model)
    v = torch.ones(H.shape[0], dtype=torch.float64, device=device)
    torch.testing.assert_close(H @ v, H @ v, rtol=0, atol=0)
    after = torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()
    assert torch.equal(state, after)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
