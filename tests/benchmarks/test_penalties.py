"""The experiment of penalties runs, and shows what it is to show."""

from __future__ import annotations

import pytest

pytest.importorskip("sklearn", minversion="1.6", reason="scikit-learn 1.6 is not installed")

from benchmarks.bilevel import penalties
from tests.benchmarks.conftest import text, written


@pytest.mark.slow
def test_ours_stand_beside_those_of_scikit_learn(tmp_path):
    assert penalties.main(["--quick", "--output", str(tmp_path)]) == 0
    runs = written(tmp_path, "penalties")["runs"]
    assert len(runs) == 14
    for (one,) in runs.values():
        assert one["loss"] > 0 and 0 < one["score"] <= 1 and one["seconds"] > 0
    names = "all", "features", "features, no prior"
    one, each, free = (runs[f"regression, ours, {name}"][0]["loss"] for name in names)
    assert free < each < one
    assert "held-out loss" in text(tmp_path, "penalties")
