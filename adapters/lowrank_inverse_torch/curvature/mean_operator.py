"""The mean curvature over batches as an operator, with one graph in memory at a time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Generic

import numpy as np
import torch
from torch import Tensor, nn

from lowrank_inverse._typing import Indices
from lowrank_inverse.arrays.checks import check_indices, no_entries
from lowrank_inverse.arrays.spread import gathered, is_spread, local
from lowrank_inverse.operators.base import Operator
from lowrank_inverse_torch.curvature.batch_graphs import BatchGraphs, G
from lowrank_inverse_torch.parameters import Parameters

Modules = nn.Module | Iterable[nn.Module]


if TYPE_CHECKING:  # a torch without torch.distributed will do where there is no mesh
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    from lowrank_inverse_torch.mesh.processes import Processes

WHOLE_COLUMNS = 8
"""Products that a process holds in full until the sum over processes is taken."""

Stack = Callable[[Sequence[int]], Sequence[Tensor | None]]


class CurvatureOperator(Operator, Generic[G]):
    """The common base of the Hessian and the Gauss-Newton operator.

    Parameters
    ----------
    builders : sequence of callables () -> graph
        One for each batch. The graph of a single batch is kept. With several, each graph is built
        for each block of products and freed before the next is built.
    params : Parameters
        The parameters.
    chunk_size : int
        Products computed at a time.
    module : Module or iterable of Modules, optional
        Modules to restore besides those in `params`.
    mesh : DeviceMesh, optional
        Mesh of the processes over whose closures the mean is taken.
    """

    _parts: tuple[str, ...] | None = ()  # products are constants
    detached = False

    def __init__(
        self,
        builders: Sequence[Callable[[], G]],
        params: Parameters,
        chunk_size: int,
        module: Modules | None,
        mesh: DeviceMesh | None = None,
    ) -> None:
        if isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
            raise TypeError(f"`chunk_size` must be an int; got {type(chunk_size).__name__}.")
        if chunk_size < 1:
            raise ValueError(f"`chunk_size` must be at least 1; got {chunk_size}.")
        further = (module,) if isinstance(module, nn.Module) else tuple(module or ())
        self.params = params
        self.shape = (params.n, params.n)
        self.dtype = params.dtype
        self.device = params.device
        self.chunk_size = chunk_size
        self._count = [0]  # in a list, which copies share
        self._graphs = BatchGraphs(builders, params, (*params.modules, *further))
        self.processes: Processes | None = None
        self._num_closures = len(builders)  # of all processes
        if mesh is None:
            self.loss, self.gradient = self._graphs.evaluate()
        else:
            from lowrank_inverse_torch.mesh.processes import Processes

            self._evaluate_together(Processes(mesh, params))
        self.like = no_entries(self.gradient)

    def _evaluate_together(self, processes: Processes) -> None:
        """Set loss and gradient to their means over the closures of all processes."""
        shapes = [tuple(tensor.shape) for tensor in self.params.tensors]
        processes.agree(
            shapes_of_the_parameters=(shapes, self.dtype), parameters=self.params.tensors
        )
        loss, gradient = processes.together(self._graphs.evaluate)
        num = len(self._graphs)
        mine = [float(num), num * loss.item(), float(self.detached)]
        totals = processes.total(torch.tensor(mine, dtype=self.dtype, device=self.device))
        self._num_closures, self.detached = int(totals[0]), bool(totals[2] != 0)
        if self._num_closures == 0:
            raise ValueError(
                "at least one process must have a closure; all of them have an empty list."
            )
        self.loss = totals[1] / self._num_closures
        share = num / self._num_closures
        self.gradient = processes.spread(processes.own_sum(share * gradient))
        self.processes = processes

    def _about(self) -> dict[str, Any]:
        return {"num_products": self.num_products}

    @property
    def num_products(self) -> int:
        """Number of products with a vector so far; a column counts as one."""
        return self._count[0]

    def laid(self, vector: Tensor) -> Tensor:
        """Shard a plain vector like the vectors of the operator; return a number unchanged."""
        if self.processes is None or vector.ndim == 0:
            return vector
        return self.processes.laid(vector)

    def __matmul__(self, v: Tensor) -> Tensor:
        """Multiply a vector, shape (n,), or a block, shape (n, m): one product a column."""
        v = self.params.check_vector(v)
        if self.processes is not None:
            return self._shared_product(self.processes, v)
        block = v if v.ndim == 2 else v[:, None]

        def stack(chunk: Sequence[int]) -> Sequence[Tensor | None]:
            part = block[:, chunk[0] : chunk[-1] + 1]
            # Columns that lie together in memory: products with strided ones are many times slower.
            return self.params.unflatten(part.mT.contiguous().mT)

        result = self._products(range(block.shape[1]), stack)
        return result if v.ndim == 2 else result[:, 0]

    def columns(self, indices: Indices) -> Tensor:
        """Compute columns of the operator.

        Parameters
        ----------
        indices : sequence of int, or an integer array or tensor, shape (k,)
            Distinct, in ``0 ... n - 1``.

        Returns
        -------
        Tensor, shape (n, k)
            Column j of the result is column ``indices[j]`` of the operator.

        Raises
        ------
        TypeError
            If the indices are not integers.
        ValueError
            If indices are out of range or repeated.

        Notes
        -----
        Cost: k products, cheaper than others, since a unit vector selects the gradient of a single
        tensor. Memory besides the result: one chunk of unit vectors and products.
        """
        wanted = _host_indices(indices, self.params.n)
        if self.processes is not None:
            self.processes.agree(columns=wanted)
        offsets, tensors = self.params.offsets, self.params.tensors

        def stack(chunk: Sequence[int]) -> Sequence[Tensor | None]:
            units: list[Tensor | None] = [None] * len(tensors)
            for row, j in enumerate(chunk):
                i = bisect_right(offsets, wanted[j]) - 1
                unit = units[i]
                if unit is None:
                    unit = units[i] = tensors[i].new_zeros(len(chunk), *tensors[i].shape)
                unit.view(len(chunk), -1)[row, wanted[j] - offsets[i]] = 1
            return units

        # In ascending order, so that a chunk lies in few tensors.
        order = sorted(range(len(wanted)), key=wanted.__getitem__)
        if self.processes is not None:
            return self._shared(self.processes, order, lambda piece: stack)
        return self._products(order, stack)

    def _shared_product(self, processes: Processes, v: Tensor) -> Tensor:
        """Multiply a spread vector or block; one that is whole on each process comes back so."""
        if not is_spread(v):
            processes.agree(vector=[v])
            return gathered(self._shared_product(processes, processes.laid(v)))
        own = local(v) if v.ndim == 2 else local(v)[:, None]

        def prepare(piece: Sequence[int]) -> Stack:
            whole = [gathered(processes.spread(own[:, j].contiguous())) for j in piece]
            rows = torch.stack(whole)

            def stack(chunk: Sequence[int]) -> Sequence[Tensor | None]:
                return self.params.unflatten(rows[[j - piece[0] for j in chunk]].mT)

            return stack

        result = self._shared(processes, range(own.shape[1]), prepare)
        return result if v.ndim == 2 else processes.spread(local(result)[:, 0])

    def _shared(
        self,
        processes: Processes,
        order: Sequence[int],
        prepare: Callable[[Sequence[int]], Stack],
    ) -> DTensor:
        """Multiply with the vectors numbered in `order`, a few at a time; rows of the sums stay."""
        rows = torch.empty(len(order), len(processes.rows), dtype=self.dtype, device=self.device)
        for start in range(0, len(order), WHOLE_COLUMNS):
            piece = order[start : start + WHOLE_COLUMNS]
            stack = prepare(piece)

            def own_products(piece: Sequence[int] = piece, stack: Stack = stack) -> Tensor:
                return self._products(
                    range(len(piece)), lambda chunk: stack([piece[i] for i in chunk])
                )

            products, error = processes.attempt(own_products)
            for i, j in enumerate(piece):
                rows[j] = processes.own_sum(None if products is None else products[:, i], error)
        return processes.spread(rows.mT)

    def _products(self, order: Sequence[int], stack: Stack) -> Tensor:
        """Multiply with the vectors numbered in `order`; the answer has them by number."""
        # One product is one contiguous row here; the transposed view has them as columns.
        make = torch.empty if len(self._graphs) else torch.zeros
        rows = make(len(order), self.params.n, dtype=self.dtype, device=self.device)
        put = self.params.copy_to

        def multiply(graph: G) -> None:
            nonlocal put
            for start in range(0, len(order), self.chunk_size):
                chunk = order[start : start + self.chunk_size]
                vectors = stack(chunk)
                if len(chunk) == 1:  # without vmap, which cannot batch everything
                    products = graph.product([None if v is None else v[0] for v in vectors])
                    put(rows[chunk[0]], products)
                    continue
                products = graph.product(vectors, batched=True)
                for row, j in enumerate(chunk):
                    put(rows[j], [None if p is None else p[row] for p in products])
            put = self.params.add_to  # to what the first graph wrote

        if len(order) > 0:
            self._graphs.for_each(multiply)
        if self._num_closures > 1:
            rows /= self._num_closures
        self._count[0] += len(order)
        return rows.mT


def _host_indices(indices: Indices, n: int) -> list[int]:
    """Return checked indices as a list; none, and an iterator of some, are welcome here."""
    if isinstance(indices, Iterable) and not hasattr(indices, "shape"):
        indices = list(indices)
    if np.shape(indices) == (0,):
        return []
    checked: list[int] = check_indices(indices, n).tolist()
    return checked
