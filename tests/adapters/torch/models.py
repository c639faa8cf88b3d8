"""Small networks from three features to three outputs, and what must come back as it was."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch import Tensor, nn


class Tied(nn.Module):
    """An autoencoder whose two layers share one weight, as the same parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(3, 3), nn.Linear(3, 3)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(torch.tanh(self.encode(x)))


class Unused(nn.Module):
    """A layer and a parameter that the outputs do not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.idle, self.layer = nn.Parameter(torch.ones(2)), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Written(nn.Module):
    """Buffers of all kinds: assigned anew in forward, written to, shared, and absent."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("also", self.norm.running_mean)
        self.register_buffer("none", None)

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        self.mean = 0.9 * self.mean + 0.1 * z.detach().mean(0)
        return (self.norm(z) * (1 + self.also)).tanh()  # just written under its other name


class Stochastic(nn.Module):
    """Dropout and BatchNorm in training mode, one layer in evaluation mode, a buffer assigned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.drop, self.rest = nn.Dropout(0.4), nn.Dropout(0.5).eval()
        self.last = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.last(self.rest(self.drop(torch.tanh(self.norm(self.first(x))))))


def mlp(bias: bool = True) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4, bias=bias), nn.Tanh(), nn.Linear(4, 3, bias=bias))


def frozen() -> nn.Module:
    model = mlp()
    model[0].bias.requires_grad_(False)
    model[2].weight.requires_grad_(False)
    return model


def dead_relu() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        model[0].bias[1:3] = -100.0
    return model


def batchnorm() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Tanh())


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything that must come back: identities, values, versions and states."""
    tensors = [*model.parameters(), *model.buffers()]
    return {
        "modes": [module.training for module in model.modules()],
        "ids": [id(t) for t in tensors],
        "keys": [list(module._buffers) for module in model.modules()],
        "values": [t.detach().clone() for t in tensors],
        "versions": [t._version for t in tensors],
        "grads": [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in tensors],
        "hooks": [list(module._forward_hooks.items()) for module in model.modules()],
        "rng": torch.get_rng_state(),
        "grad_mode": torch.is_grad_enabled(),
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return bool(torch.equal(a, b))
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    for key, value in before.items():
        assert same(value, after[key]), key
