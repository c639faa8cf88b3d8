"""Networks in torch, and the bilevel problem that the measurements of speed share.

Each training example has a weight ``sigmoid(w_i)``; the inner loss is the weighted mean of the
cross-entropies on a batch, the outer one the mean on another. Data are random: speed does not
depend on them. Nothing of this package is imported, so that an interpreter that has only a peer
can run it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

CLASSES = 10
WIDENED = {"wrn": 2, "wrn10": 10}
"""Factors of the widths of a WideResNet-28."""


class Block(nn.Module):
    """Two convolutions before a sum (Zagoruyko and Komodakis, 2016)."""

    def __init__(
        self, before: int, after: int, stride: int, slope: float = 0.0, running: bool = False
    ) -> None:
        super().__init__()
        self.rectify = nn.LeakyReLU(slope) if slope else nn.ReLU()
        self.norm1 = nn.BatchNorm2d(before, track_running_stats=running)
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(after, track_running_stats=running)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        same = before == after and stride == 1
        self.shortcut = None if same else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.rectify(self.norm1(x))
        left = x if self.shortcut is None else self.shortcut(y)
        return left + self.conv2(self.rectify(self.norm2(self.conv1(y))))


def wide_resnet(
    depth: int = 28, widen: int = 2, *, slope: float = 0.0, running: bool = False
) -> nn.Module:
    """Return a WideResNet for images of 32×32; 28-2 has 1.5e6 parameters.

    `slope` is that of leaky ReLUs below zero. With `running` statistics, evaluation does not depend
    on the batch; without them there are no buffers, which some of the peers do not take.
    """
    widths = [16, 16 * widen, 32 * widen, 64 * widen]
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False)]
    for stage in range(3):
        for block in range((depth - 4) // 6):
            first = block == 0
            before = widths[stage] if first else widths[stage + 1]
            stride = 2 if first and stage > 0 else 1
            layers.append(Block(before, widths[stage + 1], stride, slope, running))
    layers += [
        nn.BatchNorm2d(widths[3], track_running_stats=running),
        nn.LeakyReLU(slope) if slope else nn.ReLU(),
    ]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[3], CLASSES)
    )


def lenet() -> nn.Module:
    """Return LeNet-5 for images of 28×28, with 6.2e4 parameters."""
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, CLASSES)),
    )


def perceptron(widths: Sequence[int]) -> nn.Module:
    """Return a perceptron with tanh between the layers."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def network(name: str, small: bool = False) -> tuple[nn.Module, tuple[int, ...]]:
    """Return a network and the shape of an input; `small` ones are to try the commands."""
    if name == "mlp":
        widths = (20, 16, CLASSES) if small else (784, 1024, 448, CLASSES)
        return perceptron(widths), widths[:1]
    if name == "lenet":
        return lenet(), (1, 28, 28)
    if name in WIDENED:
        return (wide_resnet(10, 1) if small else wide_resnet(28, WIDENED[name])), (3, 32, 32)
    raise ValueError(f"`name` must be 'mlp', 'lenet', 'wrn' or 'wrn10'; got {name!r}.")


class Reweighting:
    """The bilevel problem of a network, as closures over live tensors and as functions.

    `shape` is that of an input; `batch` counts the examples of the inner loss, and of the outer.
    """

    def __init__(
        self, model: nn.Module, shape: tuple[int, ...], batch: int, *, seed: int, device: str
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in model.parameters():
                if p.ndim > 1:  # as torch does by default, but from our own generator
                    bound = p[0].numel() ** -0.5
                    p.uniform_(-bound, bound, generator=generator)
        self.model = model.to(device)
        self.names = [name for name, _ in self.model.named_parameters()]
        self.params = tuple(self.model.parameters())
        self.n = sum(p.numel() for p in self.params)

        def data() -> tuple[Tensor, Tensor]:
            x = torch.randn(batch, *shape, generator=generator, dtype=torch.float64)
            y = torch.randint(CLASSES, (batch,), generator=generator)
            return x.to(device, torch.float32), y.to(device)

        self.x, self.y = data()
        self.outer_x, self.outer_y = data()
        self.w = torch.randn(batch, generator=generator, dtype=torch.float64).to(
            device, torch.float32
        )
        self.w.requires_grad_()

    def weighted(self, outputs: Tensor, w: Tensor) -> Tensor:
        """Return the inner loss of the outputs."""
        return (torch.sigmoid(w) * F.cross_entropy(outputs, self.y, reduction="none")).mean()

    def inner(self) -> Tensor:
        """Return the inner loss of the live tensors."""
        return self.weighted(self.model(self.x), self.w)

    def outer(self) -> Tensor:
        """Return the outer loss of the live tensors."""
        return F.cross_entropy(self.model(self.outer_x), self.outer_y)

    def _outputs(self, params: Sequence[Tensor], x: Tensor) -> Tensor:
        return functional_call(self.model, dict(zip(self.names, params, strict=True)), (x,))

    def functions(self, ridge: float) -> tuple[Any, Any]:
        """Return both losses as functions of (params, hparams), the inner one with its ridge."""

        def inner(params: Sequence[Tensor], hparams: Sequence[Tensor]) -> Tensor:
            loss = self.weighted(self._outputs(params, self.x), hparams[0])
            return loss + 0.5 * ridge * sum((p**2).sum() for p in params) if ridge else loss

        def outer(params: Sequence[Tensor], hparams: Sequence[Tensor]) -> Tensor:
            zero = 0.0 * hparams[0].sum()  # some peers want a path from every hyperparameter
            return F.cross_entropy(self._outputs(params, self.outer_x), self.outer_y) + zero

        return inner, outer

    def products(self) -> Any:
        """Return a function that multiplies the Hessian once, on a graph kept: the floor."""
        grads = torch.autograd.grad(self.inner(), self.params, create_graph=True)
        v = [torch.randn_like(p) for p in self.params]
        return lambda: torch.autograd.grad(grads, self.params, v, retain_graph=True)

    def to(self, dtype: torch.dtype) -> None:
        """Convert parameters and data."""
        self.model.to(dtype)
        self.x, self.outer_x = self.x.to(dtype), self.outer_x.to(dtype)
        self.w = self.w.detach().to(dtype).requires_grad_()

    def train(self, steps: int, rate: float = 1e-3) -> None:
        """Lower the inner loss by Adam, so that its Hessian comes close to semidefinite."""
        optimizer = torch.optim.Adam(self.params, lr=rate)
        for _ in range(steps):
            grads = torch.autograd.grad(self.inner(), self.params)
            for p, grad in zip(self.params, grads, strict=True):
                p.grad = grad
            optimizer.step()
        optimizer.zero_grad()
