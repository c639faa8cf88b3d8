"""What the parts found, as text; what has not been run yet says so."""

from __future__ import annotations

from typing import Any

from benchmarks.harness.processes import Found
from benchmarks.harness.report import table
from benchmarks.speed import table5_claims

NOT_RUN = "not run yet"
FAILED_SHOWN = 20


def text(parts: dict[str, dict[str, Found]]) -> list[str]:
    """Return a paragraph for each part, from its results by name."""
    return [f"{title}\n\n{tell(parts.get(name, {}))}" for name, (title, tell) in PARTS.items()]


def failures(found: dict[str, Found]) -> str:
    """Name what failed."""
    lines = [f"{name}: {one['failed']}" for name, one in found.items() if "failed" in one]
    return "\n".join(["", "", *lines]) if lines else ""


def lines_of(found: dict[str, Found], columns: dict[str, str], prefix: str = "") -> str:
    """Return a table of the results whose name begins so, with a format for each column."""
    rows = [
        {"": name.removeprefix(prefix)}
        | {label: f"{one[label]:{form}}" if label in one else "" for label, form in columns.items()}
        for name, one in found.items()
        if name.startswith(prefix) and any(label in one for label in columns)
    ]
    return table(rows) if rows else NOT_RUN


def tests(found: dict[str, Found]) -> str:
    if not found:
        return NOT_RUN
    rows = [
        {
            "tests": file,
            "passed": str(one["passed"]),
            "skipped": str(one["skipped"]),
            "failed": str(len(one["failed tests"])),
        }
        for file, one in found.items()
        if "passed" in one
    ]
    failed = [name for one in found.values() for name in one.get("failed tests", {})]
    return table(rows) + "".join(f"\nfailed: {name}" for name in failed[:FAILED_SHOWN])


def table5(found: dict[str, Found]) -> str:
    rows = table5_claims.beside_the_paper(found, absent=NOT_RUN if not found else "")
    left_out = table5_claims.left_out(found)
    products = {"in products": ".1f", "seconds": ".3f", "mib": ".0f", "products": ""}
    methods = {name: one for name, one in found.items() if not name.endswith("graph")}
    more = f"\n\n{lines_of(methods, products)}" if methods else ""
    return "\n".join([table(rows), *left_out]) + more


def in_jax(found: dict[str, Found]) -> str:
    columns = {"seconds": ".4f", "in products": ".1f", "program mib": ".0f"}
    return lines_of(found, columns) + failures(found)


def precision(found: dict[str, Found]) -> str:
    from benchmarks.systems.accuracy import FORMS

    networks = {"product": ".1e", "CG": ".1e", "Nyström": ".1e"}
    if not found:
        return NOT_RUN
    forms = dict.fromkeys(FORMS, ".0e")
    return f"{lines_of(found, networks)}\n\n{lines_of(found, forms)}{failures(found)}"


def sizes(found: dict[str, Found]) -> str:
    if not found:
        return NOT_RUN
    influence = {"parameters": "", "examples": "", "fit": ".1f", "scores": ".1f", "mib": ".0f"}
    kernels = {"product": ".3f", "solve": ".2f", "steps": "", "mib": ".0f"}
    kinds = {name: one for name, one in found.items() if name.startswith("kernel")}
    first = lines_of({"influence": found.get("influence", {})}, influence)
    return f"{first}\n\n{lines_of(kinds, kernels)}{failures(found)}"


def busy(found: dict[str, Found]) -> str:
    if not found:
        return NOT_RUN
    profiles = {"kernels": "", "ms": ".1f", "busy": ".2f", "longest": ".2f"}
    steps = {"every 1": ".3f", "every 5": ".3f"}
    ways = {"ms": ".3f"}
    tables = []
    for name, one in found.items():
        top = [
            {name: k["name"], "calls": str(k["calls"]), "ms": f"{k['ms']:.2f}"}
            for k in one.get("top", [])
        ]
        tables += [table(top)] if top else []
    return "\n\n".join(
        [
            lines_of(found, profiles, "profile, "),
            lines_of(found, steps, "steps, "),
            lines_of(found, ways, "product, "),
            *tables,
        ]
    ) + failures(found)


PARTS: dict[str, tuple[str, Any]] = {
    "tests": ("Tests that need a GPU.", tests),
    "table5": (
        "Table 5 of the paper. The paper: an A100, WideResNet-28-2; seconds of a hypergradient "
        "and its peak of memory.\nHere: the same network, 128 images.",
        table5,
    ),
    "jax": (
        "The hypergradient in JAX, compiled: a perceptron's, and that network's; k = 10.",
        in_jax,
    ),
    "precision": ("Relative errors of products and inverse products against float64.", precision),
    "sizes": ("Influence and kernel matrices: seconds, and peak of memory in MiB.", sizes),
    "busy": (
        "Is the GPU busy in a hypergradient? Milliseconds, the share of them in some kernel, and "
        "the longest\ngap; then milliseconds of a step of CG whose test is read each time and "
        "every fifth, and of a product.",
        busy,
    ),
}
