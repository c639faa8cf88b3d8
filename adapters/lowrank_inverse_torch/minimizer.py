"""Minimisers that are differentiated by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lowrank_inverse.bilevel.ridge import default_solver, inverse_product
from lowrank_inverse_torch.curvature.gradient_graph import graph_nodes
from lowrank_inverse_torch.curvature.operators import HessianOperator, Modules
from lowrank_inverse_torch.model_guard import evaluate_loss, explained, untouched

__all__ = ["implicit_minimizer"]


_SECOND = (
    "implicit_minimizer has no second derivative. Leave create_graph=True out; under torch.func, "
    "differentiate once."
)


_FORWARD = (
    "implicit_minimizer has no forward mode in torch. Take reverse mode: torch.func.grad, vjp or "
    "jacrev."
)


def implicit_minimizer(
    inner_loss: Callable[..., Tensor],
    *,
    solver: Any = None,
    rng: Any = 0,
    chunk_size: int = 1,
    module: Modules | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make the result of a training function differentiable by its hyperparameters.

    Parameters
    ----------
    inner_loss : callable (params, hparams, *args) -> scalar
        What the function minimises. It may read further tensors and modules.
    solver : settings such as ``lowrank_inverse.NystromCG(...)``
        Inverts the Hessian of the inner loss.
    rng : int or numpy.random.Generator, optional
        Seed of the columns.
    chunk_size : int
        Hessian products taken at a time.
    module : Module or iterable of Modules, optional
        What the inner loss runs, so that its buffers and mode are left as they are.

    Returns
    -------
    decorator
        For a function ``train(init, hparams, *args) -> params``, all of them tensors or
        structures of tensors. Its derivative by `hparams`, by `args`, and by every leaf tensor
        that the inner loss reads beside them, becomes ``-(∂²f/∂θ² + damping I)^{-1} ∂²f/∂θ∂φ``,
        whatever the function does inside; the derivative by `init` is zero. `train` is given
        `hparams` and `args` detached.

    Raises
    ------
    RuntimeError
        For a second derivative, and for forward mode.
    TypeError, ValueError
        As :func:`lowrank_inverse_torch.HessianOperator`, when differentiated.

    Notes
    -----
    The backward pass costs a gradient, the products of the solver, and one more. One evaluation
    of the loss at the result finds the tensors that it reads; under ``torch.no_grad()`` there is
    none.

    ``torch.func.grad``, ``vjp``, ``jacrev`` and ``vmap`` work, the last by a loop. They see
    arguments alone, never what the loss reads beside them. A training function that calls
    ``backward()`` should name its ``inputs``, or it fills ``.grad`` of all that the loss reads.

    References
    ----------
    .. [1] M. Blondel et al. Efficient and Modular Implicit Differentiation. NeurIPS 2022.

    Examples
    --------
    >>> import torch
    >>> import lowrank_inverse as li
    >>> def inner(w, h):
    ...     return 0.5 * ((w - 3) ** 2 + h * w**2)
    >>> @implicit_minimizer(inner, solver=li.CG())
    ... def train(init, h):
    ...     return 3 / (1 + h)
    >>> h = torch.tensor(1.0, requires_grad=True)
    >>> train(torch.tensor(0.0), h).backward()
    >>> print(h.grad.item())
    -0.75
    """
    settings = default_solver(solver)
    if not callable(inner_loss):
        raise TypeError(
            f"`inner_loss` must be a function; got {type(inner_loss).__name__}. Pass the function, "
            "not its value."
        )
    guarded = [module] if isinstance(module, nn.Module) else list(module or ())

    def decorator(train: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(train)
        def wrapped(init: Any, hparams: Any, *args: Any) -> Any:
            problem = _Problem(
                train, inner_loss, settings, rng, chunk_size, guarded, init, hparams, args
            )
            return problem.minimise()

        return wrapped

    return decorator


class _Problem:
    """One call of a training function: its arguments as a list of tensors, and the way back."""

    def __init__(
        self,
        train: Callable[..., Any],
        inner_loss: Callable[..., Tensor],
        settings: Any,
        rng: Any,
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
        if _transformed():
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
    def forward(problem: _Problem, *tensors: Tensor) -> tuple[Tensor, ...]:
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
    def vmap(info: Any, in_dims: Any, problem: _Problem, *tensors: Tensor) -> Any:
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
        problem: _Problem, wanted: tuple[bool, ...], num_params: int, *tensors: Tensor
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


def _transformed() -> bool:
    """Whether a transformation of torch.func is at work: there no tensor can be marked."""
    try:
        torch.empty(0).requires_grad_()
    except RuntimeError:
        return True
    return False
