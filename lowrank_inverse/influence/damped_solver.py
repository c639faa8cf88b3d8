"""The damped inverse of a mean curvature, for several dampings from one set of columns."""

from __future__ import annotations

import math
from dataclasses import asdict, is_dataclass, replace
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import Array, Indices, OperatorLike, Scalar, SolveFunction, Solver
from lowrank_inverse.arrays.checks import check_finite, check_scalar, describe
from lowrank_inverse.arrays.conversion import concrete, eps, is_array, to_host
from lowrank_inverse.estimators.extreme_eigenvalues import lowest_ritz
from lowrank_inverse.iterative.recycling import joined_pairs
from lowrank_inverse.operators.base import Operator
from lowrank_inverse.operators.diagonal import ShiftedOperator
from lowrank_inverse.operators.function import aslinearoperator
from lowrank_inverse.operators.product import block_width
from lowrank_inverse.results.solution import Pairs, Reason, Solution, ended
from lowrank_inverse.solvers.base import PreparedInverse, as_settings
from lowrank_inverse.solvers.direct import Exact, Identity
from lowrank_inverse.solvers.iterative import CG, Neumann
from lowrank_inverse.solvers.low_rank import Nystrom
from lowrank_inverse.solvers.preconditioned import NystromCG

MARGIN = 1.2
SETTINGS = (
    CG,
    Exact,
    Identity,
    Neumann,
    Nystrom,
    NystromCG,
)


class KeptColumns(Operator):
    """The products of one operator and, kept once computed, the columns of another.

    Where all columns are kept, products are taken with them, and cost the operator nothing. Of
    the products of earlier solves it keeps Ritz pairs.

    Attributes
    ----------
    num_products : int
        With either, so far.
    """

    def __init__(self, A: OperatorLike, source: Any = None, *, keep: bool = True) -> None:
        self.A = aslinearoperator(A)
        self.source = self.A if source is None else aslinearoperator(source)
        self.shape, self.dtype, self.like = self.A.shape, self.A.dtype, self.A.like
        self.num_products, self.keep = 0, keep
        self.indices: np.ndarray | None = None
        self.kept: Array | None = None
        self.pairs: Pairs | None = None
        self.fresh: Pairs | None = None
        """Directions of the latest solve, with their products."""

    def recycled(self, size: int) -> Pairs | None:
        """Return up to `size` Ritz pairs of all solves so far."""
        if self.fresh is not None:
            self.pairs, self.fresh = joined_pairs(self.pairs, self.fresh, size), None
        return self.pairs

    def _multiply(self, block: Array) -> Array:
        if self.kept is not None and self.source is self.A and self._is_whole():
            return self.kept @ block
        self.num_products += block_width(block)
        return self.A @ block

    def _is_whole(self) -> bool:
        order = np.arange(self.shape[0])
        return self.indices is not None and np.array_equal(self.indices, order)

    def columns(self, indices: Indices) -> Array:
        """Return columns of the source, shape (n, k)."""
        indices = np.asarray(to_host(indices) if is_array(indices) else indices)
        if self.kept is None or self.indices is None or not np.array_equal(indices, self.indices):
            columns = self.source.columns(indices)
            self.num_products += indices.size
            if not self.keep:
                return columns
            self.indices, self.kept = indices, columns
        return self.kept

    def diagonal(self) -> Array:
        """Return the diagonal of the source, shape (n,)."""
        return self.source.diagonal()


