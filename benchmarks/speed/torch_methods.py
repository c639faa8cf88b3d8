"""Every way to a hypergradient in torch, of this package and of others, by name.

Each function returns calls by the name of a method, at k columns, steps or terms.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.speed.networks import Reweighting

Calls = dict[str, Callable[[], Any]]


def ours(problem: Reweighting, damping: float, step: float, k: int) -> Calls:
    """Return our own."""
    import lowrank_inverse as li
    import lowrank_inverse_torch as lit

    def run(solver: Any, chunk_size: int = 1) -> Callable[[], Any]:
        arguments = problem.inner, problem.outer, problem.model, problem.w
        settings = {"solver": solver, "rng": 0, "chunk_size": chunk_size}
        return lambda: lit.hypergradient(*arguments, **settings)

    def nystrom(storage: str = "stored", chunk: int | None = None) -> Any:
        uniform = {"sampling": "uniform", "memory": storage, "chunk_size": chunk}
        return li.Nystrom(rank=k, damping=damping, **uniform)

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


def hypergrad(problem: Reweighting, damping: float, step: float, k: int) -> Calls:
    """Return those of hypergrad; only its Nyström method knows a damping, the loss has it else."""
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


def betty(problem: Reweighting, damping: float, step: float, k: int) -> Calls:
    """Return those of betty-ml: its functions, on a stand-in for the problem of its engine."""
    from betty.hypergradient.cg import cg
    from betty.hypergradient.neumann import neumann

    def damped(_: Any) -> Any:
        return problem.inner() + 0.5 * damping * sum((p**2).sum() for p in problem.params)

    config = {"cg_iterations": k, "cg_alpha": 1.0, "neumann_iterations": k, "neumann_alpha": step}
    lower = SimpleNamespace(
        paths=[],
        cur_batch=None,
        training_step_exec=damped,
        parameters=lambda: list(problem.params),
        trainable_parameters=lambda: list(problem.params),
        config=SimpleNamespace(**config),
    )
    upper = SimpleNamespace(trainable_parameters=lambda: [problem.w])

    def run(method: Any) -> Callable[[], Any]:
        def call() -> Any:
            vector = torch.autograd.grad(problem.outer(), problem.params)
            return method(vector, lower, upper)

        return call

    return {"betty CG": run(cg), "betty Neumann": run(neumann)}


def torchopt(problem: Reweighting, damping: float, step: float, k: int) -> Calls:
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


def source(method: str) -> Callable[..., Calls]:
    """Return what has the method of that name."""
    return SOURCES.get(method.split()[0], ours)


def num_products(method: str, k: int) -> int:
    """Count what a method needs in products at least, the mixed derivative among them."""
    if "κ" in method:
        chunk = k if method.endswith("k") else min(k, int(method.rsplit(" ", 1)[1]))
        return k * (k // chunk + 1) // 2 + k + 3
    return {"Nyström, streamed": 2 * k + 4}.get(method, k + 2)
