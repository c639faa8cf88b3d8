"""The derivative of a minimiser, for torch's autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lowrank_inverse._typing import RNG
from lowrank_inverse.bilevel.ridge import inverse_product
from lowrank_inverse_torch.curvature.gradient_graph import graph_nodes
from lowrank_inverse_torch.curvature.operators import HessianOperator
from lowrank_inverse_torch.model_guard import evaluate_loss, explained, untouched

_SECOND = (
    "implicit_minimizer has no second derivative. Leave create_graph=True out; under torch.func, "
    "differentiate once."
)
_FORWARD = (
    "implicit_minimizer has no forward mode in torch. Take reverse mode: torch.func.grad, vjp or "
    "jacrev."
)


class Problem:
    """One call of a training function: its arguments as a list of tensors, and the way back."""

    def __init__(
        self,
        train: Callable[..., Any],
        inner_loss: Callable[..., Tensor],
        settings: Any,
        rng: RNG,
        chunk_size: int,
        modules: Sequence[nn.Module],
        init: Any,
        hparams: Any,
        args: tuple[Any, ...],
    ) -> None:
        self.train, self.inner_loss, self.settings = train, inner_loss, settings
        self.rng, self.chunk_size = rng, chunk_size
        self._leaves, self._structure = pytree.tree_flatten((init, hparams, *args))
        self._places = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        num_init = sum(isinstance(leaf, Tensor) for leaf in pytree.tree_flatten(init)[0])
        self.tensors = [self._leaves[i] for i in self._places]
        # Without a derivative: it may come from an earlier call, whose graph is gone by now.
        self.tensors[:num_init] = [tensor.detach() for tensor in self.tensors[:num_init]]
        self.modules = [*modules, *(m for m in self._leaves if isinstance(m, nn.Module))]
        for tensor in self.tensors[num_init:]:
            if tensor.is_complex():
                raise TypeError(
                    f"`hparams` and `args` must be real; one is {tensor.dtype}. Hold its real and "
                    "imaginary parts as two tensors."
                )
        self.by = [  # arguments to differentiate by
            i >= num_init and tensor.is_floating_point() for i, tensor in enumerate(self.tensors)
        ]
        self.read: list[Tensor] = []  # leaf tensors that the loss reads beside its arguments
        self.found: list[Tensor] | None = None
        self.result: Any = None

    def minimise(self) -> Any:
        """Return the minimiser, with the derivative attached."""
        if is_transformed():
            return self._restored(_Minimizer.apply(self, *self.tensors))
        self.found = self.run([tensor.detach() for tensor in self.tensors])
        if torch.is_grad_enabled():
            self.read = self._tensors_read()
        return self._restored(_Minimizer.apply(self, *self.tensors, *self.read))

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Train, and return the distinct floating-point tensors of the result."""
        with torch.enable_grad():
            params = self.train(*self._arguments(tensors))
        leaves, structure = pytree.tree_flatten(params)
        places: dict[int, int] = {}
        distinct: list[Tensor] = []
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.is_complex():
                raise TypeError(
                    f"the parameters returned must be real; got {leaf.dtype}. Hold real and "
                    "imaginary parts as two tensors."
                )
            floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
            if floating and id(leaf) not in places:  # tied tensors count once
                places[id(leaf)] = len(distinct)
                distinct.append(leaf)
        if not distinct:
            raise ValueError(
                "the training function must return a floating-point tensor, or a structure that "
                f"holds one; got {type(params).__name__}. Return the parameters."
            )
        self.result = leaves, structure, [places.get(id(leaf)) for leaf in leaves]
        return [tensor.detach().clone() for tensor in distinct]

    def loss(self, theta: Sequence[Tensor], tensors: Sequence[Tensor]) -> Callable[[], Tensor]:
        """Return the inner loss as a closure."""
        _, *inputs = self._arguments(tensors)
        params = self._restored(theta)
        return lambda: self.inner_loss(params, *inputs)

    def _arguments(self, tensors: Sequence[Tensor]) -> Any:
        leaves = list(self._leaves)
        for i, tensor in zip(self._places, tensors, strict=True):
            leaves[i] = tensor
        return pytree.tree_unflatten(leaves, self._structure)

    def _restored(self, theta: Sequence[Tensor]) -> Any:
        leaves, structure, places = self.result
        values = [
            leaf if place is None else theta[place]
            for leaf, place in zip(leaves, places, strict=True)
        ]
        return pytree.tree_unflatten(values, structure)

    def _tensors_read(self) -> list[Tensor]:
        """Return the leaf tensors that require grad in the graph of the loss."""
        theta = [tensor.detach().requires_grad_() for tensor in self.found or ()]
        own = {id(tensor) for tensor in theta}
        with untouched(theta, self.modules), explained():
            loss = self.loss(theta, [tensor.detach() for tensor in self.tensors])
            value = evaluate_loss(loss, name="inner_loss")
        leaves: dict[int, Tensor] = {}
        for node in graph_nodes([value]):
            variable = getattr(node, "variable", None)
            if isinstance(variable, Tensor) and id(variable) not in own:
                leaves[id(variable)] = variable
        return list(leaves.values())


