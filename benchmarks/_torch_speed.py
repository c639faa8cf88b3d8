"""What is measured in torch: every way to a hypergradient, and the floor under it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks._measure import MIB, Found, Peak, in_turn, ratio, seconds
from benchmarks._networks import Reweighting, network


def ours(problem: Reweighting, damping: float, step: float, k: int) -> dict[str, Callable[[], Any]]:
    """Return our hypergradients at k columns, steps or terms."""
    import lowrank_inverse as li
    import lowrank_inverse_torch as lit

    def run(solver: Any, chunk_size: int = 1) -> Callable[[], Any]:
        return lambda: lit.hypergradient(
            problem.inner,
            problem.outer,
            problem.model,
            problem.w,
            solver=solver,
            rng=0,
            chunk_size=chunk_size,
        )

    def nystrom(storage: str = "stored", chunk: int | None = None) -> Any:
        return li.Nystrom(rank=k, damping=damping, memory=storage, chunk_size=chunk)

    return {
        "Nyström, stored": run(nystrom()),
        "Nyström, stored, 5 products a batch": run(nystrom(), min(5, k)),
        "Nyström, stored, k products a batch": run(nystrom(), k),
        "Nyström, chunked, κ = 1": run(nystrom("chunked", 1)),
        "Nyström, chunked, κ = 5": run(nystrom("chunked", min(5, k))),
        "Nyström, chunked, κ = k": run(nystrom("chunked", k)),
        "Nyström, streamed": run(nystrom("streamed")),
        "CG": run(li.CG(damping=damping, rtol=0.0, max_steps=k)),
        "Neumann": run(li.Neumann(damping=damping, num_terms=k, step_size=step)),
    }


def hypergrad(
    problem: Reweighting, damping: float, step: float, k: int
) -> dict[str, Callable[[], Any]]:
    """Return those of hypergrad; only its Nyström method knows a damping, the loss has it else."""
    import warnings

    warnings.filterwarnings("ignore")  # of functorch, that it is deprecated
    from hypergrad import approx_hypergrad as peer

    plain, outer = problem.functions(0.0)
    damped, _ = problem.functions(damping)
    params, hparams = tuple(p.detach() for p in problem.params), (problem.w.detach(),)

    def nystrom() -> Any:
        torch.manual_seed(0)
        return peer.nystrom(plain, outer, params, hparams, k, damping)

    return {
        "hypergrad Nyström": nystrom,
        "hypergrad CG": lambda: peer.conjugate_gradient(damped, outer, params, hparams, k, 1.0),
        "hypergrad Neumann": lambda: peer.neumann(damped, outer, params, hparams, k, step),
    }


def betty(
    problem: Reweighting, damping: float, step: float, k: int
) -> dict[str, Callable[[], Any]]:
    """Return those of betty-ml: its functions, on a stand-in for the problem of its engine."""
    from types import SimpleNamespace

    from betty.hypergradient.cg import cg
    from betty.hypergradient.neumann import neumann

    def damped(_: Any) -> Any:
        return problem.inner() + 0.5 * damping * sum((p**2).sum() for p in problem.params)

    lower = SimpleNamespace(
        paths=[],
        cur_batch=None,
        training_step_exec=damped,
        parameters=lambda: list(problem.params),
        trainable_parameters=lambda: list(problem.params),
        config=SimpleNamespace(
            cg_iterations=k,
            cg_alpha=1.0,
            neumann_iterations=k,
            neumann_alpha=step,
        ),
    )
    upper = SimpleNamespace(trainable_parameters=lambda: [problem.w])

    def run(method: Any) -> Callable[[], Any]:
        def call() -> Any:
            vector = torch.autograd.grad(problem.outer(), problem.params)
            return method(vector, lower, upper)

        return call

    return {"betty CG": run(cg), "betty Neumann": run(neumann)}


def torchopt(
    problem: Reweighting, damping: float, step: float, k: int
) -> dict[str, Callable[[], Any]]:
    """Return those of TorchOpt: the gradient through a solver that is already at the minimum."""
    from torchopt.diff.implicit import custom_root
    from torchopt.linear_solve import solve_cg, solve_inv

    plain, outer = problem.functions(0.0)
    optimality = torch.func.grad(plain, argnums=0)
    theta = tuple(p.detach() for p in problem.params)

    def run(solve: Any) -> Callable[[], Any]:
        @custom_root(optimality, argnums=1, solve=solve)
        def solver(params: Any, hparams: Any) -> Any:
            return params

        def call() -> Any:
            hparams = (problem.w.detach().requires_grad_(),)
            loss = outer(solver(theta, hparams), hparams)
            return torch.autograd.grad(loss, hparams)

        return call

    series = {"ns": True, "maxiter": k, "alpha": step, "ridge": damping}
    return {
        "TorchOpt CG": run(solve_cg(maxiter=k, rtol=0.0, ridge=damping)),
        "TorchOpt Neumann": run(solve_inv(**series)),
    }


SOURCES = {"ours": ours, "hypergrad": hypergrad, "betty": betty, "TorchOpt": torchopt}


def source(method: str) -> Callable[..., dict[str, Callable[[], Any]]]:
    """Return what has the method of that name."""
    return SOURCES.get(method.split()[0], ours)


def num_products(method: str, k: int) -> int:
    """Count what a method needs in products at least, the mixed derivative among them."""
    if "κ" in method:
        chunk = k if method.endswith("k") else min(k, int(method.rsplit(" ", 1)[1]))
        return k * (k // chunk + 1) // 2 + k + 3
    return {"Nyström, streamed": 2 * k + 4}.get(method, k + 2)


def gradient(found: Any) -> torch.Tensor:
    """Return the hypergradient in what a method returned."""
    found = getattr(found, "grads", found)
    return (found[0] if isinstance(found, (tuple, list)) else found).detach()


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


def measure(
    model: str,
    method: str,
    k: int,
    batch: int,
    damping: float,
    step: float,
    seed: int,
    device: str,
    small: bool,
    repeats: int,
    limit: float,
) -> Found:
    """Measure a hypergradient: memory at its first call, then times in turn with products.

    `limit` is of seconds: what would take longer is left out, and says what it would take.
    """
    methods = source(method)
    # What loads code and starts threads, on a small problem, so that the first call has neither.
    tiny = build(model, 2, seed=seed, device=device, small=True)
    methods(tiny, damping, step, min(k, 2))[method]()
    problem = build(model, batch, seed=seed, device=device, small=small)
    expected = num_products(method, k)
    if expected > 4 * k + 10:
        product = problem.products()
        product()
        needed = expected * seconds(product, device)
        del product
        if needed > limit:
            return {"left out": f"{expected} products, about {needed:.0f} s", "n": problem.n}
    makers = {j: (lambda j=j: methods(problem, damping, step, j)[method]) for j in (k, 1)}
    found, _ = timed(makers, k, problem.products, device, repeats=repeats, limit=limit)
    return {"n": problem.n} | found


def timed(
    makers: dict[int, Callable[[], Any]],
    k: int,
    products: Callable[[], Any],
    device: str,
    *,
    repeats: int,
    limit: float,
) -> tuple[Found, torch.Tensor]:
    """Measure memory and times of ``makers[k]()``, and the answer of its first call."""
    run = makers[k]()
    found: list[Any] = []
    with Peak(device) as peak:
        first = seconds(lambda: found.append(run()), device)
    info = getattr(found[0], "info", None)
    answer = gradient(found.pop())
    runs = {"run": run, "product": products()}
    if first < limit / 30 and k > 1:
        runs["one"] = makers[1]()
    budget = limit / 10
    times = in_turn(runs, device, repeats=repeats, budget=budget, known={"run": first})
    result: Found = {
        "mib": peak.num_bytes / MIB,
        "first": first,
        "seconds": statistics.median(times["run"]),
        "product": statistics.median(times["product"]),
        "in products": ratio(times, "run", "product"),
        "finite": bool(torch.isfinite(answer).all()),
        "products": None if info is None else int(info.num_products),
        "times": times,
    }
    if "one" in runs:  # what each further column or step costs
        turns = zip(times["run"], times["one"], times["product"], strict=True)
        result["step"] = statistics.median((a - b) / c for a, b, c in turns) / (k - 1)
    return result, answer
