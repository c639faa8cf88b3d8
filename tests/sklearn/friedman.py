"""The regression problem of the tests of estimators."""

from __future__ import annotations

import numpy as np
from sklearn.datasets import make_friedman1

SCALE = 1.5
X, Y = make_friedman1(200, n_features=6, noise=0.1, random_state=0)
TARGETS = np.stack([Y, X[:, 0] ** 2], axis=1)
NEW = X[::7] + 0.01
WEIGHTS = np.random.default_rng(0).integers(0, 4, len(X)).astype(float)
