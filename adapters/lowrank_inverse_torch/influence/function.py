"""Influence functions of PyTorch models."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from lowrank_inverse._typing import RNG, Data, PyTree, Scalar, SolveFunction, Solver
from lowrank_inverse.influence.base import InfluenceBase
from lowrank_inverse.influence.engine import MEMORY_BUDGET
from lowrank_inverse_torch.influence.backend import TorchBackend
from lowrank_inverse_torch.influence.example_losses import Split

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["InfluenceFunction"]


class InfluenceFunction(InfluenceBase):
    """Find the training examples that helped or harmed a prediction [1]_.

    Let g_q be the gradient of the loss of a query, g_i that of a training example, and H the mean
    curvature of the training set. Then ``score[q, i] = g_q.T (H + (ridge + damping) I)^{-1} g_i``.
    A positive score is helpful: without example i, the loss of the query would rise by about
    ``score / num_train``.

    Parameters
    ----------
    model : Module
        A trained model. Each call runs it in evaluation mode and restores mode, buffers, ``.grad``
        and random state. Its outputs may have any structure. Attention is computed in a form that
        has second derivatives. Weights of less than float32 are copied to float32.
    loss : callable (output, target) -> Tensor, shape (size,)
        One number per example, such as ``cross_entropy(..., reduction="none")``.
    train : DataLoader, Dataset, tuple of tensors, or list of batches or examples
        A batch is a pair (inputs, targets). Inputs in a tuple or mapping become the arguments of
        the model. A batch that is a mapping, such as a tokenizer's, is passed as
        ``model(**batch)`` and ``loss(output, batch)``. NumPy arrays are accepted. Examples are
        numbered in the order of the data set: a shuffled loader is read in order, and
        ``drop_last`` is ignored. Batch size and order do not change the result.
    params : Module, Tensor or iterable of tensors, optional
        Parameters with respect to which to differentiate. Default: all that require grad.
    curvature : {"ggn", "hessian", "empirical_fisher"}
        "ggn" is the Gauss-Newton matrix, which is positive semidefinite if the loss is convex in
        the outputs. "hessian" is exact near a minimum. "empirical_fisher" is the mean of
        ``g_i g_i.T``, which estimates neither well.
    solver : settings such as ``lowrank_inverse.NystromCG(...)``, or callable, optional
        Its damping is added to the mean curvature. Default: ``CG()`` with one Krylov space for a
        block of queries, preconditioned by Ritz pairs of earlier blocks; or ``Exact()``, if the
        model has at most 2000 parameters and there are so many queries that all columns cost less.
        The default damping is 0 if `ridge` is positive everywhere, and otherwise "auto". For the
        Hessian, NystromCG samples the columns of its preconditioner from the Gauss-Newton matrix.
    ridge : float, array of shape (n,), or dict by name of parameter
        Coefficient r of the term ``r / 2 * sum(params ** 2)`` of the training objective (weight
        decay), for all parameters or for each. It is treated exactly.
    damping : float or "auto", optional
        Replaces the damping of `solver`. "auto" is a tenth of the mean eigenvalue of the curvature
        [2]_, estimated from 16 products; see ``info.damping``.
    batch_size : int, optional
        Examples per graph. Default: 512 (up to 4096 small ones that hold a MiB together), or
        the batches of `train` if they cannot be cut.
    split : callable (batch) -> (inputs, targets), optional
        For batches that are neither a pair nor the arguments of the model.
    chunk_size : int
        Products computed at a time by vmap; more than 1 may be faster on an accelerator.
    rng : int or numpy.random.Generator, optional
        Seed of the sampled columns.
    memory_budget : int
        Bytes to work with, besides the columns that a solver is asked to hold: half of them for the
        right-hand sides of a solve, a quarter for the pairs of the default solver, and a quarter
        for batches kept in memory. A larger training set is read again for each block of products.
    progress : bool
        Show progress bars, which need tqdm, and print the plan before each computation.
    mesh : DeviceMesh, optional
        One-dimensional mesh of processes, each with its own part of the training set as `train`,
        of any size, and otherwise equal arguments. All make the same calls. `scores` returns the
        columns of the process's own examples; `top_k` covers all examples, numbered process by
        process; a checkpoint has a folder per process. `self_influence`, `removal_effect` and
        `save` need a single process.

    Raises
    ------
    TypeError, ValueError
        If the loss of an example is not one finite number with a finite gradient, depends on other
        examples, or changes from call to call; if a label is out of range; if the data are empty
        or can be read only once.
    RuntimeError
        If the data change when they are read again; in later calls, if weights, buffers, data or
        constants of the loss were changed in place.

    Notes
    -----
    A product costs about two gradients of the mean loss. `info` has the cost, the residual of each
    query, and the norm of the gradient, which the formula assumes to be 0.

    References
    ----------
    .. [1] P. W. Koh, P. Liang. Understanding Black-box Predictions via Influence Functions. ICML
       2017.
    .. [2] R. Grosse et al. Studying Large Language Model Generalization with Influence Functions.
       2023.

    Examples
    --------
    The model is the mean of three numbers. For the query 1, the training example 0 is helpful and 4
    is harmful.

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
        train: Data,
        *,
        params: PyTree = None,
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
        train: Data,
        **options: Any,
    ) -> InfluenceFunction:
        """Read a file of `save`, without computing its columns again.

        Parameters
        ----------
        path : path
            The file.
        model, loss, train
            The same as before; weights, data and the loss of each training example are checked.
        **options
            `params`, `batch_size`, `split`, `chunk_size`, `memory_budget` and `progress`.
        """
        influence: InfluenceFunction = cls._loaded(path, model, loss, train, **options)
        return influence
