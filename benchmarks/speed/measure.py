"""What is measured: a hypergradient's time and memory, in turn with a product with the Hessian."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from benchmarks.harness.processes import Found
from benchmarks.harness.timing import MIB, Peak, in_turn, ratio, seconds
from benchmarks.speed.networks import Reweighting, network
from benchmarks.speed.torch_methods import num_products, source


def build(model: str, batch: int, *, seed: int, device: str, small: bool) -> Reweighting:
    """Return the problem of a model in its initial state."""
    torch.manual_seed(seed)
    return Reweighting(*network(model, small), batch, seed=seed, device=device)


def spectrum(problem: Reweighting, steps: int = 25) -> tuple[float, float]:
    """Estimate the lowest and the highest eigenvalue of the Hessian, by Lanczos."""
    grads = torch.autograd.grad(problem.inner(), problem.params, create_graph=True)
    flat = torch.cat([grad.reshape(-1) for grad in grads])
    basis: list[torch.Tensor] = []
    v = torch.randn_like(flat.detach())
    T = torch.zeros(steps, steps, dtype=torch.float64)
    for j in range(steps):
        v = v / torch.linalg.vector_norm(v)
        basis.append(v)
        Q = torch.stack(basis)
        product = torch.autograd.grad(flat, problem.params, v, retain_graph=True)
        v = torch.cat([p.reshape(-1) for p in product])
        T[: j + 1, j] = (Q @ v).double().cpu()
        for _ in range(2):  # once more, for what rounding left
            v = v - Q.T @ (Q @ v)
    eigenvalues = torch.linalg.eigvalsh(torch.triu(T) + torch.triu(T, 1).T)
    return float(eigenvalues[0]), float(eigenvalues[-1])


def damping_and_step(lowest: float, highest: float, least: float) -> tuple[float, float]:
    """Return a damping that makes the system definite, and a step that lets Neumann converge."""
    damping = max(-1.2 * lowest, least)
    return damping, 0.9 / (highest + damping)


def prepare(model: str, batch: int, seed: int, device: str, small: bool) -> Found:
    """Measure the memory of the floor, one gradient's graph and a product, and the curvature."""
    build(model, 2, seed=seed, device=device, small=True).products()()
    problem = build(model, batch, seed=seed, device=device, small=small)
    with Peak(device) as peak:
        product = problem.products()
        product()
    times = in_turn({"product": product}, device, repeats=7, budget=10.0)
    lowest, highest = spectrum(problem, min(25, problem.n))
    found = {"n": problem.n, "mib": peak.num_bytes / MIB, "product": times["product"]}
    return found | {"lowest": lowest, "highest": highest}


def write_problem(path: str, batch: int, seed: int, small: bool, training: int) -> Found:
    """Train the perceptron, solve its system well, and write both to `path` for all peers."""
    import lowrank_inverse as li
    import lowrank_inverse_torch as lit

    problem = build("mlp", batch, seed=seed, device="cpu", small=small)
    problem.train(training)
    lowest, highest = spectrum(problem)
    damping, step = damping_and_step(lowest, highest, least=1e-2 * highest)
    numbers = arrays(problem)
    found = {"n": problem.n, "loss": problem.inner().item(), "lowest": lowest, "highest": highest}
    wide = load(numbers, small, torch.float64)
    solver = li.CG(damping=damping, rtol=1e-10, max_steps=1000)
    out = lit.hypergradient(wide.inner, wide.outer, wide.model, wide.w, solver=solver)
    if not out.solution.converged:
        raise RuntimeError(f"the reference did not converge: {out.solution.message}")
    np.savez(path, reference=out.grads.numpy(), **numbers)
    return found | {"damping": damping, "step": step, "steps": int(out.solution.num_steps)}


def arrays(problem: Reweighting) -> dict[str, Any]:
    """Return all numbers of a problem on the CPU, for `load` and for jax."""
    found: dict[str, Any] = {"num_params": len(problem.params)}
    found |= {f"p{i}": p.detach().cpu().numpy().copy() for i, p in enumerate(problem.params)}
    for name in ("x", "y", "outer_x", "outer_y", "w"):
        found[name] = getattr(problem, name).detach().cpu().numpy().copy()
    return found


