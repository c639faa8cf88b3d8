"""The predicted cost of a computation, and the cheapest solver for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from math import isqrt
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._typing import Array, Data, OperatorLike
from lowrank_inverse.arrays.conversion import like, to_host
from lowrank_inverse.arrays.spread import rows_beside
from lowrank_inverse.influence.backend import Backend
from lowrank_inverse.influence.dataset import Examples
from lowrank_inverse.solvers.direct import Exact
from lowrank_inverse.solvers.low_rank import Nystrom
from lowrank_inverse.solvers.preconditioned import NystromCG

TYPICAL_STEPS = 20
"""Of conjugate gradients for a right-hand side; the damping and the width of a block decide."""
DENSE_MOST = 2000
"""Parameters up to which the eigenvectors of the dense matrix take seconds."""
COPIES = {Exact: 4, NystromCG: 2}
"""Blocks of the size of the columns that a solver holds: the preconditioner has its own basis."""
MOST_PAIRS = 200
JOINING = 10
PAIR_BLOCKS = 6
"""Vectors and products of the pairs, of the directions that are joined with them, and the sums."""
DIRECTION_BLOCKS = 2
"""Vectors and products of the directions alone, where one solve is all there is."""
DATA_SHARE, PAIRS_SHARE, SOLVE_SHARE = 4, 4, 2
"""One part in so many of the memory budget: for kept batches, for pairs, for right-hand sides."""
BLOCKS = 14
"""Vectors of n numbers a right-hand side, as counted: it, conjugate gradients, and products."""
JVP_LEAST, JVP_MOST = 4, 24
"""Queries up to which directional derivatives are taken: always, and where none is timed."""
TRIALS = 8
"""Batches from which on it pays to time one of them in both ways."""
LONG = 20.0
"""Seconds of a call that is not repeated: a compilation takes less of it than what it does."""


class UnitCosts(NamedTuple):
    """Seconds for the scores of one training example, measured on a batch.

    Attributes
    ----------
    graph, slope : float
        Of the loss with its graph, and of each directional derivative.
    gradient : float
        Of the gradient of the example alone.
    """

    graph: float
    slope: float
    gradient: float

    def scores(self, width: int, *, jvp: bool) -> float:
        """Return the seconds for the scores of `width` queries."""
        return self.graph + width * self.slope if jvp else self.gradient


class Plan(NamedTuple):
    """The predicted cost of scores, top k or self-influence.

    Attributes
    ----------
    solver, why : str
        Settings of the solver, and the reason for them. The default depends on the number of
        right-hand sides.
    method : str
        How scores are computed: "jvp" or "gradients".
    num_params, num_train, num_solves, width : int
        Size of the system, number of training examples, number of right-hand sides, and number of
        them solved at a time.
    num_products : int
        Number of products with the curvature.
    assumes_steps : bool
        Whether it assumes 20 steps per right-hand side, because the settings of the solver do not
        say how many.
    num_passes : int
        Number of passes over the training set, for the products of each block and for the scores.
    num_bytes : dict of int
        Memory of each stage: ``data`` kept, ``columns`` or pairs of the solver, ``solve`` of a
        block of right-hand sides, ``batch`` for a product with the curvature of one batch (as
        measured), ``scores``.
    seconds : dict of float
        From measured times: ``product`` for a single one; ``columns``, ``solve`` and ``scores``
        for the stages.
    """

    solver: str
    why: str
    method: str
    num_params: int
    num_train: int
    num_solves: int
    width: int
    num_products: int
    assumes_steps: bool
    num_passes: int
    num_bytes: dict[str, int]
    seconds: dict[str, float]

    def __str__(self) -> str:
        """Return it as a few lines."""
        sizes = ", ".join(f"{name} {size / 2**20:.4g}" for name, size in self.num_bytes.items())
        times = ", ".join(f"{name} {value:.2g}" for name, value in self.seconds.items())
        assumed = f" ({TYPICAL_STEPS} steps each assumed)" if self.assumes_steps else ""
        return (
            f"{self.num_solves} right-hand sides of {self.num_params} parameters, {self.width} at "
            f"a time, by {self.solver}: {self.why};\nabout {self.num_products} products{assumed}, "
            f"{self.num_passes} passes over {self.num_train} examples, scores by {self.method};\n"
            f"MiB: {sizes};\nseconds: {times}"
        )


class ProductCosts(NamedTuple):
    """What a product with the curvature takes, measured.

    Attributes
    ----------
    single, further : float
        Seconds for one vector, and for each other one in a block with it: what is done once for
        each batch, such as its graph, a block shares.
    num_bytes : int
        Beside the vectors.
    """

    single: float
    further: float
    num_bytes: int

    def seconds(self, num_products: int, num_blocks: int) -> float:
        """Return the seconds for products in so many blocks."""
        return num_blocks * (self.single - self.further) + num_products * self.further


def measured(run: Callable[[], Any]) -> float:
    """Time a call, the second one where the first may have compiled something."""
    for _ in range(2):
        start = time.perf_counter()
        to_host(run())  # of an accelerator, to the end
        seconds = time.perf_counter() - start
        if seconds > LONG:
            break
    return seconds


def product_costs(backend: Backend, operator: OperatorLike, num_bytes: int) -> ProductCosts:
    """Measure products with one vector and with two."""

    def timed(block: Array) -> float:
        block = rows_beside(block, backend.like)
        return measured(lambda: operator @ block)

    v = backend.vector()
    single, both = timed(v), timed(array_namespace(v).stack([v, v], axis=1))
    return ProductCosts(single, min(max(both - single, 0.0), single), num_bytes)


def unit_costs(backend: Backend, examples: Examples, num_gradients: int) -> UnitCosts:
    """Measure the scores of one batch by both methods."""
    batch = examples.get(0)
    size = examples.size(batch)
    few = examples.rows(batch, 0, min(size, num_gradients))
    Z = like(np.ones((backend.n, JVP_LEAST)), backend.like)
    one, several = (
        measured(lambda k=k: backend.slopes(batch, Z[:, :k])) / size  # type: ignore[misc]
        for k in (1, JVP_LEAST)
    )
    slope = max(several - one, 0.0) / (JVP_LEAST - 1)
    gradient = measured(lambda: backend.gradients(few)[:1, ...]) / examples.size(few)
    return UnitCosts(max(one - slope, 0.0), slope, gradient)


def short(solver: Any) -> str:
    """Return the settings of a solver without what is as by default."""
    if not is_dataclass(solver):
        return repr(solver)
    parts = [
        f"{field.name}={getattr(solver, field.name)!r}"
        for field in fields(solver)
        if field.name == "rank" or getattr(solver, field.name) != field.default
    ]
    return f"{type(solver).__name__}({', '.join(parts)})"


def dense_pays(solver: Any, n: int, num_solves: int, itemsize: int, budget: int) -> bool:
    """Whether all n columns cost less than conjugate gradients, and fit."""
    fits = n <= DENSE_MOST and COPIES[Exact] * n * n * itemsize <= budget // PAIRS_SHARE
    return fits and n < num_columns(solver, n) + num_solves * TYPICAL_STEPS


def reason(solver: Any, n: int, num_solves: int, *, is_default: bool) -> str:
    """Say why the default is what it is for so many right-hand sides."""
    if not is_default:
        return "as it was given"
    steps = num_solves * TYPICAL_STEPS
    if isinstance(solver, Exact):
        return f"all {n} columns cost less than about {steps} products, or are there"
    if n > DENSE_MOST:
        return f"more than {DENSE_MOST} parameters"
    return f"all {n} columns cost more than about {steps} products, or do not fit"


def most_pairs(n: int, num_train: int, itemsize: int, budget: int) -> int:
    """Count the Ritz pairs of earlier solves that are worth keeping.

    To join k of them takes ``6 n k**2`` operations, a product ``6 n num_train`` or more: so many
    that it costs no more than `JOINING` products, and that they fit into their part of the budget.
    """
    fitting = budget // (PAIRS_SHARE * PAIR_BLOCKS * n * itemsize)
    return min(n, MOST_PAIRS, isqrt(JOINING * num_train), fitting)


def num_columns(solver: Any, n: int) -> int:
    """Count the columns that a solver computes, as far as that is known before."""
    if isinstance(solver, Exact):
        return n
    if not isinstance(solver, (Nystrom, NystromCG)):
        return 0
    if solver.indices is not None:
        return len(solver.indices)
    most = min(n, solver.max_rank or 1000)
    return most if solver.rank == "auto" else min(n, solver.rank)


def make_plan(
    solver: Any,
    n: int,
    itemsize: int,
    *,
    why: str,
    jvp: bool,
    train: Data,
    num_solves: int,
    width: int,
    num_scores: int,
    recycle: int,
    product: ProductCosts,
    costs: UnitCosts,
) -> Plan:
    """Return the plan for `num_solves` right-hand sides, `width` at a time."""
    columns = num_columns(solver, n)
    told = getattr(solver, "max_steps", None) or getattr(solver, "num_terms", None)
    steps, assumes_steps = 2 + (told or TYPICAL_STEPS), told is None
    if isinstance(solver, (Exact, Nystrom)):  # which multiply to know their residual
        steps, assumes_steps = 0 if isinstance(solver, Exact) else 1, False
    width = min(width, num_solves)
    groups = -(-num_solves // width)
    held = columns if getattr(solver, "memory", "stored") == "stored" else 0
    copies = COPIES.get(type(solver), 1)
    pairs = (PAIR_BLOCKS if groups > 1 else DIRECTION_BLOCKS) * recycle
    return Plan(
        solver=short(solver),
        why=why,
        method="jvp" if jvp else "gradients",
        num_params=n,
        num_train=train.num,
        num_solves=num_solves,
        width=width,
        num_products=columns + steps * num_solves,
        assumes_steps=assumes_steps,
        num_passes=(columns > 0) + groups * (steps + 1),
        num_bytes={
            "data": train.num_bytes,
            "columns": (copies * held + pairs) * n * itemsize,
            "solve": BLOCKS * width * n * itemsize,
            "batch": product.num_bytes,
            "scores": num_scores * itemsize,
        },
        seconds={
            "product": product.single,
            "columns": product.seconds(columns, columns > 0),
            "solve": product.seconds(steps * num_solves, steps * groups),
            "scores": groups * train.num * costs.scores(width, jvp=jvp),
        },
    )
