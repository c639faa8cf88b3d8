"""Minimisation of bilevel problems by quasi-Newton outer steps on accurate hypergradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Integral
from os import PathLike
from typing import Any, NamedTuple

import numpy as np

from lowrank_inverse._progress import progress_bar
from lowrank_inverse._typing import RNG
from lowrank_inverse.arrays.checks import check_count, check_scalar
from lowrank_inverse.bilevel.evaluation import ROUNDING, Evaluator, Problem, Stepper, Train
from lowrank_inverse.bilevel.minimum import BilevelMinimum, Evaluation, Stop
from lowrank_inverse.bilevel.quasi_newton import Scaling, lbfgs
from lowrank_inverse.bilevel.trail import Trail

TIGHTER = 0.1
"""Of the inner and linear tolerances, after a line search that failed."""
MAX_HALVINGS = 20
FIRST_STEP = 0.1
"""Length of the first step, for each hyperparameter, or relative to them where they are larger."""

PATIENCE = 10
"""Evaluations without a lower value, at the tightest tolerances, before it ends."""


class Point(NamedTuple):
    """Hyperparameters, the inner minimum there, the outer loss and its gradient."""

    phi: np.ndarray
    theta: np.ndarray
    value: float
    gradient: np.ndarray


class Minimization:
    """The outer loop: counts, keeps the best, and decides when it ends.

    Parameters
    ----------
    evaluate : Evaluator
    lower, upper : arrays, shape (p,)
        Bounds, infinite where there are none.
    tol : float
        Of the norm of the projected gradient, relative to the first.
    max_evaluations : int
    trail : Trail
        Evaluations of an earlier call, which are not made again.
    callback : callable (Point, Evaluation) -> bool
        Ends the minimisation where it returns True.
    """

    def __init__(
        self,
        evaluate: Evaluator,
        lower: np.ndarray,
        upper: np.ndarray,
        *,
        tol: float,
        max_evaluations: int,
        trail: Trail,
        callback: Callable[[Point, Evaluation], Any],
    ) -> None:
        self.evaluate, self.lower, self.upper = evaluate, lower, upper
        self.tol, self.max_evaluations = tol, max_evaluations
        self.trail, self.callback = trail, callback
        self.history: list[Evaluation] = []
        self.best: Point | None = None
        self._norm, self._improved = 0.0, 0  # of the best: its gradient, and when it was lowered
        self._rounding = ROUNDING * evaluate.problem.eps
        self.first = 0.0  # norm of the first gradient
        phi = evaluate.problem.hparams
        self.length = FIRST_STEP * max(float(np.linalg.norm(phi)), phi.size**0.5)
        self.reason = ""

    def ended(self, reason: str) -> Stop:
        """Return what is to be raised."""
        self.reason = reason
        return Stop()

    def clipped(self, phi: np.ndarray) -> np.ndarray:
        """Return hyperparameters within the bounds."""
        return np.clip(phi, self.lower, self.upper)

    def __call__(self, phi: np.ndarray) -> tuple[float, np.ndarray]:
        """Evaluate; the value of what is rejected is NaN."""
        if len(self.history) >= self.max_evaluations:
            raise self.ended("max_evaluations")
        phi = self.clipped(phi)
        kept = self.trail.replay(phi, len(self.history))
        record, gradient = self.evaluate(phi) if kept is None else kept
        if record.rejected:
            if not self.history:
                self.history.append(record)
                raise self.ended(record.rejected)
            record = record._replace(value=np.nan)
        outward = (phi <= self.lower) & (gradient > 0) | (phi >= self.upper) & (gradient < 0)
        norm = float(np.linalg.norm(np.where(outward, 0.0, gradient)))
        record = record._replace(gradient_norm=np.nan if record.rejected else norm)
        if not self.history:
            self.first = norm
        self.history.append(record)
        point = Point(phi, self.evaluate.theta, record.value, gradient)
        if not record.rejected:
            self.evaluate.progress = min(self.evaluate.progress, norm / self.first) if norm else 0.0
            self._keep(point, norm)
        if kept is None:
            self.trail.add(phi, gradient, record, self)
        else:
            self.trail.restore(self)
            point = point._replace(theta=self.evaluate.theta)
        if self.callback(point, record):
            raise self.ended("callback")
        if not record.rejected:
            self._judge(phi, norm, record.value)
        return record.value, gradient

    def _keep(self, point: Point, norm: float) -> None:
        """Make a point the best if its value is lower, or the same and its gradient smaller."""
        best = self.best
        if best is not None and not np.array_equal(point.phi, best.phi):
            same = self._rounding * max(abs(best.value), abs(point.value))
            if point.value > best.value + same:
                return
            if point.value > best.value - same and norm >= self._norm:
                return
        if best is None or point.value < best.value:
            self._improved = len(self.history)
        self.best, self._norm = point, norm

    def _judge(self, phi: np.ndarray, norm: float, value: float) -> None:
        """End where there is nothing left to do."""
        if len(self.history) == 1 and norm * self.length <= self.evaluate.problem.eps * abs(value):
            raise self.ended("flat")
        assert self.best is not None
        if self.best.phi is phi and norm <= self.tol * self.first:
            raise self.ended("converged")
        idle = len(self.history) - self._improved
        if self.evaluate.at_floor and idle >= PATIENCE:
            raise self.ended("precision")

    def by_lbfgs(self, phi: np.ndarray) -> None:
        """Run L-BFGS-B, again with tighter tolerances where a line search failed."""
        length = self.length
        while True:
            value, gradient = self(phi)
            if self.history[-1].rejected:
                raise self.ended("precision")
            norm = float(np.linalg.norm(gradient))
            lbfgs(
                self,
                phi,
                (value, gradient),
                scaling=Scaling(length),
                value_unit=length * norm,  # so that the scaled gradient begins with norm 1
                rounding=self._rounding,
                bounds=(self.lower, self.upper),
            )
            if self.history[-1].rejected:
                raise self.ended(self.history[-1].rejected)
            if self.evaluate.at_floor:
                raise self.ended("precision")
            self.evaluate.factor *= TIGHTER
            assert self.best is not None
            length = float(np.linalg.norm(self.best.phi - phi)) / 10 or length / 10
            phi = self.best.phi  # evaluated again, more accurately

    def by_steps(self, phi: np.ndarray, step: Stepper) -> None:
        """Take the steps of an optimizer; half of one that leads to what is rejected."""
        _, gradient = self(phi)
        while True:
            following = self.clipped(step(phi, gradient))
            for _ in range(MAX_HALVINGS):
                value, ahead = self(following)
                if np.isfinite(value):
                    break
                following = (phi + following) / 2
            else:
                raise self.ended(self.history[-1].rejected)
            phi, gradient = following, ahead

    def run(self, step: Stepper | None) -> None:
        """Minimise, from the hyperparameters of the problem."""
        phi = self.clipped(self.evaluate.problem.hparams)
        try:
            if step is None:
                self.by_lbfgs(phi)
            else:
                self.by_steps(phi, step)
        except Stop:
            return


def minimize(
    problem: Problem,
    *,
    inner: Train | Stepper | None,
    outer: Stepper | None,
    bounds: tuple[np.ndarray, np.ndarray] | None,
    tol: float,
    max_evaluations: int,
    inner_steps: int,
    callback: Callable[..., Any] | None,
    progress: bool,
    checkpoint: str | PathLike[str] | None,
    seed: int,
) -> BilevelMinimum:
    """Minimise the outer loss by the hyperparameters; None stands for L-BFGS.

    The arguments are those of ``minimize_bilevel`` of an adapter, made ready.
    """
    check_scalar("tol", tol)
    evaluate = Evaluator(problem, inner, check_count("inner_steps", inner_steps), seed)
    with _shown(progress, check_count("max_evaluations", max_evaluations)) as show:

        def report(point: Point, record: Evaluation) -> Any:
            show(record)
            return callback is not None and callback(
                record, *problem.restore(point.theta, point.phi)
            )

        loop = Minimization(
            evaluate,
            *(bounds or (np.full_like(problem.hparams, side) for side in (-np.inf, np.inf))),
            tol=tol,
            max_evaluations=max_evaluations,
            trail=Trail(checkpoint),
            callback=report,
        )
        try:
            loop.run(outer)
        finally:
            phi = loop.clipped(problem.hparams)
            best = loop.best or Point(phi, evaluate.theta, np.nan, phi)
            params, hparams = problem.restore(best.theta, best.phi)
    return BilevelMinimum(
        params=params,
        hparams=hparams,
        value=best.value,
        history=tuple(loop.history),
        products=sum(one.products for one in loop.history),
        gradients=sum(one.gradients for one in loop.history),
        reason=loop.reason,
        num_at_bounds=int(np.sum((best.phi == loop.lower) | (best.phi == loop.upper))),
        state=evaluate.state,
        info=evaluate.info,
    )


def check_bounds(lower: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the bounds, if they are in order."""
    if not np.all(lower <= upper):
        place = int(np.argmax(~(lower <= upper)))
        raise ValueError(
            "`bounds` must be a pair of lower and upper bounds; at hyperparameter "
            f"{place} they are {lower[place]:g} and {upper[place]:g}."
        )
    return lower, upper


def seed_of(rng: RNG) -> int:
    """Return a whole number for all that is drawn."""
    if isinstance(rng, Integral):
        return int(rng)
    return int(np.random.default_rng(rng).integers(2**31))


@contextmanager
def _shown(progress: bool, total: int) -> Iterator[Callable[[Evaluation], None]]:
    """Yield what shows an evaluation in a bar, if asked for."""
    if not progress:
        yield lambda record: None
        return
    with progress_bar(total=total, desc="evaluations") as bar:

        def show(record: Evaluation) -> None:
            bar.set_postfix(loss=f"{record.value:.6g}", gradient=f"{record.gradient_norm:.1e}")
            bar.update()

        yield show
