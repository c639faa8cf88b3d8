"""Influence functions of losses of pytrees."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from lowrank_inverse._typing import RNG, Scalar, SolveFunction, Solver
from lowrank_inverse.influence.base import InfluenceBase
from lowrank_inverse.influence.checkpoint import Store
from lowrank_inverse.influence.dataset import Examples
from lowrank_inverse.influence.engine import MEMORY_BUDGET
from lowrank_inverse_jax.influence.backend import JaxBackend

__all__ = ["InfluenceFunction"]


class InfluenceFunction(InfluenceBase):
    """Which training examples helped or harmed a prediction [1]_.

    With g_q the gradient of the loss of a query, g_i that of a training example and H the mean
    curvature of the training set: ``score[q, i] = g_q.T (H + (ridge + damping) I)^{-1} g_i``.
    Positive is helpful: without example i the loss of the query would rise, by about
    ``score / num_train``.

    Parameters
    ----------
    loss : callable
        Returns one number for each example, shape (size,): ``loss(params, batch)``, or
        ``loss(outputs, batch)`` where `outputs` is given.
    params : pytree
        Trained. Arrays of floats are differentiated by; those in less than float32 in float32.
    train : pytree of arrays, list of batches or examples, iterable of batches, or torch DataLoader
        Arrays have one row for each example. A list, and what is no pytree of arrays, is taken for
        batches, each a pytree of arrays, which are read again and again; or for single examples,
        where one has a number in the place of an array. A shuffled loader is read in order. A mean
        over all examples, to which batch size and order make no difference.
    outputs : callable (params, batch) -> array or pytree, optional
        Of the network, for the Gauss-Newton matrix.
    curvature : {"ggn", "hessian", "empirical_fisher"}, optional
        Gauss-Newton, never negative for a loss that is convex in the outputs; the Hessian, exact
        near a minimum; or the mean of ``g_i g_i.T``, which is no good estimate of either.
        Default: "ggn", which needs `outputs`.
    solver : settings such as ``lowrank_inverse.NystromCG(...)``, or callable, optional
        With the damping of the mean curvature. Default: ``CG()``, one Krylov space for a block of
        queries, preconditioned by Ritz pairs of those before, and ``Exact()`` for so many queries
        that all columns of a model of up to 2000 parameters cost less; damping 0 where there is a
        `ridge` everywhere and "auto" elsewhere. NystromCG takes the columns for the Hessian from
        the Gauss-Newton matrix, if there are `outputs`.
    ridge : float, array of shape (n,), or pytree like `params`
        Coefficient r of the term ``r / 2 * sum(params ** 2)`` of the training objective (weight
        decay), treated exactly. One for all parameters, or one for each.
    damping : float or "auto", optional
        In place of that of `solver`. "auto" is a tenth of the mean eigenvalue of the curvature
        [2]_, from 16 products; see ``info.damping``.
    batch_size : int, optional
        Examples in a compiled call. Default: where batches can be cut anew, 512, or up to
        4096 small ones that hold a MiB together; else as they come.
    rng : int or numpy.random.Generator, optional
        Seed of the columns.
    memory_budget : int
        Bytes for the batches to keep, as much again for the right-hand sides of a solve, and a
        quarter of it for the pairs of the default solver. Other batches are read again for each
        product.
    progress : bool
        Show progress bars, which need tqdm, and print the plan before each computation.
    mesh : jax.sharding.Mesh, optional
        Of the devices that vectors and columns are cut over, and the examples of each batch, in
        any number. Every process gives the same `train`, or arrays whose parts lie with all of
        them, and gets the same scores; in a `checkpoint` each has a folder of its own.

    Raises
    ------
    TypeError, ValueError
        A loss that is not one finite number for each example, of it alone, with a finite gradient
        and the same at each evaluation; data without examples, or that can be read only once;
        "ggn" without `outputs`.
    RuntimeError
        Data that are others when they are read again; in later calls, data or constants of the
        loss that were changed in place.

    Notes
    -----
    A product costs about two gradients of the mean loss. Each shape of a batch is compiled once.
    See `info` for the cost, the residual of each query, and the norm of the gradient, which the
    formula assumes to be 0.

    References
    ----------
    .. [1] P. W. Koh, P. Liang. Understanding Black-box Predictions via Influence Functions. ICML
       2017.
    .. [2] R. Grosse et al. Studying Large Language Model Generalization with Influence Functions.
       2023.

    Examples
    --------
    The parameter is the mean of three numbers. Where it should be 1, the training example 0 helps
    and 4 harms.

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
        params: Any,
        train: Any,
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
        params: Any,
        train: Any,
        **options: Any,
    ) -> InfluenceFunction:
        """Read what `save` wrote, without computing its columns again.

        Parameters
        ----------
        path : path
        loss, params, train
            As they were: weights, data and the loss of each training example are checked.
        **options
            `outputs`, `batch_size`, `memory_budget`, `progress` and `mesh`.
        """
        influence: InfluenceFunction = cls._loaded(path, loss, params, train, **options)
        return influence
