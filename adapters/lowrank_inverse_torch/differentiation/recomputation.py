"""Functions of tensors that are evaluated again for their derivatives, of any order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, autograd


class _Recomputed(autograd.Function):
    """A function of tensors that is evaluated again for its derivative: nothing inside is held."""

    @staticmethod
    def forward(function: Callable[..., Any], *tensors: Tensor) -> Any:
        return function(*(tensor.detach() for tensor in tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.function, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        wanted = ctx.needs_input_grad[1:]
        pull = partial(
            pull_back, ctx.function, [i for i, w in enumerate(wanted) if w], len(cotangents)
        )
        found = iter(_Recomputed.apply(pull, *cotangents, *ctx.saved_tensors))
        return (None, *(next(found) if want else None for want in wanted))

    @staticmethod
    def jvp(ctx: Any, _: Any, *moves: Tensor | None) -> Any:
        moved = [i for i, move in enumerate(moves) if move is not None]
        push = partial(push_forward, ctx.function, moved)
        return _Recomputed.apply(push, *(moves[i] for i in moved), *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: Any, function: Callable[..., Any], *tensors: Tensor) -> Any:
        return by_loop(partial(_Recomputed.apply, function), info, in_dims[1:], *tensors)


def recomputed(function: Callable[..., Any], *tensors: Tensor) -> Any:
    """Return ``function(*tensors)``, a tensor or a tuple; a derivative evaluates it again.

    The function reads no other tensors that a derivative is asked for.
    """
    return _Recomputed.apply(function, *tensors)


def pull_back(
    function: Callable[..., Any], needed: Sequence[int], count: int, *tensors: Tensor
) -> tuple[Tensor, ...]:
    """Return the products of `count` cotangents with the derivatives by the tensors `needed`."""
    again = torch.is_grad_enabled()
    cotangents, at = tensors[:count], _marked(tensors[count:], needed)
    with torch.enable_grad():
        outputs = function(*at)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return _grad(outputs, [at[i] for i in needed], cotangents, again)


def push_forward(function: Callable[..., Any], moved: Sequence[int], *tensors: Tensor) -> Any:
    """Return the derivative along tangents of the tensors `moved`: the pull, which is linear."""
    again = torch.is_grad_enabled()
    moves, at = tensors[: len(moved)], _marked(tensors[len(moved) :], moved)
    with torch.enable_grad():
        outputs = function(*at)
        several = isinstance(outputs, tuple)
        outputs = outputs if several else (outputs,)
        seeds = [torch.zeros_like(output, requires_grad=True) for output in outputs]
        pulled = _grad(outputs, [at[i] for i in moved], seeds, True)
        pushed = _grad(pulled, seeds, moves, again)
    return pushed if several else pushed[0]


def _marked(tensors: Sequence[Tensor], which: Sequence[int]) -> list[Tensor]:
    """Return tensors to differentiate by: those with a graph as nodes of their own in it."""
    at = list(tensors)
    for i in which:
        linked = torch.is_grad_enabled() and at[i].requires_grad
        at[i] = at[i].view_as(at[i]) if linked else at[i].detach().requires_grad_()
    return at


def _grad(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], seeds: Sequence[Tensor], again: bool
) -> tuple[Tensor, ...]:
    pairs = [(y, seed) for y, seed in zip(outputs, seeds, strict=True) if y.requires_grad]
    if not pairs:
        return tuple(torch.zeros_like(x) for x in inputs)
    ys, seeds = zip(*pairs, strict=True)
    return autograd.grad(
        ys, inputs, seeds, create_graph=again, allow_unused=True, materialize_grads=True
    )


def by_loop(apply: Callable[..., Any], info: Any, in_dims: Any, *tensors: Tensor) -> Any:
    """Call a function for each of a batch: solves end after numbers of steps of their own."""
    results = []
    for i in range(info.batch_size):
        one = (
            tensor.select(dim, i) if isinstance(dim, int) else tensor
            for tensor, dim in zip(tensors, in_dims, strict=True)
        )
        results.append(apply(*one))
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    stacked = tuple(torch.stack(part) for part in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)
