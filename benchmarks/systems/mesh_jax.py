"""Hypergradients in JAX on a mesh of 1 … 8 devices of one CPU: what each holds, and what is sent.

Weak scaling: a network with so many parameters for each device, its columns cut by rows. Nothing is
timed, for the devices share one processor. What is counted is in the compiled program: the bytes of
scratch on a device by ``memory_analysis``, in units of n k / P numbers, and the collectives in its
text with the numbers of the largest one. A loop's collectives are in it once.
"""

from __future__ import annotations

import os
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lowrank_inverse as li
import lowrank_inverse_jax as lij
from benchmarks.harness.experiment import QUICK, WORKERS, Option, Run, experiment
from benchmarks.harness.report import table

INPUTS, CLASSES, EXAMPLES, DAMPING = 16, 8, 64, 0.1
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def solvers(rank: int) -> dict[str, Any]:
    return {
        "CG": li.CG(damping=DAMPING, recycle=0),
        "Nystrom": li.Nystrom(rank=rank, damping=DAMPING, sampling="uniform"),
        "NystromCG": li.NystromCG(rank=rank, damping=DAMPING, sampling="uniform", recycle=0),
    }


def collectives(text: str) -> dict[str, tuple[int, int]]:
    """Return how many of each kind there are in a program, and the numbers of the largest."""
    found: dict[str, tuple[int, int]] = {}
    for line in text.splitlines():
        match = re.search(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(", line)
        if match:
            shapes = re.findall(r"\w\d+\[([\d,]*)\]", match[1])
            sizes = [int(np.prod([int(d) for d in shape.split(",") if d])) for shape in shapes]
            count, largest = found.get(match[2], (0, 0))
            found[match[2]] = count + 1, max([largest, *sizes])
    return found


def measure(devices: int, solver: str, hidden: int, rank: int) -> dict[str, Any]:
    """Compile a hypergradient for a mesh, run it, and count."""
    os.environ["NPROC"] = "32"  # threads of XLA: with one a device, a sum may wait for ever
    jax.config.update("jax_num_cpu_devices", devices)
    mesh = jax.make_mesh((devices,), ("x",), axis_types=(AxisType.Auto,))
    rng = np.random.default_rng(0)
    width = hidden * devices

    def put(x: Any, *spec: Any) -> jax.Array:
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    def drawn(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / shape[0] ** 0.5).astype(np.float32)

    params = {"a": put(drawn(INPUTS, width), None, "x"), "b": put(drawn(width, CLASSES), "x")}
    data = put(drawn(EXAMPLES, INPUTS), "x"), put(rng.integers(0, CLASSES, EXAMPLES), "x")
    weights = put(np.zeros(EXAMPLES, np.float32), "x")

    def errors(w: Any, x: Any, y: Any) -> jax.Array:
        scores = jax.nn.log_softmax(jnp.tanh(x @ w["a"]) @ w["b"])
        return -jnp.take_along_axis(scores, y[:, None], axis=1)[:, 0]

    def call(w: Any, h: Any, x: Any, y: Any) -> Any:
        out = lij.hypergradient(
            lambda w, h, x, y: (jax.nn.sigmoid(h) * errors(w, x, y)).mean(),
            lambda w, h, x, y: errors(w, x, y)[: EXAMPLES // 4].mean(),
            w,
            h,
            inner_args=(x, y),
            outer_args=(x, y),
            solver=solvers(rank)[solver],
            chunk_size=1,
            mesh=mesh,
        )
        return out.grads, out.solution.value, out.info.relative_residual

    program = jax.jit(call).lower(params, weights, *data).compile()
    _, value, residual = program(params, weights, *data)
    n = value.size
    return {
        "n": n,
        "rows": max(shard.data.size for shard in value.addressable_shards),
        "scratch": program.memory_analysis().temp_size_in_bytes / 4 / (n * rank / devices),
        "weights": INPUTS * width,
        "collectives": collectives(program.as_text()),
        "residual": float(residual),
    }


@experiment(
    "mesh-jax",
    __doc__,
    Option("devices", [1, 2, 4, 8], "how many", least=1),
    Option("hidden", 512, "units a device", least=1, quick=16),
    Option("rank", 20, "columns", least=1, quick=4),
    QUICK,
    WORKERS,
    packages=("jax", "numpy"),
)
def main(run: Run) -> None:
    given = {"hidden": run.options.hidden, "rank": run.options.rank}
    cells = {
        (devices, name): {"devices": devices, "solver": name, **given}
        for devices in run.options.devices
        for name in solvers(1)
    }
    found = run.each(measure, cells)
    rows = []
    for (devices, name), one in found.items():
        kinds = one["collectives"]
        rows.append(
            {
                "solver": name,
                "devices": f"{devices}",
                "n": f"{one['n']}",
                "rows a device": f"{one['rows']}",
                "scratch, n k / P": f"{one['scratch']:.1f}",
                "weight matrix": f"{one['weights']}",
            }
            | {
                f"{kind} (largest)": "{} ({})".format(*kinds.get(kind, (0, 0)))
                for kind in ("all-gather", "all-reduce", "collective-permute")
            }
        )
    run.publish(
        table(sorted(rows, key=lambda row: row["solver"])),
        f"k = {run.options.rank}, float32, {EXAMPLES} examples, on devices that one CPU imitates.",
        counts=[{"devices": cell[0], "solver": cell[1]} | one for cell, one in found.items()],
    )
