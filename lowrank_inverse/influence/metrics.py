"""Measures of how well influence scores predict the effects of training."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from lowrank_inverse._typing import Array
from lowrank_inverse.arrays.checks import check_finite, describe
from lowrank_inverse.arrays.conversion import is_array, to_host

__all__ = ["Agreement", "leave_one_out", "linear_datamodelling_score", "mislabel_auc"]


class Agreement(NamedTuple):
    """Agreement between predicted and actual values.

    Attributes
    ----------
    pearson, spearman : float
        Correlations of the values and of their ranks, from -1 to 1; NaN if one side is constant.
    slope : float
        Least-squares slope of the actual over the predicted values, through zero; 1 if they have
        the same scale.
    relative_error : float
        Euclidean norm of the difference divided by that of the actual values.
    """

    pearson: float
    spearman: float
    slope: float
    relative_error: float


def leave_one_out(predicted: Array, actual: Array) -> Agreement:
    """Compare predicted changes of the loss with those found by training again.

    Parameters
    ----------
    predicted : array, any shape
        For example ``scores / num_train``, or ``removal_effect`` for each set of examples.
    actual : array, shape of `predicted`
        Loss after training without the examples minus loss with them.

    Returns
    -------
    Agreement
        Over all entries.

    Raises
    ------
    ValueError
        If the shapes differ, there are fewer than two entries, or some are not finite.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank_inverse.influence.metrics import leave_one_out
    >>> agreement = leave_one_out(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.5, 4.0]))
    >>> print(f"{agreement.pearson:.3f} {agreement.spearman:.3f} {agreement.slope:.3f}")
    1.000 1.000 1.286
    """
    p, a = _host("predicted", predicted), _host("actual", actual)
    if p.shape != a.shape:
        raise ValueError(
            f"`predicted` and `actual` must have the same shape; got {p.shape} and {a.shape}."
        )
    p, a = p.reshape(-1), a.reshape(-1)
    if p.size < 2:
        raise ValueError(f"`predicted` must have at least two entries; got {p.size}.")
    scale = float(np.max(np.abs(p))) or 1.0
    unit = p / scale
    square, norm = float(unit @ unit), _norm(a)
    return Agreement(
        pearson=_correlation(p, a),
        spearman=_correlation(stats.rankdata(p), stats.rankdata(a)),
        slope=float(unit @ a) / square / scale if square > 0 else float("nan"),
        relative_error=_norm(a - p) / norm if norm > 0 else float("nan"),
    )


def linear_datamodelling_score(scores: Array, subsets: Array, losses: Array) -> float:
    """Measure how well scores predict the losses of models trained on subsets (LDS) [1]_.

    Parameters
    ----------
    scores : array, shape (n_query, n_train)
        Positive is helpful.
    subsets : array of bool, shape (n_models, n_train)
        Training examples of each model.
    losses : array, shape (n_models, n_query)
        Loss of each model on each query, best averaged over several trainings.

    Returns
    -------
    float
        For each query, the Spearman correlation over the models between the sum of the scores in
        the subset and the negative loss; averaged over the queries. 1 is perfect, 0 is chance.

    Raises
    ------
    ValueError
        If the shapes do not fit, there are fewer than two models, or a query has the same loss or
        sum for each model.

    References
    ----------
    .. [1] S. M. Park et al. TRAK: Attributing Model Behavior at Scale. ICML 2023.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank_inverse.influence.metrics import linear_datamodelling_score
    >>> subsets = np.array([[1, 1, 0], [0, 1, 1], [1, 0, 1]], dtype=bool)
    >>> losses = np.array([[0.1], [0.3], [0.2]])
    >>> print(
    ...     round(
    ...         linear_datamodelling_score(
    ...             np.array([[3.0, 2.0, 1.0]]), subsets, losses
    ...         ),
    ...         6,
    ...     )
    ... )
    1.0
    """
    s, f, m = _host("scores", scores), _host("losses", losses), _flags("subsets", subsets)
    if m.ndim != 2 or s.ndim != 2 or m.shape[1] != s.shape[1] or f.shape != (len(m), len(s)):
        raise ValueError(
            "`scores`, `subsets` and `losses` must have the shapes (n_query, n_train), (n_models, "
            f"n_train) and (n_models, n_query); got {s.shape}, {m.shape} and {f.shape}."
        )
    if len(m) < 2:
        raise ValueError(f"`subsets` must have at least two models; got {len(m)}.")
    sums = m.astype(np.float64) @ s.T
    found = [
        _correlation(stats.rankdata(-f[:, q]), stats.rankdata(sums[:, q])) for q in range(len(s))
    ]
    constant = np.flatnonzero(np.isnan(found))
    if constant.size:
        raise ValueError(
            "`losses` and the sums of `scores` must differ from model to model; one of them is the "
            f"same for all at query {constant[0]}. Omit that query, or use other subsets."
        )
    return float(np.mean(found))


def mislabel_auc(self_influence: Array, is_mislabelled: Array) -> float:
    """Measure how well large values identify mislabelled examples.

    Parameters
    ----------
    self_influence : array, shape (n,)
        Any score that is larger for suspicious examples.
    is_mislabelled : array of bool, shape (n,)
        Which labels are wrong.

    Returns
    -------
    float
        Area under the ROC curve: the probability that a mislabelled example has a larger value
        than a correctly labelled one, where ties count half. 0.5 is chance.

    Raises
    ------
    ValueError
        If the shapes differ, or all examples are of one kind.

    Examples
    --------
    >>> import numpy as np
    >>> from lowrank_inverse.influence.metrics import mislabel_auc
    >>> mislabel_auc(
    ...     np.array([0.1, 0.9, 0.3, 0.2]), np.array([False, True, False, True])
    ... )
    0.75
    """
    values = _host("self_influence", self_influence)
    flags = _flags("is_mislabelled", is_mislabelled)
    if values.ndim != 1 or values.shape != flags.shape:
        raise ValueError(
            "`self_influence` and `is_mislabelled` must have the same shape (n,); got "
            f"{values.shape} and {flags.shape}."
        )
    num, others = int(flags.sum()), int((~flags).sum())
    if num == 0 or others == 0:
        raise ValueError(
            f"`is_mislabelled` must have both kinds; got {num} True and {others} False."
        )
    ranks = stats.rankdata(values)  # the statistic of Mann and Whitney
    return float((ranks[flags].sum() - num * (num + 1) / 2) / (num * others))


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Return the correlation of Pearson, NaN where one is constant."""
    if x.min() == x.max() or y.min() == y.max():
        return float("nan")
    return float(stats.pearsonr(x / np.max(np.abs(x)), y / np.max(np.abs(y))).statistic)


def _norm(x: np.ndarray) -> float:
    scale = float(np.max(np.abs(x)))
    return scale * float(np.linalg.norm(x / scale)) if scale > 0 else 0.0


def _host(name: str, x: Any) -> np.ndarray:
    if not is_array(x):
        raise TypeError(f"`{name}` must be an array; got {describe(x)}.")
    check_finite(name, x)
    return to_host(x).astype(np.float64)


def _flags(name: str, x: Any) -> np.ndarray:
    if not is_array(x) or to_host(x).dtype != np.bool_:
        raise TypeError(f"`{name}` must be an array of bool; got {describe(x)}.")
    return to_host(x)
