"""Fixtures of all tests that run jax: compilation without costly passes, and caches cleared."""

from __future__ import annotations

import importlib.metadata
import os
import sys
from collections.abc import Iterator

import pytest

# A third of the time to compile. XLA dies of a flag that it does not know: only where it does.
QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
try:
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        os.environ.setdefault("XLA_FLAGS", QUICK)
except importlib.metadata.PackageNotFoundError:
    pass


@pytest.fixture(autouse=True)
def quick_compilation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compile without optimizations, in half the time; the slow tests compile with them."""
    jax = sys.modules.get("jax")
    if jax is None:
        yield
        return
    before = jax.config.read("jax_disable_most_optimizations")
    quick = before or request.node.get_closest_marker("slow") is None
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True, scope="module")
def clear() -> Iterator[None]:
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
