"""Inner problems of a few gradient steps from a known start, and their true derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, autograd, nn
from torch.func import functional_call

from benchmarks._measure import Found

SLOPE = 0.01
"""Of the leaky ReLU that the paper puts in place of the ReLU."""


def initialize(model: nn.Module, seed: int, gain: float = 1.0) -> list[Tensor]:
    """Draw weights uniformly within ``gain / sqrt(fan-in)`` (as torch does at gain 1), biases 0.

    Vectors named "weight", which are scales of a normalization, stay 1.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                bound = gain * p[0].numel() ** -0.5
                p.copy_(bound * (2 * torch.rand(p.shape, generator=generator) - 1))
            elif name.endswith("bias"):
                p.zero_()
    return list(model.parameters())


def outputs(model: nn.Module, params: Sequence[Tensor], x: Tensor) -> Tensor:
    """Evaluate `model` with other parameters."""
    names = (name for name, _ in model.named_parameters())
    return functional_call(model, dict(zip(names, params, strict=True)), (x,))


def descend(
    loss: Callable[[list[Tensor]], Tensor],
    start: Sequence[Tensor],
    steps: int,
    rate: float,
    *,
    unroll: bool = False,
) -> list[Tensor]:
    """Take steps of gradient descent; return leaves, or tensors on the graph of all the steps."""
    params = [p.clone() if unroll else p.detach().clone().requires_grad_() for p in start]
    for _ in range(steps):
        grads = autograd.grad(loss(params), params, create_graph=unroll)
        params = [p - rate * g for p, g in zip(params, grads, strict=True)]
        if not unroll:
            params = [p.detach().requires_grad_() for p in params]
    return params


def flat(tensors: Any) -> Tensor:
    """Return tensors as one vector in float64, where the squares do not overflow."""
    return torch.cat([t.detach().reshape(-1).to(torch.float64) for t in tensors])


def against(grads: Any, truth: Any) -> Found:
    """Return the length of a gradient over that of the true one, and the cosine between them."""
    a, b = flat(grads), flat(truth)
    length, norm = float(torch.linalg.vector_norm(a)), float(torch.linalg.vector_norm(b))
    cosine = float(a @ b) / (length * norm) if length * norm > 0 else 0.0
    return {"length": length / norm if norm > 0 else float("inf"), "cosine": cosine}
