"""Settings of the iterative solvers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lowrank_inverse._typing import RNG, Array
from lowrank_inverse.arrays.checks import check_count, check_scalar
from lowrank_inverse.bilevel.state import start
from lowrank_inverse.iterative.conjugate_gradients import cg
from lowrank_inverse.iterative.neumann_series import neumann
from lowrank_inverse.operators.function import aslinearoperator
from lowrank_inverse.results.solution import Solution
from lowrank_inverse.solvers.base import (
    PreparedInverse,
)


@dataclass(frozen=True)
class CG:
    """Conjugate gradients; parameters as in :func:`lowrank_inverse.cg`."""

    damping: Any = 0.0
    rtol: float = 1e-5
    atol: float = 0.0
    max_steps: int | None = None
    check_every: int = 1

    def __post_init__(self) -> None:
        check_iteration(self)
        check_scalar("atol", self.atol)

    def prepare(self, A: Any, *, rng: RNG = None, state: Solution | None = None) -> PreparedInverse:
        """Return the inverse of ``A + damping * I``, started from ``state.value`` if given."""
        A = aslinearoperator(A)

        def run(b: Array) -> Solution:
            return cg(
                A,
                b,
                damping=self.damping,
                x0=start(state, b),
                rtol=self.rtol,
                atol=self.atol,
                max_steps=self.max_steps,
                check_every=self.check_every,
            )

        return PreparedInverse(A, run)


@dataclass(frozen=True)
class Neumann:
    """Truncated Neumann series; parameters as in :func:`lowrank_inverse.neumann`."""

    damping: Any = 0.0
    num_terms: int = 10
    step_size: Any = None

    def __post_init__(self) -> None:
        check_scalar("damping", self.damping)
        check_count("num_terms", self.num_terms)
        if self.step_size is not None:
            check_scalar("step_size", self.step_size, positive=True)

    def prepare(self, A: Any, *, rng: RNG = None, state: Solution | None = None) -> PreparedInverse:
        """Return the inverse of ``A + damping * I``; `state` is not used."""
        A = aslinearoperator(A)

        def run(b: Array) -> Solution:
            return neumann(
                A,
                b,
                damping=self.damping,
                num_terms=self.num_terms,
                step_size=self.step_size,
            )

        return PreparedInverse(A, run)


def check_iteration(settings: Any) -> None:
    """Raise unless damping, tolerance and numbers of steps are in their ranges."""
    check_scalar("damping", settings.damping)
    check_scalar("rtol", settings.rtol)
    check_count("check_every", settings.check_every)
    if settings.max_steps is not None:
        check_count("max_steps", settings.max_steps)
