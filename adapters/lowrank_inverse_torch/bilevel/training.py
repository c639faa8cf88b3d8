"""Training functions and the problems that their calls pose."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lowrank_inverse._typing import RNG, PyTree
from lowrank_inverse.bilevel.diagnostics import HypergradientWarning
from lowrank_inverse.bilevel.info import HypergradientInfo
from lowrank_inverse.solvers.state import HypergradientState
from lowrank_inverse_torch.bilevel.adjoint import apply, is_transformed
from lowrank_inverse_torch.bilevel.ridge import Ridge
from lowrank_inverse_torch.curvature.gradient_graph import graph_nodes
from lowrank_inverse_torch.model_guard import (
    RandomStates,
    evaluate_loss,
    explained,
    untouched,
)
from lowrank_inverse_torch.parameters import Parameters, as_parameters


class Minimizer:
    """A training function with its inner problem, and what its latest backward pass left."""

    def __init__(
        self,
        train: Callable[..., Any],
        inner_loss: Callable[..., Tensor],
        *,
        solver: Any,
        ridge: Any,
        rng: RNG,
        chunk_size: int,
        modules: Sequence[nn.Module],
        keep_state: bool,
    ) -> None:
        self.train, self.inner_loss, self.solver, self.ridge = train, inner_loss, solver, ridge
        self.rng, self.chunk_size, self.modules = rng, chunk_size, modules
        self.keep_state = keep_state
        self.info: HypergradientInfo | None = None
        self.state = HypergradientState() if keep_state else None
        self._said: set[str] = set()

    def report(self, info: HypergradientInfo, state: HypergradientState) -> None:
        """Keep the record of a solve, and warn of what is wrong, once of each kind."""
        self.info, self.state = info, state
        new = [one for one in info.findings() if one.name not in self._said]
        if new:
            self._said.update(one.name for one in new)
            text = "\n".join(f"{one.message} {one.remedy}" for one in new)
            warnings.warn(text, HypergradientWarning, stacklevel=2)


class Problem:
    """One call of a training function: its arguments as a list of tensors, and the way back.

    It lives as long as the graph of the result, and so holds no tensor that this does not need:
    an `init` that came from an earlier call would keep that call alive, and so on to the first.
    """

    def __init__(
        self,
        minimizer: Minimizer,
        init: PyTree,
        hparams: PyTree,
        args: Any,
        options: dict[str, Any],
    ) -> None:
        self.minimizer, self._options = minimizer, options
        leaves, self._structure = pytree.tree_flatten((init, hparams, *args))
        self._places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self._leaves = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.num_init = sum(isinstance(leaf, Tensor) for leaf in pytree.tree_flatten(init)[0])
        self.modules = [*minimizer.modules, *(m for m in leaves if isinstance(m, nn.Module))]
        inputs = [leaves[i] for i in self._places[self.num_init :]]
        for tensor in inputs:
            if tensor.is_complex():
                raise TypeError(
                    f"`hparams` and `args` must be real; one is {tensor.dtype}. Store its real and "
                    "imaginary parts as two tensors."
                )
        self.by = [tensor.is_floating_point() for tensor in inputs]  # to differentiate by
        self.read: list[Tensor] = []  # leaf tensors that the loss reads beside its arguments
        self.found: list[Tensor] | None = None
        self.value: Tensor | None = None  # of the loss at the result, and the random state there
        self.states: RandomStates = {}
        self._result: Any = None

    def minimise(self, init: PyTree, hparams: PyTree, args: Any) -> Any:
        """Return the minimiser, with the derivative attached."""
        given = pytree.tree_flatten((init, hparams, *args))[0]
        tensors = [leaf for leaf in given if isinstance(leaf, Tensor)]
        tensors[: self.num_init] = [tensor.detach() for tensor in tensors[: self.num_init]]
        if is_transformed():
            return self._restored(apply(self, *tensors))
        self.found = self.run([tensor.detach() for tensor in tensors])
        if torch.is_grad_enabled():
            self._look([tensor.detach() for tensor in tensors[self.num_init :]])
        return self._restored(apply(self, *tensors, *self.read))

    def run(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Train, and return the distinct floating-point tensors of the result."""
        with torch.enable_grad():
            params = self.minimizer.train(*self._arguments(tensors), **self._options)
        leaves, structure = pytree.tree_flatten(params)
        places: dict[int, int] = {}
        distinct: list[Tensor] = []
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.is_complex():
                raise TypeError(
                    f"the parameters returned must be real; got {leaf.dtype}. Store real and "
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
        where = [places.get(id(leaf)) for leaf in leaves]
        rest = [leaf if i is None else None for leaf, i in zip(leaves, where, strict=True)]
        self._result = rest, structure, where
        return [tensor.detach().clone() for tensor in distinct]

    def problem(
        self, theta: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> tuple[Callable[[], Tensor], Parameters, Ridge | None]:
        """Return the inner loss as a closure, its parameters, and the ridge."""
        _, hparams, *args = self._arguments([*(None,) * self.num_init, *inputs])
        params, loss = self._restored(theta), self.minimizer.inner_loss
        _, structure, where = self._result
        only = [None if i is None else theta[i] for i in where]
        parameters = as_parameters(pytree.tree_unflatten(only, structure))
        ridge = self.minimizer.ridge
        if callable(ridge):
            with torch.enable_grad():
                ridge = ridge(hparams)
        known = None if ridge is None else Ridge(ridge, parameters)
        return lambda: loss(params, hparams, *args), parameters, known

    def check_value(self, loss: Tensor) -> None:
        """Raise unless the inner loss has the value that it had at the end of training."""
        if self.value is None:
            return
        before, now = self.value.item(), loss.item()
        if abs(now - before) > torch.finfo(loss.dtype).eps ** 0.5 * max(abs(before), abs(now)):
            raise RuntimeError(
                f"`inner_loss` was {before:.6g} at the end of training and is {now:.6g} in the "
                "backward pass: something that it reads besides its arguments has changed, such as "
                "a batch. Pass that as an argument, train(init, hparams, batch), or call "
                "backward() before it changes."
            )

    def _arguments(self, tensors: Sequence[Any]) -> Any:
        leaves = list(self._leaves)
        for i, tensor in zip(self._places, tensors, strict=True):
            leaves[i] = tensor
        return pytree.tree_unflatten(leaves, self._structure)

    def _restored(self, theta: Sequence[Tensor]) -> Any:
        rest, structure, where = self._result
        values = [leaf if i is None else theta[i] for leaf, i in zip(rest, where, strict=True)]
        return pytree.tree_unflatten(values, structure)

    def _look(self, inputs: Sequence[Tensor]) -> None:
        """Keep the value of the loss, and the leaf tensors that require grad in its graph."""
        theta = [tensor.detach().requires_grad_() for tensor in self.found or ()]
        own = {id(tensor) for tensor in theta}
        loss, _, ridge = self.problem(theta, inputs)
        with untouched(theta, self.modules) as self.states, explained():
            value = evaluate_loss(loss, name="inner_loss")
        self.value = value.detach()
        known = [] if ridge is None else [r * 1 for r in ridge.tensors if r is not None]
        leaves: dict[int, Tensor] = {}
        for node in graph_nodes([value, *known]):
            variable = getattr(node, "variable", None)
            if isinstance(variable, Tensor) and id(variable) not in own:
                leaves[id(variable)] = variable
        self.read = list(leaves.values())
