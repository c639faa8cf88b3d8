"""Losses of several parts for each example, such as tokens, against dense derivatives."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from array_api_compat import array_namespace

from tests.adapters.shared.frameworks import flat, rebuilt, slow_in_jax
from tests.adapters.shared.test_influence import (
    Problem,
    assert_close,
    expected,
    inverse,
    numbers,
    outputs,
)
from tests.oracles import gradient


def parts(z: Any, y: Any) -> Any:
    """Return the two terms of the cross entropy."""
    xp = array_namespace(z)
    return xp.stack([xp.log(xp.sum(xp.exp(z), axis=1)), -xp.sum(y * z, axis=1)], axis=1)


def of_parts(which: int) -> np.ndarray:
    """Return the gradient of each part of each example, shape (size, 2, n)."""
    params, *sets = numbers()
    x, y = sets[which]

    def losses(t: np.ndarray) -> np.ndarray:
        return parts(outputs(rebuilt(t, params), x), y)

    return gradient(losses, flat(params))


@slow_in_jax
def test_the_parts_of_a_loss_are_summed(framework):
    with framework.wide():
        problem = Problem(framework)
        for curvature, method in (("hessian", "jvp"), ("empirical_fisher", "gradients")):
            influence = problem.influence(loss=parts, curvature=curvature)
            assert_close(influence.scores(problem.query, method=method), expected(curvature))


@slow_in_jax
def test_the_scores_of_parts_are_those_of_their_gradients(framework):
    with framework.wide():
        problem = Problem(framework)
        influence = problem.influence(loss=parts)
        train, query = of_parts(0), of_parts(1)
        wanted = np.einsum("qn,nm,itm->qit", query.sum(1), inverse("ggn"), train)
        assert_close(influence.token_scores(problem.query), wanted)
        wanted = np.einsum("qsn,nm,im->qsi", query, inverse("ggn"), train.sum(1))
        assert_close(influence.token_scores(problem.query, of="query"), wanted)
        for of in ("train", "query"):
            with pytest.raises(ValueError, match="one number per token"):
                problem.influence().token_scores(problem.query, of=of)
