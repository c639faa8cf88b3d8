"""Scores block by block: queries solved for in groups, examples passed over in batches."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypedDict

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import Array, Batch, Data
from lowrank_inverse.arrays.conversion import is_array, like, to_host
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
NORMALIZATIONS = ("none", "theta-relatif", "l-relatif", "cosine")


class Asked(NamedTuple):
    """What is asked of an influence function, checked and read."""

    queries: Examples
    targets: Examples
    backend: Backend
    """For the function of a query."""

    weights: np.ndarray | None
    """Of each query in each sum of queries, shape (k, n_query)."""

    normalize: str
    method: str
    store: Store

    @property
    def shape(self) -> tuple[int, int]:
        """Of all scores."""
        rows = self.queries.num if self.weights is None else len(self.weights)
        return rows, self.targets.num


class Options(TypedDict, total=False):
    """What `scores`, `top_k` and `group_scores` take beside the examples; see `scores`."""

    query_loss: Callable[..., Any] | None
    reduction: str
    weights: Any
    normalize: str
    method: str
    checkpoint: str | os.PathLike[str] | None


class Passes(Recorded):
    """The loops of an influence function."""

    def _asked(
        self,
        query: Data,
        train: Data,
        *,
        query_loss: Callable[..., Any] | None = None,
        reduction: str = "none",
        weights: Any = None,
        normalize: str = "none",
        method: str = "auto",
        checkpoint: str | os.PathLike[str] | None = None,
    ) -> Asked:
        """Check and read what is asked, and take the solver for it."""
        check_choice("method", method, METHODS)
        check_choice("reduction", reduction, REDUCTIONS)
        check_choice("normalize", normalize, NORMALIZATIONS)
        queries, targets, backend = self._both(query, train, query_loss)
        sums = checked_weights(weights, reduction, queries.num)
        if normalize != "none":
            self._alone(f"normalize={normalize!r}")
        if self._group.size > 1:
            of_sums = () if sums is None else sums.tolist()
            self._group.agree(queries=queries.digest(), method=method, weights=of_sums)
        num_solves = queries.num if sums is None else len(sums)
        num_scores = num_solves * targets.num
        self._begin(num_solves + (normalize != "none") * targets.num, num_scores)
        about = ("scores", method, normalize, *(() if sums is None else (sums,)))
        store = self._store(checkpoint, *about, query=queries, train=targets)
        return Asked(queries, targets, backend, sums, normalize, method, store)

    def _both(
        self, query: Data, train: Data, query_loss: Callable[..., Any] | None
    ) -> tuple[Examples, Examples, Backend]:
        """Read queries and training examples, and return the backend for the former."""
        self._check_unchanged()
        targets = self._train if train is None else self._read(train, "train")
        backend = self._measure(query_loss)
        return self._read(query, "query", backend), targets, backend

    def _scored(self, asked: Asked) -> Iterator[tuple[int, Iterator[tuple[int, Array]]]]:
        """Yield for each group of queries its start, and the blocks of scores with their starts."""
        solutions: list[Any] = []
        scale = self._target_scale(asked)
        solve = Recycling(self, asked.store)
        for number, (first, right_hand_sides) in enumerate(self._right_hand_sides(asked)):

            def compute(
                number: int = number, make: Callable[[], Array] = right_hand_sides
            ) -> Array:
                G = make()
                Z = solve(G, number)
                solutions.append(self._solution)
                return Z * _inverse_root(dot(G, Z)) if asked.normalize == "cosine" else Z

            Z = asked.store.get(f"directions-{first}", compute, self._backend.like)
            self._remember(solutions)
            blocks = self._blocks(
                gathered(Z), asked.targets, asked.method, asked.store, first, scale
            )
            if self._group.size > 1:  # before the next solve, in which all must take part
                blocks = iter(self._group.together(partial(list, blocks)))
            yield first, blocks

    def _right_hand_sides(self, asked: Asked) -> Iterator[tuple[int, Callable[[], Array]]]:
        """Yield the start of each group of queries, or of sums of them, and what computes it."""
        queries, backend = asked.queries, asked.backend
        if asked.weights is None:
            for first, batches in self._groups(queries):
                yield first, partial(self._gradients, backend, queries, first, batches)
            return
        width = self._width()
        for first in range(0, len(asked.weights), width):
            sums = asked.weights[first : first + width]
            yield first, partial(self._totals, backend, queries, sums)

    def _totals(self, backend: Backend, queries: Examples, sums: np.ndarray) -> Array:
        columns = [backend.total(queries, weights) for weights in sums]
        G = rows_beside(array_namespace(columns[0]).stack(columns, axis=1), self._backend.like)
        self._check_total(G, backend, queries)
        return G

    def _blocks(
        self,
        Z: Array,
        targets: Examples,
        method: str,
        store: Store,
        first: int,
        scale: Array | None = None,
    ) -> Iterator[tuple[int, Array]]:
        by_jvp = self._by_jvp(method, int(Z.shape[1]), targets, store)
        parts = targets.parts(None if by_jvp else self._num_gradients())
        for start, batch in shown(
            parts, progress=self._progress, total=len(targets), label="scores"
        ):

            def compute(batch: Batch = batch) -> Array:
                if by_jvp:
                    return self._backend.slopes(batch, Z)
                return Z.T @ self._backend.gradients(batch)

            block = store.get(f"scores-{first}-{start}", compute, local(self._backend.like))
            check_gradients(block, targets, start)
            yield start, block if scale is None else block * scale[start : start + block.shape[1]]

    def _by_jvp(self, method: str, width: int, targets: Examples, store: Store) -> bool:
        """Whether scores come from directional derivatives: for "auto", if these are faster."""
        if method != "auto":
            return method == "jvp"

        def choose() -> Array:
            pays = float(self._jvp_pays(width, len(targets)))
            return like(np.asarray(pays), local(self._backend.like))

        # A run that goes on from a checkpoint has the same blocks.
        return bool(store.get(f"by-jvp-{width}", choose, local(self._backend.like)))

    def _target_scale(self, asked: Asked) -> Array | None:
        """Return what the scores of each training example are multiplied by."""
        if asked.normalize == "none":
            return None
        by_step = asked.normalize == "theta-relatif"
        own = self._own_values(asked.targets, asked.store, "norms", "norms", by_step=by_step)
        parts = list(own)
        return _inverse_root(array_namespace(parts[0]).concat(parts, axis=0))

    def _own_values(
        self, examples: Examples, store: Store, name: str, label: str, *, by_step: bool = False
    ) -> Iterator[Array]:
        """Yield for groups of examples ``g.T H^-1 g``, or with `by_step` ``|H^-1 g|**2``."""
        solutions: list[Any] = []
        solve = Recycling(self, store)
        total = -(-examples.num // self._width())
        groups = shown(self._groups(examples), progress=self._progress, total=total, label=label)
        for number, (first, batches) in enumerate(groups):

            def compute(number: int = number, first: int = first, batches: Any = batches) -> Array:
                G = self._gradients(self._backend, examples, first, batches)
                Z = solve(G, number)
                solutions.append(self._solution)
                return dot(Z if by_step else G, Z)

            yield store.get(f"{name}-{first}", compute, self._backend.like)
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


def checked_weights(weights: Any, reduction: str, num: int) -> np.ndarray | None:
    """Return the weights of the queries in each sum, shape (k, num); None without sums."""
    if weights is None:
        return np.ones((1, num)) if reduction == "sum" else None
    if reduction == "sum":
        raise ValueError("pass `weights`, or reduction='sum', which means weights of 1; got both.")
    W = np.asarray(to_host(weights) if is_array(weights) else weights, dtype=np.float64)
    if W.ndim not in (1, 2) or W.shape[-1] != num or W.size == 0:
        raise ValueError(
            f"`weights` must have shape ({num},) or (k, {num}), one for each query; got shape "
            f"{W.shape}."
        )
    if not np.isfinite(W).all():
        raise ValueError("`weights` must be finite; some are not.")
    return np.atleast_2d(W)


def _inverse_root(x: Array) -> Array:
    """Return ``1 / sqrt(x)``, and 0 where x is 0: there the scores are 0 too."""
    xp = array_namespace(x)
    positive = x > 0
    return xp.where(positive, 1 / xp.sqrt(xp.where(positive, x, 1)), 0 * x)


def _name(number: int) -> str:
    return f"pairs-{number % 2}"
