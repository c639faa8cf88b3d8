"""Memory of a gradient through conjugate gradients, against the number of their steps.

The matrix is a multiple t of the second difference on a line, plus the identity; the derivative is
that of ``b @ x`` by t, for the solution x. "graph of steps" is torch's own derivative of the same
steps, written out. Each cell runs in a process of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

import lowrank_inverse as li
from benchmarks.harness.experiment import SEED, Option, Run, experiment
from benchmarks.harness.report import table
from benchmarks.harness.timing import MIB, Peak

SCALE = 1e6
METHODS = ("ours, torch", "ours, jax", "graph of steps, torch")


def product(v: Any, t: Any) -> Any:
    """Return ``(t D + I) v`` for the second difference D."""
    return v + t * (2 * v - _moved(v, 1) - _moved(v, -1))


def _moved(v: Any, by: int) -> Any:
    if hasattr(v, "roll"):
        return v.roll(by)
    import jax.numpy as jnp

    return jnp.roll(v, by)


def steps_of_torch(t: Any, b: Any, steps: int) -> Any:
    """Return the iterate of conjugate gradients, with a graph of all steps."""
    x, r = 0 * b, b
    p, rr = r, r @ r
    for _ in range(steps):
        Ap = product(p, t)
        alpha = rr / (p @ Ap)
        x, r = x + alpha * p, r - alpha * Ap
        new = r @ r
        p, rr = r + (new / rr) * p, new
    return x


def measure(method: str, n: int, steps: int, seed: int) -> dict[str, float]:
    """Return the peak of memory in MiB of value and gradient, and the gradient."""
    values = np.random.default_rng(seed).standard_normal(n)
    solver = li.CG(rtol=0.0, max_steps=steps)

    def ours(t: Any, b: Any) -> Any:
        A = li.FunctionOperator(product, n, like=b, parameters=[t])
        return b @ li.solve(A, b, solver=solver).value

    if method.endswith("jax"):
        import jax
        import jax.numpy as jnp

        jax.config.update("jax_enable_x64", True)
        b = jnp.asarray(values)
        compiled = jax.jit(jax.grad(ours)).lower(SCALE, b).compile()
        with Peak() as peak:
            gradient = float(compiled(SCALE, b))
        return {"mib": peak.num_bytes / MIB, "gradient": gradient}
    import torch

    torch.set_num_threads(1)
    b = torch.tensor(values)

    def value(t: Any, b: Any, steps: int) -> Any:
        return ours(t, b) if method.startswith("ours") else b @ steps_of_torch(t, b, steps)

    t = torch.tensor(SCALE, dtype=b.dtype, requires_grad=True)
    steps_of_torch(t, b[:8], 2).sum().backward()  # what torch loads at first
    li.solve(li.FunctionOperator(product, 8, like=b, parameters=[t]), b[:8]).value.sum().backward()
    t.grad = None
    with Peak() as peak:
        value(t, b, steps).backward()
    return {"mib": peak.num_bytes / MIB, "gradient": float(t.grad)}


@experiment(
    *("gradients", __doc__),
    Option("n", 20000, "order of the matrix", least=8),
    Option("steps", [10, 100, 1000], "of conjugate gradients", least=1),
    SEED,
    packages=("torch", "jax", "numpy"),
)
def main(run: Run) -> None:
    options = run.options
    cells = {
        (method, steps): {"method": method, "n": options.n, "steps": steps, "seed": options.seed}
        for method in METHODS
        for steps in options.steps
    }
    found = run.each(measure, cells)
    rows = [
        {"steps": str(steps)}
        | {f"{method}, MiB": f"{found[method, steps]['mib']:.1f}" for method in METHODS}
        for steps in options.steps
    ]
    run.publish(
        table(rows),
        f"n = {options.n}, float64: a vector takes {options.n * 8 / MIB:.2f} MiB.",
        memory={f"{method}, {steps}": one for (method, steps), one in found.items()},
    )
