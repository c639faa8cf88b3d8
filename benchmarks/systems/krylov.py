"""Error of the inverse product against products, by what the products are spent on.

Three problems: data hyper-cleaning on scikit-learn's digits, at its first hypergradient; a
perceptron trained on the digits by 200 steps of Adam, whose Hessian is slightly indefinite, against
its dense inverse; and a wide one of some 100 000 parameters in float32, against conjugate gradients
in float64. Each method spends k products, and one more to confirm its answer. "other b" is the
error for another right-hand side of what was prepared for the first: the outer gradient, and twice
as much of a random vector of the range.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

import lowrank_inverse as li
import lowrank_inverse_torch as lit
from benchmarks.bilevel.cleaning import NUM_TRAIN, RIDGE, fit, load_backend, load_problem
from benchmarks.data.digits import shuffled
from benchmarks.harness.experiment import Option, Run, experiment, seeds
from benchmarks.harness.processes import Found
from benchmarks.harness.report import table

RANKS = [5, 10, 20, 50]
DAMPINGS = [0.01, 0.1, 1.0]
WIDE_DAMPINGS = [0.05, 0.1]
"""Above the negative curvature: below it there is no answer to compare with."""
SAMPLINGS = ("krylov", "uniform", "diagonal", "gaussian")
WIDTHS = {"digits MLP": 24, "wide MLP": 1333}


class Captured:
    """The dense inverse, as settings that remember the matrix that they were given."""

    damping = 0.0

    def prepare(self, A: Any, *, rng: Any = 0, b: Any = None) -> Any:
        """Return the inverse of `A`."""
        self.matrix = A @ torch.eye(A.shape[0], dtype=b.dtype)
        return li.Exact().prepare(A)


def cleaning(seed: int) -> tuple[Any, np.ndarray]:
    """Return the Hessian without the ridge, and the outer gradient."""
    backend, w = load_backend("torch", load_problem(seed)), np.zeros(NUM_TRAIN)
    captured = Captured()
    out = backend.differentiate(fit(backend, w), w, captured, seed)
    H = captured.matrix.numpy()
    return H - RIDGE * np.eye(len(H)), H @ out.ihvp.numpy().reshape(-1)


def perceptron(seed: int, width: int) -> tuple[Any, np.ndarray, Any]:
    """Return the Hessian of the training loss, the outer gradient, and the Hessian in float32."""
    x, y = (torch.as_tensor(a) for a in shuffled(np.random.default_rng(seed)))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10)).double()
        optimizer = torch.optim.Adam(net.parameters(), 1e-2 if width < 100 else 2e-3)
        for _ in range(200 if width < 100 else 300):
            batch = torch.randint(0, 1437, (128,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    loss = nn.functional.cross_entropy(net(x[1437:]), y[1437:])
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, net.parameters())])

    def hessian(net: nn.Module, x: torch.Tensor) -> Any:
        return lit.HessianOperator(
            lambda: nn.functional.cross_entropy(net(x), y[:1437]), net, chunk_size=10
        )

    single = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10))
    single.load_state_dict(net.state_dict())
    return hessian(net, x[:1437]), gradient.numpy(), hessian(single, x[:1437].float())


def measure(problem: str, damping: float, seed: int) -> list[Found]:
    """Return the errors of every method at every rank."""
    dense = problem != "wide MLP"
    exact: Any
    if problem == "hyper-cleaning":
        A, b = cleaning(seed)
    else:
        H, b, single = perceptron(seed, WIDTHS[problem])
        A = (H @ torch.eye(H.shape[0], dtype=torch.float64)).numpy() if dense else single
    other = np.random.default_rng(seed).standard_normal(len(b))
    if dense:
        other = b + 2 * np.linalg.norm(b) * A @ other / np.linalg.norm(A @ other)
        factors = np.linalg.eigh(A)

        def exact(b: np.ndarray) -> np.ndarray:
            return factors[1] @ ((factors[1].T @ b) / (factors[0] + damping))

        lowest, operator, kind = (
            factors[0][0],
            li.FunctionOperator(A.__matmul__, len(b)),
            np.asarray,
        )
        with_diagonal = li.FunctionOperator(A.__matmul__, len(b), diagonal=lambda: np.diag(A))
    else:
        moved = (H @ torch.as_tensor(other)).numpy()
        other = b + 2 * np.linalg.norm(b) * moved / np.linalg.norm(moved)

        def exact(b: np.ndarray) -> np.ndarray:
            tight = li.CG(damping=damping, rtol=1e-10, max_steps=1000)
            return li.solve(H, torch.as_tensor(b), solver=tight, throw=True).value.numpy()

        lowest, operator = None, single

        def kind(b: np.ndarray) -> Any:
            return torch.as_tensor(b, dtype=torch.float32)

    wanted, wanted_other = exact(b), exact(other)

    def error(x: Any, wanted: np.ndarray) -> float:
        return float(np.linalg.norm(np.asarray(x) - wanted) / np.linalg.norm(wanted))

    rows = []
    for rank in RANKS:
        cg = li.CG(damping=damping, max_steps=rank, rtol=0.0)
        row: Found = {"k": rank, "CG": error(li.solve(operator, kind(b), solver=cg).value, wanted)}
        for sampling in SAMPLINGS:
            if sampling == "diagonal" and not dense:
                continue
            solver = li.Nystrom(rank=rank, damping=damping, sampling=sampling)
            source = with_diagonal if sampling == "diagonal" else operator
            inverse = solver.prepare(source, rng=seed, b=kind(b))
            row[sampling] = error(inverse.solve(kind(b)).value, wanted)
            row[f"{sampling}, other b"] = error(inverse.solve(kind(other)).value, wanted_other)
        rows.append(row | {"lowest eigenvalue": lowest})
    return rows


@experiment(
    *("krylov", __doc__, seeds(3, quick=1)),
    Option("quick", False, "without the wide perceptron"),
    packages=("torch", "numpy"),
)
def main(run: Run) -> None:
    """Measure; print the table, draw errors against products."""
    cases: dict[Any, Found] = {("hyper-cleaning", RIDGE): {}}
    cases |= {("digits MLP", damping): {} for damping in DAMPINGS}
    if not run.options.quick:
        cases |= {("wide MLP", damping): {} for damping in WIDE_DAMPINGS}
    settings = {case: {"problem": case[0], "damping": case[1]} for case in cases}
    found = run.repeated(measure, settings)
    rows, curves = [], {}
    for (problem, damping), runs in found.items():
        curves[f"{problem}, damping {damping:g}"] = runs
        for i, rank in enumerate(RANKS):
            means = {
                key: float(np.exp(np.mean([np.log(one[i][key]) for one in runs])))
                for key in runs[0][i]
                if key not in ("k", "lowest eigenvalue")
            }
            rows.append(
                {"problem": problem, "damping": f"{damping:g}", "k": str(rank)}
                | {
                    key: f"{means[key]:.1e}" if key in means else "-"
                    for key in ("CG", *SAMPLINGS, *(f"{s}, other b" for s in SAMPLINGS[:2]))
                }
            )
    figure, axes = run.figure(1, len(curves), 3.2 * len(curves), 3.4)
    for axis, (title, runs) in zip(axes[0], curves.items(), strict=True):
        for i, name in enumerate(("CG", *SAMPLINGS)):
            if name in runs[0][0]:
                errors = [[row[name] for row in one] for one in runs]
                means = np.exp(np.mean(np.log(errors), axis=0))
                axis.loglog(RANKS, means, f"C{i}o-", label=name, ms=4)
        axis.set(title=title, xlabel="products")
        axis.set_xticks(RANKS, [str(rank) for rank in RANKS])
        axis.minorticks_off()
    axes[0, 0].set_ylabel("relative error")
    axes[0, 0].legend(fontsize=8)
    run.draw(figure)
    run.publish(
        table(rows),
        f"Geometric means over {run.options.seeds} seeds of the relative error of (H + damping "
        "I)^-1 b, against\nthe dense inverse; wide MLP: n = 99 985, float32, against conjugate "
        "gradients in float64.",
        errors=curves,
    )
