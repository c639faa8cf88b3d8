"""Settings of the Nyström solver, which inverts a low-rank approximation directly."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import RNG, Array, Indices, OperatorLike, Sampling, Scalar
from lowrank_inverse.arrays.checks import check_count, check_damping, check_scalar
from lowrank_inverse.arrays.conversion import eps
from lowrank_inverse.iterative.conjugate_gradients import conjugate_gradients
from lowrank_inverse.low_rank.column_sampling import DRAWN, resolve_sampling
from lowrank_inverse.low_rank.core import is_indefinite
from lowrank_inverse.low_rank.streaming import chunked_inverse, streamed_inverse
from lowrank_inverse.operators.columns import empty_like
from lowrank_inverse.operators.composition import (
    scaled,
    scaled_by_diagonal,
    split_diagonal,
)
from lowrank_inverse.operators.product import apply_cost, block_width
from lowrank_inverse.results.solution import Solution, check_system
from lowrank_inverse.solvers.base import (
    PreparedInverse,
    better,
    differentiable,
    direct_solution,
    with_apply_cost,
)
from lowrank_inverse.solvers.column_memory import (
    Memory,
    MemoryPlan,
    check_memory,
    plan_memory,
)
from lowrank_inverse.solvers.columns import (
    check_columns,
    chosen_approximation,
    chosen_indices,
    is_lossy,
)

AUTO_SHARE = 0.1
"""Of the damping, that a rank which grows may leave to a direct inverse."""


@dataclass(frozen=True, kw_only=True)
class Nystrom:
    """The Nyström method [1]_: a low-rank approximation, inverted by the Woodbury identity.

    Parameters
    ----------
    rank : int or "auto"
        Number of columns to sample, at one product each; at most n are used. ``"auto"`` samples
        columns until the error of the approximation is about a tenth of the damping; see
        :func:`lowrank_inverse.nystrom`.
    damping : float
        Added to the diagonal. Positive, unless the system has a ridge. A small damping needs many
        columns; :func:`lowrank_inverse.certify` bounds the error.
    sampling : str
        How to choose the columns; see :func:`lowrank_inverse.nystrom`. ``"krylov"`` multiplies
        along the Krylov space of the right-hand side instead. ``"auto"`` is ``"krylov"`` if each
        column costs a product and all columns are stored, ``"rpcholesky"`` if columns and
        diagonal can be read, and otherwise ``"uniform"``, the method of [1]_.
    memory : {"stored", "chunked", "streamed"} or float
        ``"stored"`` keeps all columns in memory. ``"chunked"`` keeps `chunk_size` of them and
        computes the others again when they are needed (:func:`lowrank_inverse.chunked_inverse`).
        ``"streamed"`` keeps none (:func:`lowrank_inverse.streamed_inverse`). A number is a budget
        in bytes, for which the fastest of the three is chosen; if the damping is too small to
        stream in the precision of the operator, chunked replaces streamed. The attribute `memory`
        of the prepared inverse holds the choice.
    chunk_size : int, optional
        Columns computed at a time. Default: all if stored, else 1.
    refine : int
        Maximum number of steps of preconditioned conjugate gradients that refine the result, at a
        product each. The refinement stops at a relative residual of 1e-5.
    indices : sequence of ints, shape (k,), optional
        The columns to use, in place of `rank` and `sampling`. Kept as a tuple unless traced.
    max_rank : int, optional
        Upper limit for ``rank="auto"``. Default: the smaller of n and 1000.
    diagonal_products : int, optional
        Number of products that estimate the diagonal for ``"diagonal"`` and
        ``"diagonal_squared"`` if the operator cannot tell it; see
        :func:`lowrank_inverse.estimate_diagonal`.

    References
    ----------
    .. [1] R. Hataya, M. Yamada. Nyström Method for Accurate and Scalable Implicit
       Differentiation. AISTATS 2023.
    """

    rank: Any = 20
    damping: Scalar = 0.0
    sampling: Sampling = "auto"
    memory: Memory = "stored"
    chunk_size: int | None = None
    refine: int = 0
    indices: Indices = None
    max_rank: int | None = None
    diagonal_products: int | None = None

    def __post_init__(self) -> None:
        check_columns(self)
        check_scalar("damping", self.damping)
        check_memory(self.memory)
        if self.chunk_size is not None:
            check_count("chunk_size", self.chunk_size)
        if self.refine != 0:
            check_count("refine", self.refine)
        held = self.rank == "auto" or self.sampling not in ("auto", *DRAWN)
        if held and self.indices is None and self.memory != "stored":
            raise ValueError(
                f"rank={self.rank!r} with sampling={self.sampling!r} stores its columns; got "
                f"memory={self.memory!r}. Use memory='stored', or pass `indices`."
            )

    @differentiable
    def prepare(self, A: OperatorLike, *, rng: RNG = 0, b: Array | None = None) -> PreparedInverse:
        """Return the Nyström inverse of ``A + damping * I``."""
        H, damping, s = split_diagonal(A, self.damping)
        check_damping(damping)
        inverse: Any
        spent = 0
        b = scaled(b, s)
        plan = self._plan(H, b)
        if plan is not None and plan.memory != "stored" and self.sampling == "auto":
            b, plan = None, self._plan(H, None)  # columns, for the vectors do not fit beside them
        if plan is None or plan.memory == "stored":
            source: Any = chosen_approximation(
                self,
                H,
                rng,
                AUTO_SHARE * damping,
                b,
                chunk_size=self.chunk_size,
            )
            inverse = source.inverse(damping)
        else:
            indices, spent = chosen_indices(self, H, rng)
            build = chunked_inverse if plan.memory == "chunked" else streamed_inverse
            chunk_size = plan.chunk_size or 1
            inverse = source = build(H, indices, damping=damping, chunk_size=chunk_size)
            if not isinstance(self.memory, str) and is_lossy(inverse):
                spent += inverse.num_products
                plan = plan._replace(memory="chunked")
                inverse = source = chunked_inverse(
                    H, indices, damping=damping, chunk_size=chunk_size
                )
        unit = eps(inverse.like)
        approximate = inverse if s is None else scaled_by_diagonal(inverse, s)

        run = partial(_solve_by_inverse, A, self, source, inverse, approximate)
        return PreparedInverse(
            A,
            run,
            apply=None if self.refine else approximate.__matmul__,
            num_products=source.num_products + spent,
            rank=source.rank,
            negative_curvature=is_indefinite(source.core_eigenvalues, damping, unit),
            nystrom_inverse=inverse if s is None else None,
            preconditioner=approximate,
            memory=plan,
            asymmetry=getattr(source, "asymmetry", None),
        )

    def _plan(self, A: OperatorLike, b: Array | None) -> MemoryPlan | None:
        """Say how the columns are to be held; None where their number is not known before."""
        if self.indices is None and self.rank == "auto":
            return None
        empty = empty_like(A)
        n = int(A.shape[0])
        rank = min(self.rank, n) if self.indices is None else np.shape(self.indices)[0]
        itemsize = array_namespace(empty).finfo(empty.dtype).bits // 8
        krylov = self.indices is None and resolve_sampling(A, self.sampling, b) == "krylov"
        return plan_memory(
            n,
            rank,
            itemsize,
            memory=self.memory,
            chunk_size=self.chunk_size,
            num_held=2 * rank if krylov else rank,
        )


def _solve_by_inverse(
    A: OperatorLike,
    settings: Nystrom,
    source: Any,
    inverse: Any,
    approximate: Any,
    b: Array,
    x0: Array | None,
) -> Solution:
    damping = settings.damping
    check_system(A, b, damping)
    if settings.refine == 0:
        cost = apply_cost(inverse, block_width(b))
        solution = direct_solution(A, damping, b, approximate @ b, cost)
        if getattr(source, "vectors", None) is None:
            return solution
        _, damping, s = split_diagonal(A, damping)
        x, r = source.galerkin(scaled(b, s), damping)
        if s is not None:
            x, r = scaled(x, s), scaled(r, 1 / s)
        return better(solution, b, x, r)
    # From zero: the first step is the plain answer with the best length.
    solution = conjugate_gradients(
        A,
        b,
        None,
        damping=damping,
        preconditioner=approximate,
        max_steps=settings.refine + 1,
        block_size=1,  # each application of the preconditioner has its price
    )
    return with_apply_cost(solution, inverse, b)
