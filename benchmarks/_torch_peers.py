"""One problem for all peers, in a file, and what is measured on it in torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from benchmarks._measure import Found
from benchmarks._networks import Reweighting
from benchmarks._torch_speed import build, damping_and_step, source, spectrum, timed


def prepare(path: str, batch: int, seed: int, small: bool, training: int) -> Found:
    """Train the network, solve its system well, and write both to `path`."""
    import lowrank_inverse as li
    import lowrank_inverse_torch as lit

    problem = build("mlp", batch, seed=seed, device="cpu", small=small)
    problem.train(training)
    lowest, highest = spectrum(problem)
    damping, step = damping_and_step(lowest, highest, least=1e-2 * highest)
    arrays = {f"p{i}": p.detach().numpy().copy() for i, p in enumerate(problem.params)}
    for name in ("x", "y", "outer_x", "outer_y", "w"):
        arrays[name] = getattr(problem, name).detach().numpy().copy()
    loss = problem.inner().item()
    wide = load(arrays, small, torch.float64)
    solver = li.CG(damping=damping, rtol=1e-10, max_steps=1000)
    found = lit.hypergradient(
        wide.inner, wide.outer, wide.model, wide.w, solver=solver, accumulate_grad=False
    )
    if not found.solution.converged:
        raise RuntimeError(f"the reference did not converge: {found.solution.message}")
    reference = found.grads.numpy()
    np.savez(path, reference=reference, num_params=len(problem.params), **arrays)
    return {
        "n": problem.n,
        "loss": loss,
        "lowest": lowest,
        "highest": highest,
        "damping": damping,
        "step": step,
        "steps": int(found.solution.num_steps),
    }


def load(arrays: Any, small: bool, dtype: torch.dtype = torch.float32) -> Reweighting:
    """Return the problem whose numbers were written."""
    problem = build("mlp", len(arrays["y"]), seed=0, device="cpu", small=small)
    problem.model.to(dtype)
    with torch.no_grad():
        for i, p in enumerate(problem.params):
            p.copy_(torch.as_tensor(arrays[f"p{i}"]))
    for name in ("x", "outer_x", "w"):
        setattr(problem, name, torch.as_tensor(arrays[name]).to(dtype))
    for name in ("y", "outer_y"):
        setattr(problem, name, torch.as_tensor(arrays[name]))
    problem.w.requires_grad_()
    return problem


def compare(
    path: str,
    method: str,
    k: int,
    damping: float,
    step: float,
    small: bool,
    repeats: int,
    limit: float,
) -> Found:
    """Measure a method in torch on the problem in the file `path`."""
    methods = source(method)
    tiny = build("mlp", 2, seed=0, device="cpu", small=True)
    methods(tiny, damping, step, 2)[method]()
    with np.load(path) as arrays:
        problem, reference = load(arrays, small), torch.as_tensor(arrays["reference"])
    makers = {j: (lambda j=j: methods(problem, damping, step, j)[method]) for j in (k, 1)}
    found, answer = timed(makers, k, problem.products, "cpu", repeats=repeats, limit=limit)
    norm = torch.linalg.vector_norm
    return found | {"error": float(norm(answer - reference) / norm(reference))}
