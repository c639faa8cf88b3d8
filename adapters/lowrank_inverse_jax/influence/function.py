"""Influence functions of losses of pytrees."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from lowrank_inverse._typing import RNG, Data, PyTree, Scalar, SolveFunction, Solver
from lowrank_inverse.influence.base import InfluenceBase
from lowrank_inverse.influence.checkpoint import Store
from lowrank_inverse.influence.dataset import Examples
from lowrank_inverse.influence.engine import MEMORY_BUDGET
from lowrank_inverse_jax.influence.backend import JaxBackend

__all__ = ["InfluenceFunction"]


class InfluenceFunction(InfluenceBase):
    """Find the training examples that helped or harmed a prediction [1]_.

    Let g_q be the gradient of the loss of a query, g_i that of a training example, and H the mean
    curvature of the training set. Then ``score[q, i] = g_q.T (H + (ridge + damping) I)^{-1} g_i``.
    A positive score is helpful: without example i, the loss of the query would rise by about
    ``score / num_train``.

    Parameters
    ----------
    loss : callable
        Returns one number per example, shape (size,): ``loss(params, batch)``, or
        ``loss(outputs, batch)`` if `outputs` is given.
    params : pytree
        Parameters of the trained model. Arrays of floats are differentiated, in at least float32.
    train : pytree of arrays, list of batches or examples, iterable of batches, or torch DataLoader
        Arrays have one row per example. A list, or an iterable, holds batches, each a pytree of
        arrays, and is read repeatedly; a list whose items hold numbers instead of arrays holds
        single examples. A shuffled loader is read in order. Batch size and order do not change the
        result.
    outputs : callable (params, batch) -> array or pytree, optional
        Outputs of the network, for the Gauss-Newton matrix.
    curvature : {"ggn", "hessian", "empirical_fisher"}, optional
        "ggn" is the Gauss-Newton matrix, which is positive semidefinite if the loss is convex in
        the outputs. "hessian" is exact near a minimum. "empirical_fisher" is the mean of
        ``g_i g_i.T``, which estimates neither well. Default: "ggn", which needs `outputs`.
    solver : settings such as ``lowrank_inverse.NystromCG(...)``, or callable, optional
        Its damping is added to the mean curvature. Default: ``CG()`` with one Krylov space for a
        block of queries, preconditioned by Ritz pairs of earlier blocks; or ``Exact()``, if the
        model has at most 2000 parameters and there are so many queries that all columns cost less.
        The default damping is 0 if `ridge` is positive everywhere, and otherwise "auto". For the
        Hessian, NystromCG samples the columns of its preconditioner from the Gauss-Newton matrix,
        if `outputs` is given.
    ridge : float, array of shape (n,), or pytree like `params`
        Coefficient r of the term ``r / 2 * sum(params ** 2)`` of the training objective (weight
        decay), for all parameters or for each. It is treated exactly.
    damping : float or "auto", optional
        Replaces the damping of `solver`. "auto" is a tenth of the mean eigenvalue of the curvature
        [2]_, estimated from 16 products; see ``info.damping``.
    batch_size : int, optional
        Examples per compiled call. Default: 512 (up to 4096 small ones that hold a MiB together),
        or the batches of `train` if they cannot be cut.
    rng : int or numpy.random.Generator, optional
        Seed of the sampled columns.
    memory_budget : int
        Bytes to work with, besides the columns that a solver is asked to hold: half of them for the
        right-hand sides of a solve, a quarter for the pairs of the default solver, and a quarter
        for batches kept in memory. A larger training set is read again for each block of products.
    progress : bool
        Show progress bars, which need tqdm, and print the plan before each computation.
    mesh : jax.sharding.Mesh, optional
        Devices over which vectors, columns and the examples of each batch are sharded. The number
        of examples need not be divisible. Every process passes the same `train`, or arrays that
        are sharded over all of them, and gets the same scores. In a `checkpoint` each has a folder.

    Raises
    ------
    TypeError, ValueError
        If the loss of an example is not one finite number with a finite gradient, depends on other
        examples, or changes from call to call; if the data are empty or can be read only once; if
        "ggn" has no `outputs`.
    RuntimeError
        If the data change when they are read again; in later calls, if data or constants of the
        loss were changed in place.

    Notes
    -----
    A product costs about two gradients of the mean loss. Each batch shape is compiled once. `info`
    has the cost, the residual of each query, and the norm of the gradient, which the formula
    assumes to be 0.

    References
    ----------
    .. [1] P. W. Koh, P. Liang. Understanding Black-box Predictions via Influence Functions. ICML
       2017.
    .. [2] R. Grosse et al. Studying Large Language Model Generalization with Influence Functions.
       2023.

    Examples
    --------
    The parameter is the mean of three numbers. For the query 1, the training example 0 is helpful
    and 4 is harmful.

    >>> import jax.numpy as jnp
    >>> def loss(mean, batch):
    ...     return (mean - batch) ** 2 / 2
    >>> train, query = jnp.array([0.0, 2.0, 4.0]), jnp.array([1.0])
    >>> influence = InfluenceFunction(
    ...     loss, jnp.array(2.0), train, curvature="hessian", damping=0.0, rng=0
    ... )
    >>> print(influence.scores(query))
    [[ 2.  0. -2.]]
    """

    def __init__(
        self,
        loss: Callable[..., Any],
        params: PyTree,
        train: Data,
        *,
        outputs: Callable[..., Any] | None = None,
        curvature: str = "ggn",
        solver: Solver | SolveFunction | None = None,
        ridge: Any = 0.0,
        damping: Scalar = None,
        batch_size: int | None = None,
        rng: RNG = 0,
        memory_budget: int = MEMORY_BUDGET,
        progress: bool = False,
        mesh: Mesh | None = None,
    ) -> None:
        self._arguments = (loss, params, train), {"outputs": outputs, "mesh": mesh}
        backend = JaxBackend(loss, params, outputs, mesh)
        self._layout = backend.layout
        super().__init__(
            backend,
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

    def _store(self, folder: str | os.PathLike[str] | None, *about: Any, **data: Examples) -> Store:
        return super()._store(self._layout.folder(folder), *about, **data)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        loss: Callable[..., Any],
        params: PyTree,
        train: Data,
        **options: Any,
    ) -> InfluenceFunction:
        """Read a file of `save`, without computing its columns again.

        Parameters
        ----------
        path : path
            The file.
        loss, params, train
            The same as before; weights, data and the loss of each training example are checked.
        **options
            `outputs`, `batch_size`, `memory_budget`, `progress` and `mesh`.
        """
        influence: InfluenceFunction = cls._loaded(path, loss, params, train, **options)
        return influence
