"""Settings of the iterative solvers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from lowrank_inverse._typing import RNG, Array, LinearOperator, OperatorLike, Scalar, Solver
from lowrank_inverse.arrays.checks import check_count, check_scalar
from lowrank_inverse.iterative.conjugate_gradients import BLOCK_SIZE
from lowrank_inverse.iterative.neumann_series import neumann_series
from lowrank_inverse.operators.composition import split_shift
from lowrank_inverse.operators.diagonal import ShiftedOperator
from lowrank_inverse.results.solution import Pairs, Solution
from lowrank_inverse.solvers.base import PreparedInverse, differentiable
from lowrank_inverse.solvers.recycled import preconditioner_of, recycled_approximation, solve_by_cg


@dataclass(frozen=True, kw_only=True)
class CG:
    """Conjugate gradients.

    Parameters
    ----------
    damping, rtol, atol, max_steps, check_every, callback, block_size
        See :func:`lowrank_inverse.cg`.
    preconditioner : linear operator, or settings of a solver, optional
        An operator is used as in :func:`lowrank_inverse.cg`. Settings, such as
        ``Nystrom(rank=20)`` or ``lowrank_inverse_torch.KFAC``, prepare an inverse for each
        operator and damping; `num_products` includes their products.
    recycle : int
        Number of Ritz pairs that a `state` keeps from earlier solves, those of largest magnitude,
        to precondition later solves. Memory: ``2 recycle n`` numbers, and as many again during a
        solve, for its first `recycle` directions and their products. 0 keeps none. Only solves
        with a `state` and influence functions, which keep up to 200 by default, use it.
    """

    damping: Scalar = 0.0
    rtol: float = 1e-5
    atol: float = 0.0
    max_steps: int | None = None
    check_every: int = 1
    preconditioner: LinearOperator | Solver | None = None
    callback: Callable[[Array, Array], object] | None = None
    block_size: int = BLOCK_SIZE
    recycle: int = 20

    def __post_init__(self) -> None:
        check_iteration(self)

    @differentiable
    def prepare(
        self, A: OperatorLike, *, rng: RNG = 0, b: Array | None = None, pairs: Pairs | None = None
    ) -> PreparedInverse:
        """Return an inverse of ``A + damping * I`` by conjugate gradients; `rng` is not used.

        Without a `preconditioner`, the `pairs` of a state, if given, serve as one. They belong to A
        without its diagonal shift.
        """
        preconditioner: Any = self.preconditioner
        approx, spent = None, 0
        if callable(getattr(preconditioner, "prepare", None)):  # settings
            inverse = preconditioner.prepare(ShiftedOperator(A, self.damping), rng=rng, b=b)
            spent = inverse.num_products
            preconditioner = inverse if inverse.preconditioner is None else inverse.preconditioner
        if pairs is not None and preconditioner is None:
            approx = recycled_approximation(A, self.damping, pairs)
            preconditioner = preconditioner_of(A, self.damping, approx)
        H, damping = split_shift(A, self.damping)
        return PreparedInverse(
            H,
            partial(solve_by_cg, self, H, damping, preconditioner),
            num_products=spent,
            preconditioner=preconditioner,
            approximation=approx,
            keeps=True,
        )


@dataclass(frozen=True, kw_only=True)
class Neumann:
    """The truncated Neumann series. For the parameters see :func:`lowrank_inverse.neumann`."""

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

    @differentiable
    def prepare(self, A: OperatorLike, *, rng: RNG = 0, b: Array | None = None) -> PreparedInverse:
        """Return an inverse of ``A + damping * I`` that sums the series; `rng` is not used."""
        H, damping = split_shift(A, self.damping)
        return PreparedInverse(H, partial(_solve_by_neumann, self, H, damping))


def _solve_by_neumann(
    settings: Neumann, A: OperatorLike, damping: Scalar, b: Array, x0: Array | None
) -> Solution:
    return neumann_series(
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
    check_count("block_size", settings.block_size)
    if settings.recycle != 0:
        check_count("recycle", settings.recycle)
    if settings.max_steps is not None:
        check_count("max_steps", settings.max_steps)