class Factor:
    """``(A + (ridge + damping) I)^{-1}`` by the settings of a solver.

    Parameters
    ----------
    A : linear operator, shape (n, n)
    solver : settings, or callable ``solve(matvec, b)``
    ridge : float, or array, shape (n,)
    damping : float
    seed : int
        Of the columns.
    name : str
        What messages call `A`.
    source : linear operator, optional
        Positive semidefinite, with columns for the preconditioner of NystromCG.
    kept : KeptColumns, optional
        Of another factor of the same `A`.
    recycle : int
        Ritz pairs of earlier solves to precondition conjugate gradients with.
    """

    def __init__(
        self,
        A: OperatorLike,
        solver: Solver | SolveFunction,
        *,
        ridge: Scalar,
        damping: float,
        seed: int,
        name: str,
        source: Any = None,
        kept: KeptColumns | None = None,
        recycle: int = 0,
    ) -> None:
        self.solver, self.ridge, self.damping = solver, ridge, damping
        self.seed, self.name, self.recycle = seed, name, recycle
        settings: Any = as_settings(solver)
        stored = getattr(settings, "memory", "stored") == "stored"
        source = source if isinstance(settings, NystromCG) else None
        self.A = KeptColumns(A, source, keep=stored) if kept is None else kept
        if is_dataclass(settings) and hasattr(settings, "damping"):
            settings = replace(settings, damping=0.0)  # type: ignore[type-var]  # it is added to A
        self.settings = settings
        self._inverse: PreparedInverse | None = None

    @property
    def inverse(self) -> PreparedInverse:
        """What the settings become, prepared when first used, and after each solve to recycle."""
        if self._inverse is None or (self.recycle and self.A.fresh is not None):
            A = ShiftedOperator(self.A, self.ridge + self.damping)
            options = {"pairs": self.A.recycled(self.recycle)} if self.recycle else {}
            self._inverse = self.settings.prepare(A, rng=self.seed, **options)
        return self._inverse

    def recall(self, pairs: Pairs | None) -> None:
        """Precondition the next solve with these pairs in the place of those kept."""
        self.A.pairs, self.A.fresh, self._inverse = pairs, None, None

    def solve(self, b: Array) -> Solution:
        """Solve for all columns of `b`; raise if the matrix proved to be indefinite."""
        indefinite = self.inverse.negative_curvature
        solution: Solution | None = None
        if not (indefinite is not None and bool(indefinite)):
            solution = self.inverse.solve(b, keep=min(self.recycle, int(b.shape[0])))
            self.A.fresh = solution.directions
            negative = ended(solution.reason, Reason.NEGATIVE_CURVATURE)
            indefinite = bool(array_namespace(negative).any(negative))
        if indefinite or solution is None:
            raise ValueError(self._indefinite(b))
        return solution

    def _indefinite(self, b: Array) -> str:
        value, residual, largest = lowest_ritz(ShiftedOperator(self.A, self.ridge), self.seed, b)
        enough = max(MARGIN * (residual - value), eps(b) ** 0.5 * largest)
        lowest = float(to_host(self.ridge).min())
        parts = [f"ridge = {lowest:g}"] if lowest else []
        parts += [f"damping = {self.damping:g}"]
        matrix = f"the {self.name} (with {' and '.join(parts)})"
        if value + self.damping > 0:  # rounding, or the search was too short
            enough = max(enough, 2 * (lowest + self.damping))
            matrix = f"{matrix} has a direction of negative curvature; its"
        else:
            matrix = f"{matrix} is not positive definite; its"
        return (
            f"{matrix} lowest Ritz value is {value + self.damping:.3g}. A damping of "
            f"{_rounded_up(enough):.2g} would do; curvature='ggn' is never negative for a loss "
            "that is convex in the outputs; or train the model further."
        )


def to_record(settings: Any) -> dict[str, Any] | None:
    """Return settings, or None for the default, as plain values for a file."""
    if settings is None:
        return None
    if not isinstance(settings, SETTINGS):
        raise TypeError(
            f"`solver` must be settings such as NystromCG(...) to be written to disk; got "
            f"{describe(settings)}."
        )
    return {"name": type(settings).__name__, **asdict(settings)}


def from_record(record: dict[str, Any] | None) -> Any:
    """Undo `to_record`."""
    if record is None:
        return None
    fields = dict(record)
    kinds = {kind.__name__: kind for kind in SETTINGS}
    return kinds[fields.pop("name")](**fields)


def checked_damping(damping: Scalar) -> Any:
    """Return `damping` if it is a number of 0 or more, or "auto"."""
    if isinstance(damping, str):
        if damping != "auto":
            raise ValueError(f"`damping` must be a number or 'auto'; got {damping!r}.")
        return damping
    check_scalar("damping", damping)
    return float(concrete(damping))


def checked_ridge(ridge: Any) -> Any:
    """Return a ridge if it is finite and 0 or more, a number as a float."""
    if not is_array(ridge) or ridge.ndim == 0:
        check_scalar("ridge", ridge)
        return float(ridge)
    check_finite("ridge", ridge)
    if to_host(ridge).min() < 0:
        raise ValueError("`ridge` must be >= 0 everywhere; it holds negative entries.")
    return ridge


def _rounded_up(x: float) -> float:
    """Round a positive number up to two digits."""
    if not (x > 0 and math.isfinite(x)):
        return x
    unit = 10.0 ** (math.floor(math.log10(x)) - 1)
    return math.ceil(x / unit) * unit
