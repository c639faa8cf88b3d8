"""The outer loss and its gradient with respect to the hyperparameters, to a varying accuracy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from lowrank_inverse.arrays.conversion import to_host
from lowrank_inverse.bilevel.minimum import Evaluation, Stop
from lowrank_inverse.bilevel.quasi_newton import Change, Scaling, lbfgs
from lowrank_inverse.solvers.iterative import CG
from lowrank_inverse.solvers.state import HypergradientState

ACCURACY = 1e-2
"""Newton step to the inner minimum over the norm of the parameters, at the first evaluation."""
LINEAR_ACCURACY = 1e-2
"""Relative residual of the linear system, at the first evaluation."""
FIRST = 1e-3
"""By which the inner gradient falls before its scale is known."""
SUMMABLE = 10.0
"""Evaluations after which tolerances fall as the inverse square, whatever the progress."""
ROUNDING = 100
"""Relative error of a value, in units of the precision."""
LEAST = 1e-8
"""Curvature that is told from none, relative to the largest."""
MAX_STEPS = 200
"""Of conjugate gradients, where the solver is left open."""
ROUNDS = 4
"""Inner solves for one evaluation."""


def tolerant_solver(solver: Any, rtol: Any) -> Any:
    """Return the default where there is no solver: its tolerance is the one that is needed."""
    return CG(max_steps=MAX_STEPS, rtol=rtol) if solver is None else solver


class Differentiated(NamedTuple):
    """The outer loss and its hypergradient at one point."""

    value: float
    gradient: np.ndarray
    inverse_product: np.ndarray
    info: Any
    state: Any
    ridge: float
    """The mean of the coefficients."""


class Problem(Protocol):
    """A bilevel problem in one framework, in flat vectors of NumPy's float64."""

    params: np.ndarray
    hparams: np.ndarray
    eps: float
    """Of the dtype of the parameters."""

    def inner(self, theta: np.ndarray, phi: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the inner loss with its ridge, and the gradient by the parameters."""
        ...

    def differentiate(
        self, theta: np.ndarray, phi: np.ndarray, state: Any, rtol: float
    ) -> Differentiated:
        """Return the outer loss and its hypergradient; the value may be NaN."""
        ...

    def restore(self, theta: np.ndarray, phi: np.ndarray) -> tuple[Any, Any]:
        """Return parameters and hyperparameters as the user has them."""
        ...

    # A problem that knows better variables for its inner minimisations has besides
    # change(phi, gradient), which returns a Change or None.


Train = Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]
"""From parameters and hyperparameters to trained parameters."""


class Stepper(Protocol):
    """An optimizer of a framework."""

    def reset(self) -> None:
        """Forget what it has seen."""
        ...

    def __call__(self, x: np.ndarray, gradient: np.ndarray) -> np.ndarray:
        """Return where a step leads."""
        ...


class Evaluator:
    """Evaluates the outer loss at the inner minimum, starting from the previous inner minimum.

    The error of the inner solve changes the value by ``<q, r>`` to first order, with q the inverse
    product and r the inner gradient. This term is subtracted, which leaves an error of second order
    [2]_. The inner and linear tolerances fall with the outer gradient and are summable [1]_, so the
    errors vanish as the minimum is approached.

    Parameters
    ----------
    problem : Problem
        The bilevel problem.
    train : callable or Stepper, optional
        Its result is taken as the inner minimum. Default: L-BFGS to a tolerance, in variables that
        the pairs of the state precondition.
    inner_steps : int
        Maximum number of steps of L-BFGS or of the stepper.
    seed : int
        Seed of the solver.

    References
    ----------
    .. [1] F. Pedregosa. Hyperparameter Optimization with Approximate Gradient. ICML 2016.
    .. [2] R. Becker, R. Rannacher. An Optimal Control Approach to A Posteriori Error Estimation
       in Finite Element Methods. Acta Numerica, 2001.
    """

    def __init__(
        self, problem: Problem, train: Train | Stepper | None, inner_steps: int, seed: int
    ) -> None:
        self.problem, self._train, self._inner_steps = problem, train, inner_steps
        self._seed = seed
        self.theta, self.state, self.info = problem.params, HypergradientState(), None
        self.phi, self.loss = problem.hparams, np.nan  # where `theta` was found, and the loss there
        self.length = float(np.linalg.norm(self.theta))  # of the parameters, the largest so far
        self.curvature = 0.0  # of the inner loss, along the latest inverse product
        self.ridge = 0.0
        self.progress = 1.0  # of the outer gradient
        self.factor = 1.0  # by which tolerances are tightened beyond that
        self.count = self._gradients = 0

    @property
    def at_floor(self) -> bool:
        """Whether tolerances are as tight as the precision allows."""
        return ACCURACY * self.progress * self.factor <= self._floor

    @property
    def _floor(self) -> float:
        return 10 * self.problem.eps

    def __call__(self, phi: np.ndarray) -> tuple[Evaluation, np.ndarray]:
        """Return the evaluation, its `gradient_norm` still to be told, and the gradient."""
        number, self._gradients = self.count, 0
        self.count += 1
        tight = min(self.progress, (1 + number / SUMMABLE) ** -2) * self.factor
        accuracy = max(ACCURACY * tight, self._floor)
        rtol = max(LINEAR_ACCURACY * tight, self._floor)
        theta, record = self.theta, Evaluation(*(np.nan,) * 5, 0, 0)
        nothing = np.zeros_like(phi)
        for further in range(ROUNDS):
            wanted = accuracy * self.curvature * self.length * 0.1**further
            value, theta, residual, solved = self.minimised(theta, phi, wanted)
            record = record._replace(gradients=self._gradients)
            if not np.isfinite(value):
                return record._replace(rejected="nonfinite"), nothing
            found = self.problem.differentiate(theta, phi, self.state, rtol)
            info = found.info
            if info is None:
                return record._replace(rejected="nonfinite"), nothing
            step = self._learn(theta, found, float(np.linalg.norm(residual)))
            record = record._replace(
                value=float(found.value),
                inner_step=step,
                relative_residual=float(info.relative_residual),
                products=record.products + int(info.num_products),
            )
            if not (np.isfinite(found.value) and np.all(np.isfinite(found.gradient))):
                return record._replace(rejected="nonfinite"), nothing
            indefinite = bool(info.negative_curvature)
            if self._train is not None or (step <= 3 * accuracy and not indefinite):
                break
        if self._train is None:
            if indefinite:
                return record._replace(rejected="indefinite"), nothing
            # From a start at the minimum a gradient of rounding cannot fall, and is small enough.
            if not (0 < step <= accuracy or (solved and step <= 10 * accuracy)):
                return record._replace(rejected="inner_unsolved"), nothing
            correction = -float(found.inverse_product @ residual)
            record = record._replace(value=record.value + correction, correction=correction)
        self.theta, self.phi, self.loss = theta, phi, float(value)
        return record, found.gradient

    def _learn(self, theta: np.ndarray, found: Differentiated, residual: float) -> float:
        """Keep what a hypergradient tells; return the relative length of a Newton step."""
        self.info, self.ridge = found.info, found.ridge
        if self._train is not None or not bool(found.info.negative_curvature):
            self.state = found.state
        length = float(np.linalg.norm(theta))
        self.length = max(self.length, length)
        if residual == 0 or not np.any(found.inverse_product):
            return 0.0
        step = float(found.info.inner_step) * length  # NaN without a positive curvature
        if step > 0:
            self.curvature = residual / step
        return step / self.length

    def minimised(
        self, theta: np.ndarray, phi: np.ndarray, wanted: float
    ) -> tuple[float, np.ndarray, np.ndarray, bool]:
        """Return value, parameters and gradient of the inner problem, and whether it is solved."""
        if hasattr(self._train, "reset"):
            return *self._stepped(self._train, theta, phi, wanted), True
        if self._train is not None:
            theta = self._train(theta, phi, np.random.default_rng([self._seed, self.count]))
        value, gradient = self._inner(theta, phi)
        norm = float(np.linalg.norm(gradient))
        lowest, wanted = (value, theta, gradient), wanted or FIRST * norm
        if self._train is not None or norm <= wanted or not np.isfinite(value + norm):
            return *lowest, True

        def function(x: np.ndarray) -> tuple[float, np.ndarray]:
            nonlocal lowest
            value, gradient = self._inner(x, phi)
            solved = np.linalg.norm(gradient) <= wanted
            if solved or value <= lowest[0]:
                lowest = value, x, gradient
            if solved:
                raise Stop
            return value, gradient

        try:
            found = lbfgs(
                function,
                theta,
                (value, gradient),
                scaling=self._scaling(phi, gradient),
                rounding=ROUNDING * self.problem.eps,
                max_steps=self._inner_steps,
            )
        except Stop:
            return *lowest, True
        # Anything but the end of all steps has met the rounding of the values.
        return *lowest, found.status != 1

    def _stepped(
        self, stepper: Any, theta: np.ndarray, phi: np.ndarray, wanted: float
    ) -> tuple[float, np.ndarray, np.ndarray]:
        stepper.reset()
        value, gradient = self._inner(theta, phi)
        wanted = wanted or FIRST * float(np.linalg.norm(gradient))
        for _ in range(self._inner_steps):
            if not np.linalg.norm(gradient) > wanted:
                break
            theta = stepper(theta, gradient)
            value, gradient = self._inner(theta, phi)
        return value, theta, gradient

    def _inner(self, theta: np.ndarray, phi: np.ndarray) -> tuple[float, np.ndarray]:
        self._gradients += 1
        return self.problem.inner(theta, phi)

    def _scaling(self, phi: np.ndarray, gradient: np.ndarray) -> Change:
        """Return variables in which the Hessian is near the identity, so far as the pairs tell."""
        known = getattr(self.problem, "change", lambda *_: None)(phi, gradient)
        if known is not None:
            return known
        norm = float(np.linalg.norm(gradient))
        plain = Scaling(norm / self.curvature if self.curvature > 0 else 1.0)
        if self.state.vectors is None:
            return plain
        S, Y = (to_host(x).astype(np.float64) for x in self.state[1:])
        kept = S.any(axis=0)
        S, Y = S[:, kept], Y[:, kept]
        values, Z = np.linalg.eigh((S.T @ Y + Y.T @ S) / 2)
        values = np.abs(values) + self.ridge
        if not values.max(initial=0.0) > 0:
            return plain
        values = np.maximum(values, LEAST * values.max())
        least = float(values.min())
        scaling = Scaling(1 / np.sqrt(least), S @ Z, np.sqrt(least / values) - 1)
        # Of a step of length 1, as the first one is, that of steepest descent.
        return scaling._replace(unit=scaling.unit * float(np.linalg.norm(scaling(gradient))))
