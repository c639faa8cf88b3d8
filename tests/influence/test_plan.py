"""What a computation will cost, and the default solver."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

import lowrank_inverse as li
from lowrank_inverse.influence.damped_solver import KeptColumns
from lowrank_inverse.influence.plan import (
    BLOCKS,
    COPIES,
    PAIR_BLOCKS,
    PAIRS_SHARE,
    ProductCosts,
    UnitCosts,
    dense_pays,
    make_plan,
    most_pairs,
    reason,
    short,
)
from lowrank_inverse.influence.results import open_scores
from tests import problems

MIB = 2**20


def test_all_columns_pay_for_many_right_hand_sides_of_a_small_model():
    assert dense_pays(li.NystromCG(rank=50), 171, 400, 4, 1024 * MIB)
    assert not dense_pays(li.NystromCG(rank=50), 171, 1, 4, 1024 * MIB)
    least = PAIRS_SHARE * COPIES[li.Exact] * 171**2 * 4
    assert dense_pays(li.NystromCG(rank=50), 171, 400, 4, least)
    assert not dense_pays(li.NystromCG(rank=50), 171, 400, 4, least - 1)
    assert not dense_pays(li.NystromCG(rank=50), 10_000, 10**6, 4, 2**40)


def solve_of_ones_own(matvec, b):
    return matvec(b)


@pytest.mark.parametrize(
    ("solver", "products", "passes", "columns"),
    [
        (li.Exact(), 30, 4, 4 * 30),
        (li.Nystrom(rank=7, damping=0.1), 7 + 10, 7, 7),
        (li.Nystrom(rank=7, damping=0.1, memory="streamed"), 7 + 10, 7, 0),
        (li.NystromCG(rank=7, max_steps=4), 7 + 60, 22, 2 * 7),
        (li.CG(), 220, 69, PAIR_BLOCKS * 3),
        (li.Neumann(num_terms=6), 80, 27, 0),
        (solve_of_ones_own, 220, 69, 0),
    ],
    ids=lambda x: getattr(x, "__name__", type(x).__name__),
)
def test_a_plan_counts_products_passes_and_bytes(solver, products, passes, columns):
    train = SimpleNamespace(num=100, num_bytes=5)
    sizes = {"num_solves": 10, "width": 4, "num_scores": 1000}
    recycle = 3 if isinstance(solver, li.CG) else 0
    product = ProductCosts(0.5, 0.5, 7)  # a block has nothing in common
    units = {"product": product, "costs": UnitCosts(1.0, 2.0, 4.0), "jvp": True, "why": "so"}
    plan = make_plan(solver, 30, 8, train=train, recycle=recycle, **units, **sizes)
    assert plan.num_products == products
    assert plan.num_passes == passes
    assert plan.assumes_steps == (" products (20 steps each assumed)," in str(plan))
    assert plan.assumes_steps == (solver == li.CG() or callable(solver))
    assert plan.num_bytes == {
        "data": 5,
        "columns": columns * 30 * 8,
        "solve": BLOCKS * 4 * 30 * 8,
        "batch": 7,
        "scores": 8000,
    }
    assert plan.seconds["columns"] + plan.seconds["solve"] == products / 2
    assert plan.seconds["scores"] == 3 * 100 * (1 + 4 * 2)  # three groups of at most four
    first = f"10 right-hand sides of 30 parameters, 4 at a time, by {short(solver)}: so;\n"
    assert str(plan).startswith(first)


def test_a_block_of_products_shares_what_is_done_once():
    costs = ProductCosts(single=5.0, further=2.0, num_bytes=0)
    assert costs.seconds(1, 1) == 5
    assert costs.seconds(12, 3) == 3 * (5 + 2 + 2 + 2)
    assert costs.seconds(0, 0) == 0


def test_the_faster_way_to_scores_is_known_from_unit_costs():
    costs = UnitCosts(graph=1.0, slope=0.5, gradient=6.0)
    faster = [costs.scores(width, jvp=True) <= costs.scores(width, jvp=False) for width in (10, 11)]
    assert faster == [True, False]
    assert reason(li.Exact(), 30, 10, is_default=True).startswith("all 30 columns cost less")
    assert reason(li.CG(), 30, 1, is_default=True).startswith("all 30 columns cost more")
    assert reason(li.CG(), 3000, 1, is_default=True) == "more than 2000 parameters"
    assert reason(li.CG(), 30, 1, is_default=False) == "as it was given"


def test_pairs_are_kept_as_far_as_they_pay_and_fit():
    assert most_pairs(10_000, 10**6, 4, 2**40) == 200
    assert most_pairs(30, 10**6, 4, 2**40) == 30
    assert most_pairs(10_000, 10, 4, 2**40) == 10  # 6 * 10² operations a number: a product's
    assert most_pairs(10_000, 10**6, 4, 4 * PAIR_BLOCKS * 7 * 10_000 * 4) == 7
    assert most_pairs(10**9, 10**6, 4, 2**20) == 0


def test_settings_are_shown_without_what_is_as_by_default():
    assert short(li.NystromCG(rank=50)) == "NystromCG(rank=50)"
    assert short(li.CG(damping=0.5)) == "CG(damping=0.5)"
    assert short(li.Exact()) == "Exact()"


def test_products_with_all_columns_kept_cost_the_operator_nothing():
    A = problems.matrix("network")
    kept = KeptColumns(A)
    inverse = li.Exact(damping=0.1).prepare(kept)
    assert kept.num_products == len(A)
    b = problems.rhs(width=3)
    solution = inverse.solve(b)
    assert kept.num_products == len(A)
    true = np.linalg.norm(b - A @ solution.value - 0.1 * solution.value, axis=0)
    assert np.allclose(solution.residual_norm, true, atol=1e-12)
    other = KeptColumns(A, problems.matrix("polynomial"))  # columns of another operator
    other.columns(np.arange(len(A)))
    assert np.allclose(other @ b, A @ b)


def test_scores_are_written_to_a_file_or_an_array(tmp_path):
    file = open_scores(tmp_path / "scores.npy", (3, 4), np.float32)
    file[:] = 7
    file.flush()
    assert np.array_equal(np.load(tmp_path / "scores.npy"), np.full((3, 4), 7, np.float32))
    array = np.zeros((3, 4))
    assert open_scores(array, (3, 4), np.float64) is array
    with pytest.raises(ValueError, match=r"`out` must end in \.npy"):
        open_scores("scores.bin", (3, 4), np.float32)
    with pytest.raises(TypeError, match="or a NumPy array; got 3"):
        open_scores(3, (3, 4), np.float32)
    for bad in (np.zeros((4, 3)), np.zeros((3, 4), np.float32), np.broadcast_to(0.0, (3, 4))):
        with pytest.raises(ValueError, match=r"writeable, of shape \(3, 4\) and dtype float64"):
            open_scores(bad, (3, 4), np.float64)
