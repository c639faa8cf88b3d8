"""Gradient products without an inverse, and projected ones: baselines to measure against.

TracIn [1]_ sums over checkpoints of a training the step size times the inner product of the
gradients. TRAK [2]_ projects the gradients of a margin at random, and takes the inverse of their
Gram matrix.

References
----------
.. [1] G. Pruthi et al. Estimating Training Data Influence by Tracing Gradient Descent. NeurIPS
   2020.
.. [2] S. Park et al. TRAK: Attributing Model Behavior at Scale. ICML 2023, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Part = tuple[Tensor, Tensor]


def example_gradients(model: nn.Module, part: Part, *, margin: bool = False) -> Tensor:
    """Return the gradient of each example's loss, or of its margin, in a row, shape (size, n)."""
    values = {name: p.detach() for name, p in model.named_parameters()}

    def of_one(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, values, x[None])
        loss = cross_entropy(logits, y[None])
        return log_odds(loss) if margin else loss

    grads = torch.func.vmap(torch.func.grad(of_one), in_dims=(None, 0, 0))(values, *part)
    return torch.cat([grads[name].flatten(1) for name in values], dim=1)


def log_odds(loss: Tensor) -> Tensor:
    """Return ``log(p / (1 - p))`` for a loss ``-log p``."""
    return -loss - torch.log(-torch.expm1(-loss))


def tracin(models: Sequence[nn.Module], rates: Sequence[float], train: Part, query: Part) -> Tensor:
    """Return the scores of TracIn from checkpoints and their step sizes: (n_query, n_train)."""
    return sum(
        (
            rate * example_gradients(model, query) @ example_gradients(model, train).T
            for model, rate in zip(models, rates, strict=True)
        ),
        torch.zeros(()),
    )


def trak(
    models: Sequence[nn.Module], train: Part, query: Part, *, size: int, seed: int = 0
) -> Tensor:
    """Return the scores of TRAK from models and a random projection to `size` numbers.

    Positive is helpful, as of the other methods.
    """
    features, weights = [], []
    for i, model in enumerate(models):
        generator = torch.Generator().manual_seed(seed + i)
        n = sum(p.numel() for p in model.parameters())
        projection = torch.randn(n, size, generator=generator, dtype=train[0].dtype) / size**0.5
        of_train = example_gradients(model, train, margin=True) @ projection
        of_query = example_gradients(model, query, margin=True) @ projection
        features.append(of_query @ torch.linalg.solve(of_train.T @ of_train, of_train.T))
        with torch.no_grad():
            p = torch.exp(-cross_entropy(model(train[0]), train[1], reduction="none"))
        weights.append(1 - p)
    return torch.stack(features).mean(0) * torch.stack(weights).mean(0)
