"""The common base of the estimators with group penalties."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import check_cv
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from lowrank_inverse._typing import ArrayLike, MatrixLike
from lowrank_inverse.arrays.checks import check_count, check_scalar
from lowrank_inverse.bilevel.evaluation import Evaluator
from lowrank_inverse.bilevel.minimization import minimize
from lowrank_inverse.bilevel.minimum import REMEDIES, BilevelMinimum
from lowrank_inverse.sklearn.group_ridge.design import Design
from lowrank_inverse.sklearn.group_ridge.models import Model, Split
from lowrank_inverse.sklearn.group_ridge.problem import Groups, Problem

FLOATS = [np.float64, np.float32]
START = 1e-2
"""Penalty where it begins, relative to the unit."""
LIMITS = 1e-8, 1e4
"""Of one factor for all penalties, relative to the unit."""
TIED = 20
"""Evaluations of one factor for all penalties, at most."""
LEAST_WEIGHT = 1e-3
"""Of an example, where weights are learned; the largest is 1."""
INNER_STEPS = 500
REFIT = 1e-8
"""By which the gradient of the last fit falls, from that of no coefficients."""
UNSOLVED = (
    "Fits of more coefficients than examples are hard with hardly a penalty: take fewer features, "
    "raise the lower of `bounds`, or give `X` in float64."
)


class GroupRidge(BaseEstimator):
    """The common base of the estimators with group penalties."""

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def _validated(self, X: MatrixLike, *y: Any, **options: Any) -> Any:
        return validate_data(self, X, *y, accept_sparse="csr", dtype=FLOATS, **options)

    def _weight(self, X: MatrixLike, sample_weight: ArrayLike | None) -> np.ndarray:
        weight = _check_sample_weight(sample_weight, X, dtype=X.dtype, ensure_non_negative=True)
        return weight.astype(np.float64)

    def _splits(
        self, X: MatrixLike, y: np.ndarray, weight: np.ndarray, *, classifier: bool
    ) -> tuple[Split, Split]:
        """Return the examples of each fit and its validation, and all in one fit."""
        pairs = list(check_cv(self.cv, y, classifier=classifier).split(X, y))
        train, validate = np.zeros((2, len(y), len(pairs)))
        for k, (first, second) in enumerate(pairs):
            np.add.at(train[:, k], first, 1)
            np.add.at(validate[:, k], second, 1)
        share = weight / weight.sum()
        for name, part in (("training", train), ("validation", validate)):
            (empty,) = np.nonzero(share @ part == 0)
            if empty.size:
                raise ValueError(
                    f"`cv` must leave examples of positive weight in every {name} set; that of "
                    f"split {empty[0]} has none. Use fewer splits, or others."
                )
        whole = Split(share, np.ones((len(y), 1)), np.zeros((len(y), 1)))
        return Split(share, train, validate / np.sum(share @ validate)), whole

    def _index(self, d: int, C: int) -> np.ndarray:
        """Return the group of each coefficient, shape (d, C)."""
        names = {
            "all": np.zeros((d, C), int),
            "features": np.repeat(np.arange(d)[:, None], C, axis=1),
            "classes": np.repeat(np.arange(C)[None], d, axis=0),
            "coefficients": np.arange(d * C).reshape(d, C),
        }
        if isinstance(self.groups, str) and self.groups in self._names:
            return names[self.groups]
        labels = np.asarray(self.groups)
        if labels.shape != (d,):
            given = repr(self.groups) if isinstance(self.groups, str) else f"shape {labels.shape}"
            raise ValueError(
                f"`groups` must be one of {', '.join(map(repr, self._names))}, or a label for each "
                f"feature, shape ({d},); got {given}."
            )
        return np.repeat(np.unique(labels, return_inverse=True)[1].reshape(-1, 1), C, axis=1)

    def _learn(
        self,
        model: Model,
        whole: Model,
        design: Design,
        index: np.ndarray,
        total: float,
        examples: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Learn the penalties, and fit to all examples with them.

        Parameters
        ----------
        model, whole : Model
            Of the splits, and of all examples.
        design : Design
        index : array of int, shape (d, C)
            Group of each coefficient.
        total : float
            The sum of the weights.
        examples : array of int, shape (n,), optional
            Groups of examples whose weights are learned.

        Returns
        -------
        coefficients, intercept, weights : arrays, shape (d, C), (C,) and (number of weights,)
        """
        check_scalar("tol", self.tol)
        if not self.spread > 0:
            raise ValueError(f"`spread` must be > 0, or inf for no prior; got {self.spread!r}.")
        most = check_count("max_iter", self.max_iter)
        low, high = _logarithms(self.bounds)
        d, (p, _, C) = len(design.square), model.shape
        square = design.square[:, None]
        num_penalties = int(index.max()) + 1
        unit = float(np.exp(np.log(square[square > 0]).mean())) if square.any() else 1.0
        rows = ((0, p - d), (0, 0))  # of the intercept
        groups = Groups(
            np.pad(np.repeat(unit / np.where(square > 0, square, unit), C, axis=1), rows),
            np.pad(index, rows),
            None if examples is None else examples + num_penalties,
        )
        tied = groups._replace(penalty=np.zeros_like(groups.penalty), examples=None)
        problem = Problem(model, tied, np.full(1, np.log(START)))
        more = num_penalties > 1 or examples is not None
        found = _minimum(problem, np.log(LIMITS), self.tol, min(TIED, most) if more else most)
        history, common, U = found.history, found.hparams[0], found.params
        weights = np.zeros(0 if examples is None else int(examples.max()) + 1)
        phi = np.append(np.full(num_penalties, common), weights)
        lower = np.append(phi[:num_penalties] + low, weights + np.log(LEAST_WEIGHT))
        upper = np.append(phi[:num_penalties] + high, weights)
        if more and np.isfinite(found.value):
            strength = self._variance(found.value) / (total * self.spread**2)
            prior = np.append(np.full(num_penalties, strength), np.zeros_like(weights))
            problem = Problem(model, groups, phi, U, problem, prior)
            found = _minimum(problem, (lower, upper), self.tol, most)
            history += found.history
            phi, U = found.hparams, found.params
        if not (found.converged or found.reason == "flat"):
            remedy = "Raise `max_iter` or `tol`, scale the features, or narrow `bounds`."
            remedy = UNSOLVED if found.reason == "inner_unsolved" else remedy
            why = f"{REMEDIES[found.reason][0]}. {remedy}"
            warnings.warn(why, ConvergenceWarning, stacklevel=3)
        self.history_, self.n_iter_, self.reason_ = history, len(history), found.reason
        self.alpha_ = total * unit * np.exp(phi[:num_penalties])
        self.num_at_bounds_ = int(np.sum(((phi <= lower) | (phi >= upper))[:num_penalties]))
        U, solved = _fitted(Problem(whole, groups, phi, U.mean(axis=1, keepdims=True), problem))
        if not solved:
            why = f"the last fit did not end within {INNER_STEPS} steps. {UNSOLVED}"
            warnings.warn(why, ConvergenceWarning, stacklevel=3)
        return *design.original(U[:, 0]), np.exp(phi[num_penalties:])

    def _variance(self, loss: float) -> float:
        """Return by what a loss is to be divided to be minus the logarithm of a likelihood."""
        return 1.0

    def _scores(self, X: MatrixLike) -> np.ndarray:
        check_is_fitted(self)
        X = self._validated(X, reset=False)
        return X @ self.coef_.T + self.intercept_


