"""What a solver's settings become for one operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from array_api_compat import array_namespace

from lowrank_inverse._array import astype, quietly, scalar_like
from lowrank_inverse._operator import ProductOnly
from lowrank_inverse._typing import Array
from lowrank_inverse._vectors import add_scaled, column_norm, column_scale, dot
from lowrank_inverse.memory import StoragePlan
from lowrank_inverse.solution import Reason, Solution, code, tolerance

DEFAULT_RTOL = 1e-5


class PreparedInverse(ProductOnly):
    """An approximate inverse of ``A + damping * I``: what ``settings.prepare(A)`` returns.

    ``inverse @ b`` applies it; ``inverse.solve(b)`` applies it and says how well it did.

    Attributes
    ----------
    num_products : int
        Products with A that the preparation cost.
    rank : int or None
        Columns or eigenvalues kept, where there are any.
    negative_curvature : bool or None
        Whether the preparation proved ``A + damping * I`` indefinite; None if it did not look.
    nystrom_inverse : operator or None
        ``(H_k + damping * I)^{-1}``, where there is one, for :func:`lowrank_inverse.certify`.
    storage : StoragePlan or None
        How the columns are held, where there are any; see
        :func:`lowrank_inverse.memory.plan_storage`.
    preconditioner : operator or None
        What stands for the inverse in conjugate gradients, where there is such a thing.
    factor : lowrank_inverse.kept.Factor or None
        The columns of a NystromCG, for the state of the next call.
    """

    def __init__(
        self,
        A: Any,
        run: Callable[[Array], Solution],
        *,
        apply: Callable[[Array], Array] | None = None,
        num_products: Any = 0,
        rank: Any = None,
        negative_curvature: Any = None,
        nystrom_inverse: Any = None,
        preconditioner: Any = None,
        storage: StoragePlan | None = None,
        factor: Any = None,
    ) -> None:
        self.shape, self.dtype = tuple(A.shape), getattr(A, "dtype", None)
        self.like = getattr(A, "like", None)
        self._run, self._apply = run, apply
        self.num_products, self.rank = num_products, rank
        self.negative_curvature, self.nystrom_inverse = negative_curvature, nystrom_inverse
        self.preconditioner, self.storage, self.factor = preconditioner, storage, factor

    def _multiply(self, block: Array) -> Array:
        return self._apply(block) if self._apply is not None else self._run(block).value

    def solve(self, b: Array) -> Solution:
        """Solve for `b` of shape (n,) or (n, m); `num_products` counts this call alone."""
        self._check(b, "b")
        return self._run(b)


@quietly
def direct_solution(A: Any, damping: Any, b: Array, x: Array, num_products: int) -> Solution:
    """Say how good the `x` of a direct method is, after `num_products`, at one more a column."""
    xp = array_namespace(b)
    product = add_scaled(A @ x, scalar_like(damping, b), x)
    norm = column_norm(b - product)
    steps = astype(xp.zeros_like(norm), xp.int32)
    reason = xp.where(
        dot(x / column_scale(x), product) < 0,
        code(steps, Reason.NEGATIVE_CURVATURE),
        code(steps, Reason.DIRECT),
    )
    met = norm <= tolerance(b, DEFAULT_RTOL)
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


def block_width(b: Array) -> int:
    """Count the columns of `b`, 1 for a vector."""
    return 1 if b.ndim == 1 else int(b.shape[1])


def apply_cost(operator: Any, width: int) -> int:
    """Count the products with A that applying `operator` to a block of `width` vectors costs."""
    cost = getattr(operator, "apply_cost", None)
    return int(cost(width)) if cost is not None else 0


def with_apply_cost(solution: Solution, preconditioner: Any, b: Array) -> Solution:
    """Count the products that the preconditioner of a solve by CG from zero cost."""
    width = block_width(b)
    blocks = solution.num_products // width  # the preconditioner is applied as often
    extra = blocks * apply_cost(preconditioner, width)
    return solution._replace(num_products=solution.num_products + extra)
