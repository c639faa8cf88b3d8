"""Settings of the solvers: frozen, and turned into an inverse by ``.prepare(A)``."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._array import (
    astype,
    check_count,
    check_damping,
    check_finite,
    check_indices,
    check_scalar,
    concrete,
    eps,
    is_traced,
    quietly,
    symmetric_part,
    wide_dtype,
)
from lowrank_inverse._typing import RNG, Array
from lowrank_inverse.cg import cg
from lowrank_inverse.neumann import neumann
from lowrank_inverse.nystrom import (
    NystromApproximation,
    choose_indices,
    is_indefinite,
    nystrom,
)
from lowrank_inverse.operators import aslinearoperator, columns
from lowrank_inverse.preconditioner import NystromPreconditioner
from lowrank_inverse.prepared import (
    PreparedInverse,
    apply_cost,
    block_width,
    direct_solution,
    with_apply_cost,
)
from lowrank_inverse.sampling import check_sampling
from lowrank_inverse.solution import Solution, check_system
from lowrank_inverse.state import kept_factor, start
from lowrank_inverse.woodbury import chunked_inverse, streamed_inverse

PRECONDITIONER_PIVOT_RTOL = 1e-2
STORAGES = ("stored", "chunked", "streamed")


@dataclass(frozen=True)
class Nystrom:
    """Nyström approximation and Woodbury's identity: the method of [1]_.

    Parameters
    ----------
    rank : int
        Columns to sample, one product each.
    damping : float
        Positive, unless a ridge makes up for it. Small dampings need many columns; see
        :func:`lowrank_inverse.certify`.
    sampling : {"uniform", "diagonal", "diagonal_squared"}
        Which columns; see :func:`lowrank_inverse.sampling.sample_columns`.
    storage : {"stored", "chunked", "streamed"}
        Hold all columns; or a chunk of them, computed again where needed
        (:func:`lowrank_inverse.chunked_inverse`); or none
        (:func:`lowrank_inverse.streamed_inverse`).
    chunk_size : int, optional
        Columns computed at a time. Default: all if stored, else 1.
    refine : int
        Steps of preconditioned conjugate gradients after the plain answer, a product each; it
        ends earlier at a relative residual of 1e-5.
    indices : sequence of ints, shape (k,), optional
        The columns to take, in place of `rank` and `sampling`; kept as a tuple unless traced.

    References
    ----------
    .. [1] R. Hataya, M. Yamada. Nyström Method for Accurate and Scalable Implicit
       Differentiation. AISTATS 2023.
    """

    rank: int = 20
    damping: Any = 1e-2
    sampling: str = "uniform"
    storage: str = "stored"
    chunk_size: int | None = None
    refine: int = 0
    indices: Any = None

    def __post_init__(self) -> None:
        _check_columns(self)
        check_scalar("damping", self.damping)
        if self.storage not in STORAGES:
            raise ValueError(
                f"`storage` must be one of {', '.join(map(repr, STORAGES))}; got {self.storage!r}."
            )
        if self.chunk_size is not None:
            check_count("chunk_size", self.chunk_size)
        if self.refine != 0:
            check_count("refine", self.refine)

    def prepare(self, A: Any, *, rng: RNG = None, state: Solution | None = None) -> PreparedInverse:
        """Return the inverse of ``A + damping * I``; `state` is not used."""
        check_damping(self.damping)
        A = aslinearoperator(A)
        indices = _indices(self, A, rng)
        inverse: Any
        if self.storage == "stored":
            source: Any = nystrom(A, indices=indices, chunk_size=self.chunk_size)
            inverse = source.inverse(self.damping)
        else:
            build = chunked_inverse if self.storage == "chunked" else streamed_inverse
            inverse = source = build(A, indices, self.damping, chunk_size=self.chunk_size or 1)
        unit = eps(inverse.like)

        def run(b: Array) -> Solution:
            check_system(A, b, self.damping)
            if self.refine == 0:
                cost = apply_cost(inverse, block_width(b))
                return direct_solution(A, self.damping, b, inverse @ b, cost)
            # From zero: the first step is the plain answer with the best length.
            steps = self.refine + 1
            solution = cg(A, b, damping=self.damping, preconditioner=inverse, max_steps=steps)
            return with_apply_cost(solution, inverse, b)

        return PreparedInverse(
            A,
            run,
            apply=None if self.refine else inverse.__matmul__,
            num_products=source.num_products,
            rank=source.rank,
            negative_curvature=is_indefinite(source.core_eigenvalues, self.damping, unit),
            nystrom_inverse=inverse,
            preconditioner=inverse,
        )


@dataclass(frozen=True)
class NystromCG:
    """Conjugate gradients, preconditioned by a Nyström approximation.

    Parameters
    ----------
    rank, sampling, indices
        As in :class:`Nystrom`.
    damping : float
        0 or more.
    rtol, max_steps
        As in :func:`lowrank_inverse.cg`.

    Notes
    -----
    The preconditioner is that of [1]_ with the eigenpairs of the column-sampled H_k. Where the
    columns show negative curvature, eigenvalues of W up to 1e-2 of the largest are dropped.

    References
    ----------
    .. [1] Z. Frangella, J. A. Tropp, M. Udell. Randomized Nyström Preconditioning. SIAM J.
       Matrix Anal. Appl. 44, 2023.
    """

    rank: int = 20
    damping: Any = 0.0
    sampling: str = "uniform"
    rtol: float = 1e-5
    max_steps: int | None = None
    indices: Any = None

    def __post_init__(self) -> None:
        _check_columns(self)
        _check_iteration(self)

    @quietly
    def prepare(self, A: Any, *, rng: RNG = None, state: Solution | None = None) -> PreparedInverse:
        """Return the inverse of ``A + damping * I``, started from ``state.value`` if given.

        The columns of a :class:`lowrank_inverse.HypergradientState` serve again while they can.
        """
        A = aslinearoperator(A)

        def compute() -> tuple[Array, Any]:
            indices = _indices(self, A, rng)
            C = columns(A, indices)
            check_finite("columns of A", C)
            return C, indices

        rank = self.rank if self.indices is None else len(self.indices)
        factor = kept_factor(state, int(A.shape[0]), rank, compute)
        approx = NystromApproximation(
            factor.columns, factor.indices, indefinite_pivot_rtol=PRECONDITIONER_PIVOT_RTOL
        )
        preconditioner = NystromPreconditioner(approx, self.damping)

        def run(b: Array) -> Solution:
            return cg(
                A,
                b,
                damping=self.damping,
                x0=start(state, b),
                preconditioner=preconditioner,
                rtol=self.rtol,
                max_steps=self.max_steps,
            )

        return PreparedInverse(
            A,
            run,
            num_products=factor.num_products,
            rank=approx.rank,
            factor=factor,
            negative_curvature=is_indefinite(
                approx.core_eigenvalues, self.damping, eps(approx.columns)
            ),
            nystrom_inverse=approx.inverse(self.damping) if _is_positive(self.damping) else None,
            preconditioner=preconditioner,
        )


@dataclass(frozen=True)
class CG:
    """Conjugate gradients; parameters as in :func:`lowrank_inverse.cg`."""

    damping: Any = 0.0
    rtol: float = 1e-5
    atol: float = 0.0
    max_steps: int | None = None

    def __post_init__(self) -> None:
        _check_iteration(self)
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


@dataclass(frozen=True)
class Exact:
    """The dense (pseudo-)inverse from all n columns: for small n, and to compare with.

    Eigenvalues of ``A + damping * I`` within rounding of 0 (``n * eps`` times the largest) are
    dropped.
    """

    damping: Any = 0.0

    def __post_init__(self) -> None:
        check_scalar("damping", self.damping)

    def prepare(self, A: Any, *, rng: RNG = None, state: Solution | None = None) -> PreparedInverse:
        """Return the inverse of ``A + damping * I``; `state` is not used."""
        A = aslinearoperator(A)
        n = int(A.shape[0])
        H = columns(A, np.arange(n))
        check_finite("columns of A", H)
        xp = array_namespace(H)
        w, V = xp.linalg.eigh(symmetric_part(astype(H, wide_dtype(H))))
        # Without a damping, what may be the rounding of H is taken for zero.
        unit = xp.finfo(w.dtype).eps if _is_positive(self.damping) else eps(H)
        w = w + self.damping
        noise = n * float(unit) * xp.max(xp.abs(w))
        keep = xp.abs(w) > noise
        reciprocal = xp.where(keep, 1 / xp.where(keep, w, xp.ones_like(w)), xp.zeros_like(w))

        def apply(b: Array) -> Array:
            rotated = V.T @ astype(b, V.dtype)
            scaled = rotated * (reciprocal if b.ndim == 1 else reciprocal[:, None])
            return astype(V @ scaled, b.dtype)

        def run(b: Array) -> Solution:
            check_system(A, b, self.damping)
            return direct_solution(A, self.damping, b, apply(b), 0)

        return PreparedInverse(
            A,
            run,
            apply=apply,
            num_products=n,
            rank=concrete(xp.sum(astype(keep, xp.int32), dtype=xp.int32)),
            negative_curvature=concrete(xp.any(w < -n * eps(H) * xp.max(xp.abs(w)))),
        )


@dataclass(frozen=True)
class Identity:
    """``scale * I`` in place of the inverse: the baseline that costs nothing."""

    scale: Any = 1.0

    def __post_init__(self) -> None:
        check_scalar("scale", self.scale, positive=True)

    def prepare(self, A: Any, *, rng: RNG = None, state: Solution | None = None) -> PreparedInverse:
        """Return ``scale * I``; `rng` and `state` are not used."""
        A = aslinearoperator(A)

        def run(b: Array) -> Solution:
            check_system(A, b, 0.0)
            return direct_solution(A, 0.0, b, self.scale * b, 0)

        return PreparedInverse(A, run, apply=lambda b: self.scale * b)


def _check_columns(settings: Any) -> None:
    check_count("rank", settings.rank)
    check_sampling(settings.sampling)
    if settings.indices is not None and not is_traced(settings.indices):
        indices = tuple(check_indices(settings.indices, sys.maxsize).tolist())
        object.__setattr__(settings, "indices", indices)


def _check_iteration(settings: Any) -> None:
    check_scalar("damping", settings.damping)
    check_scalar("rtol", settings.rtol)
    if settings.max_steps is not None:
        check_count("max_steps", settings.max_steps)


def _indices(settings: Any, A: Any, rng: RNG) -> np.ndarray:
    if settings.indices is not None:
        return choose_indices(A, None, settings.indices, settings.sampling, rng)
    return choose_indices(A, settings.rank, None, settings.sampling, rng)


def _is_positive(damping: Any) -> bool:
    return is_traced(damping) or concrete(damping) > 0
