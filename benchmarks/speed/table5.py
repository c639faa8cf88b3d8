"""Time and peak memory of one hypergradient in torch: every method, network and rank.

As in Table 5 of the paper, with its reference package hypergrad 0.0.1 beside us where that is
installed, and the floor under all of them: k + 2 products with the Hessian (k columns, one product
for the residual or the inverse, one mixed derivative), each a double backward on one graph that is
kept. Every measurement has a process of its own, in which method and product are timed in turn, so
that the ratio is of one minute and one machine. ``paper-table5`` measures the paper's network and
ranks alone, and holds the paper's claims against them.
"""

from __future__ import annotations

import importlib.util
import statistics

from benchmarks.harness.experiment import DEVICE, QUICK, SEED, TIMED, Option, Run, experiment
from benchmarks.harness.processes import Found
from benchmarks.harness.report import table
from benchmarks.harness.timing import MIB
from benchmarks.speed import measure, table5_claims
from benchmarks.speed.table5_claims import OURS, PEERS

MODELS = {"mlp": "MLP", "lenet": "LeNet", "wrn": "WideResNet-28-2"}
BATCHES = {
    "cpu": {"mlp": 256, "lenet": 128, "wrn": 4},
    "cuda": {"mlp": 1024, "lenet": 1024, "wrn": 128},
}
METHODS = [*OURS, *PEERS]
ABSENT = "hypergrad is not installed: pip install hypergrad==0.0.1 --no-deps"
BATCH = Option("batch", None, "examples (default: by model and device)", least=1, kind=int)
LIMIT = Option("limit", 60.0, "seconds that a call may take")


def has_peers() -> bool:
    """Say whether the package of the paper is installed."""
    return importlib.util.find_spec("hypergrad") is not None


def measured(
    run: Run, models: list[str], methods: list[str], ranks: list[int], small: bool
) -> dict[str, Found]:
    """Measure all methods and ranks on some models, by names such as "mlp, CG, k = 5"."""
    options, batches = run.options, BATCHES[run.options.device]
    shared = {
        model: {
            "model": model,
            "batch": options.batch or (8 if small else batches[model]),
            "seed": options.seed,
            "device": options.device,
            "small": small,
        }
        for model in models
    }
    graphs = run.each(measure.prepare, {f"{model}, graph": shared[model] for model in models})
    limits = {"repeats": options.repeats, "limit": options.limit}
    cells = {}
    for model, settings in shared.items():
        graph = graphs[f"{model}, graph"]
        # Beyond the lowest eigenvalue, so that CG runs to its last step.
        steps = measure.damping_and_step(graph["lowest"], graph["highest"], least=1e-3)
        common = settings | limits | dict(zip(("damping", "step"), steps, strict=True))
        for k in ranks:
            for method in methods:
                if has_peers() or method not in PEERS:
                    cells[f"{model}, {method}, k = {k}"] = common | {"method": method, "k": k}
    return graphs | run.each(measure.measure, cells, strict=False)


@experiment(
    "table5",
    __doc__,
    Option("models", list(MODELS), "networks", choices=list(MODELS)),
    Option("ranks", [5, 10, 20, 40], "columns, steps and terms", least=1),
    Option("methods", METHODS, "what is compared", choices=METHODS),
    *(DEVICE, BATCH, LIMIT, QUICK, *TIMED),
    packages=("torch", "hypergrad", "numpy"),
)
def main(run: Run) -> None:
    options = run.options
    if options.device != "cpu":
        run.name += f"-{options.device}"
    models, ranks = options.models, sorted(options.ranks)
    found = measured(run, models, options.methods, ranks, options.quick)
    lines = [line for model in models for line in notes(found, model, ranks)]
    lines += table5_claims.left_out(found)
    run.publish(
        *(table(rows(found, model, ranks)) for model in models),
        "\n".join([*lines, *([] if has_peers() else [ABSENT])]),
        measurements=found,
    )
    draw(run, found, models, ranks)


