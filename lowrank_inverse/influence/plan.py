"""What a computation will cost, before it is done, and the solver that costs least."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from math import isqrt
from typing import Any, NamedTuple

from lowrank_inverse.solvers.direct import Exact
from lowrank_inverse.solvers.low_rank import Nystrom, NystromCG

TYPICAL_STEPS = 20
"""Of conjugate gradients for a right-hand side; the damping and the width of a block decide."""
DENSE_MOST = 2000
"""Parameters up to which the eigenvectors of the dense matrix take seconds."""
COPIES = {Exact: 4, NystromCG: 2}
"""Blocks of the size of the columns that a solver holds: the preconditioner has its own basis."""
MOST_PAIRS = 200
JOINING = 10
PAIR_BLOCKS = 4
"""Vectors and products, of pairs and of the directions that are joined with them."""
BLOCKS = 16
"""Vectors of n numbers a right-hand side: conjugate gradients, and the products inside."""


class Plan(NamedTuple):
    """What scores, top k or self-influence will take.

    Attributes
    ----------
    solver : str
        Its settings; for the default, those chosen for so many right-hand sides.
    num_params, num_train, num_solves : int
        Size of the system, training examples, and right-hand sides.
    num_products : int
        Products of curvature and vector; for conjugate gradients with 20 steps a right-hand side.
    num_passes : int
        Over the training set: for those products, a block at a time, and for the scores.
    num_bytes : dict of int
        Of each stage: ``data`` that is kept, ``columns`` of the solver or its pairs, ``solve`` of
        a block of right-hand sides, ``scores``. Beside them stands what a gradient of a batch
        takes.
    """

    solver: str
    num_params: int
    num_train: int
    num_solves: int
    num_products: int
    num_passes: int
    num_bytes: dict[str, int]

    def __str__(self) -> str:
        """Return it as a few lines."""
        sizes = ", ".join(f"{name} {size / 2**20:.4g}" for name, size in self.num_bytes.items())
        return (
            f"{self.num_solves} right-hand sides of {self.num_params} parameters by "
            f"{self.solver}:\nabout {self.num_products} products, {self.num_passes} passes over "
            f"{self.num_train} examples; MiB: {sizes}"
        )


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
    fits = n <= DENSE_MOST and COPIES[Exact] * n * n * itemsize <= budget
    return fits and n < num_columns(solver, n) + num_solves * TYPICAL_STEPS


def most_pairs(n: int, num_train: int, itemsize: int, budget: int) -> int:
    """Count the Ritz pairs of earlier solves that are worth keeping.

    To join k of them takes ``6 n k**2`` operations, a product ``6 n num_train`` or more: so many
    that it costs no more than `JOINING` products, and with the directions of a solve a quarter of
    the budget.
    """
    fitting = budget // (4 * PAIR_BLOCKS * n * itemsize)
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
    train: Any,
    num_solves: int,
    width: int,
    num_scores: int,
    recycle: int,
) -> Plan:
    """Return the plan for `num_solves` right-hand sides, `width` at a time."""
    columns = num_columns(solver, n)
    steps = 2 + (getattr(solver, "max_steps", None) or TYPICAL_STEPS)
    if isinstance(solver, (Exact, Nystrom)):  # which multiply to know their residual
        steps = 0 if isinstance(solver, Exact) else 1
    groups = -(-num_solves // width)
    held = columns if getattr(solver, "memory", "stored") == "stored" else 0
    copies = COPIES.get(type(solver), 1)
    return Plan(
        solver=short(solver),
        num_params=n,
        num_train=train.num,
        num_solves=num_solves,
        num_products=columns + steps * num_solves,
        num_passes=(columns > 0) + groups * (steps + 1),
        num_bytes={
            "data": train.num_bytes,
            "columns": (copies * held + PAIR_BLOCKS * recycle) * n * itemsize,
            "solve": BLOCKS * min(width, num_solves) * n * itemsize,
            "scores": num_scores * itemsize,
        },
    )