def _minimum(problem: Problem, bounds: Any, tol: float, most: int) -> BilevelMinimum:
    return minimize(
        problem,
        inner=None,
        outer=None,
        bounds=tuple(np.zeros_like(problem.hparams) + side for side in bounds),
        tol=tol,
        max_evaluations=most,
        inner_steps=INNER_STEPS,
        callback=None,
        progress=False,
        checkpoint=None,
        seed=0,
    )


def _fitted(problem: Problem) -> tuple[np.ndarray, bool]:
    """Return the coefficients of the fits, shape (p, K, C), and whether they are a minimum."""
    theta, phi = problem.params, problem.hparams
    evaluator = Evaluator(problem, None, INNER_STEPS, 0)
    evaluator.curvature = 1.0  # by the scaling of the parameters
    wanted = REFIT * float(np.linalg.norm(problem.inner(np.zeros_like(theta), phi)[1]))
    _, theta, _, solved = evaluator.minimised(theta, phi, wanted)
    return problem.coefficients(theta, phi), solved


def _logarithms(bounds: Any) -> tuple[float, float]:
    low, high = bounds
    for bound in (low, high):
        check_scalar("bounds", bound, positive=True)
    if not low < high:
        raise ValueError(f"`bounds` must be a smaller and a larger penalty; got {bounds!r}.")
    return float(np.log(low)), float(np.log(high))
