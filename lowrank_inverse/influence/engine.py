"""The workings of influence functions: data, blocks, solves and their factor."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import RNG, Array, Scalar, SolveFunction, Solver
from lowrank_inverse.arrays.checks import check_count, check_rng, check_scalar
from lowrank_inverse.arrays.conversion import to_host
from lowrank_inverse.arrays.linalg import column_norm
from lowrank_inverse.estimators.trace import auto_damping
from lowrank_inverse.influence.checkpoint import Store, digest, shown
from lowrank_inverse.influence.damped_solver import Factor, KeptColumns, checked_damping, to_record
from lowrank_inverse.influence.dataset import Examples
from lowrank_inverse.influence.loss_checks import check_losses
from lowrank_inverse.results.solution import Reason, Solution
from lowrank_inverse.solvers.low_rank import Nystrom, NystromCG

CURVATURES = {
    "ggn": "Gauss-Newton matrix",
    "hessian": "Hessian",
    "empirical_fisher": "empirical Fisher matrix",
}


METHODS = ("auto", "jvp", "gradients")
DEFAULT_RANK = 50
MEMORY_BUDGET = 2**30
BLOCKS = 16  # of n numbers a right-hand side: conjugate gradients, and the products inside
JVP_MOST = 24  # queries; for more, the gradient of each example is taken instead
GRADIENTS = 64  # taken at a time: more of them fall out of a processor's cache
WARN_FACTOR = 10.0


class Backend(Protocol):
    """What a framework supplies: derivatives of the loss of each example by n parameters."""

    n: int
    like: Array
    has_outputs: bool
    """Whether there is a Gauss-Newton matrix."""

    def losses(self, batch: Any) -> Array:
        """Return the loss of each example, as the user's function gives it."""
        ...

    def operator(self, examples: Examples, curvature: str, weights: Any = None) -> Any:
        """Return ``1 / num * sum_i w_i C_i`` as an operator with its `gradient`."""
        ...

    def gradients(self, batch: Any) -> Array:
        """Return the gradient of each example of a batch as a column, shape (n, size)."""
        ...

    def slopes(self, batch: Any, Z: Array) -> Array:
        """Return the inner products of all gradients with the columns of `Z`: (m, size)."""
        ...

    def total(self, examples: Examples, weights: np.ndarray) -> Array:
        """Return ``sum_i w_i g_i``, shape (n,)."""
        ...

    def vector(self) -> Array:
        """Return the parameters, shape (n,)."""
        ...

    def examples(self, data: Any, name: str, batch_size: int | None, budget: int) -> Examples:
        """Return a data set as examples."""
        ...


