"""Data hyper-cleaning on scikit-learn's digits: the problem, its inner minimum, its optimizer.

Half of the training labels are replaced by random ones. Every training example has a weight,
``sigmoid(w_i)``; the inner problem fits a softmax regression to the weighted training set, the
outer one lowers the loss on clean validation data.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import minimize

from benchmarks.data.digits import shuffled, with_ones

NUM_TRAIN, NUM_VALIDATION, NUM_CLASSES = 1000, 300, 10
CORRUPTED = 0.5
RIDGE = 1e-3
LEARNING_RATE = 0.2


class Problem(NamedTuple):
    """Digits, of whose training labels half are wrong."""

    train_x: np.ndarray
    train_y: np.ndarray
    corrupted: np.ndarray
    validation_x: np.ndarray
    validation_y: np.ndarray
    test_x: np.ndarray
    test_y: np.ndarray


def load_problem(seed: int) -> Problem:
    """Split the digits and replace half of the training labels."""
    rng = np.random.default_rng(seed)
    x, y = shuffled(rng)
    x = with_ones(x)
    corrupted = np.zeros(NUM_TRAIN, dtype=bool)
    corrupted[rng.choice(NUM_TRAIN, int(CORRUPTED * NUM_TRAIN), replace=False)] = True
    noisy = y[:NUM_TRAIN].copy()
    noisy[corrupted] = (noisy[corrupted] + rng.integers(1, NUM_CLASSES, corrupted.sum())) % 10
    stop = NUM_TRAIN + NUM_VALIDATION
    return Problem(
        x[:NUM_TRAIN], noisy, corrupted, x[NUM_TRAIN:stop], y[NUM_TRAIN:stop], x[stop:], y[stop:]
    )


def load_backend(name: str, problem: Problem) -> Any:
    """Return the losses and hypergradients of the problem in one framework."""
    if name == "jax":
        from benchmarks.bilevel.cleaning_jax import JaxCleaning

        return JaxCleaning(problem, RIDGE)
    from benchmarks.bilevel.cleaning_torch import TorchCleaning

    return TorchCleaning(problem, RIDGE)


def fit(cleaning: Any, w: np.ndarray, theta: np.ndarray | None = None) -> np.ndarray:
    """Minimise the inner problem, ridge included, from `theta` or from zero."""
    if theta is None:
        theta = np.zeros((cleaning.num_features, NUM_CLASSES))

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = cleaning.inner(flat.reshape(theta.shape), w)
        return value + 0.5 * RIDGE * flat @ flat, gradient.reshape(-1) + RIDGE * flat

    options = {"maxiter": 1000, "maxcor": 20, "gtol": 1e-5, "ftol": 0.0}
    found = minimize(objective, theta.reshape(-1), jac=True, method="L-BFGS-B", options=options)
    return found.x.reshape(theta.shape)


class Adam:
    """The optimizer of the outer problem (Kingma and Ba, 2015), for either framework."""

    def __init__(self, size: int) -> None:
        self.mean, self.square, self.count = np.zeros(size), np.zeros(size), 0

    def step(self, gradient: np.ndarray) -> np.ndarray:
        """Return what to subtract."""
        self.count += 1
        self.mean += 0.1 * (gradient - self.mean)
        self.square += 0.001 * (gradient**2 - self.square)
        mean, square = self.mean / (1 - 0.9**self.count), self.square / (1 - 0.999**self.count)
        return LEARNING_RATE * mean / (np.sqrt(square) + 1e-8)
