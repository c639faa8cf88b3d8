"""The structure of the sources in numbers: ``python -m tests.structure`` prints them."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CORE = ROOT / "lowrank_inverse"
LAYERS = {
    "_typing": 0,
    "_io": 0,
    "_progress": 0,
    "arrays": 1,
    "operators": 2,
    "results": 3,
    "estimators": 3,
    "iterative": 4,
    "low_rank": 5,
    "spectral": 6,
    "solvers": 6,
    "bilevel": 7,
    "influence": 7,
    "sklearn": 7,
}
"""Imports point downwards only; results may use estimators, and not the other way round."""


def modules(*folders: str) -> list[Path]:
    """Return the source files of some folders, without ``__init__.py``."""
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(path for path in found if path.name != "__init__.py")


def lines(*folders: str) -> int:
    """Count the lines of all Python files in some folders."""
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def imports(path: Path, package: str = "lowrank_inverse") -> Iterator[tuple[str, bool]]:
    """Yield what a module imports of its own package when it runs, and whether in a function."""

    def visit(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.ImportFrom) and (child.module or "").split(".")[0] == package:
                for alias in child.names:
                    module = child.module or ""
                    if (ROOT / module.replace(".", "/")).is_dir():
                        module = f"{module}.{alias.name}"
                    yield module, inside
            nested = inside or isinstance(child, (ast.FunctionDef, ast.Lambda))
            yield from visit(child, nested)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), False)


def name(path: Path) -> str:
    """Return the dotted name of a source file of the core."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def graph() -> dict[str, set[str]]:
    """Return the import graph of the core."""
    return {name(path): {module for module, _ in imports(path)} for path in modules(CORE.name)}


def upward() -> list[str]:
    """Return the imports that point upwards, and those inside a function."""
    found = []
    for path in modules(CORE.name):
        own = LAYERS[name(path).split(".")[1]]
        for module, inside in imports(path):
            if LAYERS[module.split(".")[1]] > own:
                found.append(f"{name(path)} imports {module} from above")
            if inside:
                found.append(f"{name(path)} imports {module} inside a function")
    return found


def levels() -> int:
    """Return the length of the longest chain of imports; raise if there is a circle."""
    edges, depth = graph(), {}

    def visit(module: str, trail: tuple[str, ...]) -> int:
        if module in trail:
            raise ValueError(f"a circle of imports: {' -> '.join((*trail, module))}")
        if module not in depth:
            below = [visit(other, (*trail, module)) for other in edges.get(module, ())]
            depth[module] = 1 + max(below, default=0)
        return depth[module]

    return max(visit(module, ()) for module in edges)


def files_entered(call: Callable[[], Any]) -> list[str]:
    """Return the source files of the project whose functions a call enters."""
    call()  # what is done once is not counted
    found: dict[str, None] = {}
    folders = (str(CORE), str(ROOT / "adapters"))

    def profile(frame: Any, event: str, _: Any) -> None:
        path = frame.f_code.co_filename
        if event == "call" and path.startswith(folders) and frame.f_code.co_name != "<module>":
            found[str(Path(path).relative_to(ROOT))] = None

    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return list(found)


def share_of_any() -> float:
    """Return the share of parameters annotated as Any."""
    total = untold = 0
    for path in modules(CORE.name, "adapters"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                for argument in arguments:
                    if argument.annotation is not None:
                        total += 1
                        untold += ast.unparse(argument.annotation) == "Any"
    return untold / total


def hidden() -> list[str]:
    """Return the modules that a function or class of their package hides."""
    import lowrank_inverse
    import lowrank_inverse_jax
    import lowrank_inverse_torch

    return [
        f"{package.__name__}.{public}"
        for package in (lowrank_inverse, lowrank_inverse_torch, lowrank_inverse_jax)
        for public in package.__all__
        if not inspect.ismodule(getattr(package, public))
        and any(
            (Path(str(package.__file__)).parent / f"{public}{end}").exists() for end in ("", ".py")
        )
    ]


def main() -> None:
    """Print the numbers."""
    import numpy as np
    import torch

    import lowrank_inverse as li
    import lowrank_inverse_torch as lit

    A, b = np.diag(np.arange(1.0, 31.0)), np.ones(30)
    w = torch.ones(30, requires_grad=True)
    h = torch.zeros(30, requires_grad=True)

    def hypergradient() -> object:
        def inner() -> torch.Tensor:
            return (h.exp() * w**2).sum()

        return lit.hypergradient(inner, lambda: (w**3).sum(), w, h)

    sources = modules(CORE.name, "adapters")
    folders = {path.parent for path in sources}
    size = {folder: sum(path.parent == folder for path in sources) for folder in folders}
    largest = max(size, key=lambda folder: size[folder])
    long = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in sources}
    library = lines(CORE.name, "adapters")
    rows = {
        "modules in the largest folder": f"{size[largest]} ({largest.relative_to(ROOT)})",
        "modules of more than 300 lines": ", ".join(
            f"{module} {count}" for module, count in long.items() if count > 300
        )
        or "none",
        "layers, levels of imports": f"{max(LAYERS.values()) + 1}, {levels()}",
        "imports upwards or in functions": len(upward()),
        "modules hidden by a name": len(hidden()),
        "files entered by li.solve(A, b)": len(files_entered(lambda: li.solve(A, b))),
        "files entered by li.solve, Nystrom": len(
            files_entered(lambda: li.solve(A, b, solver=li.Nystrom(damping=0.1), certify=True))
        ),
        "files entered by lit.hypergradient": len(files_entered(hypergradient)),
        "lines of core and adapters": library,
        "lines of tests": f"{lines('tests')}, {lines('tests') / library:.2f} times the library",
        "lines of benchmarks": lines("benchmarks"),
        "parameters annotated Any": f"{share_of_any():.0%}",
    }
    for label, value in rows.items():
        print(f"{label:<36}{value}")


if __name__ == "__main__":
    main()
