"""Inner problems of a few gradient steps from a known start, their true derivatives, and how the
hypergradients of a run were: what Tables 2 and 3 share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, autograd, nn
from torch.func import functional_call

from benchmarks.harness.experiment import DATA, DEVICE, QUICK, WORKERS, Run
from benchmarks.harness.processes import Found

OPTIONS = (QUICK, DATA, DEVICE, WORKERS)

SLOPE = 0.01
"""Of the leaky ReLU that the paper puts in place of the ReLU."""


def initialize(model: nn.Module, seed: int, gain: float = 1.0) -> list[Tensor]:
    """Draw weights uniformly within ``gain / sqrt(fan-in)`` (as torch does at gain 1), biases 0.

    Vectors named "weight", which are scales of a normalization, stay 1.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                bound = gain * p[0].numel() ** -0.5
                p.copy_(bound * (2 * torch.rand(p.shape, generator=generator) - 1))
            elif name.endswith("bias"):
                p.zero_()
    return list(model.parameters())


def outputs(model: nn.Module, params: Sequence[Tensor], x: Tensor) -> Tensor:
    """Evaluate `model` with other parameters."""
    names = (name for name, _ in model.named_parameters())
    return functional_call(model, dict(zip(names, params, strict=True)), (x,))


def descend(
    loss: Callable[[list[Tensor]], Tensor],
    start: Sequence[Tensor],
    steps: int,
    rate: float,
    *,
    unroll: bool = False,
) -> list[Tensor]:
    """Take steps of gradient descent; return leaves, or tensors on the graph of all the steps."""
    params = [p.clone() if unroll else p.detach().clone().requires_grad_() for p in start]
    for _ in range(steps):
        grads = autograd.grad(loss(params), params, create_graph=unroll)
        params = [p - rate * g for p, g in zip(params, grads, strict=True)]
        if not unroll:
            params = [p.detach().requires_grad_() for p in params]
    return params


def flat(tensors: Any) -> Tensor:
    """Return tensors as one vector in float64, where the squares do not overflow."""
    return torch.cat([t.detach().reshape(-1).to(torch.float64) for t in tensors])


def against(grads: Any, truth: Any) -> Found:
    """Return the length of a gradient over that of the true one, and the cosine between them."""
    a, b = flat(grads), flat(truth)
    length, norm = float(torch.linalg.vector_norm(a)), float(torch.linalg.vector_norm(b))
    cosine = float(a @ b) / (length * norm) if length * norm > 0 else 0.0
    return {"length": length / norm if norm > 0 else float("inf"), "cosine": cosine}


class Log:
    """The updates of one run: losses, what each hypergradient took, and how good it was."""

    def __init__(self, updates: int) -> None:
        self.found: Found = {"losses": [], "products": [], "negative": [], "checks": []}
        self.found["skipped"] = 0
        self.checks = {0, updates // 2, updates - 1}

    def hypergradient(self, *arguments: Any, **settings: Any) -> Any:
        """Accumulate the hypergradient; return None where it is singular."""
        from lowrank_inverse_torch import hypergradient

        try:
            out = hypergradient(*arguments, accumulate_grad=True, **settings)
        except torch.linalg.LinAlgError:  # of Eq. (6), where a column is zero
            return None
        self.found["products"].append(float(out.info.num_products))
        self.found["negative"].append(float(out.info.negative_curvature))
        return out

    def step(self, optimizer: torch.optim.Optimizer, learned: Sequence[Tensor]) -> None:
        """Move what is learned, unless its gradient is missing or not finite."""
        grads = [p.grad for p in learned if p.grad is not None]
        if grads and all(torch.isfinite(grad).all() for grad in grads):
            optimizer.step()
        else:
            self.found["skipped"] += 1


EXPLAINED = (
    "cosine, length: of the hypergradient against the derivative through all inner steps, which\n"
    "is the true one, at the first update (where all methods are at one place) and at the last.\n"
    "indefinite: share of the hypergradients where the solver met negative curvature. products:\n"
    "with the Hessian, one to measure the residual included."
)


def columns(found: Sequence[Found]) -> dict[str, str]:
    """Describe the hypergradients of some runs; blank where there are none."""
    checks = [run["checks"] for run in found if run["checks"]]
    names = ["cosine, first", "last", "length, first", "indefinite", "products"]
    if not checks:
        return dict.fromkeys(names, "")
    values = (
        f"{np.mean([check[0]['cosine'] for check in checks]):.2f}",
        f"{np.mean([check[-1]['cosine'] for check in checks]):.2f}",
        f"{np.median([check[0]['length'] for check in checks]):.2g}",
        f"{mean_of(found, 'negative'):.0%}",
        f"{mean_of(found, 'products'):.1f}",
    )
    return dict(zip(names, values, strict=True))


def mean_of(found: Sequence[Found], key: str) -> float:
    """Return the mean of a quantity over all the hypergradients of some runs; NaN if none."""
    values = [value for run in found for value in run[key]]
    return float(np.mean(values)) if values else float("nan")


def skipped(found: dict[str, Sequence[Found]]) -> str:
    """Say which methods had updates that had to be left out."""
    counts = {name: sum(run["skipped"] for run in group) for name, group in found.items()}
    named = [f"{name} {count}" for name, count in counts.items() if count]
    return f"Updates left out, singular or not finite: {', '.join(named)}." if named else ""


def draw(run: Run, panels: dict[str, dict[str, Sequence[Found]]]) -> None:
    """Draw the loss on unseen data over the updates, and the test accuracy, one row a panel."""
    figure, axes = run.figure(len(panels), 2, 12, 4.6 * len(panels))
    for (left, right), (title, by_method) in zip(axes, panels.items(), strict=True):
        for place, (method, found) in enumerate(by_method.items()):
            color = f"C{place}"
            accuracy = [one["accuracy"] for one in found]
            right.barh(place, np.mean(accuracy), xerr=np.std(accuracy), color=color)
            losses = np.array([one["losses"] for one in found])
            if losses.size:
                window = max(1, losses.shape[1] // 10)
                smooth = np.convolve(losses.mean(axis=0), np.full(window, 1 / window), "valid")
                left.plot(np.arange(len(smooth)) + window, smooth, color=color, label=method)
        left.set(xlabel="update", ylabel="outer loss, running mean", title=title)
        left.legend(fontsize="small")
        right.set_yticks(range(len(by_method)), by_method)
        right.invert_yaxis()
        right.set(xlabel="test accuracy", title=title)
    run.draw(figure)
