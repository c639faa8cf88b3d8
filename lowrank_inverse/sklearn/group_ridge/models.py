"""Fits without their penalties, by products with the examples or by Gram matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from lowrank_inverse.sklearn.group_ridge.design import Design
from lowrank_inverse.sklearn.group_ridge.losses import Loss

Product = Callable[[np.ndarray], np.ndarray]


class Split(NamedTuple):
    """Which examples are in each of K fits, and in its validation.

    Attributes
    ----------
    share : array, shape (n,)
        Weights of the examples, of sum 1.
    train, validate : arrays, shape (n, K)
        By what they are multiplied in each.
    """

    share: np.ndarray
    train: np.ndarray
    validate: np.ndarray


class At(NamedTuple):
    """Both losses at coefficients, shape (p, K, C): value, gradient, product with the Hessian."""

    inner_gradient: np.ndarray
    product: Product
    outer: float
    outer_gradient: np.ndarray
    along: Product
    """Derivatives of the inner gradient along q, by the logarithms of the weights, shape (n,)."""


class Model(Protocol):
    """K fits without their penalties, each on examples of its own, and what validates them."""

    shape: tuple[int, int, int]
    curvature: float
    eps: float

    def inner(self, U: np.ndarray, weight: Any) -> tuple[float, np.ndarray]:
        """Return the sum of the K losses on the training examples, and its gradient."""
        ...

    def at(self, U: np.ndarray, weight: Any) -> At:
        """Return what a hypergradient needs."""
        ...

    def hessian(self, U: np.ndarray, weight: Any) -> np.ndarray:
        """Return about the Hessian of each fit, shape (p C, p C), at their mean (p, 1, C)."""
        ...


class Rows:
    """Fits that multiply by all examples: two products with X a step, whatever K is.

    Parameters
    ----------
    design : Design
    loss : callable (rows) -> Loss
        Of some of the examples.
    num_outputs : int
        C.
    split : Split
    """

    def __init__(
        self, design: Design, loss: Callable[[np.ndarray], Loss], num_outputs: int, split: Split
    ) -> None:
        used = split.share * (split.train + split.validate).any(axis=1) > 0
        (self._used,) = np.nonzero(used)
        self._design, self._loss = design.rows(self._used), loss(self._used)
        share, self._num_examples = split.share[self._used, None], len(used)
        self._train = (share * split.train[self._used])[..., None]
        self._validate = (share * split.validate[self._used])[..., None]
        self.shape = (design.shape[1], split.train.shape[1], num_outputs)
        self.curvature, self.eps = self._loss.curvature, float(np.finfo(design.dtype).eps)
        self._latest: tuple[Any, ...] | None = None

    def _scores(self, U: np.ndarray) -> np.ndarray:
        return self._design.times(U.reshape(len(U), -1)).reshape(-1, *U.shape[1:])

    def _adjoint(self, R: np.ndarray) -> np.ndarray:
        """Return the product of the transpose, shape (n, K, C) to (p, K, C)."""
        return self._design.adjoint(R.reshape(len(R), -1)).reshape(self.shape)

    def _weights(self, weight: Any) -> Any:
        return self._train * (weight if np.ndim(weight) == 0 else weight[self._used])

    def _level(self, U: np.ndarray) -> np.ndarray:
        """Return what makes intercepts that all rise by one number have a curvature."""
        level = np.zeros_like(U)
        if self._design.fit_intercept and self.shape[2] > 1:
            level[-1] = self.curvature * U[-1].mean(axis=-1, keepdims=True)
        return level

    def inner(self, U: np.ndarray, weight: Any) -> tuple[float, np.ndarray]:
        """Return the training loss and its gradient."""
        scores, weights, level = self._scores(U), self._weights(weight), self._level(U)
        values, slope = self._loss.slope(scores)
        gradient = self._adjoint(weights * slope) + level
        self._latest = (U, weight), scores, values, slope, gradient
        value = np.sum(weights[..., 0] * values) + np.sum(level * U) / 2
        return float(value), gradient

    def at(self, U: np.ndarray, weight: Any) -> At:
        """Return what a hypergradient needs, without products where `inner` was at U last."""
        same = self._latest is not None and all(map(np.array_equal, self._latest[0], (U, weight)))
        if not same:
            self.inner(U, weight)
        assert self._latest is not None
        _, scores, values, slope, gradient = self._latest
        weights, bend = self._weights(weight), self._loss.bend(scores)

        def along(q: np.ndarray) -> np.ndarray:
            found = np.zeros(self._num_examples)
            found[self._used] = np.sum(weights * slope * self._scores(q), axis=(1, 2))
            return found

        return At(
            gradient,
            lambda V: self._adjoint(weights * bend(self._scores(V))) + self._level(V),
            float(np.sum(self._validate[..., 0] * values)),
            self._adjoint(self._validate * slope),
            along,
        )

    def hessian(self, U: np.ndarray, weight: Any) -> np.ndarray:
        """Return the mean of the Hessians, were all fits at U."""
        p, _, C = self.shape
        scores, share = self._scores(U), self._weights(weight).mean(axis=(1, 2))
        found = np.zeros((p, C, p, C))
        for c in range(C):
            for other in range(c + 1):
                block = self._design.products(share * self._loss.second(scores, c, other))
                found[:, c, :, other] = found[:, other, :, c] = block
        if self._design.fit_intercept and C > 1:
            found[-1, :, -1] += self.curvature / C
        return found.reshape(p * C, p * C)


class Gram:
    """Least squares by the matrices of inner products, exactly.

    ``n p**2`` operations once, and ``K p**3 / 3`` for each evaluation, whatever n is. Rows that
    are in the same fits are summed once.
    """

    curvature = 1.0

    def __init__(self, design: Design, targets: np.ndarray, split: Split) -> None:
        p, K = design.shape[1], split.train.shape[1]
        self.shape, self.eps = (p, K, 1), float(np.finfo(design.dtype).eps)
        sums = np.zeros((2, K, p + 1, p + 1))
        parts = np.hstack([split.train, split.validate])
        kinds, kind = np.unique(parts, axis=0, return_inverse=True)
        for number, factors in enumerate(kinds):
            chosen = kind.reshape(-1) == number
            product = design.products(split.share * chosen, targets)
            for place, factor in zip(np.ndindex(2, K), factors, strict=True):
                if factor:
                    sums[place] += factor * product
        self._A, self._b, self._c = sums[..., :p, :p], sums[..., :p, p], sums[..., p, p]

    def _value(self, part: int, U: np.ndarray) -> tuple[float, np.ndarray]:
        product = np.einsum("kij,jkc->ikc", self._A[part], U)
        b = self._b[part].T[..., None]
        value = np.sum(U * (product / 2 - b)) + np.sum(self._c[part]) / 2
        return float(value), product - b

    def inner(self, U: np.ndarray, weight: Any) -> tuple[float, np.ndarray]:
        """Return the training loss and its gradient."""
        return self._value(0, U)

    def at(self, U: np.ndarray, weight: Any) -> At:
        """Return what a hypergradient needs."""
        return At(
            self._value(0, U)[1],
            lambda V: np.einsum("kij,jkc->ikc", self._A[0], V),
            *self._value(1, U),
            lambda q: np.zeros(0),
        )

    def hessian(self, U: np.ndarray, weight: Any) -> np.ndarray:
        """Return the mean of the Hessians."""
        return self._A[0].mean(axis=0)
