"""Influence functions of live torch models."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lowrank_inverse._typing import RNG, Scalar, SolveFunction, Solver
from lowrank_inverse.influence.base import InfluenceBase
from lowrank_inverse.influence.engine import MEMORY_BUDGET
from lowrank_inverse_torch.influence.backend import TorchBackend
from lowrank_inverse_torch.influence.example_losses import Split

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["InfluenceFunction"]


class InfluenceFunction(InfluenceBase):
    """Which training examples helped or harmed a prediction [1]_.

    With g_q the gradient of the loss of a query, g_i that of a training example and H the mean
    curvature of the training set: ``score[q, i] = g_q.T (H + (ridge + damping) I)^{-1} g_i``.
    Positive is helpful: without example i the loss of the query would rise, by about
    ``score / num_train``.

    Parameters
    ----------
    model : Module
        Trained. It is put to evaluation for each call, and comes back as it was: mode, buffers,
        ``.grad`` and random state. Its outputs may be of any structure. Attention is computed in
        the form that has a second derivative; of weights in less than float32 a copy in float32
        is taken.
    loss : callable (output, target) -> Tensor, shape (size,)
        One number for each example, such as ``cross_entropy(..., reduction="none")``.
    train : DataLoader, Dataset, tuple of tensors, or list of batches or examples
        A batch is a pair (inputs, targets); inputs in a tuple or a mapping are spread over the
        arguments of the model. A batch that is a mapping, such as a tokenizer's, is given whole:
        ``model(**batch)`` and ``loss(output, batch)``. NumPy's arrays are taken too. Examples are
        numbered in the order of the data set: a shuffled loader is read in order, and
        ``drop_last`` drops nothing. A mean over all examples, to which batch size and order make
        no difference.
    params : Module, Tensor or iterable of tensors, optional
        Parameters of the model to differentiate by. Default: all that require grad.
    curvature : {"ggn", "hessian", "empirical_fisher"}
        Gauss-Newton, never negative for a loss that is convex in the outputs; the Hessian, exact
        near a minimum; or the mean of ``g_i g_i.T``, which is no good estimate of either.
    solver : settings such as ``lowrank_inverse.NystromCG(...)``, or callable, optional
        With the damping of the mean curvature. Default: ``CG()``, one Krylov space for a block of
        queries, preconditioned by Ritz pairs of those before, and ``Exact()`` for so many queries
        that all columns of a model of up to 2000 parameters cost less; damping 0 where there is a
        `ridge` everywhere and "auto" elsewhere. NystromCG takes the columns for the Hessian from
        the Gauss-Newton matrix.
    ridge : float, array of shape (n,), or dict by name of parameter
        Coefficient r of the term ``r / 2 * sum(params ** 2)`` of the training objective (weight
        decay), treated exactly. One for all parameters, or one for each.
    damping : float or "auto", optional
        In place of that of `solver`. "auto" is a tenth of the mean eigenvalue of the curvature
        [2]_, from 16 products; see ``info.damping``.
    batch_size : int, optional
        Examples in a graph. Default: where batches can be cut anew, 512, or up to
        4096 small ones that hold a MiB together; else as they come.
    split : callable (batch) -> (inputs, targets), optional
        For batches that are neither a pair nor the arguments of the model.
    chunk_size : int
        Products taken at a time by vmap; more than 1 may pay on an accelerator.
    rng : int or numpy.random.Generator, optional
        Seed of the columns.
    memory_budget : int
        Bytes for the batches to keep, as much again for the right-hand sides of a solve, and a
        quarter of it for the pairs of the default solver. Other batches are read again for each
        product.
    progress : bool
        Show progress bars, which need tqdm, and print the plan before each computation.
    mesh : DeviceMesh, optional
        Of one dimension, over processes that each give their own part of the training set as
        `train`, of any size, and otherwise the same. Each makes the same calls. `scores` returns
        the columns of the own examples; `top_k` is that of all, numbered process by process; a
        checkpoint is a folder for each process. `self_influence`, `removal_effect` and `save` are
        for one process.

    Raises
    ------
    TypeError, ValueError
        A loss that is not one finite number for each example, of it alone, with a finite gradient
        and the same at each evaluation; labels out of range; data without examples, or that can be
        read only once.
    RuntimeError
        Data that are others when they are read again; in later calls, weights, buffers, data or
        constants of the loss that were changed in place.

    Notes
    -----
    A product costs about two gradients of the mean loss. See `info` for the cost, the residual of
    each query, and the norm of the gradient, which the formula assumes to be 0.

    References
    ----------
    .. [1] P. W. Koh, P. Liang. Understanding Black-box Predictions via Influence Functions. ICML
       2017.
    .. [2] R. Grosse et al. Studying Large Language Model Generalization with Influence Functions.
       2023.

    Examples
    --------
    The model is the mean of three numbers. Where it should be 1, the training example 0 helps and 4
    harms.

    >>> import torch
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(model.weight, 2.0)  # the mean
    >>> train = torch.ones(3, 1), torch.tensor([[0.0], [2.0], [4.0]])
    >>> def loss(output, target):
    ...     return ((output - target) ** 2).sum(dim=1) / 2
    >>> influence = InfluenceFunction(model, loss, train, damping=0.0, rng=0)
    >>> influence.scores((torch.ones(1, 1), torch.tensor([[1.0]])))
    tensor([[ 2., 0., -2.]])
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        train: Any,
        *,
        params: Any = None,
        curvature: str = "ggn",
        solver: Solver | SolveFunction | None = None,
        ridge: Any = 0.0,
        damping: Scalar = None,
        batch_size: int | None = None,
        split: Split | None = None,
        chunk_size: int = 1,
        rng: RNG = 0,
        memory_budget: int = MEMORY_BUDGET,
        progress: bool = False,
        mesh: DeviceMesh | None = None,
    ) -> None:
        if isinstance(params, Iterator):
            params = list(params)
        about = {"params": params, "split": split, "chunk_size": chunk_size}
        self._arguments = (model, loss, train), about
        super().__init__(
            TorchBackend(model, loss, params, split, chunk_size, mesh),
            train,
            curvature=curvature,
            solver=solver,
            ridge=ridge,
            damping=damping,
            batch_size=batch_size,
            rng=rng,
            memory_budget=memory_budget,
            progress=progress,
        )

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        train: Any,
        **options: Any,
    ) -> InfluenceFunction:
        """Read what `save` wrote, without computing its columns again.

        Parameters
        ----------
        path : path
        model, loss, train
            As they were: weights, data and the loss of each training example are checked.
        **options
            `params`, `batch_size`, `split`, `chunk_size`, `memory_budget` and `progress`.
        """
        influence: InfluenceFunction = cls._loaded(path, model, loss, train, **options)
        return influence
