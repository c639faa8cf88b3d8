"""Ridge regression with a penalty for each group of features."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import RegressorMixin

from lowrank_inverse._typing import ArrayLike, MatrixLike
from lowrank_inverse.sklearn.group_ridge.base import GroupRidge
from lowrank_inverse.sklearn.group_ridge.design import Design
from lowrank_inverse.sklearn.group_ridge.losses import Squared
from lowrank_inverse.sklearn.group_ridge.models import Gram, Model, Rows, Split

MAX_GRAM = 1500
"""Features up to which the matrices of their inner products are formed."""


class GroupRidgeCV(RegressorMixin, GroupRidge):
    """Ridge regression with a penalty for each feature or group, chosen by validation.

    Minimises ``sum_i s_i (y_i - x_i @ w - b)**2 + sum_j alpha_[group of j] * w_j**2``, like
    ``sklearn.linear_model.Ridge`` for one penalty. The penalties minimise the error of
    cross-validation, by L-BFGS-B over their logarithms [1]_, [2]_. The start is the best common
    penalty, as ``RidgeCV`` would find it.

    Parameters
    ----------
    groups : {"features", "all"} or array, shape (d,)
        One penalty per feature, one for all, or one for each label in the array, shared by the
        features that have it.
    cv : int, splitter of scikit-learn, or iterable of (train, validation) indices
        Default: five folds without shuffling. For a single split use
        ``ShuffleSplit(1, test_size=0.2)``.
    bounds : pair of float
        Smallest and largest penalty, relative to the best common one.
    spread : float
        Prior standard deviation of the logarithms of the penalties about the common one. Their
        normal log-density is added to the log-likelihood of the validation sets. It keeps the
        penalties near the common one where few examples cannot tell them apart. ``inf``: no prior.
    fit_intercept : bool
        Add a constant, without a penalty.
    tol : float
        Stop when the norm of the gradient with respect to the logarithms has fallen by this factor.
    max_iter : int
        Maximum number of evaluations of the gradient.

    Attributes
    ----------
    coef_ : ndarray, shape (d,)
        Coefficients, fitted to all examples, including those of the validation sets.
    intercept_ : float
        Intercept of that fit.
    alpha_ : ndarray, shape (number of groups,)
        Penalties of the features, or of the groups by sorted label.
    history_ : tuple of Evaluation
        Validation loss, including the prior, gradient norm and cost of each evaluation; see
        :class:`lowrank_inverse.bilevel.minimum.Evaluation`. The common penalty comes first.
    n_iter_ : int
        Number of evaluations.
    num_at_bounds_ : int
        Number of penalties at a bound.
    reason_ : str
        Why it ended: ``"converged"``, ``"flat"``, ``"max_evaluations"``, ….

    Notes
    -----
    Standardise features of different units, as for any ridge. A sparse `X` stays sparse, and
    centring is applied to its products. Up to 1500 features, if n exceeds d, all computations use
    Gram matrices: ``n d**2`` operations once, and ``cv * d**2`` per step. Otherwise a step takes
    two products with `X`.

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
    0.67
    """

    _names = ("features", "all")

    def __init__(
        self,
        groups: Any = "features",
        *,
        cv: Any = None,
        bounds: tuple[float, float] = (1e-2, 1e4),
        spread: float = 0.5,
        fit_intercept: bool = True,
        tol: float = 0.1,
        max_iter: int = 100,
    ) -> None:
        self.groups = groups
        self.cv = cv
        self.bounds = bounds
        self.spread = spread
        self.fit_intercept = fit_intercept
        self.tol = tol
        self.max_iter = max_iter

    def fit(
        self, X: MatrixLike, y: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> GroupRidgeCV:
        """Fit to features `X` (n, d), dense or sparse, and targets `y` (n,).

        The weights, shape (n,), multiply the errors of fits and validation.
        """
        X, y = self._validated(X, y, y_numeric=True)
        weight, y = self._weight(X, sample_weight), y.astype(np.float64)
        index = self._index(X.shape[1], 1)
        split, everything = self._splits(X, y, weight, classifier=False)
        mean = split.share @ y if self.fit_intercept else 0.0
        scale = float(np.sqrt(split.share @ (y - mean) ** 2)) or 1.0
        design, y = Design(X, weight, self.fit_intercept), (y - mean) / scale
        form = Gram if design.shape[1] <= min(len(y), MAX_GRAM) else _rows
        models = form(design, y, split), form(design, y, everything)
        coefficients, intercept, _ = self._learn(*models, design, index, weight.sum())
        self.coef_ = (scale * coefficients[:, 0]).astype(X.dtype)
        self.intercept_ = X.dtype.type(mean + scale * intercept[0])
        return self

    def predict(self, X: MatrixLike) -> np.ndarray:
        """Return the regression function at features `X` (n, d), shape (n,)."""
        return self._scores(X)

    def _variance(self, loss: float) -> float:
        return 2 * loss


def _rows(design: Design, y: np.ndarray, split: Split) -> Model:
    return Rows(design, lambda rows: Squared(y[rows]), 1, split)
