"""Penalties as the hyperparameters of a bilevel problem: fits inside, validation outside."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from scipy.linalg import solve_triangular

from lowrank_inverse.bilevel.evaluation import MAX_STEPS, Differentiated, tolerant_solver
from lowrank_inverse.bilevel.implicit_gradient import implicit_gradient
from lowrank_inverse.bilevel.info import hypergradient_info
from lowrank_inverse.operators.function import FunctionOperator
from lowrank_inverse.sklearn.group_ridge.models import Model
from lowrank_inverse.solvers.iterative import CG

DENSE = 1500
"""Coefficients of a fit up to which a Hessian is held, to precondition."""
EASY = 8
"""Steps of conjugate gradients that are few."""


class Groups(NamedTuple):
    """Which hyperparameter belongs to which coefficient and example.

    Attributes
    ----------
    unit : array, shape (p, C)
        The ridge of a standardised coefficient at the penalty 1; 0 for an intercept.
    penalty : array of int, shape (p, C)
        Of its penalty.
    examples : array of int, shape (n,), or None
        Of the weight of an example, after the penalties; None: no weight is learned.
    """

    unit: np.ndarray
    penalty: np.ndarray
    examples: np.ndarray | None = None


class Factored(NamedTuple):
    """Variables in which the matrix ``L L.T`` of each fit is the identity."""

    unit: float
    factor: np.ndarray
    shape: tuple[int, int, int]

    def _solve(self, x: np.ndarray, transposed: bool) -> np.ndarray:
        p, K, C = self.shape
        columns = x.reshape(p, K, C).swapaxes(1, 2).reshape(p * C, K)
        found = solve_triangular(
            self.factor, columns, lower=True, trans=int(transposed), check_finite=False
        )
        return self.unit * found.reshape(p, C, K).swapaxes(1, 2).reshape(-1)

    def __call__(self, z: np.ndarray) -> np.ndarray:
        """Return ``T z``."""
        return self._solve(z, True)

    def adjoint(self, x: np.ndarray) -> np.ndarray:
        """Return ``T.T x``."""
        return self._solve(x, False)


class Problem:
    """Penalties that minimise the loss of validation; see the core's protocol of this name.

    The hyperparameters are logarithms. The parameters are coefficients times the roots of their
    curvatures, ridge included, whatever the hyperparameters: so the Hessian has a diagonal near 1,
    and a fit from before is a good start where a penalty changes. Hypergradients do not depend on
    such a change of variables.

    Parameters
    ----------
    model : Model
    groups : Groups
    hparams : array
        Where they begin.
    U : array, shape (p, K, C), optional
        Coefficients to begin with.
    earlier : Problem, optional
        Whose Hessian is a good preconditioner.
    prior : array or 0.0
        What half the squares of the distances from `hparams` are multiplied by, and added to the
        loss of validation.
    """

    def __init__(
        self,
        model: Model,
        groups: Groups,
        hparams: np.ndarray,
        U: np.ndarray | None = None,
        earlier: Problem | None = None,
        prior: Any = 0.0,
    ) -> None:
        self.model, self.groups, self.hparams, self.eps = model, groups, hparams, model.eps
        self._prior = prior
        start = np.zeros(model.shape) if U is None else U
        self._mean, self._excess = start.mean(axis=1, keepdims=True), 0
        self._hessian: np.ndarray | None = None if earlier is None else earlier._hessian
        self._factored: tuple[np.ndarray, np.ndarray] | None = None
        self.params = (start * self._scale(self.ridge(hparams))).reshape(-1)

    def ridge(self, phi: np.ndarray) -> np.ndarray:
        """Return the ridges of the standardised coefficients, shape (p, 1, C)."""
        return (self.groups.unit * np.exp(phi[self.groups.penalty]))[:, None]

    def _weight(self, phi: np.ndarray) -> Any:
        examples = self.groups.examples
        return 1.0 if examples is None else np.exp(phi[examples])[:, None, None]

    def _scale(self, ridge: np.ndarray) -> np.ndarray:
        return np.sqrt(self.model.curvature + ridge)

    def coefficients(self, theta: np.ndarray, phi: np.ndarray) -> np.ndarray:
        """Return the standardised coefficients, shape (p, K, C)."""
        return theta.reshape(self.model.shape) / self._scale(self.ridge(phi))

    def restore(self, theta: np.ndarray, phi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the standardised coefficients and the hyperparameters."""
        return self.coefficients(theta, phi), phi

    def inner(self, theta: np.ndarray, phi: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the loss of the fits and its gradient."""
        ridge = self.ridge(phi)
        scale = self._scale(ridge)
        U = theta.reshape(self.model.shape) / scale
        value, gradient = self.model.inner(U, self._weight(phi))
        gradient = (gradient + ridge * U) / scale
        return value + float(np.sum(ridge * U**2)) / 2, gradient.reshape(-1)

    def differentiate(
        self, theta: np.ndarray, phi: np.ndarray, state: Any, rtol: float
    ) -> Differentiated:
        """Return the loss of validation, with the prior, and its hypergradient."""
        ridge, shape = self.ridge(phi), self.model.shape
        scale = self._scale(ridge)
        U = theta.reshape(shape) / scale
        at = self.model.at(U, self._weight(phi))

        def matvec(v: np.ndarray) -> np.ndarray:
            V = v.reshape(shape) / scale
            return ((at.product(V) + ridge * V) / scale).reshape(-1)

        def mixed(v: np.ndarray) -> list[np.ndarray]:
            q = v.reshape(shape) / scale
            parts = np.sum(q * ridge * U, axis=1)
            grads = np.bincount(self.groups.penalty.reshape(-1), parts.reshape(-1), len(phi))
            if self.groups.examples is not None:
                grads += np.bincount(self.groups.examples, at.along(q), len(phi))
            return [grads]

        outer = (at.outer_gradient / scale).reshape(-1)
        inner = ((at.inner_gradient + ridge * U) / scale).reshape(-1)
        out = implicit_gradient(
            FunctionOperator(matvec, theta.size),
            outer,
            mixed,
            [None],
            solver=self._solver(phi, rtol),
            state=state,
        )
        info = hypergradient_info(out, outer, inner, (), theta)
        self._watch(U, int(info.num_products))
        (grads,) = out.grads
        assert grads is not None
        apart = phi - self.hparams
        value, grads = at.outer + self._prior * apart @ apart / 2, grads + self._prior * apart
        return Differentiated(float(value), grads, out.solution.value, info, out.state, 0.0)

    def change(self, phi: np.ndarray, gradient: np.ndarray) -> Factored | None:
        """Return variables in which each Hessian is about the identity."""
        factor = self._factor(phi)
        if factor is None:
            return None
        plain = Factored(1.0, factor, self.model.shape)
        return plain._replace(unit=float(np.linalg.norm(plain.adjoint(gradient))))

    def _factor(self, phi: np.ndarray) -> np.ndarray | None:
        """Return the Cholesky factor of about the Hessian of each fit; None if it is too large."""
        p, _, C = self.model.shape
        if p * C > DENSE:
            return None
        if self._hessian is None:
            self._hessian = self.model.hessian(self._mean, self._weight(phi))
            self._factored = None
        if self._factored is None or not np.array_equal(self._factored[0], phi):
            ridge = self.ridge(phi)
            scale, H = self._scale(ridge).reshape(-1), self._hessian + np.diag(ridge.reshape(-1))
            self._factored = phi, np.asfortranarray(np.linalg.cholesky(H / np.outer(scale, scale)))
        return self._factored[1]

    def _solver(self, phi: np.ndarray, rtol: float) -> CG:
        factor = self._factor(phi)
        if factor is None:
            return tolerant_solver(None, rtol)
        change = Factored(1.0, factor, self.model.shape)
        inverse = FunctionOperator(lambda r: change(change.adjoint(r)), self.params.size)
        return CG(rtol=rtol, max_steps=MAX_STEPS, preconditioner=inverse, recycle=0)

    def _watch(self, U: np.ndarray, work: int) -> None:
        """Have the Hessian computed anew, at U, where that will soon have paid."""
        p, K, C = self.model.shape
        self._excess += work - EASY
        if self._excess > p * (C + 1) / (8 * K):
            self._hessian, self._mean, self._excess = None, U.mean(axis=1, keepdims=True), 0
