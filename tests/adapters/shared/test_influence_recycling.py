"""Ritz pairs of earlier queries precondition the solves for later ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import lowrank_inverse as li
from tests.adapters.shared.frameworks import slow_in_jax
from tests.adapters.shared.test_influence import (
    DAMPING,
    NUM_QUERY,
    Problem,
    assert_close,
    expected,
)
from tests.conftest import host

SMALL = 2**14
"""Of memory: a group has few queries."""


def influence(problem: Problem, recycle: int = 20, **options: Any) -> Any:
    solver = li.CG(rtol=1e-12, damping=DAMPING, recycle=recycle)
    return problem.influence(solver=solver, **options)


@slow_in_jax
def test_the_same_queries_again_take_few_products(framework):
    problem = Problem(framework)
    with_pairs, without = influence(problem, 43), influence(problem, 0)
    counts: dict[int, list[int]] = {43: [], 0: []}
    for recycle, one in ((43, with_pairs), (0, without)):
        for _ in range(2):
            before = one.info.num_products
            assert_close(one.scores(problem.query), expected("ggn"))
            counts[recycle].append(one.info.num_products - before)
    assert counts[0][0] == counts[0][1] == counts[43][0]
    # The solutions lie in the space of the pairs: one step, and the products of the residual.
    assert counts[43][1] <= counts[0][1] / 2
    stronger = with_pairs.with_damping(2 * DAMPING)
    before = stronger.info.num_products
    assert_close(stronger.scores(problem.query), expected("ggn", 2 * DAMPING))
    assert stronger.info.num_products - before <= 4 * NUM_QUERY  # pairs serve other dampings


@slow_in_jax
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_run_cut_short_between_groups_goes_on_bit_for_bit(framework, cut, tmp_path):
    problem = Problem(framework)
    wanted = host(
        influence(problem, memory_budget=SMALL).self_influence(checkpoint=tmp_path / "whole")
    )
    short, solves = influence(problem, memory_budget=SMALL), []
    short.scores(problem.query)  # pairs of other calls make no difference
    solve = short._solve

    def failing(*args: Any) -> Any:
        if len(solves) == cut:
            raise KeyboardInterrupt
        solves.append(None)
        return solve(*args)

    short._solve = failing
    with pytest.raises(KeyboardInterrupt):
        short.self_influence(checkpoint=tmp_path / "cut")
    again = influence(problem, memory_budget=SMALL)
    assert np.array_equal(host(again.self_influence(checkpoint=tmp_path / "cut")), wanted)
    assert len(list((tmp_path / "cut").glob("pairs-*"))) == 2


@slow_in_jax
def test_a_run_cut_short_between_pairs_and_result_goes_on_bit_for_bit(framework, tmp_path):
    problem = Problem(framework)
    wanted = host(influence(problem, memory_budget=SMALL).self_influence(checkpoint=tmp_path))
    last = max(tmp_path.glob("values-*"), key=lambda path: int(path.stem.split("-")[1]))
    last.unlink()
    again = influence(problem, memory_budget=SMALL)
    assert np.array_equal(host(again.self_influence(checkpoint=tmp_path)), wanted)
