"""A state carried through outer steps in torch: cost, save and resume, diagnostics."""

from __future__ import annotations

import copy
import io
import warnings

import numpy as np
import pytest

import lowrank_inverse as li
from lowrank_inverse.bilevel.diagnostics import HypergradientWarning

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

    def step(self, state, **options):
        self.outer.zero_grad()
        arguments = {
            "solver": li.NystromCG(rank=8, max_steps=4),
            "ridge": RIDGE,
            "rng": 0,
            "state": state,
            "accumulate_grad": True,
        }
        out = hypergradient(
            self.inner_loss, self.outer_loss, self.model, self.weight, **{**arguments, **options}
        )
        self.outer.step()
        self.train(20)
        return out

    def checkpoint(self):
        parts = self.model.state_dict(), self.weight.detach(), self.outer.state_dict()
        return copy.deepcopy(parts)

    def restore(self, checkpoint):
        model, weight, outer = checkpoint
        self.model.load_state_dict(model)
        self.weight.data.copy_(weight)
        self.outer.load_state_dict(outer)


def test_an_outer_loop_by_torch_optim_pays_for_columns_once_and_lowers_its_loss():
    loop, state, values, products = Loop(), None, [], []
    for step in range(10):
        values.append(loop.outer_loss().item())
        out = loop.step(state)
        state = out.state
        products.append(out.info.num_products)
        assert out.info.refreshed == (step == 0)
        assert out.info.relative_residual < (0.5 if step == 0 else 0.05)
    assert products[0] == 8 + 4 + 1
    assert set(products[1:]) <= set(range(2, 7))
    assert values[-1] < values[0]


@pytest.mark.parametrize("ridge", [RIDGE, torch.linspace(0.01, 0.02, 18, dtype=torch.float64)])
def test_a_run_interrupted_and_resumed_has_the_same_trajectory_bit_for_bit(ridge, tmp_path):
    whole, state, weights = Loop(), None, []
    for step in range(8):
        if step == 3:
            state.save(tmp_path / "state.npz")
            checkpoint = whole.checkpoint()
        state = whole.step(state, ridge=ridge).state
        weights.append(whole.weight.detach().clone())
    resumed = Loop()
    resumed.restore(checkpoint)
    state = li.HypergradientState.load(tmp_path / "state.npz")
    for step in range(3, 8):
        state = resumed.step(state, ridge=ridge).state
        assert torch.equal(resumed.weight, weights[step])


def test_a_state_holds_no_graph_and_is_a_pytree():
    out = Loop().step(None)
    leaves = torch.utils._pytree.tree_leaves(out.state)
    assert len(leaves) == len(out.state)
    assert not any(leaf.requires_grad for leaf in leaves)


def test_a_good_hypergradient_has_nothing_to_warn_of():
    loop = Loop()
    loop.train(3000)
    out = loop.step(None, solver=li.CG())
    assert out.info.findings() == ()
    assert out.explain().endswith("nothing to warn of")
    assert "ended at converged" in out.explain()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out.info.warn()


def names(out):
    return {finding.name for finding in out.info.findings()}


def test_an_inner_problem_far_from_its_minimum_is_reported_with_the_missing_ridge():
    loop = Loop()
    assert "not_stationary" not in names(loop.step(None, solver=li.CG()))
    out = loop.step(None, ridge=None, solver=li.CG(damping=RIDGE))  # SGD decays, the loss does not
    assert "not_stationary" in names(out)
    assert "give it as `ridge`" in out.explain()
    with pytest.warns(HypergradientWarning, match="Train the inner problem further"):
        out.info.warn()


def test_the_estimated_step_is_that_of_newton_on_a_quadratic():
    w = torch.tensor([2.0, 2.0], dtype=torch.float64, requires_grad=True)
    h = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)

    def inner():
        return 1.5 * ((w - h) ** 2).sum()

    out = hypergradient(inner, lambda: w.sum(), w, h, solver=li.CG())
    assert out.info.inner_step == pytest.approx(np.sqrt(2) / np.sqrt(8))


def test_negative_curvature_and_unbounded_errors_are_reported():
    w = torch.tensor([0.1, 0.1], dtype=torch.float64, requires_grad=True)
    h = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    out = hypergradient(
        lambda: h * (w[0] ** 2 - w[1] ** 2), lambda: (w[1] - 1) ** 2, w, h, solver=li.CG()
    )
    assert "negative_curvature" in names(out)
    assert np.isnan(out.info.error_bound)


def test_the_error_bound_holds_and_an_answer_that_it_does_not_support_is_reported():
    loop = Loop()
    exact = loop.step(None, solver=li.Exact())

    def error(out):
        q, wanted = (torch.cat([t.ravel() for t in o.ihvp.values()]) for o in (out, exact))
        return float((q - wanted).norm() / q.norm())

    outs = []
    for solver in (li.CG(max_steps=1), li.CG(max_steps=6), li.CG()):
        fresh = Loop()
        outs.append(fresh.step(None, solver=solver))
        assert 0 < error(outs[-1]) <= outs[-1].info.error_bound
    assert "worse_than_identity" in names(outs[0])
    assert "Raise `max_steps` or the rank" in outs[0].explain()
    assert names(outs[-1]) == set()


def test_hyperparameters_without_a_path_are_named():
    loop = Loop()
    idle = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    out = hypergradient(
        loop.inner_loss, loop.outer_loss, loop.model, {"w": loop.weight, "idle": idle},
        solver=li.CG(), ridge=RIDGE,
    )  # fmt: skip
    assert names(out) == {"no_path"}
    assert "'idle'" in out.explain()


@pytest.mark.skipif(
    not hasattr(torch.serialization, "add_safe_globals"), reason="torch.load trusts every file"
)
def test_a_checkpoint_with_a_state_is_read_by_torch_load():
    w = torch.ones(3, requires_grad=True)
    h = torch.ones(3, requires_grad=True)
    state = hypergradient(
        lambda: ((w - h) ** 2).sum(), lambda: (w**2).sum(), w, h, solver=li.NystromCG(rank=2)
    ).state
    file = io.BytesIO()
    torch.save({"epoch": 3, "state": state}, file)
    file.seek(0)
    read = torch.load(file, weights_only=True)["state"]
    assert isinstance(read, li.HypergradientState)
    assert all(torch.equal(a, b) for a, b in zip(read, state, strict=True))
