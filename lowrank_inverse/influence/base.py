"""Influence functions from gradients, an inverse and blocks, once for every framework."""

from __future__ import annotations

import copy
import os
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._io import Format
from lowrank_inverse._typing import Array, Indices, Scalar
from lowrank_inverse.arrays.checks import check_block, check_count, check_finite, check_indices
from lowrank_inverse.arrays.conversion import like, to_host
from lowrank_inverse.arrays.linalg import column_norm, dot
from lowrank_inverse.influence.checkpoint import digest, shown
from lowrank_inverse.influence.damped_solver import from_record, to_record
from lowrank_inverse.influence.engine import Workings
from lowrank_inverse.influence.results import InfluenceInfo, TopK, merged, top

__all__ = ["InfluenceBase", "InfluenceInfo", "TopK"]

FILE = Format("InfluenceFunction.save")


class InfluenceBase(Workings):
    """Influence of the training examples on the loss of others [1]_, [2]_.

    With g_q the gradient of a query, g_i that of a training example and H the mean curvature:
    ``score[q, i] = g_q.T (H + (ridge + damping) I)^{-1} g_i``. Positive is helpful: without
    example i the loss of the query would rise, by about ``score / num_train``. The
    ``InfluenceFunction`` of each framework derives from this class.

    References
    ----------
    .. [1] F. R. Hampel. The Influence Curve and Its Role in Robust Estimation. JASA 69, 1974.
    .. [2] P. W. Koh, P. Liang. Understanding Black-box Predictions via Influence Functions. ICML
       2017.
    """

    def scores(
        self,
        query: Any,
        train: Any = None,
        *,
        method: str = "auto",
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> Array:
        """Compute the influence of each training example on the loss of each query.

        Parameters
        ----------
        query : examples
            In any form that `train` may have.
        train : examples, optional
            Those to score. Default: the training set.
        method : {"auto", "jvp", "gradients"}
            One directional derivative of all losses for each query, or the gradient of each
            example once for all queries. Equal up to rounding; "auto" takes the cheaper one.
        checkpoint : path, optional
            A folder for partial results. The same call after an interruption goes on from there.

        Returns
        -------
        array, shape (n_query, n_train)
            Positive is helpful. In the order of the data sets.

        Raises
        ------
        ValueError
            If the curvature proved to be indefinite: with its lowest Ritz value, and the damping
            that would do. For bad examples, and for a `checkpoint` of another computation.

        Notes
        -----
        One solve for each query, all of them in one block as far as `memory_budget` allows, and
        one pass over the examples for each block.
        """
        targets = self._train if train is None else self._read(train, "train")[0]
        rows = []
        for blocks in self._passes(query, targets, method, checkpoint):
            parts = [block for _, block in blocks]
            rows.append(array_namespace(parts[0]).concat(parts, axis=1))
        return array_namespace(rows[0]).concat(rows, axis=0)

    def top_k(
        self,
        query: Any,
        k: int,
        kind: str = "helpful",
        train: Any = None,
        *,
        method: str = "auto",
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> TopK:
        """Find the k most influential training examples of each query.

        Parameters
        ----------
        k : int
        kind : {"helpful", "harmful", "absolute"}
            The largest scores, the smallest, or the largest absolute values.
        query, train, method, checkpoint
            As in `scores`.

        Returns
        -------
        TopK
            Indices and scores, each of shape (n_query, k), the most influential first.

        Notes
        -----
        The scores of one batch are held at a time, so that the training set may be of any size.
        """
        targets = self._train if train is None else self._read(train, "train")[0]
        check_count("k", k, most=targets.num)
        top(np.zeros((1, 1)), 1, kind)  # refuses an unknown kind before the work
        rows = []
        for blocks in self._passes(query, targets, method, checkpoint):
            best: TopK | None = None
            for start, block in blocks:
                best = merged(best, top(to_host(block), k, kind, start), k, kind)
            assert best is not None
            rows.append(best)
        indices = np.concatenate([one.indices for one in rows])
        return TopK(indices, like(np.concatenate([one.scores for one in rows]), self._backend.like))

    def self_influence(self, *, checkpoint: str | os.PathLike[str] | None = None) -> Array:
        """Compute the influence of each training example on its own loss.

        Parameters
        ----------
        checkpoint : path, optional
            As in `scores`.

        Returns
        -------
        array, shape (n_train,)
            ``g_i.T (H + (ridge + damping) I)^{-1} g_i``, at least 0. Mislabelled examples have
            large ones.

        Notes
        -----
        One solve for each training example, in blocks as large as `memory_budget` allows.
        """
        store = self._store(checkpoint, "self_influence", "", train=self._train)
        parts: list[Array] = []
        solutions: list[Any] = []
        total = -(-self._train.num // self._width())
        groups = shown(
            self._groups(self._train), progress=self._progress, total=total, label="self-influence"
        )
        for first, _, batches in groups:

            def compute(batches: list[Any] = batches) -> Array:
                G = self._gradients(batches)
                Z = self._solve(G).value
                solutions.append(self._solution)
                return dot(G, Z)

            parts.append(store.get(f"values-{first}", compute, self._backend.like))
        self._remember(solutions)
        return array_namespace(parts[0]).concat(parts, axis=0)

    def removal_effect(self, query: Any, indices: Indices, leverage: bool = False) -> Array:
        """Predict by how much the loss of each query rises when training examples are removed.

        Parameters
        ----------
        query : examples
        indices : sequence of int
            The examples to remove, all at once.
        leverage : bool
            Let the curvature of the removed examples go too: one Newton step of the problem
            without them. It is exact for a quadratic loss, and better for large or unusual groups.

        Returns
        -------
        array, shape (n_query,)
            In units of the loss, to first order in the step of the parameters. Positive where the
            examples were helpful.

        Notes
        -----
        The problem without them is ``1 / num_train * sum of the others + ridge / 2 * sum(params **
        2)``: neither divisor nor ridge change. One solve, however many queries.
        """
        chosen = check_indices(indices, self._train.num)
        weights = np.zeros(self._train.num)
        weights[chosen] = 1
        removed = self._backend.total(self._train, weights) / self._train.num
        factor = self._factor_without(1 - weights) if leverage else None
        step = self._solve(removed[:, None], factor).value
        queries, _ = self._read(query, "query")
        parts = [self._backend.slopes(batch, step)[0, :] for _, batch in queries.parts()]
        return array_namespace(parts[0]).concat(parts, axis=0)

    def inverse_product(self, G: Array) -> Array:
        """Apply ``(H + (ridge + damping) I)^{-1}`` to a vector or a block.

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
        return self._solve(G).value

    def with_damping(self, damping: Scalar) -> Any:
        """Return the same influence function with another damping, on the same columns.

        Parameters
        ----------
        damping : float or "auto"
        """
        other = copy.copy(self)
        other._solution = None
        other._set_damping(damping, self._factor.A)
        return other

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write settings, columns and a fingerprint of the parameters to one file.

        Parameters
        ----------
        path : path
            Ends in ``.npz``, or in ``.safetensors``: plain arrays, without pickle.
        """
        _ = self._factor.inverse  # computes the columns
        kept = self._factor.A
        settings = {
            "solver": to_record(self._solver),
            "curvature": self._curvature,
            "ridge": self._ridge,
            "damping": self._damping,
            "rng": self._seed,
        }
        content = {
            "settings": settings,
            "parameters": digest(self._backend.vector()),
            "num_train": self._train.num,
            "columns": None if kept.kept is None else to_host(kept.kept),
            "indices": kept.indices,
        }
        FILE.save(path, content)

    @classmethod
    def _loaded(cls: Any, path: str | os.PathLike[str], *arguments: Any, **options: Any) -> Any:
        """Return what was saved, with its columns, after a check that it is about the same."""
        saved = FILE.load(path)
        settings = saved["settings"] | options
        settings["solver"] = from_record(settings["solver"])
        influence = cls(*arguments, **settings)
        if saved["parameters"] != digest(influence._backend.vector()):
            raise ValueError(
                f"{str(path)!r} was saved with other parameters than those given. Load the "
                "parameters of that time first."
            )
        if saved["num_train"] != influence._train.num:
            raise ValueError(
                f"`train` must have {saved['num_train']} examples as it had when {str(path)!r} "
                f"was saved; got {influence._train.num}."
            )
        if saved["columns"] is not None:
            kept = influence._factor.A
            kept.indices = saved["indices"]
            kept.kept = like(saved["columns"], influence._backend.like)
        return influence

    @property
    def info(self) -> InfluenceInfo:
        """Cost and trust; see `InfluenceInfo`."""
        gradient = self._operator.gradient + self._ridge * self._backend.vector()
        residual, steps, message = self._solution or (None, None, "nothing solved yet")
        prepared = self._factor._inverse
        return InfluenceInfo(
            num_train=self._train.num,
            num_params=self._backend.n,
            curvature=self._curvature,
            ridge=self._ridge,
            damping=self._damping,
            loss=self._loss,
            gradient_norm=float(column_norm(gradient)),
            rank=None if prepared is None else prepared.rank,
            num_products=self._factor.A.num_products,
            relative_residual=residual,
            num_steps=steps,
            message=message,
        )
