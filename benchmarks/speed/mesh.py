"""Weak scaling over processes: what each holds, sends and computes; and a model of larger ones.

A perceptron in torch, float32, whose parameters grow with the processes: as many for each, and as
many examples. Each process counts what it holds of a vector and of 20 columns, and the numbers
that its collectives handle for a product, a column and a step of conjugate gradients; the products
a second are those of 10, and of one process in the time of which the others wait. Processes on the
loopback of one machine share its memory and its cores: that column is no prediction of a network.
The second table is SIMULATED: the counts of the first, with a bandwidth, a latency and a speed of
arithmetic that are given.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import socket
import time
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lowrank_inverse as li
import lowrank_inverse_torch as lit
from benchmarks.harness.experiment import Option, Run, experiment
from benchmarks.harness.report import table

RANK, PRODUCTS, STEPS = 20, 10, 4
BANDWIDTH, LATENCY, SPEED = 50e9, 20e-6, 4e14
"""Of the model: bytes a second of a process, seconds a message, operations a second."""


class Sent(TorchDispatchMode):
    """Counts the numbers that collectives take or return here, whichever are more."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        result = func(*args, **(kwargs or {}))
        ours = func.namespace in ("_c10d_functional", "c10d")
        if ours and not any(part in func.__name__ for part in ("wait", "wrap", "barrier")):
            sides = [[x for x in tree_leaves(s) if torch.is_tensor(x)] for s in (*args, result)]
            self.numbers += max(sum(x.numel() for x in side) for side in sides)
        return result


def counted(function: Any) -> tuple[Any, int]:
    """Return what a function returns, and the numbers sent meanwhile."""
    with Sent() as sent:
        result = function()
    return result, sent.numbers


def take_part(rank: int, size: int, port: int, per_process: int, batch: int, found: Any) -> None:
    """Measure as one of the processes; the first one tells."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=size)
    mesh = init_device_mesh("cpu", (size,))
    torch.manual_seed(0)
    width = size * per_process // 110
    model = nn.Sequential(nn.Linear(99, width), nn.Tanh(), nn.Linear(width, 10, bias=False))
    x, y = torch.randn(batch, 99), torch.arange(batch) % 10
    H = lit.HessianOperator(lambda: F.cross_entropy(model(x), y), model, mesh=mesh)
    b = H.gradient
    _, product = counted(lambda: H @ b)

    def solved(steps: int) -> Any:
        return li.solve(H, b, solver=li.CG(damping=1.0, rtol=0.0, max_steps=steps))

    few, many = counted(lambda: solved(1))[1], counted(lambda: solved(1 + STEPS))[1]
    approx, columns = counted(lambda: li.nystrom(H, RANK, sampling="uniform"))
    start = time.perf_counter()
    for _ in range(PRODUCTS):
        _ = H @ b
    seconds = (time.perf_counter() - start) / PRODUCTS
    if rank == 0:
        rows = approx.columns.to_local()
        told = {
            "n": H.shape[0],
            "rows": rows.shape[0],
            "vector bytes": b.to_local().nbytes,
            "column bytes": rows.numel() * rows.element_size(),
            "sent a product": product,
            "sent a column": columns / RANK,
            "sent a step": (many - few) / STEPS,
            "products a second": 1 / seconds,
        }
        found.put(told)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def measured(size: int, per_process: int, batch: int) -> Any:
    """Measure with `size` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    arguments = (size, port, per_process, batch, found)
    members = [context.Process(target=take_part, args=(rank, *arguments)) for rank in range(size)]
    for member in members:
        member.start()
    result = found.get(timeout=600)
    for member in members:
        member.join(60)
    return result


def simulated(n: float, size: int, rank: int = 50) -> dict[str, str]:
    """Return a row of the model, for float32."""
    share = (size - 1) / size
    sent = 2 * share * n * 4
    network = sent / BANDWIDTH + 2 * LATENCY * math.log2(size)
    return {
        "n": f"{n:.0e}",
        "processes": str(size),
        f"{rank} columns, GiB": f"{4 * n * rank / size / 2**30:.3g}",
        "9 vectors, GiB": f"{9 * 4 * n / size / 2**30:.3g}",
        "parameters, GiB": f"{4 * n / 2**30:.3g}",
        "sent a product, GiB": f"{sent / 2**30:.3g}",
        "network a product, s": f"{network:.3g}",
        "tokens a process where arithmetic takes as long": f"{network * SPEED / (12 * n):.0f}",
    }


@experiment(
    "mesh",
    __doc__,
    Option("processes", [1, 2], "how many", least=1),
    Option("per_process", 110_000, "parameters for each process", least=110, quick=1100),
    Option("batch", 256, "examples of each process", least=1, quick=8),
    Option("quick", False, "smaller, to try it"),
    packages=("torch",),
)
def main(run: Run) -> None:
    options = run.options
    cells = {
        str(size): {"size": size, "per_process": options.per_process, "batch": options.batch}
        for size in options.processes
    }
    found = run.each(measured, cells, apart=False)
    rows = [
        {
            "processes": size,
            "n": f"{one['n']}",
            "rows held": f"{one['rows']}",
            "vector, KiB": f"{one['vector bytes'] / 2**10:.0f}",
            f"{RANK} columns, KiB": f"{one['column bytes'] / 2**10:.0f}",
            "sent a product / n": f"{one['sent a product'] / one['n']:.4f}",
            "a column / n": f"{one['sent a column'] / one['n']:.4f}",
            "a step / n": f"{one['sent a step'] / one['n']:.4f}",
            "products a second": f"{one['products a second']:.1f}",
        }
        for size, one in found.items()
    ]
    model = [simulated(10.0**e, p) for e in (9, 10, 11) for p in (1, 64, 1024)]
    run.publish(
        f"{table(rows)}\n\nSIMULATED, {BANDWIDTH / 1e9:.0f} GB/s and {LATENCY * 1e6:.0f} µs a "
        f"process, {SPEED / 1e12:.0f} TFLOP/s, float32:\n\n{table(model)}",
        "Numbers are those of one process. With one process nothing leaves it, though collectives "
        "are called.",
        measured=found,
    )
