"""The results of influence functions, and the largest scores of a stream."""

from __future__ import annotations

import os
from functools import reduce
from typing import Any, NamedTuple

import numpy as np

KINDS = ("helpful", "harmful", "absolute")


class TopK(NamedTuple):
    """The most influential examples of each query, in decreasing order.

    Attributes
    ----------
    indices : numpy.ndarray of int64, shape (n_query, k)
        Indices in the training set.
    scores : array, shape (n_query, k)
        Their scores, in the library of the parameters.
    """

    indices: np.ndarray
    scores: Any


class InfluenceInfo(NamedTuple):
    """Cost and accuracy of an influence function.

    Attributes
    ----------
    num_train, num_params : int
        Number of training examples and of parameters.
    curvature, solver : str
        The curvature, and the settings of the solver (those of the last call for the default).
    ridge, damping : float
        Added to the mean curvature. The ridge may be an array, shape (n,). For "auto", `damping`
        is the number that was chosen.
    loss, gradient_norm : float
        Mean loss on the training set, and norm of the gradient of ``mean loss + ridge / 2 *
        sum(params ** 2)``, which the formula assumes to be 0.
    rank : int or None
        Number of columns that the solver kept; None if it keeps none.
    num_products : int
        Number of products with the curvature so far.
    relative_residual : numpy.ndarray, shape (n_query,)
        Relative norm of the true residual in the last solve. None before the first solve, and if
        the result came from a checkpoint.
    num_steps : numpy.ndarray of int, shape (n_query,)
        Number of steps of the last solve.
    message : str
        How the last solve ended.
    """

    num_train: int
    num_params: int
    curvature: str
    solver: str
    ridge: Any
    damping: float
    loss: float
    gradient_norm: float
    rank: Any
    num_products: int
    relative_residual: np.ndarray | None
    num_steps: np.ndarray | None
    message: str


def top(block: np.ndarray, k: int, kind: str, start: int = 0) -> TopK:
    """Return the k best of each row of a block of scores, whose first column has index `start`."""
    chosen = np.argsort(_rank(block, kind), axis=1, kind="stable")[:, :k]
    return TopK(chosen + start, np.take_along_axis(block, chosen, axis=1))


def merged(best: TopK | None, other: TopK, k: int, kind: str) -> TopK:
    """Return the k best of both, of equal ones those that came first."""
    if best is None:
        return other
    indices = np.concatenate([best.indices, other.indices], axis=1)
    scores = np.concatenate([best.scores, other.scores], axis=1)
    chosen = top(scores, k, kind).indices
    return TopK(*(np.take_along_axis(x, chosen, axis=1) for x in (indices, scores)))


def joined(parts: list[TopK], k: int, kind: str) -> TopK:
    """Return the k best of all parts, of equal ones those that came first."""
    return reduce(lambda best, part: merged(best, part, k, kind), parts)


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, choices))}; got {value!r}.")


def open_scores(out: Any, shape: tuple[int, int], dtype: Any) -> np.ndarray:
    """Return a NumPy array to write scores to: `out`, or a new file of that path."""
    if isinstance(out, (str, os.PathLike)):
        if not str(out).endswith(".npy"):
            raise ValueError(f"`out` must end in .npy, or be a NumPy array; got {str(out)!r}.")
        return np.lib.format.open_memmap(out, mode="w+", dtype=dtype, shape=shape)
    if not isinstance(out, np.ndarray):
        raise TypeError(f"`out` must be a path that ends in .npy, or a NumPy array; got {out!r}.")
    if out.shape != shape or out.dtype != dtype or not out.flags.writeable:
        raise ValueError(
            f"`out` must be writeable, of shape {shape} and dtype {np.dtype(dtype)}; got shape "
            f"{out.shape} and dtype {out.dtype}."
        )
    return out


def _rank(block: np.ndarray, kind: str) -> np.ndarray:
    check_choice("kind", kind, KINDS)
    return block if kind == "harmful" else -(np.abs(block) if kind == "absolute" else block)
