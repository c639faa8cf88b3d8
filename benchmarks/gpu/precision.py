"""What TF32 and bfloat16 cost in accuracy: products and inverse products against float64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

import lowrank_inverse as li
import lowrank_inverse_torch as lit
from benchmarks.gpu.part import Part
from benchmarks.harness.processes import Found
from benchmarks.speed import measure
from benchmarks.systems import accuracy

MODES = {"float32": (False, False), "TF32": (True, False), "bfloat16 autocast": (False, True)}
"""Whether matrix products and convolutions may take TF32, and whether losses are autocast."""
K = 20


def run(path: str, about: Found, small: bool) -> None:
    """Measure networks, and the forms of the damped inverse on a matrix."""
    part = Part(path, about, small)
    settings = {"device": part.device, "small": small}
    for model in part.models:
        for mode in MODES:
            part.measure(f"{model}, {mode}", errors, model=model, mode=mode, **settings)
    if small:
        accuracy.SIZE = 200
    for name, damping in accuracy.ROW_CASES[:1] if small else accuracy.ROW_CASES:
        for mode in ("float32", "TF32"):
            case = {"name": name, "damping": damping, "mode": mode, "device": part.device}
            part.measure(f"{name}, ρ = {damping:.0e}, {mode}", forms, **case)


@contextlib.contextmanager
def rounding(tf32: bool) -> Iterator[None]:
    """Let torch take TF32 for float32, or not."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def errors(model: str, mode: str, device: str, small: bool) -> dict[str, float]:
    """Relative errors of a product, and of inverse products at equal steps, against float64."""
    problem = measure.build(model, 4 if small else 128, seed=0, device=device, small=small)
    tf32, autocast = MODES[mode]
    kind = torch.autocast(device, torch.bfloat16) if autocast else None
    with rounding(False):
        problem.train(3 if small else 50)
        lowest, highest = measure.spectrum(problem, 5 if small else 25)
        damping, _ = measure.damping_and_step(lowest, highest, least=1e-2 * highest)
    with rounding(tf32):
        found = products(problem, damping, kind)
    problem.to(torch.float64)
    exact = products(problem, damping)
    return {name: float((found[name] - x).norm() / x.norm()) for name, x in exact.items()}


def products(problem: Any, damping: float, autocast: Any = None) -> dict[str, torch.Tensor]:
    """Return the product of the Hessian with a vector, and its inverse's by two methods."""

    def inner() -> torch.Tensor:
        with autocast or contextlib.nullcontext():
            return problem.inner()

    H = lit.HessianOperator(inner, problem.model)
    b = torch.randn(H.shape[0], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    b = b.to(H.device, H.dtype)
    k = min(K, H.shape[0])
    nystrom = li.Nystrom(rank=k, damping=damping, sampling="uniform")
    return {
        "product": H @ b,
        "CG": li.cg(H, b, damping=damping, rtol=0.0, max_steps=k).value,
        "Nyström": li.solve(H, b, solver=nystrom, rng=0).value,
    }


def forms(name: str, damping: float, mode: str, device: str) -> dict[str, float]:
    """Return the errors of each form of the inverse of a float32 matrix."""
    with rounding(MODES[mode][0]):
        return accuracy.errors(name, damping, 0, lambda x: torch.tensor(x, device=device))
