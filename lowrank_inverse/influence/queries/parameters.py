"""Influence by parameter of the model."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any

from array_api_compat import array_namespace

from lowrank_inverse._typing import Array, Data
from lowrank_inverse.influence.loss_checks import check_gradients
from lowrank_inverse.influence.passes import Passes


class ParameterScores(Passes):
    """Scores by parameter."""

    def parameter_scores(
        self,
        query: Data,
        train: Data = None,
        *,
        query_loss: Callable[..., Any] | None = None,
    ) -> dict[str, Array]:
        """Split the influence of training examples by the parameters that carry it.

        Parameters
        ----------
        query, train, query_loss
            See `scores`.

        Returns
        -------
        dict of str to array, shape (n_query, n_train)
            By name of parameter, such as ``"0.weight"`` in torch or ``"['w']"`` in jax, in their
            order in the flat vector. Their sum is the score. With ``z = H^-1 g_q``, that of a
            parameter is the inner product of its entries of z with its entries of ``g_i``.

        Notes
        -----
        Cost: one solve per query, and one gradient per training example for each block of queries.
        The result is kept in memory, so pass as `train` the examples that `top_k` found. The solve
        takes the curvature between all parameters; for the influence through some of them alone,
        pass these as `params`.
        """
        self._alone("parameter_scores")
        queries, targets, backend = self._both(query, train, query_loss)
        self._begin(queries.num, 0)
        sizes = self._backend.sizes()
        entries = [slice(*ends) for ends in pairwise(accumulate(sizes.values(), initial=0))]
        rows: list[list[Array]] = [[] for _ in sizes]
        for first, batches in self._groups(queries):
            Z = self._solve(self._gradients(backend, queries, first, batches)).value
            blocks: list[list[Array]] = [[] for _ in sizes]
            for start, batch in targets.parts(self._num_gradients()):
                G = self._backend.gradients(batch)
                check_gradients(G, targets, start)
                for found, own in zip(blocks, entries, strict=True):
                    found.append(Z[own, :].T @ G[own, :])
            xp = array_namespace(Z)
            for row, found in zip(rows, blocks, strict=True):
                row.append(xp.concat(found, axis=1))
        xp = array_namespace(rows[0][0])
        return {name: xp.concat(row, axis=0) for name, row in zip(sizes, rows, strict=True)}
