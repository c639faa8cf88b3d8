"""Preconditioned conjugate gradients that keep directions for later solves."""

from __future__ import annotations

from typing import Any

from lowrank_inverse._typing import Array, LinearOperator, OperatorLike, Scalar
from lowrank_inverse.arrays.checks import check_indices
from lowrank_inverse.arrays.linalg import tall_dot, times_diagonal
from lowrank_inverse.iterative.conjugate_gradients import conjugate_gradients
from lowrank_inverse.iterative.recycling import scaled_pairs
from lowrank_inverse.low_rank.approximation import NystromApproximation
from lowrank_inverse.low_rank.preconditioner import NystromPreconditioner
from lowrank_inverse.operators.composition import scaled_by_diagonal, split_diagonal
from lowrank_inverse.operators.diagonal import ShiftedOperator
from lowrank_inverse.operators.product import unit_vectors
from lowrank_inverse.results.solution import Pairs, Solution


def solve_by_cg(
    settings: Any,
    A: OperatorLike,
    damping: Scalar,
    preconditioner: LinearOperator | None,
    b: Array,
    x0: Array | None,
    keep: int = 0,
) -> Solution:
    """Run conjugate gradients by `settings`, but with another damping and preconditioner.

    The products kept are those of A less a vector that it was shifted by.
    """
    solution = conjugate_gradients(
        A,
        b,
        x0,
        keep,
        damping=damping,
        preconditioner=preconditioner,
        rtol=settings.rtol,
        atol=settings.atol,
        max_steps=settings.max_steps,
        check_every=settings.check_every,
        callback=settings.callback,
        block_size=settings.block_size,
    )
    if solution.directions is None or not isinstance(A, ShiftedOperator):
        return solution
    S, Y = solution.directions
    return solution._replace(directions=Pairs(S, Y - times_diagonal(A.shift, S)))


def recycled_approximation(A: OperatorLike, damping: Scalar, pairs: Pairs) -> NystromApproximation:
    """Return the approximation that pairs give, of what ``split_diagonal(A, damping)`` leaves.

    Negative eigenvalues are left out: the pairs are of several operators, which may be their cause.
    """
    s = split_diagonal(A, damping)[2]
    S, Y = pairs if s is None else scaled_pairs(pairs, s)
    approx = NystromApproximation(Y, None, core=tall_dot(S, Y))
    approx.num_products = 0
    approx.asymmetry = None  # of several operators, each of which may be symmetric
    return approx


def preconditioner_of(A: OperatorLike, damping: Scalar, approx: NystromApproximation) -> Any:
    """Return the preconditioner of ``A + damping * I`` from what approximates the rest of it."""
    _, damping, s = split_diagonal(A, damping)
    preconditioner: Any = NystromPreconditioner(approx, damping)
    return preconditioner if s is None else scaled_by_diagonal(preconditioner, s)


def sampled_pairs(A: OperatorLike, damping: Scalar, approx: NystromApproximation) -> Pairs | None:
    """Return the vectors of an approximation and their products with A less its diagonal shift."""
    S, Y, n = approx.vectors, approx.columns, int(A.shape[0])
    if S is None:
        if approx.indices is None:
            return None
        S = unit_vectors(check_indices(approx.indices, n), n, Y)
    s = split_diagonal(A, damping)[2]
    return Pairs(S, Y) if s is None else scaled_pairs(Pairs(S, Y), 1 / s)
