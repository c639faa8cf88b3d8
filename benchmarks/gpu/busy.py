"""Whether the GPU is busy in a hypergradient, and what would keep it so."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType

import lowrank_inverse as li
import lowrank_inverse_torch as lit
from benchmarks.gpu.part import Part
from benchmarks.harness.processes import Found
from benchmarks.harness.timing import in_turn
from benchmarks.speed import measure, torch_methods

LINES, WIDTH = 12, 50
BY_DEVICE = {
    "cpu": (DeviceType.CPU, "self_cpu_time_total"),
    "cuda": (DeviceType.CUDA, "self_device_time_total"),
}
"""Where a network's kernels run, and the field with their time."""


def run(path: str, about: Found, small: bool) -> None:
    """Profile two methods, then time ways to a product and to a step."""
    part = Part(path, about, small)
    settings = {"device": part.device, "small": small}
    for method in ("CG", "Nyström, stored"):
        part.measure(f"profile, {method}", profile, method=method, **settings)
    for model in part.models:
        part.measure(f"steps, {model}", steps, model=model, **settings)
    for way in WAYS:
        for model in part.models:
            part.measure(f"product, {model}, {way}", product, model=model, way=way, **settings)


def build(model: str, device: str, small: bool) -> Any:
    """Return the problem of a network."""
    return measure.build(model, 4 if small else 128, seed=0, device=device, small=small)


def profile(method: str, device: str, small: bool) -> Found:
    """Return the kernels of one hypergradient by their time, and the share of it without any."""
    from torch.profiler import ProfilerActivity

    problem = build("wrn", device, small)
    call = torch_methods.ours(problem, 10.0, 0.01, 2 if small else 10)[method]
    call()
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with torch.profiler.profile(activities=kinds, acc_events=True) as recorded:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    there, of_itself = BY_DEVICE[device]
    kernels = [
        {"name": e.key[:WIDTH], "calls": e.count, "ms": getattr(e, of_itself) / 1e3}
        for e in recorded.key_averages()
        if e.device_type == there
    ]
    events = [e.time_range for e in recorded.events() if e.device_type == DeviceType.CUDA]
    return {
        "top": sorted(kernels, key=lambda one: -one["ms"])[:LINES],
        "kernels": len(events),
        **gaps([(e.start, e.end) for e in events]),
    }


def gaps(spans: list[tuple[float, float]]) -> dict[str, float]:
    """Return the time from the first start to the last end, and the share of it in some span."""
    if not spans:
        return {}
    spans = sorted(spans)
    start, end, idle, longest = spans[0][0], spans[0][0], 0.0, 0.0
    for begin, stop in spans:
        idle, longest = idle + max(0.0, begin - end), max(longest, begin - end)
        end = max(end, stop)
    return {"ms": (end - start) / 1e3, "busy": 1 - idle / (end - start), "longest": longest / 1e3}


def steps(model: str, device: str, small: bool) -> dict[str, float]:
    """Time a step of conjugate gradients whose test is read each time, and every fifth."""
    problem = build(model, device, small)
    H = lit.HessianOperator(problem.inner, problem.model)
    b, k = torch.ones_like(H.gradient), 5 if small else 20
    runs: dict[str, Callable[[], Any]] = {
        f"every {every}": lambda every=every: li.cg(
            H, b, damping=10.0, rtol=0.0, max_steps=k, check_every=every
        )
        for every in (1, 5)
    }
    times = in_turn(runs, device, repeats=1 if small else 5)
    return {name: 1e3 * statistics.median(found) / k for name, found in times.items()}


def eager(problem: Any, small: bool) -> Callable[[], Any]:
    return problem.products()


def compiled(problem: Any, small: bool) -> Callable[[], Any]:
    """Compile forward over reverse, as a function of the vector alone."""
    inner, _ = problem.functions(0.0)
    params, hparams = tuple(p.detach() for p in problem.params), (problem.w.detach(),)
    vectors = tuple(torch.randn_like(p) for p in params)

    def multiply(vectors: Any) -> Any:
        gradient = torch.func.grad(lambda p: inner(p, hparams))
        return torch.func.jvp(gradient, (params,), (vectors,))[1]

    run = torch.compile(multiply, backend="eager" if small else "inductor")
    return lambda: run(vectors)


def captured(problem: Any, small: bool) -> Callable[[], Any]:
    """Capture a product on a kept graph; its vector is written into the same memory."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        multiply = problem.products()
        for _ in range(3):
            multiply()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        multiply()
    return graph.replay


WAYS = {"eager": eager, "CUDA graph": captured, "torch.compile": compiled}


def product(model: str, way: str, device: str, small: bool) -> dict[str, float]:
    """Time a product with the Hessian, in milliseconds."""
    run = WAYS[way](build(model, device, small), small)
    run()
    times = in_turn({way: run}, device, repeats=1 if small else 7)
    return {"ms": 1e3 * statistics.median(times[way])}