class Workings:
    """What the public methods of an influence function are made of."""

    def __init__(
        self,
        backend: Backend,
        train: Any,
        *,
        curvature: str,
        solver: Solver | SolveFunction | None,
        ridge: float,
        damping: Scalar,
        batch_size: int | None,
        rng: RNG,
        memory_budget: int,
        progress: bool,
    ) -> None:
        if curvature not in CURVATURES:
            names = ", ".join(map(repr, CURVATURES))
            raise ValueError(f"`curvature` must be one of {names}; got {curvature!r}.")
        check_scalar("ridge", ridge)
        if batch_size is not None:
            check_count("batch_size", batch_size)
        self._backend, self._curvature, self._ridge = backend, curvature, float(ridge)
        self._batch_size, self._progress = batch_size, bool(progress)
        self._memory_budget = check_count("memory_budget", memory_budget)
        self._seeded = rng is not None
        if isinstance(rng, (int, np.integer)) and not isinstance(rng, bool):
            self._seed = int(rng)
        else:
            self._seed = int(check_rng(rng).integers(2**32))
        if solver is None:
            solver = NystromCG(rank=min(DEFAULT_RANK, backend.n))
            damping = damping if damping is not None else (0.0 if ridge else "auto")
        self._solver: Any = solver
        self._train, self._loss = self._read(train, "train")
        self._operator = backend.operator(self._train, curvature)
        self._source: Any = None
        if curvature == "hessian" and backend.has_outputs and isinstance(solver, NystromCG):
            self._source = backend.operator(self._train, "ggn")
        self._solution: tuple[np.ndarray | None, np.ndarray | None, str] | None = None
        damping = getattr(solver, "damping", 0.0) if damping is None else damping
        self._set_damping(damping, None)

    def _set_damping(self, damping: Scalar, kept: KeptColumns | None) -> None:
        damping = checked_damping(damping)
        if damping == "auto":
            damping = auto_damping(self._source or self._operator, self._seed)
        self._damping = float(damping)
        self._factor = self._factor_of(self._operator, kept)

    def _factor_of(self, A: Any, kept: KeptColumns | None = None) -> Factor:
        return Factor(
            A,
            self._solver,
            ridge=self._ridge,
            damping=self._damping,
            seed=self._seed,
            name=CURVATURES[self._curvature],
            source=self._source,
            kept=kept,
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

    def _read(self, data: Any, name: str) -> tuple[Examples, float]:
        examples = self._backend.examples(data, name, self._batch_size, self._memory_budget)
        return examples, check_losses(self._backend, examples)

    def _width(self) -> int:
        """Right-hand sides solved for at a time."""
        one = BLOCKS * self._backend.n * int(self._backend.like.dtype.itemsize)
        return max(1, self._memory_budget // one)

    def _solve(self, b: Array, factor: Factor | None = None) -> Solution:
        factor = self._factor if factor is None else factor
        solution = factor.solve(b)
        norm, of_b = to_host(solution.residual_norm), to_host(column_norm(b))
        residual = np.where(of_b > 0, norm / np.where(of_b > 0, of_b, 1), norm)
        self._solution = residual, to_host(solution.num_steps), solution.message
        rtol = getattr(factor.settings, "rtol", None)
        short = ~to_host(solution.converged) & (to_host(solution.reason) != Reason.DIRECT)
        if rtol is not None and np.any(short & ~(residual <= WARN_FACTOR * rtol)):
            warnings.warn(
                f"The solve did not converge: {solution.message}; the largest relative residual is "
                f"{np.max(residual):.1e}, rtol is {rtol:.1e}. Raise the damping, `rank` or "
                "`max_steps` of the solver, or take float64.",
                RuntimeWarning,
                stacklevel=4,
            )
        return solution

    def _remember(self, solutions: list[Any]) -> None:
        """Join what several solves said, for `info`."""
        if len(solutions) > 0:
            residual, steps, messages = zip(*solutions, strict=True)
            message = messages[0] if len(set(messages)) == 1 else "; ".join(messages)
            self._solution = np.concatenate(residual), np.concatenate(steps), message
        else:
            self._solution = None, None, "read from the checkpoint"

    def _groups(self, examples: Examples) -> Iterator[tuple[int, int, list[Any]]]:
        """Yield start, size and batches of as many examples as are solved for at a time."""
        width = self._width()
        held: list[Any] = []
        first = count = 0
        for _, batch in examples.parts(width):
            size = examples.size(batch)
            if held and count + size > width:
                yield first, count, held
                held, first, count = [], first + count, 0
            held.append(batch)
            count += size
        yield first, count, held

    def _gradients(self, batches: list[Any]) -> Array:
        blocks = [self._backend.gradients(batch) for batch in batches]
        return array_namespace(blocks[0]).concat(blocks, axis=1) if len(blocks) > 1 else blocks[0]

    def _passes(
        self, query: Any, targets: Examples, method: str, checkpoint: str | os.PathLike[str] | None
    ) -> Iterator[Iterator[tuple[int, Array]]]:
        """Yield for each group of queries the blocks of their scores, with their starts."""
        if method not in METHODS:
            names = ", ".join(map(repr, METHODS))
            raise ValueError(f"`method` must be one of {names}; got {method!r}.")
        queries, _ = self._read(query, "query")
        store = self._store(checkpoint, "scores", method, query=queries, train=targets)
        solutions: list[Any] = []
        for first, _, batches in self._groups(queries):

            def compute(batches: list[Any] = batches) -> Array:
                Z = self._solve(self._gradients(batches)).value
                solutions.append(self._solution)
                return Z

            Z = store.get(f"directions-{first}", compute, self._backend.like)
            self._remember(solutions)
            yield self._blocks(Z, targets, method, store, first)

    def _blocks(
        self, Z: Array, targets: Examples, method: str, store: Store, first: int
    ) -> Iterator[tuple[int, Array]]:
        limit = max(1, min(GRADIENTS, self._width() * BLOCKS // 4))
        by_jvp = method == "jvp" or (method == "auto" and Z.shape[1] <= JVP_MOST)
        parts = targets.parts(None if by_jvp else limit)
        for start, batch in shown(
            parts, progress=self._progress, total=len(targets), label="scores"
        ):

            def compute(batch: Any = batch) -> Array:
                if by_jvp:
                    return self._backend.slopes(batch, Z)
                return Z.T @ self._backend.gradients(batch)

            yield start, store.get(f"scores-{first}-{start}", compute, self._backend.like)

    def _store(
        self, folder: str | os.PathLike[str] | None, kind: str, method: str, **data: Examples
    ) -> Store:
        """Return a store whose key is all that the results depend on."""
        if folder is None:
            return Store(None, {})
        sampled = isinstance(self._solver, (Nystrom, NystromCG))
        if sampled and not self._seeded and self._solver.indices is None:
            raise ValueError(
                "`checkpoint` needs a seed, so that a later run draws the same columns: give `rng`."
            )
        solver = to_record(self._solver)
        settings = (self._curvature, self._ridge, self._damping, solver, self._seed, method)
        blocks = [(self._width(), one.sizes) for one in data.values()]
        key = {
            "kind": kind,
            "parameters": digest(self._backend.vector()),
            "training set": self._train.digest(),
            "settings": digest(settings),
            "batches": digest(blocks),
        }
        return Store(folder, key | {name: one.digest() for name, one in data.items()})
