"""The graphs of the batches of a mean curvature, with one in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from lowrank_inverse_torch.curvature.gradient_graph import Graph
from lowrank_inverse_torch.model_guard import (
    RandomStates,
    random_states,
    set_random_states,
    twice_differentiable_attention,
    untouched,
)
from lowrank_inverse_torch.parameters import Parameters

G = TypeVar("G", bound=Graph)


class BatchGraphs(Generic[G]):
    """The graphs of some batches: that of a single one is kept, of several each is built again.

    Parameters
    ----------
    builders : sequence of callables () -> graph
        One for each batch.
    params : Parameters
    modules : sequence of Module
        To be left as they were.

    Attributes
    ----------
    losses : list of Tensor
        Of the batches, when they were evaluated.
    """

    def __init__(
        self, builders: Sequence[Callable[[], G]], params: Parameters, modules: Sequence[nn.Module]
    ) -> None:
        self._builders, self._params, self.modules = builders, params, modules
        self._kept: G | None = None
        self._starts: list[RandomStates] = []
        self._versions: list[int] = []
        self.losses: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._builders)

    def evaluate(self) -> tuple[Tensor, Tensor]:
        """Return the means of losses and gradients; zeros without a batch. To be called first."""
        params = self._params
        gradient = torch.zeros(params.n, dtype=params.dtype, device=params.device)
        loss = torch.zeros((), dtype=params.dtype, device=params.device)
        with untouched(params.tensors, self.modules) as states:
            for build in self._builders:
                self._starts.append(random_states(states))
                graph = build()
                self.losses.append(graph.loss)
                params.add_to(gradient, graph.gradient())
                if len(self._builders) == 1:
                    self._kept = graph
                del graph  # before the next one is built
        if self.losses:
            gradient /= len(self._builders)
            loss = torch.stack(self.losses).mean()
        self._versions = [tensor._version for tensor in params.tensors]
        return loss, gradient

    def for_each(self, use: Callable[[G], None], by: Sequence[Tensor] = ()) -> None:
        """Call `use` with each graph, which may differentiate by further tensors."""
        tensors = self._params.tensors
        if [tensor._version for tensor in tensors] != self._versions:
            raise RuntimeError(
                "The parameters were changed in place after this operator was made, so its "
                "curvature is out of date. Create a new operator after each step."
            )
        # A checkpointed module runs again in backward.
        with untouched([*tensors, *by], self.modules), twice_differentiable_attention():
            if self._kept is not None:
                use(self._kept)
            else:
                for i in range(len(self._builders)):
                    use(self.rebuilt(i))
        self._versions = [tensor._version for tensor in tensors]  # Embedding(max_norm=...) writes

    def rebuilt(self, i: int) -> G:
        """Build the graph of a batch again, with the random state that it had at first."""
        set_random_states(self._starts[i])
        graph = self._builders[i]()
        before, now = self.losses[i].item(), graph.loss.item()
        tolerance = torch.finfo(graph.loss.dtype).eps ** 0.5  # more than another order of sums
        if abs(now - before) > tolerance * max(abs(before), abs(now)):
            raise RuntimeError(
                f"Closure {i} returned the loss {before:.6g} at first and {now:.6g} now. It must "
                "return the loss of the same batch at each call, since the operator must not "
                "change during a solve."
            )
        return graph
