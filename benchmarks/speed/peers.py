"""One hypergradient by this package and by its peers: time, memory, and error.

The problem is the same for all: a perceptron of 1.3e6 parameters, trained for a while, and the
weights of its training examples as hyperparameters. The system solved is Hessian + damping in every
case: where a peer knows no damping, its inner loss has it as a ridge. All make the same number of
products with the Hessian. The error is that of the hypergradient, against conjugate gradients in
float64 to a relative residual of 1e-10. Each measurement has a process of its own.

Peers that are not installed are named as absent. They can live in other environments:

    python -m venv peers
    peers/bin/pip install -c constraints.txt torch==2.13.0 numpy graphviz optree
    peers/bin/pip install --no-deps hypergrad==0.0.1 betty-ml==0.1.1 torchopt==0.7.3
    python -m benchmarks peers --peer-python peers/bin/python

jaxopt is among the tools that this package is developed with (extra `dev`).
"""

from __future__ import annotations

import sys

from benchmarks.harness.experiment import PEER_PYTHON, QUICK, TIMED, Option, Run, experiment
from benchmarks.harness.processes import Found, interpreter
from benchmarks.harness.report import table
from benchmarks.speed import measure as in_torch

METHODS = {
    "Nyström, stored": None,
    "Nyström, streamed": None,
    "hypergrad Nyström": "hypergrad",
    "CG": None,
    "hypergrad CG": "hypergrad",
    "betty CG": "betty-ml",
    "TorchOpt CG": "torchopt",
    "Neumann": None,
    "hypergrad Neumann": "hypergrad",
    "betty Neumann": "betty-ml",
    "TorchOpt Neumann": "torchopt",
    "Nyström (jax)": "jax",
    "CG (jax)": "jax",
    "jaxopt CG": "jaxopt",
}
"""Each with the package that it needs beside this one's torch."""
IN_JAX = ("jax", "jaxopt")
TRAINING = 100


@experiment(
    *("peers", __doc__),
    Option("rank", 20, "columns, steps and terms", least=1),
    Option("batch", 128, "examples", least=1),
    Option("methods", list(METHODS), "what is compared", choices=list(METHODS)),
    Option("limit", 60.0, "seconds that a call may take"),
    *(PEER_PYTHON, QUICK, *TIMED),
    packages=("torch", "numpy"),
)
def main(run: Run) -> None:
    options = run.options
    candidates = [sys.executable, *options.peer_python]
    places = {
        package: interpreter(package, candidates)
        for package in dict.fromkeys(filter(None, METHODS.values()))
    }
    run.about["versions"] |= {package: version for package, (_, version) in places.items()}
    given = {"batch": options.batch, "seed": options.seed, "small": options.quick}
    problem = run.file(in_torch.write_problem, given | {"training": TRAINING})
    shared = {name: problem[name] for name in ("path", "damping", "step")} | {"k": options.rank}
    shared |= {"repeats": options.repeats, "limit": options.limit}
    found: dict[str, Found] = {}
    pythons = {m: places[p][0] if p else sys.executable for m, p in METHODS.items()}
    wanted = [m for m in METHODS if m in options.methods and pythons[m]]
    cells = {
        m: shared | {"method": m, "small": options.quick}
        for m in wanted
        if METHODS[m] not in IN_JAX
    }
    found |= run.each(in_torch.measure, cells, strict=False, pythons=pythons)
    cells = {m: shared | {"method": m} for m in wanted if METHODS[m] in IN_JAX}
    if cells:
        from benchmarks.speed import jax_methods

        found |= run.each(jax_methods.measure, cells, strict=False, pythons=pythons)
    rows = [
        {
            "hypergradient": method,
            "s": f"{entry['seconds']:.3f}",
            "in products": f"{entry['in products']:.1f}",
            "a further step": f"{entry['step']:.2f}" if "step" in entry else "",
            "MiB": f"{entry['mib']:.0f}",
            "relative error": f"{entry['error']:.1e}",
        }
        for method, entry in found.items()
        if "seconds" in entry
    ]
    absent = [f"{m}: {METHODS[m]} is not installed" for m in METHODS if not pythons[m]]
    run.publish(
        table(rows),
        f"n = {problem['n']}, trained to an inner loss of {problem['loss']:.3f}; Hessian in "
        f"[{problem['lowest']:.1e}, {problem['highest']:.1e}], damping {problem['damping']:.1e}. "
        f"The reference took {problem['steps']} steps.\nProducts: of one double backward on a kept "
        "graph (in jax: one compiled product), timed in turn with the method.",
        *absent,
        *(f"{method}: {entry['failed']}" for method, entry in found.items() if "failed" in entry),
        measurements={"problem": problem, **found},
    )
    draw(run, {method: entry for method, entry in found.items() if "seconds" in entry})


def draw(run: Run, found: dict[str, Found]) -> None:
    """Draw time, memory and error of every method that was measured, as bars."""
    from matplotlib.ticker import LogLocator, NullFormatter

    panels = {
        "in products": "time, in products with the Hessian",
        "mib": "peak of memory, MiB",
        "error": "relative error",
    }
    methods = [method for method in METHODS if method in found][::-1]
    figure, (axes,) = run.figure(1, 3, 13, 1.5 + 0.35 * len(methods), sharey=True)
    colors = ["C0" if METHODS[method] in (None, "jax") else "C1" for method in methods]
    for axis, (key, label) in zip(axes, panels.items(), strict=True):
        axis.barh(methods, [found[method][key] for method in methods], color=colors)
        axis.set(xlabel=label, xscale="log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(axis="x", alpha=0.3)
    figure.suptitle("One hypergradient: ours blue, peers orange")
    run.draw(figure)