class _Minimizer(torch.autograd.Function):
    """The minimiser as a function of all the tensors in a problem."""

    @staticmethod
    def forward(problem: Problem, *tensors: Tensor) -> tuple[Tensor, ...]:
        if problem.found is not None:
            return tuple(tensor.detach() for tensor in problem.found)
        return tuple(problem.run([tensor.detach() for tensor in tensors]))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.problem, *tensors = inputs
        ctx.num_params = len(output)
        ctx.save_for_backward(*output, *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        problem, needed = ctx.problem, ctx.needs_input_grad[1:]
        by = [*problem.by, *(True for _ in problem.read)]
        wanted = tuple(a and b for a, b in zip(by, needed, strict=True))
        if not any(wanted):
            return (None,) * len(ctx.needs_input_grad)
        found = iter(
            _Adjoint.apply(problem, wanted, ctx.num_params, *cotangents, *ctx.saved_tensors)
        )
        return (None, *(next(found) if want else None for want in wanted))

    @staticmethod
    def vmap(info: Any, in_dims: Any, problem: Problem, *tensors: Tensor) -> Any:
        return _by_loop(_Minimizer, info, in_dims, problem, *tensors)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(_FORWARD)


class _Adjoint(torch.autograd.Function):
    """The derivative of a minimiser, applied to a cotangent.

    A Function, so that under torch.func it is given plain tensors to solve with.
    """

    @staticmethod
    def forward(
        problem: Problem, wanted: tuple[bool, ...], num_params: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        cotangents, tensors = tensors[:num_params], tensors[num_params:]
        theta = [tensor.detach().requires_grad_() for tensor in tensors[:num_params]]
        num_arguments = len(problem.tensors)
        arguments = [
            tensor.detach().requires_grad_(want)
            for tensor, want in zip(tensors[num_params:][:num_arguments], wanted, strict=False)
        ]
        H = HessianOperator(
            problem.loss(theta, arguments),
            theta,
            chunk_size=problem.chunk_size,
            module=problem.modules,
            name="inner_loss",
        )
        b = H.params.flatten(cotangents)
        solution = inverse_product(H, b, solver=problem.settings, rng=problem.rng).solution
        by = [t for t, want in zip([*arguments, *problem.read], wanted, strict=True) if want]
        parts = H.vjp(-solution.value, by)
        return tuple(
            torch.zeros_like(tensor) if part is None else part
            for tensor, part in zip(by, parts, strict=True)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise RuntimeError(_SECOND)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *arguments: Any) -> Any:
        return _by_loop(_Adjoint, info, in_dims, *arguments)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(_FORWARD)


def _by_loop(function: Any, info: Any, in_dims: Any, *arguments: Any) -> Any:
    """Apply a Function to each of a batch: solves end after numbers of steps of their own."""
    results = []
    for i in range(info.batch_size):
        one = [
            argument.select(dim, i) if isinstance(dim, int) else argument
            for argument, dim in zip(arguments, in_dims, strict=True)
        ]
        results.append(function.apply(*one))
    stacked = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return stacked, (0,) * len(stacked)


def is_transformed() -> bool:
    """Whether a transformation of torch.func is at work: there no tensor can be marked."""
    try:
        torch.empty(0).requires_grad_()
    except RuntimeError:
        return True
    return False
