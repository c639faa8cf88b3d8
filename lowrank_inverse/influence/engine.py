"""The workings of influence functions: data, blocks, solves and their factor."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import RNG, Array, Data, OperatorLike, Scalar, SolveFunction, Solver
from lowrank_inverse.arrays.checks import all_finite, check_count, check_rng
from lowrank_inverse.arrays.conversion import to_host
from lowrank_inverse.arrays.linalg import column_norm
from lowrank_inverse.arrays.spread import rows_beside
from lowrank_inverse.estimators.trace import auto_damping
from lowrank_inverse.influence.backend import Alone, Backend, Together
from lowrank_inverse.influence.damped_solver import (
    Factor,
    KeptColumns,
    checked_damping,
    checked_ridge,
)
from lowrank_inverse.influence.dataset import Examples
from lowrank_inverse.influence.loss_checks import check_gradients, check_unchanged, measure_losses
from lowrank_inverse.influence.plan import (
    BLOCKS,
    DATA_SHARE,
    JVP_LEAST,
    JVP_MOST,
    SOLVE_SHARE,
    TRIALS,
    Plan,
    ProductCosts,
    UnitCosts,
    dense_pays,
    make_plan,
    most_pairs,
    product_costs,
    reason,
    unit_costs,
)
from lowrank_inverse.results.solution import Reason, Solution
from lowrank_inverse.solvers.direct import Exact
from lowrank_inverse.solvers.iterative import CG
from lowrank_inverse.solvers.preconditioned import NystromCG

CURVATURES = {
    "ggn": "Gauss-Newton matrix",
    "hessian": "Hessian",
    "empirical_fisher": "empirical Fisher matrix",
}
MEMORY_BUDGET = 2**30
GRADIENTS = 64  # taken at a time: more of them fall out of a processor's cache
WARN_FACTOR = 10.0


class Workings:
    """What the public methods of an influence function are made of."""

    def __init__(
        self,
        backend: Backend,
        train: Data,
        *,
        curvature: str,
        solver: Solver | SolveFunction | None,
        ridge: Any,
        damping: Scalar,
        batch_size: int | None,
        rng: RNG,
        memory_budget: int,
        progress: bool,
    ) -> None:
        if curvature not in CURVATURES:
            names = ", ".join(map(repr, CURVATURES))
            raise ValueError(f"`curvature` must be one of {names}; got {curvature!r}.")
        if batch_size is not None:
            check_count("batch_size", batch_size)
        self._backend, self._curvature = backend, curvature
        self._ridge = checked_ridge(backend.ridge(ridge))
        self._batch_size, self._progress = batch_size, bool(progress)
        self._memory_budget = check_count("memory_budget", memory_budget)
        self._seeded = rng is not None
        if isinstance(rng, bool) or not isinstance(rng, (int, np.integer)):
            rng = int(check_rng(rng).integers(2**32))
        self._seed = int(rng)
        self._is_default = solver is None
        if solver is None:
            solver = CG()
            if damping is None:
                damping = 0.0 if to_host(self._ridge).min() > 0 else "auto"
        self._solver: Any = solver
        self._measures: dict[Any, Backend] = {}  # the latest alone
        self._group: Together = getattr(backend, "group", None) or Alone()
        self._group.agree(solver=self._solver, curvature=curvature, damping=damping, rng=self._seed)
        self._train = self._read(train, "train")
        losses: Any = self._train.losses
        counts = self._group.everyone((self._train.num, float(losses.sum(dtype=np.float64))))
        self._num_train = sum(num for num, _ in counts)
        self._loss = sum(loss for _, loss in counts) / self._num_train
        self._operator = backend.operator(self._train, curvature)
        self._check_total(self._operator.gradient, backend, self._train)
        self._source: Any = None
        if curvature == "hessian" and backend.has_outputs and isinstance(solver, NystromCG):
            self._source = backend.operator(self._train, "ggn")
        self._unit_costs: UnitCosts | None = None
        self._product: ProductCosts | None = None
        self._solution: tuple[np.ndarray | None, np.ndarray | None, str] | None = None
        damping = getattr(solver, "damping", 0.0) if damping is None else damping
        self._set_damping(damping, None)

    def _set_damping(self, damping: Scalar, kept: KeptColumns | None) -> None:
        damping = checked_damping(damping)
        if damping == "auto":
            damping = auto_damping(self._source or self._operator, self._seed)
        self._damping = float(damping)
        self._factor = self._factor_of(self._operator, kept)

    def _factor_of(self, A: OperatorLike, kept: KeptColumns | None = None) -> Factor:
        return Factor(
            A,
            self._solver,
            ridge=self._ridge,
            damping=self._damping,
            seed=self._seed,
            name=CURVATURES[self._curvature],
            source=self._source,
            kept=kept,
            recycle=self._recycle(),
        )

    def _factor_without(self, weights: np.ndarray) -> Factor:
        """Return the factor for the curvature of some of the examples."""
        A = self._backend.operator(self._train, self._curvature, weights)
        if not isinstance(self._solver, NystromCG):
            return self._factor_of(A)
        _ = self._factor.inverse  # its columns precondition the smaller problem too
        kept = KeptColumns(A, self._source or self._operator)
        kept.indices, kept.kept = self._factor.A.indices, self._factor.A.kept
        return self._factor_of(A, kept)

    def _read(self, data: Data, name: str, backend: Backend | None = None) -> Examples:
        backend = self._backend if backend is None else backend

        def read() -> Examples:
            budget = self._memory_budget // DATA_SHARE
            examples = backend.examples(data, name, self._batch_size, budget)
            measure_losses(backend, examples)
            return examples

        return self._group.together(read)

    def _check_unchanged(self) -> None:
        self._group.together(lambda: check_unchanged(self._backend, self._train))

    def _measure(self, query_loss: Callable[..., Any] | None) -> Backend:
        """Return the backend for the function of a query."""
        if query_loss is None:
            return self._backend
        if query_loss not in self._measures:
            self._measures = {query_loss: self._backend.measuring(query_loss)}
        return self._measures[query_loss]

    @property
    def _itemsize(self) -> int:
        return int(self._backend.like.dtype.itemsize)

    def _width(self) -> int:
        """Right-hand sides solved for at a time."""
        each = SOLVE_SHARE * BLOCKS * self._backend.n * self._itemsize
        return max(1, self._memory_budget // each)

    def _recycle(self) -> int:
        """Ritz pairs to keep of earlier solves."""
        if not isinstance(self._solver, CG) or self._solver.preconditioner is not None:
            return 0
        n, num = self._backend.n, self._num_train
        if not self._is_default:
            return min(n, self._solver.recycle)
        return most_pairs(n, num, self._itemsize, self._memory_budget)

    def _num_gradients(self) -> int:
        """Gradients of single examples taken at a time."""
        return max(1, min(GRADIENTS, self._width() * BLOCKS // 4))

    def _begin(self, num_solves: int, num_scores: int) -> None:
        """Print the plan, if asked for, and take the solver that costs least."""
        if self._progress:
            print(self._plan(num_solves, num_scores), file=sys.stderr)
        solver = self._solver_for(num_solves)
        if solver is not self._solver:
            spent, self._solver = self._factor.A.num_products, solver
            self._factor = self._factor_of(self._operator)
            self._factor.A.num_products = spent

    def _costs(self) -> UnitCosts:
        """Measure once what the scores of a training example take."""
        if self._unit_costs is None:
            self._unit_costs = unit_costs(self._backend, self._train, self._num_gradients())
        return self._unit_costs

    def _jvp_pays(self, width: int, num_batches: int) -> bool:
        """Whether directional derivatives give the scores of `width` queries faster."""
        if num_batches < TRIALS or width <= JVP_LEAST:  # to time both would not pay
            return width <= JVP_MOST
        costs = self._costs()
        return costs.scores(width, jvp=True) <= costs.scores(width, jvp=False)

    def _plan(self, num_solves: int, num_scores: int) -> Plan:
        n, solver, costs = self._backend.n, self._solver_for(num_solves), self._costs()
        if self._product is None:
            num_bytes = self._backend.product_bytes(self._train.get(0), self._curvature)
            self._product = product_costs(self._backend, self._operator, num_bytes)
        width = min(self._width(), num_solves)
        return make_plan(
            solver,
            n,
            self._itemsize,
            why=reason(solver, n, num_solves, is_default=self._is_default),
            jvp=self._jvp_pays(width, len(self._train)),
            train=self._train,
            num_solves=num_solves,
            width=width,
            num_scores=num_scores,
            recycle=self._recycle(),
            product=self._product,
            costs=costs,
        )

    def _solver_for(self, num_solves: int) -> Any:
        """Return the solver for so many right-hand sides."""
        kept = not self._is_default or isinstance(self._solver, Exact)
        n, size, budget = self._backend.n, self._itemsize, self._memory_budget
        pays = dense_pays(self._solver, n, num_solves, size, budget)
        return self._solver if kept or not pays else Exact()

    def _solve(self, b: Array, factor: Factor | None = None) -> Solution:
        factor = self._factor if factor is None else factor
        solution = factor.solve(b)
        norm, of_b = to_host(solution.residual_norm), to_host(column_norm(b))
        residual = np.where(of_b > 0, norm / np.where(of_b > 0, of_b, 1), norm)
        self._solution = residual, to_host(solution.num_steps), solution.message
        if not np.all(np.isfinite(residual)):
            raise ValueError(
                f"a product with the {factor.name} is not finite, though the gradients are. Look "
                "for a root, a norm or an absolute value at 0 in the loss, whose second derivative "
                "is not finite, or for an overflow, which float64 avoids."
            )
        rtol = getattr(factor.settings, "rtol", None)
        short = ~to_host(solution.converged) & (to_host(solution.reason) != Reason.DIRECT)
        if rtol is not None and np.any(short & ~(residual <= WARN_FACTOR * rtol)):
            warnings.warn(
                f"The solve did not converge: {solution.message}; the largest relative residual is "
                f"{np.max(residual):.1e}, rtol is {rtol:.1e}. Raise the damping, `rank` or "
                "`max_steps` of the solver, or use float64.",
                RuntimeWarning,
                stacklevel=4,
            )
        return solution

    def _groups(self, examples: Examples) -> Iterator[tuple[int, list[Any]]]:
        """Yield start and batches of as many examples as are solved for at a time."""
        width = self._width()
        held: list[Any] = []
        first = count = 0
        for _, batch in examples.parts(width):
            size = examples.size(batch)
            if held and count + size > width:
                yield first, held
                held, first, count = [], first + count, 0
            held.append(batch)
            count += size
        yield first, held

    def _gradients(
        self, backend: Backend, examples: Examples, first: int, batches: list[Any]
    ) -> Array:
        """Return the gradients of the examples from `first` on, shape (n, size of the batches)."""

        def taken() -> Array:
            blocks = [backend.gradients(batch) for batch in batches]
            G = array_namespace(blocks[0]).concat(blocks, axis=1) if len(blocks) > 1 else blocks[0]
            check_gradients(G, examples, first)
            return G

        return rows_beside(self._group.together(taken), self._backend.like)

    def _check_total(self, total: Array, backend: Backend, examples: Examples) -> None:
        """Name an example whose gradient makes the sum of all no number."""
        if not bool(all_finite(total)):

            def look() -> None:
                for start, batch in examples.parts(self._num_gradients()):
                    check_gradients(backend.gradients(batch), examples, start)

            self._group.together(look)