def load(arrays: Any, small: bool, dtype: torch.dtype = torch.float32) -> Reweighting:
    """Return the problem whose numbers were written."""
    problem = build("mlp", len(arrays["y"]), seed=0, device="cpu", small=small)
    with torch.no_grad():
        for i, p in enumerate(problem.params):
            p.copy_(torch.as_tensor(arrays[f"p{i}"]))
    for name in ("x", "y", "outer_x", "outer_y", "w"):
        setattr(problem, name, torch.as_tensor(arrays[name]))
    problem.to(dtype)
    return problem


def measure(
    method: str,
    k: int,
    damping: float,
    step: float,
    small: bool,
    repeats: int,
    limit: float,
    model: str = "mlp",
    batch: int = 0,
    seed: int = 0,
    device: str = "cpu",
    path: str | None = None,
) -> Found:
    """Measure a hypergradient in torch, on a new problem or on that in the file `path`.

    `limit` is of seconds: what would take longer is left out, and says what it would take.
    """
    methods = source(method)
    # What loads code and starts threads, on a small problem, so that the first call has neither.
    tiny = build(model, 2, seed=seed, device=device, small=True)
    methods(tiny, damping, step, min(k, 2))[method]()
    reference = None
    if path is None:
        problem = build(model, batch, seed=seed, device=device, small=small)
    else:
        with np.load(path) as arrays:
            problem, reference = load(arrays, small), arrays["reference"]
    expected = num_products(method, k)
    if expected > 4 * k + 10:
        product = problem.products()
        product()
        needed = expected * seconds(product, device)
        del product
        if needed > limit:
            return {"left out": f"{expected} products, about {needed:.0f} s", "n": problem.n}

    def make(k: int) -> Callable[[], Any]:
        return methods(problem, damping, step, k)[method]

    limits = {"repeats": repeats, "limit": limit, "device": device, "reference": reference}
    return {"n": problem.n} | timed(make, k, problem.products, **limits)


def timed(
    make: Callable[[int], Callable[[], Any]],
    k: int,
    product: Callable[[], Callable[[], Any]],
    *,
    repeats: int,
    limit: float,
    device: str = "cpu",
    reference: np.ndarray | None = None,
    further: bool = True,
) -> Found:
    """Measure memory and error of the first call of ``make(k)``, then times in turn with products.

    The call for one column or step is timed beside it, for what each `further` one costs.
    """
    run, answers = make(k), []
    with Peak(device) as peak:
        first = seconds(lambda: answers.append(run()), device)
    info, answer = getattr(answers[0], "info", None), gradient(answers.pop())
    runs = {"run": run, "product": product()}
    if further and first < limit / 30 and k > 1:
        runs["one"] = make(1)
    times = in_turn(runs, device, repeats=repeats, budget=limit / 10, known={"run": first})
    found: Found = {
        "mib": peak.num_bytes / MIB,
        "first": first,
        "seconds": statistics.median(times["run"]),
        "product": statistics.median(times["product"]),
        "in products": ratio(times, "run", "product"),
        "finite": bool(np.isfinite(answer).all()),
        "products": None if info is None else int(info.num_products),
        "times": times,
    }
    if "one" in runs:
        turns = zip(times["run"], times["one"], times["product"], strict=True)
        found["step"] = statistics.median((a - b) / c for a, b, c in turns) / (k - 1)
    if reference is not None:
        found["error"] = float(np.linalg.norm(answer - reference) / np.linalg.norm(reference))
    return found


def gradient(found: Any) -> np.ndarray:
    """Return the hypergradient in what a method of either framework returned."""
    found = getattr(found, "grads", found)
    found = found[0] if isinstance(found, tuple | list) else found
    return found.detach().cpu().numpy() if isinstance(found, torch.Tensor) else np.asarray(found)
