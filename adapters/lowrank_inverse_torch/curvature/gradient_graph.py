"""The graph of a gradient, kept so that it can be differentiated again and again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, autograd
from torch.overrides import TorchFunctionMode

from lowrank_inverse_torch.model_guard import explained

Values = list[Tensor | None]


# Nodes of a graph behind which autograd.grad sees nothing.
_CUTS = {
    "CheckpointFunctionBackward": "A checkpoint with use_reentrant=True hides its parameters.",
    "torch::autograd::Error": "A function marked @once_differentiable hides its arguments.",
}


_WEIGHT_NORM = (
    "The second derivative of torch's weight_norm treats its norms as constants. Pass a closure "
    "that evaluates the loss, in which it is replaced, or write ``g * v / v.norm(...)``."
)


_DETACHING = (Tensor.detach, Tensor.data.__get__)  # type: ignore[attr-defined]


class TwiceDifferentiable(TorchFunctionMode):
    """Within, its formula takes the place of torch's fused weight_norm, whose Hessian is wrong.

    Attributes
    ----------
    detached : bool
        Whether a tensor that requires grad was detached: a gradient may depend on it all the same.
    """

    detached = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DETACHING and args[0].requires_grad:
            self.detached = True
        return (_weight_norm if func is torch._weight_norm else func)(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * (g / torch.norm_except_dim(v, 2, dim))


_NO_GRAPH = (
    "A gradient has no graph, because the backward of a custom Function detaches it. Write that "
    "backward with differentiable operations, or remove the Function from the loss."
)


class Graph(Protocol):
    """What a curvature operator needs of one batch."""

    loss: Tensor

    def gradient(self) -> Values:
        """Return the gradient of the loss, detached."""
        ...

    def product(self, vectors: Sequence[Tensor | None], *, batched: bool = False) -> Values:
        """Multiply the curvature with a vector, or with several stacked along a new axis."""
        ...


class GradientGraph:
    """The gradient of an evaluated loss, with a graph for second derivatives.

    Parameters
    ----------
    loss : scalar Tensor
        With its graph, which is kept.
    tensors : sequence of Tensor
        Tensors that require grad, with respect to which to differentiate.
    name, by : str
        Names of the two in messages.

    Attributes
    ----------
    loss : scalar Tensor
        Its value, detached.
    grads : tuple of Tensor or None
        The gradient with respect to each of `tensors`, with graph; None if the loss does not
        depend on it.

    Raises
    ------
    ValueError
        If the loss depends on none of the tensors.
    RuntimeError
        If part of its graph cannot be differentiated twice.

    Notes
    -----
    Cost: one backward pass. The object keeps the activations of the loss and of its gradient.
    """

    def __init__(
        self, loss: Tensor, tensors: Sequence[Tensor], *, name: str = "loss", by: str = "params"
    ) -> None:
        self.tensors = tuple(tensors)
        self.loss = loss.detach()
        if any(node.name() == "WeightNormInterfaceBackward0" for node in graph_nodes([loss])):
            raise RuntimeError(_WEIGHT_NORM)
        self.grads = grad_with_graph(loss, self.tensors, _seed(loss), name, by)

    def gradient(self) -> Values:
        """Return the gradient, detached; None where the loss does not depend on the tensor."""
        return [None if grad is None else grad.detach() for grad in self.grads]

    def vjp(
        self,
        vectors: Sequence[Tensor | None],
        wrt: Sequence[Tensor],
        *,
        batched: bool = False,
        create_graph: bool = False,
    ) -> Values:
        """Differentiate ``<v, gradient>`` by any tensors that the loss uses.

        Parameters
        ----------
        vectors : sequence of Tensor or None
            v, one for each of `tensors` and of its shape; None stands for zeros and saves work.
            With `batched`, several stacked along a new first axis.
        wrt : sequence of Tensor
            Tensors that require grad.

        Returns
        -------
        list of Tensor or None
            One for each of `wrt`, without a graph unless it is asked for; None where the gradient
            does not depend on it.
        """
        return pull_back(self.grads, vectors, wrt, batched, create_graph)

    def product(self, vectors: Sequence[Tensor | None], *, batched: bool = False) -> Values:
        """Multiply the Hessian with a vector, given and returned as in `vjp`."""
        return self.vjp(vectors, self.tensors, batched=batched)


def _seed(value: Tensor) -> Tensor:
    # A seed that requires grad gives every gradient a graph, for a linear loss too. One that comes
    # without was cut off, and its curvature would be zero without a word: see refuse_cut_graphs.
    return torch.ones_like(value, requires_grad=True)


def grad_with_graph(
    value: Tensor, tensors: Sequence[Tensor], seed: Tensor, name: str, by: str
) -> tuple[Tensor | None, ...]:
    """Return the gradient of ``<seed, value>``, with its graph."""
    grads: tuple[Tensor | None, ...] = (None,) * len(tensors)
    if value.requires_grad:
        with explained():
            grads = autograd.grad(value, tensors, seed, create_graph=True, allow_unused=True)
            grads = tuple(dense(grads))
            refuse_cut_graphs([value, *grads])
    if all(grad is None for grad in grads):
        raise ValueError(
            f"`{name}` must depend on `{by}`; it depends on none of the tensors there. "
            "Was it evaluated under torch.no_grad(), detached, or with another model?"
        )
    return grads


def pull_back(
    outputs: Sequence[Tensor | None],
    seeds: Sequence[Tensor | None],
    tensors: Sequence[Tensor],
    batched: bool,
    create_graph: bool = False,
) -> Values:
    """Differentiate ``<seeds, outputs>``; None stands for zeros on both sides."""
    pairs = [
        (output, seed)
        for output, seed in zip(outputs, seeds, strict=True)
        if output is not None and output.requires_grad and seed is not None
    ]
    if not pairs:
        return [None] * len(tensors)
    with explained(batched=batched):
        grads = autograd.grad(
            [output for output, _ in pairs],
            list(tensors),
            [seed for _, seed in pairs],
            retain_graph=True,
            create_graph=create_graph,
            allow_unused=True,
            is_grads_batched=batched,
        )
    return dense(grads)


def dense(grads: Sequence[Tensor | None]) -> Values:
    """Return gradients, of which an Embedding(sparse=True) has a sparse one, as dense tensors."""
    return [
        grad if grad is None or grad.layout is torch.strided else grad.to_dense() for grad in grads
    ]


def refuse_cut_graphs(tensors: Sequence[Tensor | None]) -> None:
    """Raise where part of a graph is hidden: autograd.grad would take it for constant."""
    given = [tensor for tensor in tensors if tensor is not None]
    for tensor in given:
        if not tensor.requires_grad and tensor.count_nonzero() > 0:
            raise RuntimeError(_NO_GRAPH)
    for node in graph_nodes(given):
        if node.name() in _CUTS:
            raise RuntimeError(_CUTS[node.name()])


def graph_nodes(tensors: Iterable[Tensor]) -> Iterator[Any]:
    """Yield each node of the graphs behind `tensors` once."""
    stack: list[Any] = [tensor.grad_fn for tensor in tensors]
    seen: set[Any] = set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(parent for parent, _ in node.next_functions)
