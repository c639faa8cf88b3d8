"""The Gauss-Newton matrix as an operator, with the loss of the outputs computed in pieces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowrank_inverse._typing import PyTree
from lowrank_inverse_torch.curvature.gradient_graph import (
    GradientGraph,
    Values,
    grad_with_graph,
    pull_back,
)
from lowrank_inverse_torch.curvature.mean_operator import CurvatureOperator, Modules
from lowrank_inverse_torch.model_guard import evaluate_loss
from lowrank_inverse_torch.parameters import as_parameters

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["GaussNewtonOperator"]

PIECE_BYTES = 2**22
"""Outputs of so many bytes make a piece: the graph of their loss takes several times as much."""


class RowLoss:
    """A loss that is a sum over the rows of the outputs, and can be had of some of them.

    Attributes
    ----------
    num_rows : int
        0 while the loss can be had only of all.
    """

    num_rows = 0

    def __call__(self, outputs: Tensor, start: int = 0) -> Tensor:
        """Return the loss of the rows of `outputs`, the first of which is row `start`."""
        raise NotImplementedError


class GaussNewtonGraph:
    """``J^T H_L J`` of ``loss(outputs)``, with J the Jacobian of the outputs by the tensors.

    ``J^T u`` is linear in u, so that differentiating ``<v, J^T u>`` by u gives ``J v``: a second
    backward pass instead of forward mode, which not every operation has.
    """

    def __init__(
        self, outputs: Any, loss: Callable[[Tensor], Tensor], tensors: Sequence[Tensor]
    ) -> None:
        if not isinstance(outputs, Tensor):
            raise TypeError(f"`outputs` must return one tensor; got {type(outputs).__name__}.")
        if not outputs.is_floating_point():
            raise TypeError(f"`outputs` must be real and floating-point; got {outputs.dtype}.")
        self.tensors = tuple(tensors)
        self._outputs = outputs
        # One number in memory: nothing but its place in the graph is needed of it.
        self._seed = outputs.new_ones(()).expand(outputs.shape).requires_grad_()
        self._pullback = grad_with_graph(outputs, self.tensors, self._seed, "outputs", "params")
        self._loss = OutputCurvature(outputs.detach(), loss)
        self.loss = self._loss.value

    def gradient(self) -> Values:
        """Return the gradient of the loss, detached."""
        return pull_back([self._outputs], [self._loss.gradient()], self.tensors, False)

    def product(self, vectors: Sequence[Tensor | None], *, batched: bool = False) -> Values:
        """Multiply with a vector, given and returned as in `GradientGraph.vjp`."""
        pushed = pull_back(self._pullback, vectors, [self._seed], batched)[0]
        curved = None if pushed is None else self._loss.product(pushed, batched)
        del pushed
        return pull_back([self._outputs], [curved], self.tensors, batched)


class OutputCurvature:
    """The Hessian of a loss by outputs: one graph that is kept, or one at a time for each piece.

    Many outputs, such as logits over a vocabulary, are cut into pieces where the loss allows it:
    beside its argument and its result, a product takes the memory of one piece's graph.
    """

    def __init__(self, at: Tensor, loss: Callable[[Tensor], Tensor]) -> None:
        self._at, self._loss = at, loss
        num_rows = loss.num_rows if isinstance(loss, RowLoss) else 0
        row_bytes = at.element_size() * at.numel() // max(num_rows, 1)
        size = max(1, PIECE_BYTES // max(row_bytes, 1))
        self._pieces = [slice(i, i + size) for i in range(0, num_rows, size)]
        self._kept: GradientGraph | None = None
        if len(self._pieces) < 2:
            self._kept = _graph(lambda z: loss(z), at.detach())
            self.value = self._kept.loss
        else:
            with torch.no_grad():
                values = [evaluate_loss(lambda p=p: self._of(at[p], p)) for p in self._pieces]  # type: ignore[misc]
            self.value = torch.stack(values).sum()

    def gradient(self) -> Tensor | None:
        """Return the gradient of the loss, detached."""
        if self._kept is not None:
            return self._kept.gradient()[0]
        result = torch.zeros_like(self._at)
        for piece in self._pieces:
            if (part := self._graph_of(piece).gradient()[0]) is not None:
                result[piece] = part
        return result

    def product(self, v: Tensor, batched: bool) -> Tensor | None:
        """Multiply with outputs, or with several stacked along a new first axis."""
        if self._kept is not None:
            return self._kept.product([v], batched=batched)[0]
        result = torch.zeros_like(v)
        for piece in self._pieces:
            rows = (slice(None), piece) if batched else piece
            if (part := self._graph_of(piece).product([v[rows]], batched=batched)[0]) is not None:
                result[rows] = part
        return result

    def _graph_of(self, piece: slice) -> GradientGraph:
        return _graph(lambda z: self._of(z, piece), self._at[piece].detach())

    def _of(self, z: Tensor, piece: slice) -> Tensor:
        assert isinstance(self._loss, RowLoss)
        return self._loss(z, piece.start)


def _graph(loss: Callable[[Tensor], Tensor], at: Tensor) -> GradientGraph:
    at.requires_grad_()
    return GradientGraph(evaluate_loss(lambda: loss(at)), [at], by="outputs")


class GaussNewtonOperator(CurvatureOperator[GaussNewtonGraph]):
    """The Gauss-Newton matrix ``J^T H_L J`` of ``loss(outputs)`` as an operator [1]_.

    J is the Jacobian of the outputs with respect to the parameters, and ``H_L`` the Hessian of the
    loss with respect to the outputs. The matrix is positive semidefinite if the loss is convex in
    the outputs.

    Parameters
    ----------
    loss : callable (outputs) -> scalar, or list of callables
        The loss of the outputs.
    outputs : closure () -> Tensor, or list of closures
        The outputs of the network. With lists, the operator is the mean over the pairs of `loss`
        and `outputs`, with one graph at a time as in `HessianOperator`.
    params, chunk_size, module, mesh
        See `HessianOperator`, also for attributes and errors.

    Notes
    -----
    A product costs about as much as one with the Hessian.

    References
    ----------
    .. [1] N. Schraudolph, "Fast curvature matrix-vector products for second-order gradient
       descent", Neural Computation, 2002.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> G = GaussNewtonOperator(lambda z: (z**2).sum() / 2, lambda: x[0] * x[1:], x)
    >>> G @ torch.tensor([1.0, 0.0])
    tensor([4., 2.])
    """

    def __init__(
        self,
        loss: Callable[[Tensor], Tensor] | Sequence[Callable[[Tensor], Tensor]],
        outputs: Callable[[], Tensor] | Sequence[Callable[[], Tensor]],
        params: PyTree,
        *,
        chunk_size: int = 1,
        module: Modules | None = None,
        mesh: DeviceMesh | None = None,
    ) -> None:
        params = as_parameters(params, gather=mesh is not None)
        losses = loss if isinstance(loss, (list, tuple)) else [loss]
        closures = outputs if isinstance(outputs, (list, tuple)) else [outputs]
        if (not losses and mesh is None) or len(losses) != len(closures):
            raise ValueError(
                "`loss` and `outputs` must be one each, or lists of the same length; "
                f"got {len(losses)} and {len(closures)}."
            )
        for name, given in (("loss", losses), ("outputs", closures)):
            for one in given:
                if not callable(one):
                    raise TypeError(f"`{name}` must be callable; got {type(one).__name__}.")

        def builder(loss: Any, outputs: Any) -> Callable[[], GaussNewtonGraph]:
            return lambda: GaussNewtonGraph(outputs(), loss, params.tensors)

        builders = [builder(*pair) for pair in zip(losses, closures, strict=True)]
        super().__init__(builders, params, chunk_size, module, mesh)
