"""Influence with a million parameters, and kernel matrices of a hundred thousand points."""

from __future__ import annotations

from functools import partial

import torch
from torch.nn.functional import cross_entropy

import lowrank_inverse as li
from benchmarks.gpu.part import Part
from benchmarks.harness.processes import Found
from benchmarks.harness.timing import MIB, Peak, seconds
from benchmarks.influence.methods import network
from lowrank_inverse_torch import InfluenceFunction

QUERIES, CLASSES, RTOL = 20, 10, 1e-4


def run(path: str, about: Found, small: bool) -> None:
    """Measure both; kernels on the processor too, as far as it goes."""
    part = Part(path, about, small)
    features, width, examples = (20, 8, 50) if small else (784, 1260, 50_000)
    given = {"features": features, "width": width, "examples": examples, "device": part.device}
    part.measure("influence", influence, **given)
    counts = [100] if small else [20_000, 100_000]
    for device in dict.fromkeys((part.device, "cpu")):
        for n in counts:
            settings = {"n": n, "device": device, "solve": device != "cpu" or n == counts[0]}
            part.measure(f"kernel, n = {n}, {device}", kernel, **settings)


def influence(features: int, width: int, examples: int, device: str) -> Found:
    """Score all examples of a perceptron with a random start for some queries."""
    torch.manual_seed(0)
    model = network(features, width, CLASSES).to(device)
    x = torch.randn(examples + QUERIES, features, device=device)
    y = torch.arange(examples + QUERIES, device=device) % CLASSES
    loss = partial(cross_entropy, reduction="none")
    train, query = (x[:examples], y[:examples]), (x[examples:], y[examples:])
    found = []

    def fit() -> None:
        found.append(InfluenceFunction(model, loss, train, damping=0.01, rng=0))

    with Peak(device) as peak:
        fitted = seconds(fit, device)
        scored = seconds(lambda: found[0].scores(query), device)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "examples": examples,
        "fit": fitted,
        "scores": scored,
        "mib": peak.num_bytes / MIB,
        "residual": float(found[0].info.relative_residual.max()),
    }


def kernel(n: int, device: str, solve: bool) -> Found:
    """Multiply with a Gaussian kernel matrix, and solve with it."""
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(n, 10, generator=generator).to(device)
    b = torch.randn(n, generator=generator).to(device)
    K = li.KernelOperator(X, lengthscale=3.0)
    found: Found = {"n": n, "product": min(seconds(lambda: K @ b, device) for _ in range(2))}
    if solve:
        solver, solutions = li.NystromCG(rank=min(500, n // 2), rtol=RTOL, damping=0.1), []
        with Peak(device) as peak:
            found["solve"] = seconds(
                lambda: solutions.append(li.solve(K, b, solver=solver, rng=0)), device
            )
        found |= {"steps": int(solutions[0].num_steps), "mib": peak.num_bytes / MIB}
        found |= {"converged": bool(solutions[0].converged)}
    return found
