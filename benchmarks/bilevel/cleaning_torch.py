"""Hyper-cleaning in PyTorch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from lowrank_inverse_torch import hypergradient, minimize_bilevel


class TorchCleaning:
    """Losses of a softmax regression on weighted examples, and their hypergradient."""

    def __init__(self, problem: Any, ridge: float) -> None:
        torch.set_num_threads(1)  # the matrices are too small for more
        self.ridge, self.num_features = ridge, problem.train_x.shape[1]
        self.x, self.y = torch.from_numpy(problem.train_x), torch.from_numpy(problem.train_y)
        validation = problem.validation_x, problem.validation_y
        self.outer_x, self.outer_y = map(torch.from_numpy, validation)

    def _inner(self, theta: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        losses = cross_entropy(self.x @ theta, self.y, reduction="none")
        return (torch.sigmoid(w) * losses).mean()

    def _outer(self, theta: torch.Tensor) -> torch.Tensor:
        return cross_entropy(self.outer_x @ theta, self.outer_y)

    def inner(self, theta: np.ndarray, w: np.ndarray) -> tuple[float, np.ndarray]:
        """Weighted training loss without the ridge, and its gradient."""
        live = torch.from_numpy(theta).requires_grad_()
        loss = self._inner(live, torch.from_numpy(w))
        return loss.item(), torch.autograd.grad(loss, live)[0].numpy()

    def outer(self, theta: np.ndarray) -> float:
        """Validation loss."""
        return self._outer(torch.from_numpy(theta)).item()

    def hypergradient(
        self, theta: np.ndarray, w: np.ndarray, solver: Any, seed: int
    ) -> tuple[np.ndarray, int]:
        """Differentiate the validation loss by the weights; also the products it took."""
        out = self.differentiate(theta, w, solver, seed)
        return out.grads.numpy(), int(out.info.num_products)

    def differentiate(
        self, theta: np.ndarray, w: np.ndarray, solver: Any, seed: int, state: Any = None
    ) -> Any:
        """Return all that a hypergradient is."""
        live = torch.tensor(theta, requires_grad=True)
        weights = torch.tensor(w, requires_grad=True)
        losses = lambda: self._inner(live, weights), lambda: self._outer(live)
        settings = {"solver": solver, "ridge": self.ridge, "state": state, "rng": seed}
        return hypergradient(*losses, live, weights, chunk_size=50, **settings)

    def minimum(self) -> Any:
        """Return the result of `minimize_bilevel`, from zero."""
        theta = torch.zeros(self.num_features, 10, dtype=self.x.dtype, requires_grad=True)
        w = torch.zeros(len(self.x), dtype=self.x.dtype, requires_grad=True)
        losses = lambda: self._inner(theta, w), lambda: self._outer(theta)
        return minimize_bilevel(*losses, theta, w, ridge=self.ridge)
