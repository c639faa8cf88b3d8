"""The experiment on meshes of JAX: what it counts, and that rows fall as devices rise."""

from __future__ import annotations

import pytest

jax = pytest.importorskip("jax")
if not hasattr(jax.sharding, "AxisType"):
    pytest.skip("this version of jax has one kind of axes", allow_module_level=True)

from benchmarks.systems import mesh_jax
from tests.benchmarks.conftest import text, written

PROGRAM = """
  %a = f32[16,64]{1,0} all-gather(f32[16,8]{1,0} %p), dimensions={1}
  %b = (f32[3]{0}, f32[]) all-reduce-start(f32[3]{0} %q)
  %c = f32[8]{0} all-gather(f32[1]{0} %r), dimensions={0}
  %d = f32[9]{0} add(f32[9]{0} %s, f32[9]{0} %s)
"""


def test_collectives_are_counted_with_the_numbers_of_the_largest():
    assert mesh_jax.collectives(PROGRAM) == {"all-gather": (2, 1024), "all-reduce": (1, 3)}


@pytest.mark.slow
def test_each_device_holds_its_rows_and_gathers_a_weight_matrix_at_most(tmp_path):
    arguments = ["--quick", "--devices", "1", "2", "--output", str(tmp_path)]
    assert mesh_jax.main(arguments) == 0
    for count in written(tmp_path, "mesh_jax")["counts"]:
        assert count["rows"] * count["devices"] == count["n"]
        assert count["residual"] < 1
        gathered = count["collectives"].get("all-gather", [0, 0])[1]
        assert gathered <= max(count["weights"], 2 * 4**2)
    assert "NystromCG" in text(tmp_path, "mesh_jax")
