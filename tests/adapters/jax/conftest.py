"""Fixtures of the tests that run jax alone: its precision."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import x64


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
