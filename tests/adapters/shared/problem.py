"""A small network with weighted examples, and Eq. (3) written out with dense derivatives."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from tests.adapters.shared.frameworks import Framework, Tree, flat, mapped, rebuilt
from tests.oracles import gradient, jacobian

NUM_EXAMPLES, NUM_FEATURES, NUM_HIDDEN, NUM_OUTPUTS = 6, 3, 2, 2
N = NUM_HIDDEN * (NUM_FEATURES + 1) + NUM_OUTPUTS * (NUM_HIDDEN + 1)
DECAY = 0.5


def forward(params: Tree, x: Any) -> Any:
    """Apply a network of one hidden layer."""
    weight, bias = params["out"]
    hidden = params["hidden"]
    xp = array_namespace(weight)
    return xp.tanh(x @ hidden["weight"] + hidden["bias"]) @ weight + bias


def sigmoid(x: Any) -> Any:
    return 1 / (1 + array_namespace(x).exp(-x))


def data_term(params: Tree, hparams: Tree, x: Any, y: Any) -> Any:
    """Return the mean of squared errors, each with its weight."""
    outputs = forward(params, x)
    xp = array_namespace(outputs)
    return xp.mean(sigmoid(hparams["weights"]) * xp.sum((outputs - y) ** 2, axis=1))


def squares(params: Tree) -> Any:
    """Return half the sum of squares of the parameters of the network."""
    hidden, (weight, bias) = params["hidden"], params["out"]
    xp = array_namespace(weight)
    return 0.5 * sum(xp.sum(leaf**2) for leaf in (hidden["bias"], hidden["weight"], weight, bias))


def decay_of(hparams: Tree) -> Any:
    """Return the coefficient of the term that the data term leaves out."""
    return array_namespace(hparams["log_decay"]).exp(hparams["log_decay"])


def inner(params: Tree, hparams: Tree, x: Any, y: Any) -> Any:
    """Add a weight decay to the data term: the hyperparameters are example weights and decay."""
    return data_term(params, hparams, x, y) + decay_of(hparams) * squares(params)


def outer(params: Tree, hparams: Tree, x: Any, y: Any) -> Any:
    """Return an error on other data, and a term of the hyperparameters themselves."""
    xp = array_namespace(hparams["weights"])
    return xp.mean((forward(params, x) - y) ** 2) + 0.05 * xp.sum(hparams["weights"] ** 2)


@functools.cache
def numbers() -> dict[str, Any]:
    """Return all numbers of the problem, which float32 holds without rounding."""
    rng = np.random.default_rng(3)

    def single(x: Any) -> np.ndarray:
        return np.asarray(x, np.float32).astype(np.float64)

    def draw(*shape: int) -> np.ndarray:
        return single(rng.standard_normal(shape))

    params = {
        "hidden": {"bias": draw(NUM_HIDDEN), "weight": draw(NUM_FEATURES, NUM_HIDDEN)},
        "out": (draw(NUM_HIDDEN, NUM_OUTPUTS), draw(NUM_OUTPUTS)),
    }
    x = draw(NUM_EXAMPLES, NUM_FEATURES)
    # Near a fit, where the Hessian is nearly that of Gauss-Newton.
    y = single(forward(params, x) + 0.1 * draw(NUM_EXAMPLES, NUM_OUTPUTS))
    hparams = {"log_decay": single(np.log(DECAY)), "weights": single(np.linspace(-1, 1, 6))}
    clean = draw(NUM_EXAMPLES, NUM_FEATURES), draw(NUM_EXAMPLES, NUM_OUTPUTS)
    return {"params": params, "hparams": hparams, "inner": (x, y), "outer": clean}


class Dense(NamedTuple):
    """All that Eq. (3) is made of, in NumPy's float64."""

    hessian: np.ndarray
    mixed: np.ndarray
    inner_grad: np.ndarray
    outer_grad: np.ndarray
    direct: np.ndarray

    def ihvp(self, damping: Any = 0.0) -> np.ndarray:
        """Solve with the damping, a number or one for each parameter, on the diagonal."""
        damped = self.hessian + np.diag(np.broadcast_to(damping, self.outer_grad.shape))
        return np.linalg.solve(damped, self.outer_grad)

    def at(self, q: np.ndarray) -> np.ndarray:
        """Return the hypergradient with `q` in the place of the solution."""
        return self.direct - self.mixed.T @ q


def dense(inner: Any, outer: Any, params: Tree, hparams: Tree) -> Dense:
    """Differentiate two analytic functions of trees of NumPy's arrays."""
    theta, phi = flat(params), flat(hparams)

    def f(t: np.ndarray, p: np.ndarray) -> Any:
        return inner(rebuilt(t, params), rebuilt(p, hparams))

    def g(t: np.ndarray, p: np.ndarray) -> Any:
        return outer(rebuilt(t, params), rebuilt(p, hparams))

    def slope(t: np.ndarray, p: np.ndarray) -> np.ndarray:
        return gradient(lambda s: f(s, p), t)

    return Dense(
        jacobian(lambda t: slope(t, phi), theta),
        jacobian(lambda p: slope(theta, p), phi),
        slope(theta, phi),
        gradient(lambda t: g(t, phi), theta),
        gradient(lambda p: g(theta, p), phi),
    )


@functools.cache
def oracle() -> Dense:
    """Return the dense derivatives of the problem."""
    n = numbers()
    return dense(
        lambda p, h: inner(p, h, *n["inner"]),
        lambda p, h: outer(p, h, *n["outer"]),
        n["params"],
        n["hparams"],
    )


class Problem:
    """The problem in the arrays of a framework, in one dtype."""

    def __init__(self, framework: Framework, dtype: str = "float64") -> None:
        n = numbers()
        self.framework = framework
        self.params = framework.variables(n["params"], dtype)
        self.hparams = framework.variables(n["hparams"], dtype)
        self.inner_args = mapped(lambda x: framework.array(x, dtype), n["inner"])
        self.outer_args = mapped(lambda x: framework.array(x, dtype), n["outer"])

    def data_term(self, params: Tree, hparams: Tree) -> Any:
        return data_term(params, hparams, *self.inner_args)

    def inner(self, params: Tree, hparams: Tree) -> Any:
        return inner(params, hparams, *self.inner_args)

    def outer(self, params: Tree, hparams: Tree) -> Any:
        return outer(params, hparams, *self.outer_args)

    def loss(self, params: Tree) -> Any:
        """Return the inner loss at these hyperparameters."""
        return self.inner(params, self.hparams)

    def hypergradient(self, **options: Any) -> Any:
        """Call the function under test, with any of its arguments replaced."""
        arguments = {
            "inner": self.inner,
            "outer": self.outer,
            "params": self.params,
            "hparams": self.hparams,
            "rng": 0,
        }
        return self.framework.hypergradient(**{**arguments, **options})
