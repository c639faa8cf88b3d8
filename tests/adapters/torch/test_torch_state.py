"""A state carried through outer steps of torch's own optimizers."""

from __future__ import annotations

import io

import pytest

import lowrank_inverse as li

torch = pytest.importorskip("torch")

from torch.nn.functional import cross_entropy

from lowrank_inverse_torch import hypergradient

RIDGE = 0.01


class Loop:
    """Weights of the examples learned by torch.optim, the inner problem by a few steps of SGD."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        x = torch.randn(60, 5, dtype=torch.float64)
        y = (x @ torch.randn(5, 3, dtype=torch.float64)).argmax(dim=1)
        self.x, self.y, self.clean_x, self.clean_y = x[:40], y[:40], x[40:], y[40:]
        self.model = torch.nn.Linear(5, 3).double()
        self.weight = torch.zeros(40, dtype=torch.float64, requires_grad=True)
        self.outer = torch.optim.Adam([self.weight], lr=0.05)
        self.train(400)

    def inner_loss(self):
        losses = cross_entropy(self.model(self.x), self.y, reduction="none")
        return (torch.sigmoid(self.weight) * losses).mean()

    def outer_loss(self):
        return cross_entropy(self.model(self.clean_x), self.clean_y)

    def train(self, num_steps):
        params = list(self.model.parameters())
        for _ in range(num_steps):
            grads = torch.autograd.grad(self.inner_loss(), params)
            with torch.no_grad():
                for p, g in zip(params, grads, strict=True):
                    p -= 2.0 * (g + RIDGE * p)

    def step(self, state):
        self.outer.zero_grad()
        out = hypergradient(
            self.inner_loss, self.outer_loss, self.model, self.weight,
            solver=li.NystromCG(rank=8, max_steps=4), ridge=RIDGE, rng=0, state=state,
            accumulate_grad=True,
        )  # fmt: skip
        self.outer.step()
        self.train(20)
        return out


def test_an_outer_loop_by_torch_optim_pays_for_columns_once_and_lowers_its_loss():
    loop, state, values, products = Loop(), li.HypergradientState(), [], []
    for step in range(10):
        values.append(loop.outer_loss().item())
        out = loop.step(state)
        state = out.state
        products.append(out.info.num_products)
        assert (out.info.recycled > 0) == (step > 0)
        assert out.info.relative_residual < (0.5 if step == 0 else 0.05)
    assert products[0] == 8 + 4 + 1
    assert set(products[1:]) <= set(range(2, 7))
    assert values[-1] < values[0]


def test_a_state_holds_no_graph_and_is_a_pytree():
    out = Loop().step(li.HypergradientState())
    leaves = torch.utils._pytree.tree_leaves(out.state)
    assert len(leaves) == len(out.state)
    assert not any(leaf.requires_grad for leaf in leaves)


@pytest.mark.skipif(
    not hasattr(torch.serialization, "add_safe_globals"), reason="torch.load trusts every file"
)
def test_a_checkpoint_with_a_state_is_read_by_torch_load():
    w = torch.ones(3, requires_grad=True)
    h = torch.ones(3, requires_grad=True)
    new, solver = li.HypergradientState(), li.NystromCG(rank=2)
    state = hypergradient(
        lambda: ((w - h) ** 2).sum(), lambda: (w**2).sum(), w, h, solver=solver, state=new
    ).state
    file = io.BytesIO()
    torch.save({"epoch": 3, "state": state}, file)
    file.seek(0)
    read = torch.load(file, weights_only=True)["state"]
    assert isinstance(read, li.HypergradientState)
    assert all(torch.equal(a, b) for a, b in zip(read, state, strict=True))
