"""The damped inverse of a mean curvature, for several dampings from one set of columns."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse import solvers
from lowrank_inverse._array import (
    astype,
    check_scalar,
    concrete,
    describe,
    eps,
    is_array,
    like,
    to_host,
)
from lowrank_inverse._operator import Operator
from lowrank_inverse._typing import Array
from lowrank_inverse._vectors import column_norm, dot
from lowrank_inverse.operators import aslinearoperator, shifted
from lowrank_inverse.prepared import PreparedInverse, block_width
from lowrank_inverse.solution import Reason, Solution, ended
from lowrank_inverse.solve import as_settings

LANCZOS_STEPS = 100
TRACE_PROBES = 16
AUTO_FRACTION = 0.1
MARGIN = 1.2
RITZ_RTOL = 0.01
SETTINGS = (
    solvers.CG,
    solvers.Exact,
    solvers.Identity,
    solvers.Neumann,
    solvers.Nystrom,
    solvers.NystromCG,
)


class KeptColumns(Operator):
    """The products of one operator and, kept once computed, the columns of another.

    Attributes
    ----------
    num_products : int
        With either, so far.
    """

    def __init__(self, A: Any, source: Any = None, *, keep: bool = True) -> None:
        self.A = aslinearoperator(A)
        self.source = self.A if source is None else aslinearoperator(source)
        self.shape, self.dtype, self.like = self.A.shape, self.A.dtype, self.A.like
        self.num_products, self.keep = 0, keep
        self.indices: np.ndarray | None = None
        self.kept: Array | None = None

    def _multiply(self, block: Array) -> Array:
        self.num_products += block_width(block)
        return self.A @ block

    def columns(self, indices: Any) -> Array:
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
    """``(A + (l2 + damping) I)^{-1}`` by the settings of a solver.

    Parameters
    ----------
    A : linear operator, shape (n, n)
    solver : settings, or callable ``solve(matvec, b)``
    l2, damping : float
    seed : int
        Of the columns.
    name : str
        What messages call `A`.
    source : linear operator, optional
        Positive semidefinite, with columns for the preconditioner of NystromCG.
    kept : KeptColumns, optional
        Of another factor of the same `A`.
    """

    def __init__(
        self,
        A: Any,
        solver: Any,
        *,
        l2: float,
        damping: float,
        seed: int,
        name: str,
        source: Any = None,
        kept: KeptColumns | None = None,
    ) -> None:
        self.solver, self.l2, self.damping, self.seed, self.name = solver, l2, damping, seed, name
        settings = as_settings(solver)
        stored = getattr(settings, "storage", "stored") == "stored"
        source = source if isinstance(settings, solvers.NystromCG) else None
        self.A = KeptColumns(A, source, keep=stored) if kept is None else kept
        self.takes_damping = solvers.has_damping(settings)
        if self.takes_damping:
            settings = replace(settings, damping=l2 + damping)
        self.settings = settings
        self._inverse: PreparedInverse | None = None

    @property
    def inverse(self) -> PreparedInverse:
        """What the settings become, prepared when first used."""
        if self._inverse is None:
            A = self.A if self.takes_damping else shifted(self.A, self.l2 + self.damping)
            self._inverse = self.settings.prepare(A, rng=self.seed)
        return self._inverse

    def solve(self, b: Array) -> Solution:
        """Solve for all columns of `b`; raise if the matrix proved to be indefinite."""
        indefinite = self.inverse.negative_curvature
        solution: Solution | None = None
        if not (indefinite is not None and bool(indefinite)):
            solution = self.inverse.solve(b)
            negative = ended(solution.reason, Reason.NEGATIVE_CURVATURE)
            indefinite = bool(array_namespace(negative).any(negative))
        if indefinite or solution is None:
            raise ValueError(self._indefinite(b))
        return solution

    def _indefinite(self, b: Array) -> str:
        total = self.l2 + self.damping
        value, residual, largest = lowest_ritz(self.A, self.seed, b)
        enough = max(MARGIN * (residual - value), eps(b) ** 0.5 * largest)
        parts = [f"the {self.name}"]
        parts += [f"l2 = {self.l2:g}"] if self.l2 else []
        parts += [f"damping = {self.damping:g}"]
        matrix = f"{parts[0]} (with {' and '.join(parts[1:])})"
        if value + total > 0:  # rounding, or the search was too short
            enough = max(enough, 2 * total)
            matrix = f"{matrix} has a direction of negative curvature; its"
        else:
            matrix = f"{matrix} is not positive definite; its"
        return (
            f"{matrix} lowest Ritz value is {value + total:.3g}. A damping of "
            f"{_rounded_up(enough - self.l2):.2g} would do; curvature='ggn' is never negative for "
            "a loss that is convex in the outputs; or train the model further."
        )


def auto_damping(A: Any, seed: int) -> float:
    """Return a tenth of the mean eigenvalue, by Hutchinson's estimate of the trace."""
    A = aslinearoperator(A)
    n = int(A.shape[0])
    num = min(TRACE_PROBES, n)
    signs = np.random.default_rng(seed).integers(0, 2, (n, num)) * 2.0 - 1.0
    probes = like(signs, A.like)
    mean = float(to_host(dot(probes, A @ probes)).astype(np.float64).mean()) / n
    if not mean > 0:
        raise ValueError(
            f"`damping` can be 'auto' only where the curvature has a positive mean eigenvalue; it "
            f"is about {mean:.3g}. Give a number."
        )
    return AUTO_FRACTION * mean