@experiment(
    *("paper-table5", __doc__, DEVICE, BATCH, SEED, QUICK),
    Option("repeats", 10, "of each call", least=1, quick=2),
    LIMIT._replace(default=600.0, quick=90.0),
    packages=("torch", "hypergrad", "numpy"),
)
def paper(run: Run) -> None:
    model, ranks, methods = table5_claims.MODEL, table5_claims.RANKS, table5_claims.METHODS
    found = measured(run, [model], methods, ranks, small=False)
    batch = run.options.batch or BATCHES[run.options.device][model]
    run.publish(
        table(table5_claims.beside_the_paper(found)),
        "The paper: an A100; the time of a hypergradient and its peak of memory.\n"
        f"Here: one thread, n = {found[f'{model}, graph']['n']}, a batch of {batch}. At least half "
        "the paper's ratio supports its claim.",
        "\n".join(table5_claims.left_out(found)),
        claims=table5_claims.judge(found),
        measurements=found,
    )
    table5_claims.draw(run, found)


def rows(records: dict[str, Found], model: str, ranks: list[int]) -> list[dict[str, str]]:
    """Return the table of a model: one row a method, time and memory of every rank."""
    graph, lines = records[f"{model}, graph"], []
    for method in ["floor", *METHODS]:
        line, some = {MODELS[model]: method}, False
        for k in ranks:
            found = records.get(f"{model}, {method}, k = {k}", {})
            if method == "floor":
                seconds = (k + 2) * statistics.median(graph["product"])
                found = {"seconds": seconds, "mib": graph["mib"], "in products": k + 2}
            values = ["left out" if "left out" in found else "failed" if found else "", "", ""]
            if "seconds" in found:
                over = found["in products"] / (k + 2)
                values = [f"{found['seconds']:.3f}", f"{over:.2f}", f"{found['mib']:.0f}"]
            keys = f"k = {k}: s", f"/ floor ({k})", f"MiB ({k})"
            line |= dict(zip(keys, values, strict=True))
            some = some or bool(found)
        lines += [line] if some else []
    return lines


def notes(records: dict[str, Found], model: str, ranks: list[int]) -> list[str]:
    """Return what the figures of a model come to, at its rank nearest to 20."""
    k = min(ranks, key=lambda k: abs(k - 20))
    graph = records[f"{model}, graph"]
    lines = [f"{MODELS[model]}, n = {graph['n']}, k = {k}:"]
    found = {method: records.get(f"{model}, {method}, k = {k}", {}) for method in METHODS}
    found = {method: entry for method, entry in found.items() if "seconds" in entry}
    stored = found.get("Nyström, stored")
    if stored:
        columns = 4 * k * graph["n"] / MIB
        beyond = (stored["mib"] - graph["mib"]) / columns
        lines += [
            f"  stored: {stored['in products'] / (k + 2):.2f} of the floor",
            f"  stored: {stored['mib']:.0f} MiB = one graph ({graph['mib']:.0f} MiB) + "
            f"{beyond:.2f} x k n numbers ({columns:.0f} MiB)",
        ]
    for name, method, other, base in (
        ("streamed", "Nyström, streamed", "stored", "Nyström, stored"),
        ("hypergrad's Nyström", "hypergrad Nyström", "stored", "Nyström, stored"),
        ("hypergrad's CG", "hypergrad CG", "ours", "CG"),
        ("hypergrad's Neumann", "hypergrad Neumann", "ours", "Neumann"),
    ):
        if method in found and base in found:
            time, mib = (found[method][x] / found[base][x] for x in ("in products", "mib"))
            lines.append(f"  {name}: {time:.2f} x the time of {other}, {mib:.2f} x its memory")
    return lines + [
        f"  {method}: a further column or step {found[method]['step']:.2f} products"
        for method in ("Nyström, stored", "CG", "Neumann", *PEERS)
        if "step" in found.get(method, {})
    ]


def draw(run: Run, records: dict[str, Found], models: list[str], ranks: list[int]) -> None:
    """Draw time over the floor and peak memory against k, one column of panels a model."""
    figure, axes = run.figure(2, len(models), 4.5 * len(models) + 3, 8)
    for (upper, lower), model in zip(axes.T, models, strict=True):
        for number, method in enumerate(METHODS):
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
    run.draw(figure)
