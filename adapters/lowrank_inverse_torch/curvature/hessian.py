"""The Hessian of a PyTorch model as an operator, by double backward on one graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lowrank_inverse._typing import PyTree
from lowrank_inverse.arrays.spread import gathered
from lowrank_inverse_torch.curvature.gradient_graph import (
    GradientGraph,
    TwiceDifferentiable,
    Values,
)
from lowrank_inverse_torch.curvature.mean_operator import CurvatureOperator, Modules
from lowrank_inverse_torch.model_guard import evaluate_loss, untouched
from lowrank_inverse_torch.parameters import as_parameters

__all__ = ["HessianOperator", "hessian_columns", "hvp"]

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Loss = Tensor | Callable[[], Tensor]


class HessianOperator(CurvatureOperator[GradientGraph]):
    """The Hessian of a loss as an operator, by double backward [1]_ on one graph.

    Parameters
    ----------
    loss : closure, Tensor, or list of closures
        A closure () -> scalar is called once. A scalar tensor is used with its graph. For a list,
        H is the mean over the closures (batches), with one graph at a time in memory. Each graph is
        built again for each block of products with the same random state, so that a dropout mask
        does not change. Scale the losses if batches differ in size.
    params : Module, Tensor, iterable of tensors, or pytree of tensors
        Parameters with respect to which to differentiate; see `as_parameters`.
    chunk_size : int
        Products computed at a time by vmap; memory grows in proportion. 1 always works. More is
        faster if a single product is too small to occupy the device; wide layers on a CPU gain
        nothing.
    module : Module or iterable of Modules, optional
        Further modules that the loss runs, whose buffers and mode are to be restored. Those in
        `params` are known, but the module of a bare tensor is not.
    create_graph : bool
        Whether products have a graph, with respect to the parameters and all else that the loss
        reads. Solutions of systems with the operator then have first derivatives. Each block of
        products builds the graph of the loss again.
    mesh : DeviceMesh, optional
        One-dimensional mesh of data-parallel processes. Each process passes closures over its own
        data, possibly an empty list, and the same parameters. H is then the mean over the closures
        of all processes. Vectors, columns and `gradient` are DTensors of placement ``Shard(0)``,
        with n / size rows in each process. Plain vectors, the same in each process, are accepted
        too.

    Attributes
    ----------
    shape, dtype, device : (n, n), torch.dtype, torch.device
        Those of the parameters.
    loss : scalar Tensor
        Mean value of the loss.
    gradient : Tensor, shape (n,)
        Gradient of the loss.
    num_products : int
        Number of products with a vector so far; a column counts as one.
    params : Parameters
        Converts between vectors and the user's structure, by `restore` and `flatten`.
    detached : bool
        Whether the loss detached a tensor that requires grad. Its second derivative may then not
        be the derivative of the gradient that training follows; `check_hessian` tests this.

    Raises
    ------
    TypeError, ValueError
        If the loss is not a finite scalar, or depends on none of the parameters.
    RuntimeError
        If an operation has no second derivative; inside ``torch.inference_mode()``; in a product
        after the parameters changed in place, or a closure changed its loss. With a mesh, in every
        process, if a closure of one process raises, or the processes disagree on parameters,
        columns or vectors.

    Notes
    -----
    Cost: one gradient for the setup and about two per product; for a list, one more gradient per
    closure for each block of products. Training mode, buffers, ``.grad`` and random state are
    restored. Random numbers from NumPy or Python are not controlled. Use autocast inside the
    closure. With a `mesh`, a product sends 2 n numbers per process: n gathered and n reduced.

    References
    ----------
    .. [1] B. Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation, 1994.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> H = HessianOperator(lambda: x[0] ** 2 * x[1], x)
    >>> H @ torch.tensor([1.0, 0.0])
    tensor([4., 2.])
    """

    def __init__(
        self,
        loss: Loss | Sequence[Loss],
        params: PyTree,
        *,
        chunk_size: int = 1,
        module: Modules | None = None,
        create_graph: bool = False,
        mesh: DeviceMesh | None = None,
        name: str = "loss",
    ) -> None:
        params = as_parameters(params, gather=mesh is not None)
        losses: Sequence[Any] = loss if isinstance(loss, (list, tuple)) else [loss]
        if create_graph and mesh is not None:
            raise ValueError("`create_graph` is for one process; omit it or `mesh`.")
        if not losses and mesh is None:
            raise ValueError(f"`{name}` must hold at least one closure; got an empty list.")

        def builder(loss: Loss) -> Callable[[], GradientGraph]:
            def build() -> GradientGraph:
                with TwiceDifferentiable() as mode:
                    value = evaluate_loss(loss, name=name)
                self.detached |= mode.detached
                return GradientGraph(value, params.tensors, name=name)

            return build

        self._again = partial(HessianOperator, loss, params, module=module, mesh=mesh)
        super().__init__([builder(one) for one in losses], params, chunk_size, module, mesh)
        if create_graph:
            self._parts = None

    def without_graph(self) -> HessianOperator:
        """Return this operator with products that have no graph."""
        other = copy.copy(self)
        other._parts = ()
        return other

    def __matmul__(self, v: Tensor) -> Tensor:
        """Multiply a vector, shape (n,), or a block, shape (n, m): one product a column."""
        if self._parts is not None or not torch.is_grad_enabled():
            return super().__matmul__(v)
        self.params.check_vector(v)
        columns = v.unbind(1) if v.ndim == 2 else [v]
        rows: Any = [0.0 for _ in columns]
        with untouched(self.params.tensors, self._graphs.modules):
            for i in range(len(self._graphs)):
                graph = self._graphs.rebuilt(i)  # a backward pass through its products frees it
                for j, column in enumerate(columns):
                    vectors = self.params.unflatten(column)
                    parts = graph.vjp(vectors, graph.tensors, create_graph=True)
                    pairs = zip(parts, graph.tensors, strict=True)
                    flat = [torch.zeros_like(t) if part is None else part for part, t in pairs]
                    rows[j] = rows[j] + torch.cat([part.reshape(-1) for part in flat])
        self._count[0] += len(columns)
        mean = torch.stack(rows, dim=-1) / len(self._graphs)
        return mean if v.ndim == 2 else mean[:, 0]

    def gradient_at(self, theta: Tensor) -> Tensor:
        """Return the gradient at other parameters, shape (n,), from closures over leaf tensors."""
        kept = [tensor.data for tensor in self.params.tensors]
        try:
            values = self.params.unflatten(theta)
            for tensor, value in zip(self.params.tensors, values, strict=True):
                tensor.data = value.clone()  # no write to their memory
            return self._again().gradient
        finally:
            for tensor, value in zip(self.params.tensors, kept, strict=True):
                tensor.data = value

    def vjp(self, v: Tensor, wrt: Sequence[Tensor]) -> Values:
        """Return the gradients of ``<v, gradient>`` with respect to tensors that the loss uses.

        Parameters
        ----------
        v : Tensor, shape (n,)
            Fixed vector.
        wrt : sequence of Tensor
            Tensors that require grad, whether parameters or not.

        Returns
        -------
        list of Tensor or None
            One for each of `wrt`, detached; None if the gradient does not depend on it.

        Notes
        -----
        Costs as much as a product, but does not count as one.
        """
        vectors = self.params.unflatten(gathered(self.params.check_vector(v, block=False)))
        totals: Values = [None] * len(wrt)

        def accumulate(graph: GradientGraph) -> None:
            for i, part in enumerate(graph.vjp(vectors, wrt)):
                if part is not None:
                    total = totals[i]
                    totals[i] = part if total is None else total + part

        if self.processes is None:
            self._graphs.for_each(accumulate, wrt)
        else:
            _, error = self.processes.attempt(lambda: self._graphs.for_each(accumulate, wrt))
            totals = self.processes.summed_each(totals, wrt, error)
        return [None if total is None else total / self._num_closures for total in totals]


def hvp(
    loss: Loss | Sequence[Loss], params: PyTree, v: Any, *, module: Modules | None = None
) -> Any:
    """Multiply the Hessian of a loss by a vector or a block of vectors.

    Parameters
    ----------
    loss, params, module
        See `HessianOperator`, also for errors.
    v : Tensor, shape (n,) or (n, m), or the structure of `params`
        For a module, a dict with the keys of its ``named_parameters()``, and None for frozen ones.

    Returns
    -------
    Tensor or structure
        ``H @ v`` in the form of `v`.

    Notes
    -----
    Costs about three gradients. For several products use a `HessianOperator`, which keeps the
    graph.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> hvp(lambda: (x**3).sum(), [x], [torch.ones(2)])
    [tensor([ 6., 12.])]
    """
    hessian = HessianOperator(loss, params, module=module)
    like_params = isinstance(params, Tensor) and isinstance(v, Tensor) and v.shape == params.shape
    if isinstance(v, Tensor) and not like_params:
        return hessian @ v
    return hessian.params.restore(hessian @ hessian.params.flatten(hessian.params.collect(v)))


def hessian_columns(
    loss: Loss | Sequence[Loss],
    params: PyTree,
    indices: Iterable[int],
    *,
    chunk_size: int = 1,
    module: Modules | None = None,
) -> Tensor:
    """Compute columns of the Hessian of a loss, shape (n, k).

    For arguments, costs and errors see `HessianOperator` and its `columns`.

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
    >>> hessian_columns(lambda: x[0] ** 2 * x[1], x, [1])
    tensor([[2.],
            [0.]])
    """
    return HessianOperator(loss, params, chunk_size=chunk_size, module=module).columns(indices)
