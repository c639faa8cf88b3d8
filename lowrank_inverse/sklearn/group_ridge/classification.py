"""Logistic regression with a penalty for each group of coefficients."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import expit, softmax
from sklearn.base import ClassifierMixin
from sklearn.preprocessing import LabelEncoder
from sklearn.utils.multiclass import check_classification_targets

from lowrank_inverse._typing import ArrayLike, MatrixLike
from lowrank_inverse.sklearn.group_ridge.base import GroupRidge
from lowrank_inverse.sklearn.group_ridge.design import Design
from lowrank_inverse.sklearn.group_ridge.losses import Logistic, Loss, Softmax
from lowrank_inverse.sklearn.group_ridge.models import Rows


class GroupLogisticRegressionCV(ClassifierMixin, GroupRidge):
    """Logistic regression with a penalty for each feature, class or group, chosen by validation.

    Minimises ``sum_i s_i * loss_i + sum(alpha_ * coef_**2) / 2`` with the log loss of two classes
    or of the softmax, like ``sklearn.linear_model.LogisticRegression(C=1 / alpha)`` for one
    penalty. The penalties minimise the log loss of cross-validation, by L-BFGS-B over their
    logarithms [1]_. The start is the best common penalty, as ``LogisticRegressionCV`` would find it
    on a fine grid.

    Parameters
    ----------
    groups : {"features", "classes", "coefficients", "all"} or array, shape (d,)
        One penalty per feature, class or coefficient, one for all, or one for each label in the
        array, shared by the features that have it.
    cv : int, splitter of scikit-learn, or iterable of (train, validation) indices
        Default: five stratified folds without shuffling. For a single split use
        ``StratifiedShuffleSplit(1, test_size=0.2)``.
    learn_weights : {None, "classes", "examples"}
        Also learn weights of classes or examples in the fits. Weights of examples identify wrong
        labels, if `cv` is one split with correct labels in the validation set.
    bounds, spread, fit_intercept, tol, max_iter
        See :class:`GroupRidgeCV`. Learned weights count as penalties.

    Attributes
    ----------
    classes_ : ndarray, shape (C,)
        The class labels.
    coef_ : ndarray, shape (1, d) or (C, d)
        Coefficients, fitted to all examples, including those of the validation sets.
    intercept_ : ndarray, shape (1,) or (C,)
        Intercepts of that fit.
    alpha_ : ndarray
        Penalties: shape (d,), (C,), that of `coef_`, or one per sorted label. Two classes have one
        penalty.
    weights_ : ndarray, shape (C,) or (n,)
        With `learn_weights`: factors from 1e-3 to 1, multiplied by `sample_weight`.
    history_, n_iter_, num_at_bounds_, reason_
        See :class:`GroupRidgeCV`.

    Notes
    -----
    A step takes two products with `X` for all folds and classes together. Up to 1500 coefficients,
    one Hessian preconditions all folds; it is updated when this pays. For scaling and sparse `X`
    see :class:`GroupRidgeCV`.

    References
    ----------
    .. [1] F. Pedregosa. Hyperparameter Optimization with Approximate Gradient. ICML 2016.

    Examples
    --------
    >>> from sklearn.datasets import make_classification
    >>> from lowrank_inverse.sklearn import GroupLogisticRegressionCV
    >>> X, y = make_classification(
    ...     600, 40, n_informative=3, n_redundant=0, random_state=2
    ... )
    >>> model = GroupLogisticRegressionCV().fit(X[:400], y[:400])
    >>> print(f"{model.score(X[400:], y[400:]):.2f}")
    0.90
    """

    _names = ("features", "classes", "coefficients", "all")

    def __init__(
        self,
        groups: Any = "features",
        *,
        cv: Any = None,
        learn_weights: str | None = None,
        bounds: tuple[float, float] = (1e-2, 1e4),
        spread: float = 0.5,
        fit_intercept: bool = True,
        tol: float = 0.1,
        max_iter: int = 100,
    ) -> None:
        self.groups = groups
        self.cv = cv
        self.learn_weights = learn_weights
        self.bounds = bounds
        self.spread = spread
        self.fit_intercept = fit_intercept
        self.tol = tol
        self.max_iter = max_iter

    def fit(
        self, X: MatrixLike, y: ArrayLike, sample_weight: ArrayLike | None = None
    ) -> GroupLogisticRegressionCV:
        """Fit to features `X` (n, d), dense or sparse, and labels `y` (n,).

        The weights, shape (n,), multiply the losses of fits and validation.
        """
        X, y = self._validated(X, y)
        check_classification_targets(y)
        encoder = LabelEncoder()
        labels = encoder.fit_transform(y)
        self.classes_, C = encoder.classes_, len(encoder.classes_)
        if C < 2:
            raise ValueError(f"`y` must have at least two classes; got one class, {y[0]!r}.")
        kinds = {None: None, "classes": labels, "examples": np.arange(len(labels))}
        if self.learn_weights not in kinds:
            raise ValueError(
                "`learn_weights` must be None, 'classes' or 'examples'; got "
                f"{self.learn_weights!r}."
            )
        examples = kinds[self.learn_weights]
        weight, num_outputs = self._weight(X, sample_weight), 1 if C == 2 else C
        index = self._index(X.shape[1], num_outputs)
        split, everything = self._splits(X, labels, weight, classifier=True)
        for c, name in enumerate(self.classes_):
            (missing,) = np.nonzero(split.share[labels == c] @ split.train[labels == c] == 0)
            if missing.size:
                raise ValueError(
                    f"`cv` must leave every class in every training set; that of split "
                    f"{missing[0]} has none of class {name!r}, or of weight 0. Use fewer splits, "
                    "stratified ones, or remove the class."
                )
        design, share = Design(X, weight, self.fit_intercept), np.bincount(labels, split.share, C)

        def loss(rows: np.ndarray) -> Loss:
            return (Logistic if C == 2 else Softmax)(labels[rows], share)

        model, whole = (Rows(design, loss, num_outputs, part) for part in (split, everything))
        coefficients, intercept, weights = self._learn(
            model, whole, design, index, weight.sum(), examples
        )
        if isinstance(self.groups, str) and self.groups == "coefficients":
            self.alpha_ = self.alpha_.reshape(-1, num_outputs).T
        if examples is not None:
            self.weights_ = weights
        self.coef_, self.intercept_ = coefficients.T.astype(X.dtype), intercept.astype(X.dtype)
        return self

    def decision_function(self, X: MatrixLike) -> np.ndarray:
        """Return the scores for features `X`: log-odds (n,) for two classes, or (n, C)."""
        scores = self._scores(X)
        return scores[:, 0] if len(self.classes_) == 2 else scores

    def predict_proba(self, X: MatrixLike) -> np.ndarray:
        """Return the probabilities of the classes, shape (n, C)."""
        scores = self.decision_function(X)
        if scores.ndim == 1:
            return np.stack([expit(-scores), expit(scores)], axis=1)
        return softmax(scores, axis=1)

    def predict(self, X: MatrixLike) -> np.ndarray:
        """Return the most probable class of each row, shape (n,)."""
        scores = self.decision_function(X)
        best = (scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(axis=1)
        return self.classes_[best]
