"""Minimisers of torch functions, differentiated by the implicit function theorem."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest

import lowrank_inverse as li
from lowrank_inverse.bilevel.diagnostics import HypergradientWarning

torch = pytest.importorskip("torch")

from torch import Tensor, nn
from torch.func import functional_call

from lowrank_inverse_torch import implicit_minimizer

F64 = torch.float64
NUM, DIM = 8, 3
EXACT = li.CG(rtol=1e-14)


def data() -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(0)
    return torch.from_numpy(rng.standard_normal((NUM, DIM))), torch.from_numpy(
        rng.standard_normal(NUM)
    )


X, Y = data()


def inner(params: Any, h: Any, x: Tensor) -> Tensor:
    residual = x @ params["w"] + params["b"] - Y
    decay = (params["w"] ** 2).sum() + params["b"] ** 2
    fit = (torch.sigmoid(h["weights"]) * torch.cosh(residual).log()).mean()
    return fit + 0.5 * h["log_decay"].exp() * decay


def newton(init: Any, h: Any, x: Tensor) -> Any:
    """Minimise to the last digit: no graph reaches the result."""
    theta = torch.cat([init["w"], init["b"].reshape(1)]).detach()
    z = torch.cat([x, torch.ones(NUM, 1, dtype=F64)], dim=1)
    decay, weights = h["log_decay"].exp(), torch.sigmoid(h["weights"]) / NUM
    for _ in range(20):
        slope = torch.tanh(z @ theta - Y)
        gradient = z.mT @ (weights * slope) + decay * theta
        hessian = z.mT @ ((weights * (1 - slope**2))[:, None] * z) + decay * torch.eye(
            DIM + 1, dtype=F64
        )
        theta = theta - torch.linalg.solve(hessian, gradient)
    return {"w": theta[:DIM], "b": theta[DIM]}


def point() -> tuple[Any, Tensor, Tensor]:
    init = {"w": torch.zeros(DIM, dtype=F64), "b": torch.zeros((), dtype=F64)}
    weights = torch.linspace(-1, 1, NUM, dtype=F64, requires_grad=True)
    return init, weights, torch.tensor(-2.0, dtype=F64, requires_grad=True)


def outer(params: Any) -> Tensor:
    return (params["w"] ** 3).sum() + torch.sin(params["b"])


def value(weights: Tensor, log_decay: Tensor, x: Tensor = X, solver: Any = EXACT) -> Tensor:
    init, *_ = point()
    minimizer = implicit_minimizer(inner, solver=solver, rng=0)(newton)
    return outer(minimizer(init, {"weights": weights, "log_decay": log_decay}, x))


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


# Derivatives.


def test_gradcheck_passes_by_hyperparameters_and_arguments():
    _, weights, log_decay = point()
    shift = torch.tensor(0.1, dtype=F64, requires_grad=True)

    def shifted(weights: Tensor, log_decay: Tensor, shift: Tensor) -> Tensor:
        return value(weights, log_decay, X + shift)

    assert torch.autograd.gradcheck(shifted, (weights, log_decay, shift))


# What the loss reads beside its arguments.


def test_tensors_and_modules_that_the_loss_closes_over_are_filled_as_well():
    torch.manual_seed(0)
    init, weights, log_decay = point()
    net = nn.Linear(1, 1).double()
    shift = torch.tensor(0.1, dtype=F64, requires_grad=True)
    decay = log_decay * 1.0  # no leaf

    def loss(params: Any, unused: Any) -> Tensor:
        return inner(
            params, {"weights": net(X[:, :1])[:, 0] + weights, "log_decay": decay}, X + shift
        )

    @implicit_minimizer(loss, solver=EXACT)
    def train(init: Any, unused: Any) -> Any:
        with torch.no_grad():
            h = {"weights": net(X[:, :1])[:, 0] + weights, "log_decay": log_decay}
        return newton(init, h, X + shift.detach())

    read = [weights, log_decay, shift, *net.parameters()]
    unused = torch.zeros(1, dtype=F64, requires_grad=True)
    outer(train(init, unused)).backward()
    found = [tensor.grad.clone() for tensor in read]
    assert not unused.grad.any()

    def of_read(*read: Tensor) -> Tensor:
        weights, log_decay, shift, a, b = read
        h = {"weights": (X[:, :1] @ a.mT + b)[:, 0] + weights, "log_decay": log_decay}
        return outer(implicit_minimizer(inner, solver=EXACT)(newton)(init, h, X + shift))

    wanted = torch.autograd.grad(of_read(*read), read)
    for one, other in zip(found, wanted, strict=True):
        assert relative(one, other) < 1e-10


def test_an_outer_loop_by_torch_optim_lowers_the_outer_loss():
    _, weights, log_decay = point()
    optimizer = torch.optim.Adam([weights, log_decay], lr=0.1)
    values = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = value(weights, log_decay)
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert values == sorted(values, reverse=True)


def test_under_no_grad_nothing_is_evaluated():
    _, weights, log_decay = point()
    calls = []

    def counted(params: Any, h: Any) -> Tensor:
        calls.append(1)
        return inner(params, h, X)

    train = implicit_minimizer(counted, solver=EXACT)(lambda init, h: newton(init, h, X))
    h = {"weights": weights, "log_decay": log_decay}
    with torch.no_grad():
        assert not train(point()[0], h)["w"].requires_grad
    assert calls == []
    train(point()[0], h)
    assert calls == [1]


def test_the_result_is_that_of_the_function_with_its_name_and_docstring():
    def fitted(init: Any, h: Any) -> Any:
        """Fit."""
        assert not h["weights"].requires_grad
        return {**newton(init, h, X), "steps": 20, "seen": torch.arange(3)}

    _, weights, log_decay = point()
    train = implicit_minimizer(lambda p, h: inner(p, h, X), solver=EXACT)(fitted)
    assert (train.__name__, train.__doc__) == ("fitted", "Fit.")
    h = {"weights": weights, "log_decay": log_decay}
    params = train(point()[0], h)
    wanted = newton(point()[0], {name: v.detach() for name, v in h.items()}, X)
    assert torch.equal(params["w"], wanted["w"])
    assert params["steps"] == 20
    assert torch.equal(params["seen"], torch.arange(3))
    assert params["w"].requires_grad


def test_init_has_the_derivative_zero():
    init, weights, log_decay = point()
    init["w"].requires_grad_()
    h = {"weights": weights, "log_decay": log_decay}
    params = implicit_minimizer(inner, solver=EXACT)(newton)(init, h, X)
    grads = torch.autograd.grad(outer(params), [init["w"], weights], allow_unused=True)
    assert grads[0] is None
    assert grads[1] is not None


def test_training_may_go_on_from_an_earlier_result():
    init, weights, log_decay = point()
    minimizer = implicit_minimizer(inner, solver=EXACT)(newton)
    grads = []
    params = init
    for _ in range(2):
        params = minimizer(params, {"weights": weights, "log_decay": log_decay}, X)
        weights.grad = None
        outer(params).backward()
        grads.append(weights.grad)
    assert relative(grads[1], grads[0]) < 1e-10


# torch.func.


def test_grad_vjp_and_jacrev_of_torch_func_agree_with_backward():
    init, weights, log_decay = point()
    value(weights, log_decay).backward()
    h, s = weights.detach(), log_decay.detach()
    found = torch.func.grad(value, argnums=(0, 1))(h, s)
    assert relative(found[0], weights.grad) < 1e-12
    assert relative(found[1], log_decay.grad) < 1e-12
    _, pull = torch.func.vjp(lambda h: value(h, s), h)
    assert relative(pull(torch.tensor(2.0, dtype=F64))[0], 2 * weights.grad) < 1e-12
    minimizer = implicit_minimizer(inner, solver=EXACT)(newton)
    jacobian = torch.func.jacrev(lambda h: minimizer(init, {"weights": h, "log_decay": s}, X)["w"])(
        h
    )
    for row in range(DIM):
        w = minimizer(init, {"weights": weights, "log_decay": s}, X)["w"][row]
        assert relative(jacobian[row], torch.autograd.grad(w, weights)[0]) < 1e-10


# Loops: memory, batches, records, states.


def test_a_loop_that_goes_on_from_its_results_keeps_none_of_them():
    h = torch.zeros(1000, requires_grad=True)

    @implicit_minimizer(lambda w, h: ((w - h) ** 2).sum() + 0.1 * (w**2).sum(), solver=li.CG())
    def train(w: Tensor, h: Tensor) -> Tensor:
        return h.detach() / 1.1 + 0 * w

    w, results = train(torch.ones(1000), h), []
    for _ in range(5):
        w = train(w, h)
        (w**2).sum().backward()
        results.append(weakref.ref(w))
    gc.collect()
    assert [result() is None for result in results] == [True] * 4 + [False]


def test_the_result_keeps_no_graph_of_the_training():
    seen = []

    @implicit_minimizer(lambda w, h: ((w - h) ** 2).sum(), solver=li.CG())
    def train(w: Tensor, h: Tensor) -> Tensor:
        leaf = w.detach().requires_grad_()
        seen.append(weakref.ref(leaf))
        return leaf * 1 + h

    h = torch.ones(3, requires_grad=True)
    w = train(torch.zeros(3), h)
    assert w.requires_grad
    assert seen[0]() is None


def test_a_batch_that_has_moved_on_before_backward_is_reported():
    h = torch.tensor(0.0, dtype=F64, requires_grad=True)
    batch = [torch.tensor([1.0], dtype=F64)]

    def loss(w: Tensor, h: Tensor, x: Tensor) -> Tensor:
        return ((w - x) ** 2 * h.exp()).sum() + (w**2).sum()

    def train(w: Tensor, h: Tensor, *args: Tensor) -> Tensor:
        return (args or batch)[0] * h.exp() / (1 + h.exp())

    late = implicit_minimizer(lambda w, h: loss(w, h, batch[0]), solver=li.CG())(train)
    bound = implicit_minimizer(loss, solver=li.CG())(train)
    values: dict[Any, Any] = {late: 0, bound: 0}
    for x in (1.0, 2.0, 3.0):
        batch[0] = torch.tensor([x], dtype=F64)
        values[late] = values[late] + late(torch.zeros(1), h)
        values[bound] = values[bound] + bound(torch.zeros(1), h, batch[0])
    with pytest.raises(RuntimeError, match=r"end of training .* train\(init, hparams, batch\)"):
        values[late].backward()
    values[bound].backward()
    assert h.grad.item() == pytest.approx(6 / 4, rel=1e-9)  # d/dh of x e^h / (1 + e^h)


def test_dropout_masks_are_those_of_the_end_of_training():
    h = torch.ones(200, dtype=F64, requires_grad=True)

    @implicit_minimizer(
        lambda w, h: nn.functional.dropout((w - h) ** 2, 0.5).sum() + 1e-3 * (w**2).sum(),
        solver=EXACT,
    )
    def train(w: Tensor, h: Tensor) -> Tensor:
        return h.clone()

    torch.manual_seed(0)
    w = train(torch.zeros(200), h)
    torch.rand(7)
    with pytest.warns(HypergradientWarning, match="gradient of the inner problem"):
        w.sum().backward()
    torch.manual_seed(0)
    curvature = 2 * nn.functional.dropout(torch.ones(200, dtype=F64), 0.5)
    assert relative(h.grad, curvature / (curvature + 2e-3)) < 1e-9


@pytest.mark.parametrize(
    ("curvature", "solver", "words"),
    [
        (torch.logspace(-3, 1, 20, dtype=F64), li.CG(max_steps=3), "ended at max_steps|residual"),
        (-torch.ones(20, dtype=F64), li.CG(), "negative curvature"),
    ],
)
def test_a_solve_that_failed_is_warned_of_once_and_kept_as_a_record(curvature, solver, words):
    @implicit_minimizer(
        lambda w, h: (0.5 * curvature * w * w - w * h).sum(), solver=solver, keep_state=True
    )
    def train(w: Tensor, h: Tensor) -> Tensor:
        return h / curvature

    h = torch.ones(20, dtype=F64, requires_grad=True)
    assert train.minimizer.info is None
    with pytest.warns(HypergradientWarning, match=words):
        train(torch.zeros(20), h).sum().backward()
    assert train.minimizer.info.findings()
    train(torch.zeros(20), h).sum().backward()


def test_a_state_that_is_kept_saves_the_steps_of_the_next_pass():
    curvature = torch.logspace(-1, 1, 20, dtype=F64)
    h = torch.ones(20, dtype=F64, requires_grad=True)
    steps = {}
    for keep in (True, False):

        @implicit_minimizer(
            lambda w, h: (0.5 * curvature * w * w - w * h).sum(), solver=EXACT, keep_state=keep
        )
        def train(w: Tensor, h: Tensor) -> Tensor:
            return h / curvature

        for _ in range(2):
            h.grad = None
            train(torch.zeros(20), h).sum().backward()
            assert relative(h.grad, 1 / curvature) < 1e-9
        steps[keep] = train.minimizer.info.num_steps
        assert isinstance(train.minimizer.state, li.HypergradientState)
    assert steps[True] == 0 < steps[False]


RIDGES: dict[str, Any] = {
    "callable": lambda h: h["log_decay"].exp(),
    "structure": lambda h: {"w": h["log_decay"].exp(), "b": h["log_decay"].exp()},
    "flat": lambda h: h["log_decay"].exp().expand(DIM + 1),
}


@pytest.mark.parametrize("ridge", RIDGES.values(), ids=RIDGES)
def test_a_ridge_equals_the_same_term_inside_the_inner_loss(ridge):
    _, weights, log_decay = point()
    value(weights, log_decay).backward()

    def data_term(params: Any, h: Any, x: Tensor) -> Tensor:
        return inner(params, {**h, "log_decay": torch.tensor(-torch.inf, dtype=F64)}, x)

    h, decay = weights.detach().requires_grad_(), log_decay.detach().requires_grad_()
    train = implicit_minimizer(data_term, solver=EXACT, ridge=ridge)(newton)
    outer(train(point()[0], {"weights": h, "log_decay": decay}, X)).backward()
    assert relative(h.grad, weights.grad) < 1e-9
    assert relative(decay.grad, log_decay.grad) < 1e-9


def test_a_ridge_that_is_a_live_tensor_beside_the_arguments_has_its_derivative():
    r = torch.tensor(0.5, dtype=F64, requires_grad=True)
    h = torch.tensor([3.0], dtype=F64, requires_grad=True)

    @implicit_minimizer(lambda w, h: 0.5 * ((w - h) ** 2).sum(), solver=EXACT, ridge=r)
    def train(w: Tensor, h: Tensor) -> Tensor:
        return h / (1 + r.detach())

    train(torch.zeros(1), h).sum().backward()
    assert h.grad.item() == pytest.approx(1 / 1.5, rel=1e-12)
    assert r.grad.item() == pytest.approx(-3 / 1.5**2, rel=1e-12)


def test_keywords_go_to_the_training_function_alone():
    @implicit_minimizer(lambda w, h: ((w - h) ** 2).sum(), solver=EXACT)
    def train(w: Tensor, h: Tensor, steps: int = 3) -> Tensor:
        assert steps == 5
        return h.clone()

    h = torch.ones(3, dtype=F64, requires_grad=True)
    train(torch.zeros(3), h, steps=5).sum().backward()
    assert torch.equal(h.grad, torch.ones(3, dtype=F64))


# Errors.


def test_a_second_derivative_and_forward_mode_are_refused():
    _, weights, log_decay = point()
    (grad,) = torch.autograd.grad(value(weights, log_decay), weights, create_graph=True)
    with pytest.raises(RuntimeError, match=r"no second derivative\. Omit create_graph=True"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="no forward mode in torch"):
        torch.func.jvp(lambda h: value(h, log_decay.detach()), (weights.detach(),), (X[:, 0],))


def test_a_tensor_changed_in_place_between_the_passes_is_reported():
    _, weights, log_decay = point()
    loss = value(weights, log_decay)
    with torch.no_grad():
        weights += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


BAD: dict[str, Any] = {
    "no function": (lambda: implicit_minimizer(3.0, solver=EXACT), "`inner_loss` must be a funct"),
    "complex argument": (
        lambda: implicit_minimizer(inner, solver=EXACT)(newton)(None, X.to(torch.complex128)),
        "`hparams` and `args` must be real; one is torch.complex128",
    ),
    "complex result": (
        lambda: implicit_minimizer(inner, solver=EXACT)(lambda i, h: h.to(torch.complex128))(
            None, X
        ),
        "parameters returned must be real; got torch.complex128",
    ),
    "two dtypes": (
        lambda: (
            implicit_minimizer(lambda p, h: (p[0].sum() * h).sum() + p[1].sum(), solver=EXACT)(
                lambda i, h: [h.float(), h]
            )(None, X.clone().requires_grad_())[1]
            .sum()
            .backward()
        ),
        "`params` must have one dtype",
    ),
}


@pytest.mark.parametrize(("run", "message"), BAD.values(), ids=BAD)
def test_bad_kinds_are_refused_by_name(run, message):
    with pytest.raises(TypeError, match=message):
        run()


def test_a_loss_without_the_parameters_is_refused_by_name():
    h = torch.ones(2, dtype=F64, requires_grad=True)
    train = implicit_minimizer(lambda p, h: (h**2).sum(), solver=EXACT)(lambda i, h: 2 * h)
    with pytest.raises(ValueError, match="`inner_loss` must depend on `params`"):
        train(None, h).sum().backward()


def test_a_module_named_is_left_as_it_was():
    model = nn.Sequential(nn.Linear(DIM, 2), nn.BatchNorm1d(2)).double()
    before = {name: b.clone() for name, b in model.named_buffers()}
    h = torch.tensor(0.5, dtype=F64, requires_grad=True)

    @implicit_minimizer(
        lambda p, h: (
            (functional_call(model, p, (X,)) ** 4).mean()
            + h * sum((v**2).sum() for v in p.values())
        ),
        solver=li.CG(damping=0.1),
        module=model,
    )
    def train(init: Any, h: Any) -> Any:
        return dict(model.named_parameters())

    with pytest.warns(HypergradientWarning, match="negative curvature"):
        sum(v.sum() for v in train(None, h).values()).backward()
    assert h.grad.isfinite()
    assert model.training
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert all(p.grad is None for p in model.parameters())
