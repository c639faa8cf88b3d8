"""Scores by parameter against dense derivatives."""

from __future__ import annotations

from itertools import accumulate, pairwise

from tests.adapters.shared.frameworks import each, slow_in_jax
from tests.adapters.shared.test_influence import (
    Problem,
    assert_close,
    cross_entropy,
    dense,
    expected,
    inverse,
    numbers,
)

WHOLE = {"all at once": {}, "in pieces": {"batch_size": 3, "memory_budget": 1}}


@each("options", WHOLE, quick=())
def test_scores_by_parameter_are_those_of_its_entries(framework, options):
    with framework.wide():
        problem = Problem(framework)
        influence = problem.influence(**options)
        found = influence.parameter_scores(problem.query)
        _, train, query = dense("ggn")
        Z = query @ inverse("ggn")
        params = numbers()[0]
        ends = accumulate((array.size for array in params.values()), initial=0)
        assert [name.strip("[']") for name in found] == list(params)
        for block, (start, end) in zip(found.values(), pairwise(ends), strict=True):
            assert_close(block, Z[:, start:end] @ train[:, start:end].T)
        some = influence.parameter_scores(problem.query, problem.batches(4)[0])
        assert_close(sum(some.values()), expected()[:, :4])


@slow_in_jax
def test_scores_by_parameter_of_another_function_of_the_queries(framework):
    with framework.wide():
        problem = Problem(framework)
        influence = problem.influence()

        def double(z, target):  # jax passes the batch
            y = target if framework.name == "torch" else target[1]
            return 2 * cross_entropy(z, y)

        twice = influence.parameter_scores(problem.query, query_loss=double)
        assert_close(sum(twice.values()), 2 * expected())
