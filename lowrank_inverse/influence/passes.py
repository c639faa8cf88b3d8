"""Scores block by block: queries solved for in groups, examples passed over in batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from lowrank_inverse._typing import Array
from lowrank_inverse.arrays.linalg import dot
from lowrank_inverse.arrays.spread import gathered, local, rows_beside
from lowrank_inverse.influence.backend import Backend
from lowrank_inverse.influence.checkpoint import Store, shown
from lowrank_inverse.influence.dataset import Examples
from lowrank_inverse.influence.loss_checks import check_gradients
from lowrank_inverse.influence.records import Recorded
from lowrank_inverse.influence.results import check_choice
from lowrank_inverse.results.solution import Pairs

METHODS = ("auto", "jvp", "gradients")
REDUCTIONS = ("none", "sum")
JVP_MOST = 24
"""Queries; for more, the gradient of each example is taken instead."""


class Passes(Recorded):
    """The loops of an influence function."""

    def _scored(
        self,
        query: Any,
        train: Any,
        query_loss: Callable[..., Any] | None,
        reduction: str,
        method: str,
        checkpoint: str | os.PathLike[str] | None,
    ) -> tuple[Any, tuple[int, int]]:
        """Return the blocks of scores, as they are computed, and the shape of all."""
        check_choice("method", method, METHODS)
        check_choice("reduction", reduction, REDUCTIONS)
        self._check_unchanged()
        targets = self._train if train is None else self._read(train, "train")
        backend = self._measure(query_loss)
        queries = self._read(query, "query", backend)
        if self._group.size > 1:
            self._group.agree(queries=queries.digest(), method=method, reduction=reduction)
        shape = 1 if reduction == "sum" else queries.num, targets.num
        self._begin(shape[0], shape[0] * shape[1])
        store = self._store(checkpoint, "scores", method, reduction, query=queries, train=targets)
        groups = self._passes(
            queries, targets, backend, reduction=reduction, method=method, store=store
        )
        return groups, shape

    def _passes(
        self,
        queries: Examples,
        targets: Examples,
        backend: Backend,
        *,
        reduction: str,
        method: str,
        store: Store,
    ) -> Iterator[tuple[int, Iterator[tuple[int, Array]]]]:
        """Yield for each group of queries its start, and the blocks of scores with their starts."""
        solutions: list[Any] = []
        solve = Recycling(self, store)
        groups: Any = [(0, None)] if reduction == "sum" else self._groups(queries)
        for number, (first, batches) in enumerate(groups):

            def compute(number: int = number, first: int = first, batches: Any = batches) -> Array:
                if batches is None:
                    G = backend.total(queries, np.ones(queries.num))[:, None]
                    G = rows_beside(G, self._backend.like)
                    self._check_total(G, backend, queries)
                else:
                    G = self._gradients(backend, queries, first, batches)
                Z = solve(G, number)
                solutions.append(self._solution)
                return Z

            Z = store.get(f"directions-{first}", compute, self._backend.like)
            self._remember(solutions)
            blocks = self._blocks(gathered(Z), targets, method, store, first)
            if self._group.size > 1:  # before the next solve, in which all must take part
                blocks = iter(self._group.together(partial(list, blocks)))
            yield first, blocks

    def _blocks(
        self, Z: Array, targets: Examples, method: str, store: Store, first: int
    ) -> Iterator[tuple[int, Array]]:
        by_jvp = method == "jvp" or (method == "auto" and Z.shape[1] <= JVP_MOST)
        parts = targets.parts(None if by_jvp else self._num_gradients())
        for start, batch in shown(
            parts, progress=self._progress, total=len(targets), label="scores"
        ):

            def compute(batch: Any = batch) -> Array:
                if by_jvp:
                    return self._backend.slopes(batch, Z)
                return Z.T @ self._backend.gradients(batch)

            block = store.get(f"scores-{first}-{start}", compute, local(self._backend.like))
            check_gradients(block, targets, start)
            yield start, block

    def _self_values(self, store: Store) -> Iterator[Array]:
        """Yield the self-influence of each group of training examples."""
        solutions: list[Any] = []
        solve = Recycling(self, store)
        total = -(-self._train.num // self._width())
        groups = shown(
            self._groups(self._train), progress=self._progress, total=total, label="self-influence"
        )
        for number, (first, batches) in enumerate(groups):

            def compute(number: int = number, first: int = first, batches: Any = batches) -> Array:
                G = self._gradients(self._backend, self._train, first, batches)
                Z = solve(G, number)
                solutions.append(self._solution)
                return dot(G, Z)

            yield store.get(f"values-{first}", compute, self._backend.like)
        self._remember(solutions)

    def _remember(self, solutions: list[Any]) -> None:
        """Join what several solves said, for `info`."""
        if len(solutions) > 0:
            residual, steps, messages = zip(*solutions, strict=True)
            message = messages[0] if len(set(messages)) == 1 else "; ".join(messages)
            self._solution = np.concatenate(residual), np.concatenate(steps), message
        else:
            self._solution = None, None, "read from the checkpoint"


class Recycling:
    """Solves for one group after the other, each with the Ritz pairs of those before.

    With a checkpoint they are those of the groups before it alone, as the folder has them, so that
    a run goes on bit for bit. Two files take turns: it may end between the pairs and the result.
    """

    def __init__(self, influence: Passes, store: Store) -> None:
        self._influence, self._store, self._next = influence, store, -1

    def __call__(self, b: Array, number: int) -> Array:
        """Solve for the group of this number."""
        factor = self._influence._factor
        if self._store.folder is None or not factor.recycle:
            return self._influence._solve(b).value
        if number != self._next:
            self._take(number - 1, b)
        value = self._influence._solve(b).value
        self._store.write(_name(number), factor.A.recycled(factor.recycle))
        self._take(number, b)
        self._next = number + 1
        return value

    def _take(self, number: int, template: Array) -> None:
        """Take the pairs that the solve of this number left."""
        found = self._store.read(_name(number), template) if number >= 0 else None
        self._influence._factor.recall(None if found is None else Pairs(*found))


def _name(number: int) -> str:
    return f"pairs-{number % 2}"
