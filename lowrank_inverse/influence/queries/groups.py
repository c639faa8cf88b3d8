"""The influence of groups of training examples, and the effect of removing them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import Array, Data, Indices
from lowrank_inverse.arrays.checks import check_indices
from lowrank_inverse.arrays.conversion import is_array, like, to_host
from lowrank_inverse.arrays.spread import local
from lowrank_inverse.influence.loss_checks import check_gradients
from lowrank_inverse.influence.passes import Options, Passes

if TYPE_CHECKING:
    from typing_extensions import Unpack


class GroupScores(Passes):
    """The influence of several training examples together."""

    def group_scores(
        self, query: Data, groups: Any, train: Data = None, **options: Unpack[Options]
    ) -> Array:
        """Sum the scores of the training examples in each group, such as a source or a class.

        Parameters
        ----------
        groups : integer array, shape (n_train,)
            Group of each training example, numbered from 0. With a `mesh`, of each of the own.
        query, train
            See `scores`.
        **options
            Its `query_loss`, `reduction`, `weights`, `normalize`, `method` and `checkpoint`.

        Returns
        -------
        array, shape (n_query, groups.max() + 1)

        Notes
        -----
        Only the scores of one batch are in memory. The sum is a first-order prediction for the
        group; `removal_effect` with ``leverage=True`` takes a Newton step.
        """
        asked = self._asked(query, train, **options)
        labels = self._group.together(lambda: _checked_groups(groups, asked.targets.num))
        sums = np.zeros((asked.shape[0], labels.max() + 1))
        for first, blocks in self._scored(asked):
            for start, block in blocks:
                rows, size = block.shape
                part = sums[first : first + rows].T
                np.add.at(part, labels[start : start + size], to_host(block).T)
        return like(_summed(self._group.everyone(sums)), local(self._backend.like))

    def removal_effect(
        self,
        query: Data,
        indices: Indices,
        leverage: bool = False,
        *,
        query_loss: Callable[..., Any] | None = None,
    ) -> Array:
        """Predict how much the loss of each query rises when training examples are removed.

        Parameters
        ----------
        query : examples
            In any form that `train` may have.
        indices : sequence of int
            Training examples to remove together.
        leverage : bool
            Also remove their curvature: one Newton step on the problem without them. This is exact
            for a quadratic loss, and more accurate for large or unusual groups.
        query_loss : callable, optional
            See `scores`.

        Returns
        -------
        array, shape (n_query,)
            Change of the loss, to first order in the step of the parameters. Positive if the
            examples were helpful.

        Notes
        -----
        The problem without them is ``1 / num_train * sum of the others + ridge / 2 * sum(params **
        2)``, with the same `num_train` and ridge. Cost: one solve for any number of queries.
        """
        self._alone("removal_effect")
        chosen = check_indices(indices, self._train.num)
        self._check_unchanged()
        backend = self._measure(query_loss)
        queries = self._read(query, "query", backend)
        self._begin(1, queries.num)
        weights = np.zeros(self._train.num)
        weights[chosen] = 1
        removed = self._backend.total(self._train, weights) / self._train.num
        factor = self._factor_without(1 - weights) if leverage else None
        step = self._solve(removed[:, None], factor).value
        parts = []
        for start, batch in queries.parts():
            slopes = backend.slopes(batch, step)
            check_gradients(slopes, queries, start)
            parts.append(slopes[0, :])
        return array_namespace(parts[0]).concat(parts, axis=0)


def _summed(parts: list[np.ndarray]) -> np.ndarray:
    """Return the sum of what each process has, of which some know fewer groups."""
    total = np.zeros((len(parts[0]), max(part.shape[1] for part in parts)))
    for part in parts:
        total[:, : part.shape[1]] += part
    return total


def _checked_groups(groups: Any, num: int) -> np.ndarray:
    labels = np.asarray(to_host(groups) if is_array(groups) else groups)
    if labels.shape != (num,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"`groups` must be integers, one for each training example, shape ({num},); got shape "
            f"{labels.shape} and dtype {labels.dtype}."
        )
    if labels.min() < 0:
        raise ValueError(f"`groups` must be numbered from 0; got {labels.min()}.")
    return labels
