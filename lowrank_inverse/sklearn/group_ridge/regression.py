"""Ridge regression with a penalty for each group of features."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import RegressorMixin

from lowrank_inverse.sklearn.group_ridge.base import GroupRidge
from lowrank_inverse.sklearn.group_ridge.design import Design
from lowrank_inverse.sklearn.group_ridge.losses import Squared
from lowrank_inverse.sklearn.group_ridge.models import Gram, Model, Rows, Split

MAX_GRAM = 1500
"""Features up to which the matrices of their inner products are formed."""


class GroupRidgeCV(RegressorMixin, GroupRidge):
    """Ridge regression with a penalty for each feature or group, learned by validation.

    Minimises ``sum_i s_i (y_i - x_i @ w - b)**2 + sum_j alpha_[group of j] * w_j**2``, as
    ``sklearn.linear_model.Ridge`` does for one penalty, with the penalties that lower the error
    of cross-validation: by L-BFGS-B on its gradient by the logarithms of the penalties [1]_, from
    the best common penalty, which ``RidgeCV`` would take.

    Parameters
    ----------
    groups : {"features", "all"} or array, shape (d,)
        Features that share a penalty: each has its own, all have one, or those of equal labels.
    cv : int, splitter of scikit-learn, or iterable of (train, validation) indices
        Five folds by default, without shuffling. One split is ``ShuffleSplit(1, test_size=0.2)``.
    bounds : pair of float
        Least and largest penalty, over the best common one.
    early_stopping : bool or "auto"
        Keep the last validation set out of the folds, and take the penalties by which it is
        predicted best; end after three evaluations without a better one. Many penalties fit the
        noise of the folds without. "auto": if there are more penalties than one for each 100
        examples, and three splits or more.
    fit_intercept : bool
        Add a constant, which has no penalty.
    tol : float
        It ends when the norm of the gradient by the logarithms has fallen by this factor.
    max_iter : int
        Evaluations of the gradient, at most.

    Attributes
    ----------
    coef_ : ndarray, shape (d,)
    intercept_ : float
        Those of all examples, the ones set aside included.
    alpha_ : ndarray, shape (number of groups,)
        Penalties of the features or of the groups, by sorted label.
    history_ : tuple of Evaluation
        Validation loss and gradient norm of each evaluation, and what it cost; see
        :class:`lowrank_inverse.bilevel.minimum.Evaluation`. The common penalty comes first.
    n_iter_ : int
        Evaluations.
    num_at_bounds_ : int
        Penalties at a bound.
    reason_ : str
        Why it ended: ``"converged"``, ``"callback"`` (early stopping), ``"max_evaluations"``, ….

    Notes
    -----
    Standardise features of different units, as for any ridge. A sparse `X` is never dense, nor
    centred but in what it is multiplied by; products with up to 1500 features are dense. With
    these and n of more than d, all is done on matrices of inner products: ``n d**2`` operations
    once, and ``cv * d**2`` for a step. Else a step takes two products with `X`.

    References
    ----------
    .. [1] F. Pedregosa. Hyperparameter Optimization with Approximate Gradient. ICML 2016.
    .. [2] M. A. van de Wiel, M. M. van Nee, A. Rauschenberger. Fast Cross-Validation for
       Multi-Penalty High-Dimensional Ridge Regression. J. Comput. Graph. Stat. 30, 2021.

    Examples
    --------
    >>> from sklearn.datasets import make_regression
    >>> from lowrank_inverse.sklearn import GroupRidgeCV
    >>> X, y = make_regression(300, 50, n_informative=5, noise=50.0, random_state=0)
    >>> model = GroupRidgeCV().fit(X[:200], y[:200])
    >>> print(f"{model.score(X[200:], y[200:]):.2f}")
    0.70
    """

    _names = ("features", "all")

    def __init__(
        self,
        groups: Any = "features",
        *,
        cv: Any = None,
        bounds: tuple[float, float] = (1e-2, 1e4),
        early_stopping: Any = "auto",
        fit_intercept: bool = True,
        tol: float = 1e-2,
        max_iter: int = 100,
    ) -> None:
        self.groups = groups
        self.cv = cv
        self.bounds = bounds
        self.early_stopping = early_stopping
        self.fit_intercept = fit_intercept
        self.tol = tol
        self.max_iter = max_iter

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> GroupRidgeCV:
        """Fit to features `X` (n, d), dense or sparse, and targets `y` (n,).

        Weights, shape (n,), weigh the errors of fits and validation.
        """
        X, y = self._validated(X, y, y_numeric=True)
        weight, y = self._weight(X, sample_weight), y.astype(np.float64)
        index = self._index(X.shape[1], 1)
        split, everything = self._splits(X, y, weight, index.max() + 1, classifier=False)
        mean = split.share @ y if self.fit_intercept else 0.0
        scale = float(np.sqrt(split.share @ (y - mean) ** 2)) or 1.0
        design, y = Design(X, weight, self.fit_intercept), (y - mean) / scale
        form = Gram if design.shape[1] <= min(len(y), MAX_GRAM) else _rows
        models = form(design, y, split), form(design, y, everything)
        coefficients, intercept, _ = self._learn(*models, design, index, weight.sum())
        self.coef_ = (scale * coefficients[:, 0]).astype(X.dtype)
        self.intercept_ = X.dtype.type(mean + scale * intercept[0])
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Return the regression function at features `X`, shape (n, d) to (n,)."""
        return self._scores(X)


def _rows(design: Design, y: np.ndarray, split: Split) -> Model:
    return Rows(design, lambda rows: Squared(y[rows]), 1, split)
