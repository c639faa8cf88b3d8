"""A ridge that is known exactly, and its derivative by what it depends on."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, autograd

from lowrank_inverse_torch.parameters import Parameters


class Ridge:
    """The coefficients r of a term ``r / 2 * sum(θ ** 2)`` of the inner problem.

    Parameters
    ----------
    ridge : float, Tensor, or structure of the parameters
        A number; a flat tensor, shape (n,); or, for each of the parameters, a tensor of its
        shape, a number, or None for zero.
    params : Parameters

    Attributes
    ----------
    coefficients : Tensor, shape () or (n,)
        Detached.
    tensors : list of Tensor or None
        The same with their graphs: one, or one for each of the parameters.
    """

    def __init__(self, ridge: Any, params: Parameters) -> None:
        self._params = params
        with torch.enable_grad():
            self.tensors = _tensors(ridge, params)
        self._is_number = len(self.tensors) == 1 and _is_number(self.tensors[0])
        if self._is_number and self.tensors[0] is not None:
            self.coefficients = self.tensors[0].detach()
        else:
            self.coefficients = params.flatten(self.tensors)

    def vjp(self, q: Tensor, wrt: Sequence[Tensor]) -> list[Tensor | None]:
        """Differentiate ``<q, r * θ>`` by `wrt`, which r may depend on."""
        seeds = [
            part * theta.detach()
            for part, theta in zip(self._params.unflatten(q), self._params.tensors, strict=True)
        ]
        if self._is_number:
            seeds = [torch.stack([seed.sum() for seed in seeds]).sum()]
        live = [
            (r, seed)
            for r, seed in zip(self.tensors, seeds, strict=True)
            if r is not None and r.requires_grad
        ]
        if not live:
            return [None] * len(wrt)
        outputs, seeds = map(list, zip(*live, strict=True))
        return list(autograd.grad(outputs, wrt, seeds, retain_graph=True, allow_unused=True))


def sums(left: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return the sums of two gradients, tensor by tensor; None stands for zeros."""
    return [b if a is None else a if b is None else a + b for a, b in zip(left, right, strict=True)]


def _tensors(ridge: Any, params: Parameters) -> list[Tensor | None]:
    if isinstance(ridge, numbers.Real):
        return [torch.as_tensor(float(ridge), dtype=params.dtype, device=params.device)]
    if _is_number(ridge):
        return [ridge.to(params.dtype)]
    if isinstance(ridge, Tensor) and ridge.shape == (params.n,):
        return list(params.unflatten(ridge))
    return params.collect(ridge, name="ridge", expand=True)


def _is_number(ridge: Any) -> bool:
    return isinstance(ridge, Tensor) and ridge.ndim == 0
