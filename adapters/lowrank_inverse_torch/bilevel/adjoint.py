"""The derivative of a minimiser, for autograd."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from lowrank_inverse.bilevel.implicit_gradient import implicit_gradient
from lowrank_inverse_torch.bilevel.hypergradient import record
from lowrank_inverse_torch.bilevel.ridge import sums
from lowrank_inverse_torch.curvature.hessian import HessianOperator
from lowrank_inverse_torch.differentiation.recomputation import by_loop
from lowrank_inverse_torch.model_guard import (
    set_random_states,
    untouched,
)

_SECOND = (
    "implicit_minimizer has no second derivative. Omit create_graph=True; under torch.func, "
    "differentiate once."
)
_FORWARD = (
    "implicit_minimizer has no forward mode in torch. Use reverse mode: torch.func.grad, vjp or "
    "jacrev."
)


class _Minimizer(torch.autograd.Function):
    """The minimiser as a function of all the tensors in a problem."""

    @staticmethod
    def forward(problem: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        if problem.found is not None:
            return tuple(tensor.detach() for tensor in problem.found)
        return tuple(problem.run([tensor.detach() for tensor in tensors]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.problem, *tensors = inputs
        ctx.num_params = len(output)
        ctx.save_for_backward(*output, *tensors[ctx.problem.num_init :])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        problem, needed = ctx.problem, ctx.needs_input_grad[1:]
        by = [*(False,) * problem.num_init, *problem.by, *(True for _ in problem.read)]
        wanted = tuple(a and b for a, b in zip(by, needed, strict=True))
        if not any(wanted):
            return (None,) * len(ctx.needs_input_grad)
        found = iter(
            _Adjoint.apply(
                problem,
                wanted[problem.num_init :],
                ctx.num_params,
                *cotangents,
                *ctx.saved_tensors,
            )
        )
        return (None, *(next(found) if want else None for want in wanted))

    @staticmethod
    def vmap(info: Any, in_dims: Any, problem: Any, *tensors: Tensor) -> Any:
        return by_loop(partial(_Minimizer.apply, problem), info, in_dims[1:], *tensors)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(_FORWARD)


class _Adjoint(torch.autograd.Function):
    """The derivative of a minimiser, applied to a cotangent.

    A Function, so that under torch.func it is given plain tensors to solve with.
    """

    @staticmethod
    def forward(
        problem: Any, wanted: tuple[bool, ...], num_params: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        cotangents, tensors = tensors[:num_params], tensors[num_params:]
        theta = [tensor.detach().requires_grad_() for tensor in tensors[:num_params]]
        arguments = [
            tensor.detach().requires_grad_(want)
            for tensor, want in zip(tensors[num_params:][: len(problem.by)], wanted, strict=False)
        ]
        loss, params, ridge = problem.problem(theta, arguments)
        own = problem.minimizer
        with untouched(theta, problem.modules):
            set_random_states(problem.states)  # the dropout masks of the end of training
            H = HessianOperator(
                loss,
                params,
                chunk_size=own.chunk_size,
                module=problem.modules,
                name="inner_loss",
            )
        problem.check_value(H.loss)
        b = H.params.flatten(cotangents)
        by = [t for t, want in zip([*arguments, *problem.read], wanted, strict=True) if want]

        def mixed_vjp(q: Tensor) -> list[Tensor | None]:
            parts = H.vjp(q, by)
            return parts if ridge is None else sums(parts, ridge.vjp(q, by))

        coefficients = None if ridge is None else ridge.coefficients
        result = implicit_gradient(
            H,
            b,
            mixed_vjp,
            [None] * len(by),
            solver=own.solver,
            ridge=coefficients,
            rng=own.rng,
            state=own.state if own.keep_state else None,
        )
        own.report(record(result, b, H, coefficients), result.state)
        return tuple(
            torch.zeros_like(tensor) if part is None else part
            for tensor, part in zip(by, result.implicit, strict=True)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise RuntimeError(_SECOND)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Any,
        problem: Any,
        wanted: tuple[bool, ...],
        num_params: int,
        *tensors: Tensor,
    ) -> Any:
        one = partial(_Adjoint.apply, problem, wanted, num_params)
        return by_loop(one, info, in_dims[3:], *tensors)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(_FORWARD)


def apply(problem: Any, *tensors: Tensor) -> Any:
    """Return the minimiser of a problem with its derivative by all tensors in it."""
    return _Minimizer.apply(problem, *tensors)


def is_transformed() -> bool:
    """Whether a transformation of torch.func is at work: there no tensor can be marked."""
    try:
        torch.empty(0).requires_grad_()
    except RuntimeError:
        return True
    return False
