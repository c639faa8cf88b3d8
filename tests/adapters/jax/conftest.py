"""Fixtures of the tests that run jax: its precision, and compilation without costly passes."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Iterator

import pytest

from tests.conftest import x64

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
    jax = pytest.importorskip("jax")
    before = jax.config.read("jax_disable_most_optimizations")
    quick = before or request.node.get_closest_marker("slow") is None
    jax.config.update("jax_disable_most_optimizations", quick)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def wide() -> Iterator[None]:
    """Run in float64, with 64-bit types on."""
    with x64(True):
        yield


@pytest.fixture(params=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run in both, with 64-bit types on for float64 alone."""
    with x64(request.param == "float64"):
        yield request.param


@pytest.fixture(autouse=True, scope="module")
def clear() -> Iterator[None]:
    yield
    import jax

    jax.clear_caches()