def lowest_ritz(A: Any, seed: int, b: Array) -> tuple[float, float, float]:
    """Return the lowest Ritz value of `A`, its residual, and the largest absolute Ritz value.

    Lanczos [1]_ with full orthogonalisation, from a random vector, until the residual is a
    hundredth of a value below zero. There is an eigenvalue within the residual of the Ritz value.

    References
    ----------
    .. [1] C. Lanczos. An Iteration Method for the Solution of the Eigenvalue Problem of Linear
       Differential and Integral Operators. J. Res. Nat. Bur. Standards 45, 1950.
    """
    n = int(A.shape[0])
    xp = array_namespace(b)
    q = like(np.random.default_rng(seed).standard_normal(n), b)
    basis = [q / column_norm(q)]
    diagonal: list[float] = []
    beside: list[float] = []
    while True:
        w = A @ basis[-1]
        diagonal.append(float(concrete(dot(basis[-1], w))))
        Q = xp.stack(basis, axis=1)
        for _ in range(2):
            w = w - Q @ (Q.T @ w)
        norm = float(concrete(column_norm(w)))
        T = np.diag(diagonal) + np.diag(beside, 1) + np.diag(beside, -1)
        values, vectors = np.linalg.eigh(T)
        residual, largest = norm * abs(vectors[-1, 0]), float(np.abs(values).max())
        found = values[0] < 0 and residual < RITZ_RTOL * -values[0]
        spent = len(basis) == min(n, LANCZOS_STEPS) or norm <= n * eps(b) * largest
        if found or spent or not math.isfinite(norm):
            return float(values[0]), float(residual), largest
        beside.append(norm)
        basis.append(astype(w / norm, b.dtype))


def to_record(settings: Any) -> dict[str, Any]:
    """Return settings as plain values for a file."""
    if not isinstance(settings, SETTINGS):
        raise TypeError(
            f"`solver` must be settings such as NystromCG(...) for what is written to disk; got "
            f"{describe(settings)}."
        )
    return {"name": type(settings).__name__, **asdict(settings)}


def from_record(record: dict[str, Any]) -> Any:
    """Undo `to_record`."""
    fields = dict(record)
    kinds = {kind.__name__: kind for kind in SETTINGS}
    return kinds[fields.pop("name")](**fields)


def checked_damping(damping: Any) -> Any:
    """Return `damping` if it is a number of 0 or more, or "auto"."""
    if isinstance(damping, str):
        if damping != "auto":
            raise ValueError(f"`damping` must be a number or 'auto'; got {damping!r}.")
        return damping
    check_scalar("damping", damping)
    return float(concrete(damping))


def _rounded_up(x: float) -> float:
    """Round a positive number up to two digits."""
    if not (x > 0 and math.isfinite(x)):
        return x
    unit = 10.0 ** (math.floor(math.log10(x)) - 1)
    return math.ceil(x / unit) * unit
