"""Time and peak memory of one hypergradient in torch: every method, network and rank.

As in Table 5 of the paper, with its reference package hypergrad 0.0.1 beside us where that is
installed, and the floor under all of them: k + 2 products with the Hessian (k columns, one product
for the residual or the inverse, one mixed derivative), each a double backward on one graph that is
kept. Every measurement has a process of its own, in which method and product are timed in turn, so
that the ratio is of one minute and one machine. A run that was cut short is taken up where it
ended; measurements of another machine, version or setting are made anew.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks._measure import MIB, Found, Records, apart, use_threads
from benchmarks._report import machine, publish, pyplot, table
from benchmarks._torch_speed import damping_and_step

MODELS = {"mlp": "MLP", "lenet": "LeNet", "wrn": "WideResNet-28-2"}
BATCHES = {
    "cpu": {"mlp": 256, "lenet": 128, "wrn": 4},
    "cuda": {"mlp": 1024, "lenet": 1024, "wrn": 128},
}
RANKS = [5, 10, 20, 40]
OURS = [
    "Nyström, stored",
    "Nyström, stored, 5 products a batch",
    "Nyström, stored, k products a batch",
    "Nyström, chunked, κ = 1",
    "Nyström, chunked, κ = 5",
    "Nyström, chunked, κ = k",
    "Nyström, streamed",
    "CG",
    "Neumann",
]
PEERS = ["hypergrad Nyström", "hypergrad CG", "hypergrad Neumann"]


def rows(records: dict[str, Found], models: list[str], ranks: list[int]) -> list[dict[str, str]]:
    """Return the table: one row a model and method, time and memory of every rank."""
    lines = []
    for model in models:
        graph = records[f"{model}, graph"]
        for method in ["floor", *OURS, *PEERS]:
            line = {MODELS[model]: method} if len(models) == 1 else {"": f"{model}: {method}"}
            for k in ranks:
                found = records.get(f"{model}, {method}, k = {k}", {})
                if method == "floor":
                    seconds = (k + 2) * sorted(graph["product"])[len(graph["product"]) // 2]
                    found = {"seconds": seconds, "mib": graph["mib"], "in products": k + 2}
                line |= entries(found, k)
            if any(value for key, value in list(line.items())[1:]):
                lines.append(line)
    return lines


def entries(found: Found, k: int) -> dict[str, str]:
    """Return the three entries of a measurement."""
    names = (f"k = {k}: s", "/ floor", "MiB")
    keys = (names[0], f"{names[1]} ({k})", f"{names[2]} ({k})")
    if "seconds" not in found:
        reason = "left out" if "left out" in found else "failed" if found else ""
        return dict(zip(keys, (reason, "", ""), strict=True))
    over = found["in products"] / (k + 2)
    values = (f"{found['seconds']:.3f}", f"{over:.2f}", f"{found['mib']:.0f}")
    return dict(zip(keys, values, strict=True))


def notes(records: dict[str, Found], models: list[str], ranks: list[int]) -> list[str]:
    """Return what the figures come to, for each model at its rank nearest to 20."""
    k = min(ranks, key=lambda k: abs(k - 20))
    lines = []
    for model in models:

        def get(method: str, model: str = model) -> Found:
            found = records.get(f"{model}, {method}, k = {k}", {})
            return found if "seconds" in found else {}

        stored, graph = get("Nyström, stored"), records[f"{model}, graph"]
        lines.append(f"{MODELS[model]}, n = {graph['n']}, k = {k}:")
        if stored:
            columns = 4 * k * graph["n"] / MIB
            beyond = (stored["mib"] - graph["mib"]) / columns
            lines.append(f"  stored: {stored['in products'] / (k + 2):.2f} of the floor")
            lines.append(
                f"  stored: {stored['mib']:.0f} MiB = one graph ({graph['mib']:.0f} MiB) + "
                f"{beyond:.2f} x k n numbers ({columns:.0f} MiB)"
            )
        lines += _against("streamed", get("Nyström, streamed"), "stored", stored)
        lines += _against("hypergrad's Nyström", get("hypergrad Nyström"), "stored", stored)
        lines += _against("hypergrad's CG", get("hypergrad CG"), "ours", get("CG"))
        lines += _against("hypergrad's Neumann", get("hypergrad Neumann"), "ours", get("Neumann"))
        for method in ("Nyström, stored", "CG", "Neumann", *PEERS):
            if "step" in get(method):
                lines.append(
                    f"  {method}: a further column or step {get(method)['step']:.2f} products"
                )
    for name, found in records.items():
        for outcome in ("failed", "left out"):
            if outcome in found:
                lines.append(f"{name}: {outcome}, {found[outcome]}")
    return lines


def _against(name: str, found: Found, other: str, base: Found) -> list[str]:
    if not found or not base:
        return []
    time = found["in products"] / base["in products"]
    return [
        f"  {name}: {time:.2f} x the time of {other}, {found['mib'] / base['mib']:.2f} x its memory"
    ]


def draw(records: dict[str, Found], models: list[str], ranks: list[int], path: Path) -> None:
    """Draw time over the floor and peak memory against k, one column of panels a model."""
    plt = pyplot()
    size = (4.5 * len(models) + 3, 8)
    figure, axes = plt.subplots(2, len(models), figsize=size, layout="constrained", squeeze=False)
    for (upper, lower), model in zip(axes.T, models, strict=True):
        for number, method in enumerate([*OURS, *PEERS]):
            found = {k: records.get(f"{model}, {method}, k = {k}", {}) for k in ranks}
            found = {k: entry for k, entry in found.items() if "seconds" in entry}
            if found:
                over = [entry["in products"] / (k + 2) for k, entry in found.items()]
                line = "s--" if method in PEERS else "o-"
                style = {"color": f"C{number % len(OURS)}", "label": method}
                upper.plot(list(found), over, line, **style)
                lower.plot(list(found), [entry["mib"] for entry in found.values()], line, **style)
        upper.axhline(1.0, color="black", linestyle=":")
        title = f"{MODELS[model]}, n = {records[f'{model}, graph']['n']}"
        upper.set(title=title, ylabel="time / floor of k + 2 products")
        lower.set(xlabel="k", ylabel="peak of memory, MiB")
        for axis in (upper, lower):
            axis.set(yscale="log", xticks=ranks)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def has_peers() -> bool:
    """Say whether the package of the paper is installed."""
    return importlib.util.find_spec("hypergrad") is not None


def main(arguments: list[str]) -> int:
    """Measure, print the table, write JSON and the picture."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks table5", description=__doc__)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS, metavar="K")
    parser.add_argument("--methods", nargs="+", choices=[*OURS, *PEERS], default=[*OURS, *PEERS])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch", type=int, help="examples (default: by model and device)")
    parser.add_argument("--repeats", type=int, default=5, help="of each call (default: 5)")
    parser.add_argument(
        "--limit", type=float, default=60.0, help="seconds that a call may take (default: 60)"
    )
    parser.add_argument("--quick", action="store_true", help="small networks, to try it")
    parser.add_argument("--threads", type=int, default=1, help="of the processor (default: 1)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder for results")
    options = parser.parse_args(arguments)
    use_threads(options.threads)
    if min(options.ranks) < 1 or min(options.repeats, options.threads) < 1:
        parser.error("--ranks and --repeats must be at least 1")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device")
    name = f"table5-{options.device}" if options.device != "cpu" else "table5"
    about = machine(
        *("torch", "hypergrad", "numpy"),
        device=torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        threads=options.threads,
        seed=options.seed,
        repeats=options.repeats,
        networks="small" if options.quick else "full",
    )
    records = Records(options.output / f"{name}.json", about)
    methods = options.methods
    absent = not has_peers()
    if absent:
        methods = [method for method in methods if method not in PEERS]
    with tqdm(total=len(options.models) * len(options.ranks) * len(methods), desc=name) as progress:
        for model in options.models:
            measure_model(model, methods, options, records, progress)
    measured = [m for m in MODELS if f"{m}, graph" in records.found]
    ranks = sorted({int(key.rsplit(" ", 1)[1]) for key in records.found if ", k = " in key})
    tables = [table(rows(records.found, [model], ranks)) for model in measured]
    lines = notes(records.found, measured, ranks)
    if absent:
        lines.append("hypergrad is not installed: pip install hypergrad==0.0.1 --no-deps")
    text = "\n\n".join([*tables, "\n".join(lines)])
    publish(options.output, name, text, about, measurements=records.found)
    picture = options.output / f"{name}.png"
    draw(records.found, measured, ranks, picture)
    print(f"Picture: {picture}")
    return 0


def measure_model(model: str, methods: list[str], options: Any, records: Records, bar: Any) -> None:
    """Measure all methods and ranks on one model that are not there yet."""
    shared = {
        "model": model,
        "batch": options.batch or (8 if options.quick else BATCHES[options.device][model]),
        "seed": options.seed,
        "device": options.device,
        "small": options.quick,
    }
    here = "benchmarks._torch_speed"
    graph = records.get(f"{model}, graph", lambda: apart(f"{here}:prepare", shared) | shared)
    if "failed" in graph:
        raise RuntimeError(f"{model}: {graph['failed']}")
    # Beyond the lowest eigenvalue, so that CG runs to its last step.
    damping, step = damping_and_step(graph["lowest"], graph["highest"], least=1e-3)
    for k in options.ranks:
        for method in methods:
            bar.set_postfix_str(f"{model}, {method}, k = {k}")
            settings = shared | {"method": method, "k": k, "damping": damping, "step": step}
            settings |= {"repeats": options.repeats, "limit": options.limit}
            records.get(
                f"{model}, {method}, k = {k}",
                lambda settings=settings: apart(f"{here}:measure", settings),
            )
            bar.update()
