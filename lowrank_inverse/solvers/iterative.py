"""Settings of the iterative solvers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from lowrank_inverse._typing import RNG, Array, LinearOperator, Scalar
from lowrank_inverse.arrays.checks import check_count, check_scalar
from lowrank_inverse.iterative.conjugate_gradients import cg
from lowrank_inverse.iterative.neumann_series import neumann
from lowrank_inverse.operators.composition import split_shift
from lowrank_inverse.operators.function import aslinearoperator
from lowrank_inverse.results.solution import Solution
from lowrank_inverse.solvers.base import PreparedInverse


@dataclass(frozen=True, kw_only=True)
class CG:
    """Conjugate gradients; parameters as in :func:`lowrank_inverse.cg`."""

    damping: Scalar = 0.0
    rtol: float = 1e-5
    atol: float = 0.0
    max_steps: int | None = None
    check_every: int = 1
    preconditioner: LinearOperator | None = None
    callback: Callable[[Array, Array], object] | None = None

    def __post_init__(self) -> None:
        check_iteration(self)

    def prepare(self, A: Any, *, rng: RNG = 0) -> PreparedInverse:
        """Return the inverse of ``A + damping * I``; there is nothing to draw."""
        H, damping = split_shift(aslinearoperator(A), self.damping)

        return PreparedInverse(H, partial(solve_by_cg, self, H, damping, self.preconditioner))


@dataclass(frozen=True, kw_only=True)
class Neumann:
    """Truncated Neumann series; parameters as in :func:`lowrank_inverse.neumann`."""

    damping: Scalar = 0.0
    rtol: float = 1e-5
    num_terms: int = 10
    step_size: Scalar = None

    def __post_init__(self) -> None:
        check_scalar("damping", self.damping)
        check_scalar("rtol", self.rtol)
        check_count("num_terms", self.num_terms)
        if self.step_size is not None:
            check_scalar("step_size", self.step_size, positive=True)

    def prepare(self, A: Any, *, rng: RNG = 0) -> PreparedInverse:
        """Return the inverse of ``A + damping * I``; there is nothing to draw."""
        H, damping = split_shift(aslinearoperator(A), self.damping)

        return PreparedInverse(H, partial(_solve_by_neumann, self, H, damping))


def solve_by_cg(
    settings: Any, A: Any, damping: Scalar, preconditioner: Any, b: Array, x0: Array | None
) -> Solution:
    """Run conjugate gradients by `settings`, but with another damping and preconditioner."""
    return cg(
        A,
        b,
        damping=damping,
        x0=x0,
        preconditioner=preconditioner,
        rtol=settings.rtol,
        atol=settings.atol,
        max_steps=settings.max_steps,
        check_every=settings.check_every,
        callback=settings.callback,
    )


def _solve_by_neumann(
    settings: Neumann, A: Any, damping: Scalar, b: Array, x0: Array | None
) -> Solution:
    return neumann(
        A,
        b,
        damping=damping,
        num_terms=settings.num_terms,
        step_size=settings.step_size,
        rtol=settings.rtol,
    )


def check_iteration(settings: Any) -> None:
    """Raise unless damping, tolerance and numbers of steps are in their ranges."""
    check_scalar("damping", settings.damping)
    check_scalar("rtol", settings.rtol)
    check_scalar("atol", settings.atol)
    check_count("check_every", settings.check_every)
    if settings.max_steps is not None:
        check_count("max_steps", settings.max_steps)
