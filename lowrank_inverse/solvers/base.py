"""Prepared inverses, and functions that take the place of solver settings."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, TypeVar

from array_api_compat import array_namespace

from lowrank_inverse._typing import (
    RNG,
    Array,
    LinearOperator,
    OperatorLike,
    Scalar,
    SolveFunction,
    Solver,
)
from lowrank_inverse.arrays.checks import describe
from lowrank_inverse.arrays.control_flow import quietly
from lowrank_inverse.arrays.conversion import (
    astype,
    concrete,
    is_batched,
    is_traced,
    scalar_like,
)
from lowrank_inverse.arrays.linalg import add_scaled, column_norm, dot, times_diagonal
from lowrank_inverse.arrays.scale import column_scale
from lowrank_inverse.operators.differentiation import constant, implicit, noting, parts
from lowrank_inverse.operators.function import aslinearoperator
from lowrank_inverse.operators.product import ProductOnly, apply_cost, block_width
from lowrank_inverse.results.solution import Reason, Solution, check_system, code, tolerance
from lowrank_inverse.solvers.column_memory import MemoryPlan

if TYPE_CHECKING:
    from lowrank_inverse.low_rank.approximation import NystromApproximation

DEFAULT_RTOL = 1e-5


class PreparedInverse(ProductOnly):
    """An approximate inverse of ``A + damping * I``, as returned by ``settings.prepare(A)``.

    ``inverse @ b`` applies the inverse to `b`. ``inverse.solve(b)`` does the same and returns a
    `Solution` with diagnostics. Both are differentiable with respect to the same arrays as
    :func:`lowrank_inverse.solve`, and to the arrays in the settings.

    Attributes
    ----------
    num_products : int
        Number of products with A that the preparation took.
    rank : int or None
        Number of columns or eigenvalues kept; None if the method keeps none.
    negative_curvature : bool or None
        Whether the preparation proved ``A + damping * I`` indefinite; None if it did not check.
    nystrom_inverse : operator or None
        ``(H_k + damping * I)^{-1}`` of the Nyström approximation H_k, if there is one. Pass it to
        :func:`lowrank_inverse.certify` as `inverse`.
    preconditioner : operator or None
        The preconditioner that conjugate gradients use, if there is one.
    memory : MemoryPlan or None
        How the columns are stored, if there are any.
    approximation : NystromApproximation or None
        The approximation behind the preconditioner of `NystromCG`.
    asymmetry : float or None
        Largest absolute entry of ``W - W.T`` divided by that of W, where W holds the entries of A
        that were read.
    """

    def __init__(
        self,
        A: OperatorLike,
        run: Callable[..., Solution],
        *,
        apply: Callable[[Array], Array] | None = None,
        num_products: Any = 0,
        rank: Any = None,
        negative_curvature: Any = None,
        nystrom_inverse: Any = None,
        preconditioner: LinearOperator | None = None,
        memory: MemoryPlan | None = None,
        approximation: NystromApproximation | None = None,
        keeps: bool = False,
        asymmetry: Any = None,
    ) -> None:
        self.shape, self.dtype = tuple(A.shape), getattr(A, "dtype", None)
        self.like = getattr(A, "like", None)
        self._run, self._apply, self._keeps = run, apply, keeps
        self.num_products, self.rank = num_products, rank
        self.negative_curvature, self.nystrom_inverse = negative_curvature, nystrom_inverse
        self.preconditioner = preconditioner
        self.memory, self.approximation, self.asymmetry = memory, approximation, asymmetry
        self._system: tuple[Any, Scalar] | None = None
        self._make: Callable[[Any, Scalar], Any] | None = None
        self._noted = False

    def _about(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "num_products": self.num_products,
            "negative_curvature": self.negative_curvature,
        }

    @quietly
    def __matmul__(self, block: Array) -> Array:
        """Return what is taken for the solution, shape (n,) or (n, m)."""
        return self._differentiable(block, "block", self._applied).value

    @quietly
    def solve(self, b: Array, *, x0: Array | None = None, keep: int = 0) -> Solution:
        """Solve for `b`, of shape (n,) or (n, m).

        Conjugate gradients start from `x0`, which has the shape of `b`, and return the first `keep`
        directions with their products. Other methods ignore both arguments. `num_products` of the
        solution counts the products of this call only.
        """
        return self._differentiable(b, "b", self._solved, x0=x0, keep=keep * self._keeps)

    def _solved(self, b: Array, x0: Array | None, keep: int) -> Solution:
        return self._run(b, x0, keep) if keep else self._run(b, x0)

    def _applied(self, b: Array, x0: Array | None, keep: int) -> Solution:
        if self._apply is None:
            return self._run(b, None)
        untold: Any = None
        return Solution(self._apply(b), untold, untold, 0, untold, untold)

    def _differentiable(self, b: Array, name: str, run: Any, **start: Any) -> Any:
        self._check(b, name)
        if self._system is None:
            return run(b, start.get("x0"), start.get("keep", 0))
        make = self._make or (lambda A, damping: run)
        return implicit(*self._system, b, make, noted=self._noted, **start)


Prepare = TypeVar("Prepare", bound=Callable[..., PreparedInverse])


def differentiable(prepare: Prepare) -> Prepare:
    """Let what the `prepare` of settings returns have the derivatives of a solution.

    By the implicit function theorem: `prepare` itself is given constants.
    """

    @wraps(prepare)
    def prepared(
        settings: Any, A: OperatorLike, *, rng: RNG = 0, b: Array | None = None, **pairs: Any
    ) -> PreparedInverse:
        A, damping = aslinearoperator(A), settings.damping
        seen = None if is_batched(b) else constant(b)

        def fixed(A: OperatorLike, damping: Scalar, rng: RNG = rng) -> PreparedInverse:
            same = damping is settings.damping
            own = settings if same else replace(settings, damping=damping)
            return prepare(own, A, rng=rng, b=seen, **pairs)

        def each(A: OperatorLike, damping: Scalar) -> Any:
            one = fixed(A, damping, copy.deepcopy(rng))  # the same columns in its derivative

            def run(b: Array, x0: Array | None, keep: int) -> Solution:
                solution = one._solved(b, x0, keep)
                return solution._replace(num_products=one.num_products + solution.num_products)

            return run

        if any(is_batched(x) for x in parts((A, damping))[0]):  # one for each of the batch
            inverse = PreparedInverse(A, each)
            inverse._make = each
        else:
            with noting() as notes:
                inverse = fixed(constant(A), constant(damping))
            inverse._noted = bool(notes)
        inverse._system = A, damping
        return inverse

    return prepared  # type: ignore[return-value]


@quietly
def direct_solution(
    A: OperatorLike,
    damping: Scalar,
    b: Array,
    x: Array,
    num_products: int,
    *,
    scale: Array | None = None,
) -> Solution:
    """Say how good the `x` of a direct method is, after `num_products`, at one more a column.

    With a `scale`, of shape (n,), the residual must be small when its rows are scaled, too.
    """
    xp = array_namespace(b)
    product = add_scaled(A @ x, scalar_like(damping, b), x)
    r = b - product
    norm = column_norm(r)
    steps = astype(xp.zeros_like(norm), xp.int32)
    reason = xp.where(
        dot(x / column_scale(x), product) < 0,
        code(steps, Reason.NEGATIVE_CURVATURE),
        code(steps, Reason.DIRECT),
    )
    met = norm <= tolerance(b, DEFAULT_RTOL)
    if scale is not None:
        scale = astype(scale, b.dtype)
        wanted = tolerance(times_diagonal(scale, b), DEFAULT_RTOL)
        met = met & (column_norm(times_diagonal(scale, r)) <= wanted)
    reason = xp.where(met, code(steps, Reason.CONVERGED), reason)
    reason = xp.where(xp.isfinite(norm), reason, code(steps, Reason.NONFINITE))
    return Solution(
        value=x,
        residual_norm=norm,
        num_steps=steps,
        num_products=num_products + block_width(b),
        converged=met,
        reason=reason,
    )


@quietly
def better(solution: Solution, b: Array, x: Array, r: Array) -> Solution:
    """Return `solution` with the columns of another `x` where its residual `r` is smaller."""
    xp = array_namespace(b)
    norm = column_norm(r)
    smaller = ~(norm >= solution.residual_norm)
    smaller = smaller & xp.isfinite(norm)
    met = norm <= tolerance(b, DEFAULT_RTOL)
    reason = xp.where(
        met, code(solution.reason, Reason.CONVERGED), code(solution.reason, Reason.DIRECT)
    )
    return solution._replace(
        value=xp.where(smaller, x, solution.value),
        residual_norm=xp.where(smaller, norm, solution.residual_norm),
        converged=xp.where(smaller, met, solution.converged),
        reason=xp.where(smaller, reason, solution.reason),
    )


def with_apply_cost(solution: Solution, preconditioner: Any, b: Array) -> Solution:
    """Count the products that the preconditioner of a solve by CG from zero cost."""
    width = block_width(b)
    blocks = solution.num_products // width  # the preconditioner is applied as often
    extra = blocks * apply_cost(preconditioner, width)
    return solution._replace(num_products=solution.num_products + extra)


def is_positive(damping: Scalar) -> bool:
    """Whether `damping` is positive; a traced one is taken to be."""
    return is_traced(damping) or concrete(damping) > 0


class CallableSolver:
    """A function ``solve(matvec, b) -> x`` used in place of solver settings."""

    damping = 0.0

    def __init__(self, function: Callable[[Callable[[Array], Array], Array], Array]) -> None:
        self.function = function

    @differentiable
    def prepare(self, A: OperatorLike, *, rng: RNG = 0, b: Array | None = None) -> PreparedInverse:
        """Return an inverse that passes the product of `A` to the function and counts the calls."""
        return PreparedInverse(A, partial(_solve_by_function, self.function, A))


def _solve_by_function(function: Any, A: OperatorLike, b: Array, x0: Array | None) -> Solution:
    check_system(A, b, 0.0)
    calls = 0

    def matvec(v: Array) -> Array:
        nonlocal calls
        calls += block_width(v)
        return A @ v

    x = function(matvec, b)
    if not hasattr(x, "shape") or tuple(x.shape) != tuple(b.shape):
        raise ValueError(
            f"`solver` must return an array of the shape of b, {tuple(b.shape)}; got {describe(x)}."
        )
    solution = direct_solution(A, 0.0, b, x, 0)
    return solution._replace(num_products=solution.num_products + calls)


def as_settings(solver: Solver | SolveFunction) -> Any:
    """Return `solver` as settings, that is, an object with ``.prepare(A, rng=)``."""
    if not isinstance(solver, type):
        if callable(getattr(solver, "prepare", None)):
            return solver
        if callable(solver):
            return CallableSolver(solver)
    raise TypeError(
        "`solver` must be settings such as Nystrom(rank=20, damping=1e-2) or a function "
        f"solve(matvec, b); got {describe(solver)}."
    )
