"""Influence by token of training sequences or queries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import Array, Data
from lowrank_inverse.arrays.conversion import like
from lowrank_inverse.influence.backend import Backend
from lowrank_inverse.influence.checkpoint import Store
from lowrank_inverse.influence.dataset import Examples
from lowrank_inverse.influence.loss_checks import check_gradients
from lowrank_inverse.influence.passes import Passes
from lowrank_inverse.influence.results import check_choice


class TokenScores(Passes):
    """Scores by token, for a loss that returns one number per token."""

    def token_scores(
        self,
        query: Data,
        train: Data = None,
        *,
        of: str = "train",
        query_loss: Callable[..., Any] | None = None,
    ) -> Array:
        """Split the influence of training sequences by their tokens, or by the tokens of a query.

        Parameters
        ----------
        query, train, query_loss
            See `scores`. The loss (for ``of="query"``, the `query_loss`) returns one number per
            token, shape (size, tokens), with 0 for ignored tokens.
        of : {"train", "query"}
            "train" gives the influence of the loss of each training token on the loss of the query;
            "query" that of each training sequence on the loss of each token of the query.

        Returns
        -------
        array, shape (n_query, n_train, tokens) or (n_query, tokens, n_train)
            Their sum over the tokens is the score. Shorter sequences are padded with zeros.

        Raises
        ------
        ValueError
            If the loss does not return one number per token.

        Notes
        -----
        Training tokens cost as much as `scores`; tokens of a query cost one solve each. The result
        is kept in memory, so pass as `train` the sequences that `top_k` found.

        References
        ----------
        R. Grosse et al. Studying Large Language Model Generalization with Influence Functions.
        2023, section 3.3.
        """
        check_choice("of", of, ("train", "query"))
        queries, targets, backend = self._both(query, train, query_loss)
        if of == "query":
            return self._of_query(backend, queries, targets)
        self._begin(queries.num, 0)
        parts = []
        for first, batches in self._groups(queries):
            Z = self._solve(self._gradients(backend, queries, first, batches)).value
            blocks = []
            for start, batch in targets.parts():
                block = self._backend.token_slopes(batch, Z)
                check_gradients(array_namespace(block).sum(block, axis=2), targets, start)
                blocks.append(block)
            parts.append(_joined(blocks, axis=1, ragged=2))
        return array_namespace(parts[0]).concat(parts, axis=0)

    def _of_query(self, backend: Backend, queries: Examples, targets: Examples) -> Array:
        rows: list[Array] = []
        for start, batch in queries.parts(1):
            for i in range(queries.size(batch)):
                G = backend.token_gradients(queries.rows(batch, i, i + 1))
                check_gradients(array_namespace(G).sum(G, axis=1)[:, None], queries, start + i)
                if not rows:
                    self._begin(queries.num * int(G.shape[1]), 0)
                blocks = list(self._token_blocks(G, targets))
                rows.append(array_namespace(G).concat(blocks, axis=0)[None, ...])
        return _joined(rows, axis=0, ragged=1)

    def _token_blocks(self, G: Array, targets: Examples) -> Iterator[Array]:
        width = self._width()
        for first in range(0, int(G.shape[1]), width):
            Z = self._solve(G[:, first : first + width]).value
            blocks = self._blocks(Z, targets, "auto", Store(None, {}), 0)
            yield array_namespace(Z).concat([block for _, block in blocks], axis=1)


def _joined(blocks: list[Array], *, axis: int, ragged: int) -> Array:
    """Join arrays along an axis, filled up with zeros to one length along another."""
    xp = array_namespace(blocks[0])
    longest = max(int(block.shape[ragged]) for block in blocks)
    padded = []
    for block in blocks:
        shape = list(block.shape)
        shape[ragged] = longest - shape[ragged]
        padded.append(xp.concat([block, like(np.zeros(shape), block)], axis=ragged))
    return xp.concat(padded, axis=axis)
