"""The fixture that runs a test in both frameworks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.adapters.shared.frameworks import FRAMEWORKS, Framework
from tests.conftest import x64


@pytest.fixture(params=FRAMEWORKS)
def framework(request: pytest.FixtureRequest) -> Iterator[Framework]:
    """Both adapters, in float64 where a test does not say otherwise."""
    opened = FRAMEWORKS[request.param]()
    if opened.name == "torch":
        yield opened
        return
    with x64(True):
        yield opened
