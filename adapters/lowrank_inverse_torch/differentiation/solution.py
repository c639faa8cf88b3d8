"""How torch differentiates a solve: by the implicit function theorem, with no graph of steps."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, autograd

from lowrank_inverse._typing import OperatorLike, Scalar
from lowrank_inverse.operators.differentiation import (
    constant,
    damped_product,
    made_of,
    noting,
    parts,
)
from lowrank_inverse_torch.differentiation.recomputation import (
    by_loop,
    pull_back,
    push_forward,
    recomputed,
)

_FIELDS = ("value", "residual_norm", "num_steps", "converged", "reason")
_TWICE = (
    "The solution with an operator of unknown tensors has first derivatives only. Pass the tensors "
    "that the functions of a FunctionOperator read as `parameters`."
)


class _Task:
    """A system as a function of the tensors that it is made of, and what solves it."""

    def __init__(
        self, A: OperatorLike, damping: Scalar, make: Any, x0: Any = None, keep: int = 0
    ) -> None:
        self.system, self.make, self.x0, self.keep = (A, damping), make, x0, keep
        self.records = torch.is_grad_enabled()
        self.found: Any = None
        self.notes: list[Any] = []

    def product(self, x: Tensor, *tensors: Tensor) -> Tensor:
        """Return the product of the system that is made of `tensors`."""
        A, damping = made_of(self.system, tensors)
        return damped_product(A, damping, x)

    def solve(self, b: Tensor, tensors: Sequence[Tensor]) -> Any:
        """Return the Solution for plain tensors; note the operators whose products have graphs."""
        with torch.set_grad_enabled(self.records), noting() as self.notes:
            run = self.make(*constant(made_of(self.system, tensors)))
            self.found = run(b.detach(), self.x0, self.keep)
        return self.found

    def again(self) -> _Task:
        """Return the task of another right-hand side, which starts from zero."""
        other = _Task(*self.system, self.make)
        other.records = self.records
        return other


class _Solve(autograd.Function):
    """The solution as a function of the right-hand side and of the tensors of the system."""

    @staticmethod
    def forward(task: _Task, b: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        solution = task.solve(b, tensors)
        fields = (getattr(solution, name) for name in _FIELDS)
        return tuple(field for field in fields if field is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.task, _, *tensors = inputs
        ctx.num_fields = len(output) - 1
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[0], *tensors)
        ctx.save_for_forward(output[0], *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        g, (x, *tensors), task = cotangents[0], ctx.saved_tensors, ctx.task
        if g is None:
            return (None,) * len(ctx.needs_input_grad)
        u = _Solve.apply(task.again(), g, *tensors)[0]
        grads: list[Tensor | None] = [None] * len(tensors)
        needed = [i for i, need in enumerate(ctx.needs_input_grad[2:]) if need]
        if needed:
            pull = partial(pull_back, task.product, [i + 1 for i in needed], 1)
            for i, part in zip(needed, recomputed(pull, -u, x, *tensors), strict=True):
                grads[i] = part
        return (None, u, *grads)

    @staticmethod
    def jvp(ctx: Any, _: Any, db: Tensor | None, *moves: Any) -> tuple[Any, ...]:
        (x, *tensors), task = ctx.saved_tensors, ctx.task
        change = torch.zeros_like(x) if db is None else db
        moved = [i for i, move in enumerate(moves) if move is not None]
        if moved:
            push = partial(push_forward, task.product, [i + 1 for i in moved])
            change = change - recomputed(push, *(moves[i] for i in moved), x, *tensors)
        return (_Solve.apply(task.again(), change, *tensors)[0], *(None,) * ctx.num_fields)

    @staticmethod
    def vmap(info: Any, in_dims: Any, task: _Task, b: Tensor, *tensors: Tensor) -> Any:
        if not any(isinstance(dim, int) for dim in in_dims[2:]) and b.ndim == 2:  # of vectors
            rest = task.again()
            outputs = _Solve.apply(rest, b.movedim(in_dims[1], 1), *tensors)
            task.found = rest.found
            return outputs, (1, *(0,) * (len(outputs) - 1))
        tasks = [task.again() for _ in range(info.batch_size)]
        one = iter(tasks)
        outputs = by_loop(lambda *ts: _Solve.apply(next(one), *ts), info, in_dims[1:], b, *tensors)
        spent = sum(part.found.num_products for part in tasks)
        task.found = tasks[0].found._replace(num_products=spent)
        return outputs


class _Correct(autograd.Function):
    """A solution x and its residual, which is zero but has the derivatives that tell those of x."""

    @staticmethod
    def forward(task: _Task, x: Tensor, r: Tensor, *tensors: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.task = inputs[0]
        ctx.save_for_backward(*inputs[2:])
        ctx.save_for_forward(*inputs[2:])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Any, ...]:
        _, *tensors = ctx.saved_tensors
        found = _Once.apply(ctx.task, g, *ctx.saved_tensors)
        return None, None, found, *(None for _ in tensors)

    @staticmethod
    def jvp(ctx: Any, _: Any, __: Any, dr: Tensor, *moves: Any) -> Tensor:
        return _Once.apply(ctx.task, dr, *ctx.saved_tensors)

    @staticmethod
    def vmap(info: Any, in_dims: Any, task: _Task, *tensors: Tensor) -> Any:
        return by_loop(partial(_Correct.apply, task), info, in_dims[1:], *tensors)


class _Once(autograd.Function):
    """A solve for `b` that has no derivative; `of` is what it would have one by."""

    @staticmethod
    def forward(task: _Task, b: Tensor, of: Tensor, *tensors: Tensor) -> Tensor:
        return task.again().solve(b, tensors).value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise RuntimeError(_TWICE)

    @staticmethod
    def jvp(ctx: Any, *moves: Any) -> Any:
        raise RuntimeError(_TWICE)

    @staticmethod
    def vmap(info: Any, in_dims: Any, task: _Task, *tensors: Tensor) -> Any:
        return by_loop(partial(_Once.apply, task), info, in_dims[1:], *tensors)


class Rules:
    """What :func:`lowrank_inverse.operators.differentiation.register` takes."""

    @staticmethod
    def solve(
        A: OperatorLike,
        damping: Scalar,
        b: Tensor,
        make: Any,
        x0: Any,
        keep: int,
        found: Any,
        noted: bool,
    ) -> Any:
        """Return ``run(b, x0, keep)`` with the derivatives of its `value`."""
        task, tensors = _Task(A, damping, make, x0, keep), parts((A, damping))[0]
        if found is None:
            outputs = _Solve.apply(task, b, *tensors)
            fields = [name for name in _FIELDS if getattr(task.found, name) is not None]
            found = task.found._replace(**dict(zip(fields, outputs, strict=True)))
            noted = noted or bool(task.notes)
        if not noted:
            return found
        x = constant(found.value)
        r = b - damped_product(A, damping, x)  # by torch's own graph of one product
        return found._replace(value=_Correct.apply(task, x, r, *tensors))

    recomputed = staticmethod(recomputed)
