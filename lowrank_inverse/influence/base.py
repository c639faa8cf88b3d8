"""Influence functions, for every framework."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import Array, Data, Scalar
from lowrank_inverse.arrays.checks import check_block, check_count, check_finite
from lowrank_inverse.arrays.conversion import concrete, like, to_host
from lowrank_inverse.arrays.linalg import column_norm
from lowrank_inverse.arrays.spread import gathered, is_spread, local, rows_beside
from lowrank_inverse.influence.passes import Options, checked_weights
from lowrank_inverse.influence.plan import Plan, short
from lowrank_inverse.influence.queries.groups import GroupScores
from lowrank_inverse.influence.queries.parameters import ParameterScores
from lowrank_inverse.influence.queries.tokens import TokenScores
from lowrank_inverse.influence.results import (
    InfluenceInfo,
    TopK,
    joined,
    merged,
    open_scores,
    top,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["InfluenceBase", "InfluenceInfo", "Plan", "TopK"]


class InfluenceBase(TokenScores, ParameterScores, GroupScores):
    """Influence of training examples on the loss of other examples [1]_, [2]_.

    Let g_q be the gradient of a query, g_i that of a training example, and H the mean curvature.
    Then ``score[q, i] = g_q.T (H + (ridge + damping) I)^{-1} g_i``. A positive score is helpful:
    without example i, the loss of the query would rise by about ``score / num_train``. The
    ``InfluenceFunction`` of each framework derives from this class.

    It can be copied, pickled and sent to other processes, with its model, data and columns.

    References
    ----------
    .. [1] F. R. Hampel. The Influence Curve and Its Role in Robust Estimation. JASA 69, 1974.
    .. [2] P. W. Koh, P. Liang. Understanding Black-box Predictions via Influence Functions. ICML
       2017.
    .. [3] E. Barshan, M. Brunet, G. Dziugaite. RelatIF: Identifying Explanatory Training Examples
       via Relative Influence. AISTATS 2020.
    """

    def scores(
        self,
        query: Data,
        train: Data = None,
        *,
        query_loss: Callable[..., Any] | None = None,
        reduction: str = "none",
        weights: Any = None,
        normalize: str = "none",
        method: str = "auto",
        checkpoint: str | os.PathLike[str] | None = None,
        out: Any = None,
    ) -> Array:
        """Compute the influence of each training example on the loss of each query.

        Parameters
        ----------
        query : examples
            In any form that `train` may have.
        train : examples, optional
            Examples to score. Default: the training set.
        query_loss : callable, optional
            Function of a query whose change the scores predict, such as a margin. It is called like
            the loss. Default: the training loss.
        reduction : {"none", "sum"}
            "sum" treats the sum over all queries as one query, at the cost of one solve.
        weights : array, shape (n_query,) or (k, n_query), optional
            Weights of the queries in this sum, or in each of k sums; one solve per sum.
        normalize : {"none", "theta-relatif", "l-relatif", "cosine"}
            "theta-relatif" divides the score of each training example by the norm of its step
            ``H^-1 g_i``, and "l-relatif" by the square root of its self-influence
            ``g_i.T H^-1 g_i`` [3]_. "cosine" divides by that of the query as well. Takes one more
            solve per training example.
        method : {"auto", "jvp", "gradients"}
            "jvp" takes one directional derivative of all losses per query; "gradients" takes the
            gradient of each example once for all queries. Results agree up to rounding. "auto"
            chooses the faster; with many batches, it times one of them.
        checkpoint : path, optional
            Folder for partial results. The same call continues from there after an interruption.
        out : path that ends in .npy, or NumPy array, shape (n_query, n_train), optional
            Destination of the scores, which is also returned. A path creates a memory-mapped file.

        Returns
        -------
        array, shape (n_query, n_train)
            Scores in the order of the data sets; positive is helpful. One row per sum, if the
            queries are summed.

        Raises
        ------
        ValueError
            If the curvature is indefinite; the error names its lowest Ritz value and a sufficient
            damping. If examples are invalid, or `checkpoint` belongs to another computation.
        RuntimeError
            If weights, buffers, data or constants of the loss have changed since construction.

        Notes
        -----
        Cost: one solve per query, in blocks as large as `memory_budget` allows, and one pass over
        the examples per block. `plan` predicts it.
        """
        asked = self._asked(
            query,
            train,
            query_loss=query_loss,
            reduction=reduction,
            weights=weights,
            normalize=normalize,
            method=method,
            checkpoint=checkpoint,
        )
        groups = self._scored(asked)
        if out is not None:
            out = open_scores(out, asked.shape, to_host(self._backend.like).dtype)
            for first, blocks in groups:
                for start, block in blocks:
                    rows, columns = block.shape
                    out[first : first + rows, start : start + columns] = to_host(block)
            return out
        rows = [[block for _, block in blocks] for _, blocks in groups]
        xp = array_namespace(rows[0][0])
        return xp.concat([xp.concat(parts, axis=1) for parts in rows], axis=0)

    def top_k(
        self,
        query: Data,
        k: int,
        kind: str = "helpful",
        train: Data = None,
        **options: Unpack[Options],
    ) -> TopK:
        """Find the k most influential training examples of each query.

        Parameters
        ----------
        k : int
            Number of examples.
        kind : {"helpful", "harmful", "absolute"}
            Return the largest scores, the smallest, or the largest absolute values.
        query, train
            See `scores`.
        **options
            Its `query_loss`, `reduction`, `weights`, `normalize`, `method` and `checkpoint`.

        Returns
        -------
        TopK
            Indices and scores, each of shape (n_query, k), the most influential first.

        Notes
        -----
        The training set may have any size, since only the scores of one batch are in memory.
        """
        asked = self._asked(query, train, **options)
        nums = self._group.everyone(asked.targets.num)
        check_count("k", k, most=sum(nums))
        offset = sum(nums[: self._group.rank])
        top(np.zeros((1, 1)), 1, kind)  # refuses an unknown kind before the work
        rows = []
        for _, blocks in self._scored(asked):
            best: TopK | None = None
            for start, block in blocks:
                best = merged(best, top(to_host(block), k, kind, offset + start), k, kind)
            assert best is not None
            rows.append(joined(self._group.everyone(best), k, kind))
        indices = np.concatenate([one.indices for one in rows])
        scores = np.concatenate([one.scores for one in rows])
        return TopK(indices, like(scores, local(self._backend.like)))

    def plan(
        self,
        query: Data = None,
        *,
        query_loss: Callable[..., Any] | None = None,
        reduction: str = "none",
        weights: Any = None,
        normalize: str = "none",
    ) -> Plan:
        """Predict the cost of the scores of `query`.

        Parameters
        ----------
        query : examples, optional
            Default: the training set, for self-influence.
        query_loss, reduction, weights, normalize
            See `scores`.

        Returns
        -------
        Plan
            Prints as four lines. ``progress=True`` prints it before each computation.

        Notes
        -----
        Measures, once, the time of a product and of the scores of a batch by both methods.
        """
        self._check_unchanged()
        if query is None:
            return self._plan(self._train.num, self._train.num)
        num = self._read(query, "query", self._measure(query_loss)).num
        sums = checked_weights(weights, reduction, num)
        num = num if sums is None else len(sums)
        num_solves = num + (normalize != "none") * self._train.num
        return self._plan(num_solves, num * self._train.num)

    def self_influence(self, *, checkpoint: str | os.PathLike[str] | None = None) -> Array:
        """Compute the influence of each training example on its own loss.

        Parameters
        ----------
        checkpoint : path, optional
            See `scores`.

        Returns
        -------
        array, shape (n_train,)
            ``g_i.T (H + (ridge + damping) I)^{-1} g_i``, at least 0. Mislabelled examples have
            large values.

        Notes
        -----
        Cost: one solve per training example, in blocks as large as `memory_budget` allows.
        """
        self._alone("self_influence")
        self._check_unchanged()
        self._begin(self._train.num, self._train.num)
        store = self._store(checkpoint, "self_influence", train=self._train)
        parts = list(self._own_values(self._train, store, "values", "self-influence"))
        return array_namespace(parts[0]).concat(parts, axis=0)

    def inverse_product(self, G: Array) -> Array:
        """Multiply ``(H + (ridge + damping) I)^{-1}`` by a vector or a block.

        Parameters
        ----------
        G : array, shape (n,) or (n, m)
            Of the library and dtype of the parameters.

        Returns
        -------
        array, shape of `G`
        """
        check_block("G", G, self._backend.n)
        check_finite("G", G)
        self._check_unchanged()
        self._begin(1 if G.ndim == 1 else int(G.shape[1]), 0)
        value = self._solve(rows_beside(G, self._backend.like)).value
        return value if is_spread(G) else gathered(value)

    def with_damping(self, damping: Scalar) -> Any:
        """Return an influence function with another damping that reuses the columns of this one.

        Parameters
        ----------
        damping : float or "auto"
            Replaces the damping of this one.
        """
        other = copy.copy(self)
        other._solution = None
        other._set_damping(damping, self._factor.A)
        return other

    @property
    def info(self) -> InfluenceInfo:
        """Cost and accuracy so far; see `InfluenceInfo`."""
        theta = rows_beside(self._backend.vector(), self._backend.like)
        gradient = self._operator.gradient + self._ridge * theta
        residual, steps, message = self._solution or (None, None, "nothing solved yet")
        prepared = self._factor._inverse
        return InfluenceInfo(
            num_train=self._num_train,
            num_params=self._backend.n,
            curvature=self._curvature,
            solver=short(self._solver),
            ridge=self._ridge,
            damping=self._damping,
            loss=self._loss,
            gradient_norm=float(concrete(column_norm(gradient))),
            rank=None if prepared is None else prepared.rank,
            num_products=self._factor.A.num_products,
            relative_residual=residual,
            num_steps=steps,
            message=message,
        )
