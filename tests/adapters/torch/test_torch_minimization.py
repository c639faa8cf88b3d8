"""``minimize_bilevel`` on live torch models: what is written, what comes back, what is refused."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn

import lowrank_inverse_torch as lit


def problem(seed=0):
    """Return a network with a buffer, its decays, and the two losses."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    y = torch.sin(x.sum(dim=1))
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    with torch.no_grad():
        for parameter in model[1].parameters():
            parameter.zero_()
    decay = torch.zeros(3, dtype=torch.float64, requires_grad=True)

    def inner():
        residual = model(x[:40])[:, 0] - y[:40]
        return (residual**2).mean() + (decay.exp() * model[1].weight[0] ** 2).sum()

    def outer():
        return ((model(x[40:])[:, 0] - y[40:]) ** 2).mean()

    return model, decay, inner, outer


def test_the_result_is_written_and_all_else_comes_back():
    model, decay, inner, outer = problem()
    model.train()
    kept = torch.ones_like(model[1].bias)
    model[1].bias.grad = kept
    before = {name: value.clone() for name, value in model.named_buffers()}
    random = torch.get_rng_state()
    found = lit.minimize_bilevel(inner, outer, model[1], decay, module=model, max_evaluations=15)
    assert model.training and model[1].bias.grad is kept and decay.grad is None
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(found.hparams, decay.detach())
    assert torch.equal(found.params["weight"], model[1].weight.detach())
    assert not found.hparams.requires_grad
    assert found.value < found.history[0].value
    assert outer().item() == pytest.approx(found.value, rel=1e-3)


def test_a_list_of_closures_is_averaged():
    x = torch.arange(4.0, dtype=torch.float64)
    w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    h = torch.ones(1, dtype=torch.float64, requires_grad=True)
    found = lit.minimize_bilevel(
        [lambda a=a: ((w - h * a) ** 2).sum() for a in x],
        [lambda a=a: ((w - a - 1) ** 2).sum() for a in x],
        w,
        h,
    )
    assert found.converged  # w = 1.5 h, and the outer loss has its minimum at w = 2.5
    assert h.item() == pytest.approx(2.5 / 1.5, rel=1e-4)


def test_a_ridge_that_depends_on_hyperparameters_is_a_closure():
    w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    h = torch.zeros((), dtype=torch.float64, requires_grad=True)
    found = lit.minimize_bilevel(
        lambda: ((w - 3) ** 2).sum() / 2,
        lambda: ((w - 2) ** 2).sum(),
        w,
        h,
        ridge=lambda: h.exp(),  # w = 3 / (1 + exp(h))
    )
    assert found.converged and h.item() == pytest.approx(np.log(0.5), rel=1e-4)


def test_what_cannot_be_written_to_or_stepped_is_refused():
    model, decay, inner, outer = problem()
    with pytest.raises(ValueError, match="`hparams` must be leaf tensors"):
        lit.minimize_bilevel(inner, outer, model[1], decay * 2)
    with pytest.raises(ValueError, match="`outer` must be an optimizer of `hparams`; it does not"):
        other = torch.optim.SGD(model.parameters(), 0.1)
        lit.minimize_bilevel(inner, outer, model[1], decay, outer=other)
    with pytest.raises(ValueError, match="`bounds` must have a value for each"):
        pair = [decay.detach(), torch.zeros_like(decay)]
        lit.minimize_bilevel(
            inner, outer, model[1], [decay, pair[1].requires_grad_()], bounds=([pair[0], None], 1)
        )


def test_an_error_in_a_loss_leaves_the_best_hyperparameters():
    model, decay, inner, outer = problem()
    values = []

    def failing():
        if len(values) == 3:
            raise RuntimeError("out of luck")
        return outer()

    with pytest.raises(RuntimeError, match="out of luck"):
        lit.minimize_bilevel(
            inner,
            failing,
            model[1],
            decay,
            module=model,
            callback=lambda record, params, hparams: values.append((record.value, hparams)),
        )
    assert torch.equal(decay.detach(), min(values, key=lambda pair: pair[0])[1])


@pytest.mark.slow
def test_training_on_minibatches_comes_near_the_optimum():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 5, generator=generator, dtype=torch.float64)
    y = (x @ torch.randn(5, generator=generator, dtype=torch.float64) > 0).double()
    y[:200:3] = 1 - y[:200:3]  # wrong labels
    z = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    w = torch.zeros(200, dtype=torch.float64, requires_grad=True)
    entropy = nn.functional.binary_cross_entropy_with_logits

    def loss(rows):
        losses = entropy(x[rows] @ z, y[rows], reduction="none")
        return (torch.sigmoid(w[rows]) * losses).mean()

    def outer():
        return entropy(x[200:] @ z, y[200:])

    def train(rng):
        for step in range(150):
            rows = torch.as_tensor(rng.choice(200, 40, replace=False))
            (gradient,) = torch.autograd.grad(loss(rows), z)
            with torch.no_grad():
                z.sub_((gradient + 0.05 * z) / (0.5 + 0.05 * step))

    def exact():
        """Return the outer loss at the inner minimum."""
        whole = lambda: loss(slice(200))  # noqa: E731
        return lit.minimize_bilevel(whole, outer, z, w, ridge=0.05, max_evaluations=1).value

    first = exact()
    blocks = torch.arange(200).split(50)
    lit.minimize_bilevel(
        [lambda rows=rows: loss(rows) for rows in blocks],
        outer,
        *(z, w),
        inner=train,
        outer=torch.optim.Adam([w], 0.3),
        ridge=0.05,
        max_evaluations=30,
    )
    reached = exact()
    found = lit.minimize_bilevel(lambda: loss(slice(200)), outer, z, w, ridge=0.05)
    print(first, reached, found.value, len(found.history))
    assert found.converged
    assert found.value < reached <= found.value + 0.1 * (first - found.value)
