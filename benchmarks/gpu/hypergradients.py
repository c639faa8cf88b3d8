"""Table 5 of the paper on its network, and the same hypergradient in JAX."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from benchmarks.gpu.part import Part
from benchmarks.harness.processes import Found

BATCH, SMALL_BATCH = 128, 4
LIMIT = 20.0


def table5(path: str, about: Found, small: bool, model: str = "wrn") -> None:
    """Measure every method at k = 10, then at 20 and 5; of a larger model at 10 alone."""
    from benchmarks.speed import measure, table5
    from benchmarks.speed.table5_claims import METHODS, PEERS

    part = Part(path, about, small)
    batch, ranks = (SMALL_BATCH, [2]) if small else (BATCH, [10, 20, 5] if model == "wrn" else [10])
    shared = {"model": model, "batch": batch, "seed": 0, "device": part.device, "small": small}
    graph = part.measure(f"{model}, graph", measure.prepare, **shared)
    if "failed" in graph:
        return
    steps = measure.damping_and_step(graph["lowest"], graph["highest"], least=1e-3)
    shared |= dict(zip(("damping", "step"), steps, strict=True))
    shared |= {"repeats": 1 if small else 10, "limit": LIMIT}
    methods = METHODS if model == "wrn" or not small else METHODS[:1]
    for k in ranks:
        for method in methods:
            if table5.has_peers() or method not in PEERS:
                settings = {**shared, "method": method, "k": k}
                part.measure(f"{model}, {method}, k = {k}", measure.measure, **settings)


def in_jax(path: str, about: Found, small: bool) -> None:
    """Measure hypergradients in one compiled program, and jaxopt's: a perceptron's, and Table 5's.

    The larger network takes most of its time to compile.
    """
    os.environ |= {"JAX_PLATFORMS": "cpu" if small else "cuda,cpu"}
    os.environ |= {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    import numpy as np

    from benchmarks.speed import jax_methods, measure

    part = Part(path, about, small)
    batch = SMALL_BATCH if small else BATCH
    for model in part.models:
        problem = measure.build(model, batch, seed=0, device=part.device, small=small)
        lowest, highest = measure.spectrum(problem, 4 if small else 25)
        damping, step = measure.damping_and_step(lowest, highest, least=1e-3)
        with tempfile.TemporaryDirectory() as folder:
            data = str(Path(folder) / "problem.npz")
            np.savez(data, model=model, **measure.arrays(problem))
            shared = {"path": data, "k": 2 if small else 10, "damping": damping, "step": step}
            shared |= {"repeats": 1 if small else 10, "limit": LIMIT, "further": False}
            for method in ("CG (jax)", "jaxopt CG", "Nyström (jax)"):
                part.measure(f"{model}, {method}", jax_methods.measure, method=method, **shared)
