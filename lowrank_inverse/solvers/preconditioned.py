"""Settings of conjugate gradients with a Nyström preconditioner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from lowrank_inverse._typing import RNG, Array, Indices, OperatorLike, Sampling, Scalar
from lowrank_inverse.arrays.control_flow import quietly
from lowrank_inverse.arrays.conversion import eps
from lowrank_inverse.iterative.conjugate_gradients import BLOCK_SIZE
from lowrank_inverse.low_rank.approximation import NystromApproximation
from lowrank_inverse.low_rank.core import is_indefinite
from lowrank_inverse.operators.composition import scaled, split_diagonal, split_shift
from lowrank_inverse.results.solution import Pairs
from lowrank_inverse.solvers.base import PreparedInverse, differentiable, is_positive
from lowrank_inverse.solvers.columns import check_columns, chosen_approximation
from lowrank_inverse.solvers.iterative import check_iteration
from lowrank_inverse.solvers.recycled import preconditioner_of, recycled_approximation, solve_by_cg

PRECONDITIONER_PIVOT_RTOL = 1e-2


@dataclass(frozen=True, kw_only=True)
class NystromCG:
    """Conjugate gradients with a Nyström preconditioner [1]_.

    Parameters
    ----------
    rank, sampling, indices, max_rank, diagonal_products
        See :class:`Nystrom`. ``rank="auto"`` samples columns until the error of the approximation
        is about the damping, but no more columns than they save in steps. Without a damping it
        aims at a thousandth of the trace.
    damping : float
        Added to the diagonal; 0 or more.
    rtol, atol, max_steps, check_every, callback, block_size
        See :func:`lowrank_inverse.cg`.
    recycle : int
        See :class:`CG`. With a `state`, only the first solve samples columns.

    Notes
    -----
    The preconditioner is that of [1]_, with the eigenpairs of the approximation H_k from sampled
    columns. If the sampled columns show negative curvature, eigenvalues of W below 1e-2 of the
    largest are dropped.

    References
    ----------
    .. [1] Z. Frangella, J. A. Tropp, M. Udell. Randomized Nyström Preconditioning. SIAM J.
       Matrix Anal. Appl. 44, 2023.
    """

    rank: Any = 20
    damping: Scalar = 0.0
    sampling: Sampling = "auto"
    rtol: float = 1e-5
    atol: float = 0.0
    max_steps: int | None = None
    indices: Indices = None
    check_every: int = 1
    callback: Callable[[Array, Array], object] | None = None
    max_rank: int | None = None
    diagonal_products: int | None = None
    block_size: int = BLOCK_SIZE
    recycle: int = 20

    def __post_init__(self) -> None:
        check_columns(self)
        check_iteration(self)

    @differentiable
    @quietly
    def prepare(
        self, A: OperatorLike, *, rng: RNG = 0, b: Array | None = None, pairs: Pairs | None = None
    ) -> PreparedInverse:
        """Return an inverse of ``A + damping * I`` that runs preconditioned conjugate gradients.

        The `pairs` of a state, if given, replace the sampled columns and take no products. They
        belong to A without its diagonal shift.
        """
        _, damping, s = split_diagonal(A, self.damping)
        if pairs is None:
            approx = self._approximate(A, b, rng)
        else:
            approx = recycled_approximation(A, self.damping, pairs)
        preconditioner = preconditioner_of(A, self.damping, approx)
        system, total = split_shift(A, self.damping)
        bounding = s is None and is_positive(damping) and pairs is None
        negative = None  # pairs of several operators prove nothing
        if pairs is None:
            negative = is_indefinite(approx.core_eigenvalues, damping, eps(approx.columns))
        return PreparedInverse(
            system,
            partial(solve_by_cg, self, system, total, preconditioner),
            num_products=approx.num_products,
            rank=approx.rank,
            negative_curvature=negative,
            nystrom_inverse=approx.inverse(damping) if bounding else None,
            preconditioner=preconditioner,
            approximation=approx,
            keeps=True,
            asymmetry=approx.asymmetry,
        )

    def _approximate(self, A: OperatorLike, b: Array | None, rng: RNG) -> NystromApproximation:
        """Return the approximation behind the preconditioner, by `rank` products.

        It is that of `A`; or, for an `A` that a diagonal was added to, that of ``S H S`` as in
        :func:`lowrank_inverse.operators.composition.split_diagonal`.
        """
        H, damping, s = split_diagonal(A, self.damping)
        return chosen_approximation(
            self, H, rng, damping, scaled(b, s), indefinite_pivot_rtol=PRECONDITIONER_PIVOT_RTOL
        )
