"""A penalty for each feature or class, learned by hypergradient, beside scikit-learn's estimators.

Handwritten digits, pixels from 0 to 1, and 20 000 examples of 500 features of which 20 tell the two
classes apart; as a regression, as many of which 20 matter, and noise. A quarter is held out. All
choose by five folds, logistic regressions by their log loss. Seconds are those of the process, on
one thread.
"""

from __future__ import annotations

import time
import warnings
from typing import Any

import numpy as np
from sklearn.datasets import load_digits, make_classification, make_regression
from sklearn.linear_model import ElasticNetCV, LogisticRegressionCV, RidgeCV
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split

from benchmarks.harness.experiment import QUICK, WORKERS, Option, Run, experiment, seeds
from benchmarks.harness.processes import Found
from benchmarks.harness.report import spread, table
from lowrank_inverse.sklearn import GroupLogisticRegressionCV, GroupRidgeCV

INFORMATIVE = 20
OURS = ["ours, all", "ours, features", "ours, features, no prior"]
CLASSIFIERS = ["LogisticRegressionCV", *OURS, "ours, classes"]
REGRESSIONS = ["RidgeCV", "ElasticNetCV", *OURS]


def examples(data: str, size: list[int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return features and targets."""
    n, d = size
    if data == "digits":
        X, y = load_digits(return_X_y=True)
        return X / 16, y
    informative = min(INFORMATIVE, d)
    if data == "synthetic":
        more = {"n_redundant": 0, "class_sep": 0.5}
        return make_classification(n, d, n_informative=informative, random_state=seed, **more)
    return make_regression(n, d, n_informative=informative, noise=300.0, random_state=seed)


def model(name: str, regression: bool) -> Any:
    """Return an estimator as it comes, but for the criterion of LogisticRegressionCV."""
    if name.startswith("ours"):
        groups, *free = name.removeprefix("ours, ").split(", ")
        spread = {"spread": np.inf} if free else {}
        return (GroupRidgeCV if regression else GroupLogisticRegressionCV)(groups, **spread)
    if name == "LogisticRegressionCV":
        return LogisticRegressionCV(scoring="neg_log_loss", max_iter=1000)
    return RidgeCV(np.logspace(-3, 6, 10), cv=5) if name == "RidgeCV" else ElasticNetCV()


def fit(name: str, data: str, size: list[int], seed: int) -> Found:
    """Fit, and predict what is held out."""
    X, y = examples(data, size, seed)
    regression = data == "regression"
    parts = train_test_split(
        X, y, test_size=0.25, random_state=seed, stratify=None if regression else y
    )
    train_x, test_x, train_y, test_y = parts
    estimator, begin = model(name, regression), time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scikit-learn: new defaults to come
        estimator.fit(train_x, train_y)
    seconds = time.process_time() - begin
    if regression:
        loss = float(np.mean((estimator.predict(test_x) - test_y) ** 2) / np.var(test_y))
        return {"loss": loss, "seconds": seconds, "score": 1 - loss}
    p = estimator.predict_proba(test_x)
    accuracy = float(np.mean(estimator.classes_[p.argmax(axis=1)] == test_y))
    return {"loss": float(log_loss(test_y, p)), "seconds": seconds, "score": accuracy}


@experiment(
    *("penalties", __doc__, seeds(5, quick=1), QUICK, WORKERS),
    Option("examples", 20_000, "of the synthetic sets", least=100, quick=400),
    Option("features", 500, "of the synthetic sets", least=2, quick=30),
    packages=("scikit-learn", "numpy", "scipy"),
)
def main(run: Run) -> None:
    options = run.options
    size = [options.examples, options.features]
    cells = {
        (data, name): {"name": name, "data": data, "size": size}
        for data in ("digits", "synthetic", "regression")
        for name in (REGRESSIONS if data == "regression" else CLASSIFIERS)
        if (data, name) != ("synthetic", "ours, classes")  # of two classes there is one
    }
    found = run.repeated(fit, cells, apart=not options.quick)
    rows = [
        {
            "data": data,
            "estimator": name,
            "held-out loss": spread([r["loss"] for r in results], ".4f"),
            "accuracy or R²": spread([r["score"] for r in results]),
            "seconds": f"{np.mean([r['seconds'] for r in results]):.1f}",
        }
        for (data, name), results in found.items()
    ]
    run.publish(
        table(rows),
        "Log loss, and for the regression the squared error over the variance: mean ± standard "
        "deviation.\nOurs, by what has a penalty of its own.",
        runs={f"{data}, {name}": results for (data, name), results in found.items()},
    )
