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

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks._measure import Found, Records, apart, use_threads
from benchmarks._report import machine, publish, pyplot, table

TORCH, JAX = "benchmarks._torch_peers:compare", "benchmarks._jax_speed:compare"
METHODS = {
    "Nyström, stored": (None, TORCH),
    "Nyström, streamed": (None, TORCH),
    "hypergrad Nyström": ("hypergrad", TORCH),
    "CG": (None, TORCH),
    "hypergrad CG": ("hypergrad", TORCH),
    "betty CG": ("betty-ml", TORCH),
    "TorchOpt CG": ("torchopt", TORCH),
    "Neumann": (None, TORCH),
    "hypergrad Neumann": ("hypergrad", TORCH),
    "betty Neumann": ("betty-ml", TORCH),
    "TorchOpt Neumann": ("torchopt", TORCH),
    "Nyström (jax)": ("jax", JAX),
    "CG (jax)": ("jax", JAX),
    "jaxopt CG": ("jaxopt", JAX),
}
TRAINING = 100


def interpreter(package: str | None, candidates: list[str]) -> tuple[str | None, str]:
    """Return the first interpreter that has the package, and the version there."""
    if package is None:
        return candidates[0], ""
    for python in candidates:
        found: Any = apart(
            "importlib.metadata:version", {"distribution_name": package}, python=python
        )
        if isinstance(found, str):
            return python, found
    return None, "not installed"


def main(arguments: list[str]) -> int:
    """Measure, print the table, write JSON and the picture."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks peers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rank", type=int, default=20, help="columns, steps and terms")
    parser.add_argument("--batch", type=int, default=128, help="examples (default: 128)")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument(
        "--peer-python",
        action="append",
        default=[],
        metavar="PATH",
        help="an interpreter with peers that this one has not; may be repeated",
    )
    parser.add_argument("--repeats", type=int, default=5, help="of each call (default: 5)")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for a method's turns")
    parser.add_argument("--quick", action="store_true", help="a small network, to try it")
    parser.add_argument("--threads", type=int, default=1, help="of the processor (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for results")
    options = parser.parse_args(arguments)
    use_threads(options.threads)
    if min(options.rank, options.repeats, options.batch, options.threads) < 1:
        parser.error("--rank, --batch and --repeats must be at least 1")
    candidates = [sys.executable, *options.peer_python]
    packages = {package for package, _ in METHODS.values() if package is not None}
    places = {package: interpreter(package, candidates) for package in sorted(packages)}
    about = machine("torch", "numpy", threads=options.threads, seed=options.seed)
    about["versions"] |= {package: version for package, (_, version) in places.items()}
    about |= {"rank": options.rank, "batch": options.batch, "repeats": options.repeats}
    about["network"] = "small" if options.quick else "full"
    records = Records(options.output / "peers.json", about)
    bar = tqdm(total=len(options.methods), desc="peers", unit="method")
    with tempfile.TemporaryDirectory() as folder, bar:
        path = str(Path(folder) / "problem.npz")
        shared = {"small": options.quick}
        # The file lives as long as a run: a run taken up again makes it anew, from the same seed.
        about_problem = apart(
            "benchmarks._torch_peers:prepare",
            shared
            | {"path": path, "batch": options.batch, "seed": options.seed, "training": TRAINING},
        )
        if "failed" in about_problem:
            raise RuntimeError(about_problem["failed"])
        records.get("problem", lambda: about_problem)
        settings = {"path": path, "k": options.rank, "limit": options.limit}
        settings |= {"repeats": options.repeats}
        settings |= {name: about_problem[name] for name in ("damping", "step")}
        for method in options.methods:
            bar.set_postfix_str(method)
            package, target = METHODS[method]
            python = interpreter(None, candidates)[0] if package is None else places[package][0]
            if python is not None:
                extra = shared if target == TORCH else {}
                records.get(
                    method,
                    lambda extra=extra, method=method, target=target, python=python: apart(
                        target, settings | extra | {"method": method}, python=python
                    ),
                )
            bar.update()
    publish(options.output, "peers", report(records.found), about, measurements=records.found)
    picture = options.output / "peers.png"
    draw(records.found, picture)
    print(f"Picture: {picture}")
    return 0


def draw(found: dict[str, Found], path: Path) -> None:
    """Draw time, memory and error of every method that was measured, as bars."""
    from matplotlib.ticker import LogLocator, NullFormatter

    plt = pyplot()
    methods = [method for method in METHODS if "seconds" in found.get(method, {})][::-1]
    panels = {
        "in products": "time, in products with the Hessian",
        "mib": "peak of memory, MiB",
        "error": "relative error",
    }
    size = (13, 1.5 + 0.35 * len(methods))
    figure, axes = plt.subplots(1, 3, figsize=size, layout="constrained", sharey=True)
    colors = ["C0" if METHODS[method][0] in (None, "jax") else "C1" for method in methods]
    for axis, (key, label) in zip(axes, panels.items(), strict=True):
        axis.barh(methods, [found[method][key] for method in methods], color=colors)
        axis.set(xlabel=label, xscale="log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(axis="x", alpha=0.3)
    figure.suptitle("One hypergradient: ours blue, peers orange")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def report(found: dict[str, Found]) -> str:
    """Return the table, and what it was measured on."""
    lines, missing = [], []
    for method, (package, _) in METHODS.items():
        entry = found.get(method)
        if entry is None:
            if package is not None:
                missing.append(f"{method}: {package} is not installed, or it was not asked for")
        elif "failed" in entry:
            missing.append(f"{method}: {entry['failed']}")
        else:
            lines.append(
                {
                    "hypergradient": method,
                    "s": f"{entry['seconds']:.3f}",
                    "in products": f"{entry['in products']:.1f}",
                    "a further step": f"{entry['step']:.2f}" if "step" in entry else "",
                    "MiB": f"{entry['mib']:.0f}",
                    "relative error": f"{entry['error']:.1e}",
                }
            )
    problem = found["problem"]
    about = (
        f"n = {problem['n']}, trained to an inner loss of {problem['loss']:.3f}; Hessian in "
        f"[{problem['lowest']:.1e}, {problem['highest']:.1e}], damping {problem['damping']:.1e}. "
        f"The reference took {problem['steps']} steps.\nProducts: of one double backward on a kept "
        "graph (in jax: one compiled product), timed in turn with the method."
    )
    return "\n\n".join([*([table(lines)] if lines else []), about, *missing])
