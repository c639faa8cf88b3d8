"""Mean influence over several trained models."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from typing import Any

import numpy as np

from lowrank_inverse._typing import Array, Data
from lowrank_inverse.arrays.checks import check_count, describe
from lowrank_inverse.arrays.conversion import like, to_host
from lowrank_inverse.influence.base import InfluenceBase
from lowrank_inverse.influence.results import TopK, top


class Ensemble:
    """Mean influence over models from several seeds, or checkpoints of one training [1]_.

    The mean reduces the randomness of a single training.

    Parameters
    ----------
    members : iterable of influence functions
        On the same training set, each with its own trained model.

    References
    ----------
    .. [1] S. Park et al. TRAK: Attributing Model Behavior at Scale. ICML 2023, section 3.2.

    Examples
    --------
    >>> import torch, lowrank_inverse_torch as lit
    >>> def loss(output, target):
    ...     return ((output - target) ** 2).sum(dim=1) / 2
    >>> train = torch.ones(3, 1), torch.tensor([[0.0], [2.0], [4.0]])
    >>> members = []
    >>> for mean in (1.5, 2.5):
    ...     model = torch.nn.Linear(1, 1, bias=False)
    ...     _ = torch.nn.init.constant_(model.weight, mean)
    ...     members.append(lit.InfluenceFunction(model, loss, train, damping=0.0))
    >>> Ensemble(members).scores((torch.ones(1, 1), torch.tensor([[1.0]])))
    tensor([[ 2.2500,  0.2500, -1.7500]])
    """

    def __init__(self, members: Iterable[InfluenceBase]) -> None:
        self.members = list(members)
        if not self.members:
            raise ValueError("`members` must hold at least one influence function; got none.")
        for member in self.members:
            if not isinstance(member, InfluenceBase):
                raise TypeError(f"`members` must be influence functions; got {describe(member)}.")
        sizes = {member.info.num_train for member in self.members}
        if len(sizes) > 1:
            raise ValueError(
                f"`members` must have the same training set; got sets of {sorted(sizes)} examples."
            )

    def scores(self, query: Data, train: Data = None, **options: Any) -> Array:
        """Return the mean scores of all members; takes their arguments, except `out`."""
        parts = (member.scores(query, train, **options) for member in self.members)
        total: Array = reduce(lambda a, b: a + b, parts)
        return total / len(self.members)

    def top_k(
        self, query: Data, k: int, kind: str = "helpful", train: Data = None, **options: Any
    ) -> TopK:
        """Find the k most influential training examples of each query by the mean scores.

        Memory: all scores, ``n_query * n_train`` numbers.
        """
        scores = self.scores(query, train, **options)
        check_count("k", k, most=int(scores.shape[1]))
        best = top(to_host(scores), k, kind)
        return TopK(np.asarray(best.indices), like(best.scores, scores))
