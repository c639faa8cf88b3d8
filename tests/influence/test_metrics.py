"""Measures of influence scores, against SciPy, scikit-learn's formulas and counting."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from lowrank_inverse.influence.metrics import (
    leave_one_out,
    linear_datamodelling_score,
    mislabel_auc,
)


def test_correlations_are_those_of_scipy(eager):
    rng = np.random.default_rng(0)
    predicted = eager.seen(rng.standard_normal((3, 7)))
    actual = eager.seen(predicted + 0.5 * rng.standard_normal((3, 7)))
    found = leave_one_out(eager.asarray(predicted), eager.asarray(actual))
    p, a = predicted.reshape(-1), actual.reshape(-1)
    assert found.pearson == pytest.approx(pearsonr(p, a)[0], abs=1e-12)
    assert found.spearman == pytest.approx(spearmanr(p, a)[0], abs=1e-12)
    slope = np.linalg.lstsq(p[:, None], a, rcond=None)[0][0]
    assert found.slope == pytest.approx(slope, rel=1e-12)
    error = np.linalg.norm(p - a) / np.linalg.norm(a)
    assert found.relative_error == pytest.approx(error, rel=1e-12)


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_scale_changes_the_slope_alone(scale):
    rng = np.random.default_rng(1)
    p, a = rng.standard_normal(30), rng.standard_normal(30)
    one, other = leave_one_out(p, a), leave_one_out(scale * p, a)
    assert other.pearson == pytest.approx(one.pearson, rel=1e-12)
    assert other.spearman == one.spearman
    assert other.slope * scale == pytest.approx(one.slope, rel=1e-12)


def test_ties_have_the_mean_of_their_ranks_and_constants_no_correlation():
    p, a = np.array([1.0, 1.0, 2.0, 3.0]), np.array([0.0, 2.0, 2.0, 5.0])
    assert leave_one_out(p, a).spearman == pytest.approx(spearmanr(p, a)[0], abs=1e-12)
    constant = leave_one_out(np.full(4, 0.1), a)
    assert np.isnan(constant.pearson)
    assert np.isnan(constant.spearman)


def test_the_datamodelling_score_is_the_mean_of_rank_correlations(eager):
    rng = np.random.default_rng(2)
    scores, losses = (eager.seen(rng.standard_normal(shape)) for shape in ((3, 9), (12, 3)))
    subsets = rng.random((12, 9)) < 0.5
    found = linear_datamodelling_score(
        eager.asarray(scores), eager.asarray(subsets), eager.asarray(losses)
    )
    expected = [
        spearmanr([scores[q][kept].sum() for kept in subsets], -losses[:, q])[0] for q in range(3)
    ]
    assert found == pytest.approx(np.mean(expected), abs=1e-12)


def test_losses_that_fall_by_the_sum_of_the_scores_have_a_datamodelling_score_of_1():
    rng = np.random.default_rng(3)
    scores, subsets = rng.standard_normal((2, 8)), rng.random((10, 8)) < 0.5
    losses = np.exp(-(subsets @ scores.T))
    assert linear_datamodelling_score(scores, subsets, losses) == pytest.approx(1, abs=1e-12)
    assert linear_datamodelling_score(-scores, subsets, losses) == pytest.approx(-1, abs=1e-12)


def test_the_area_counts_the_pairs_in_their_right_order(eager):
    rng = np.random.default_rng(4)
    values = eager.seen(rng.integers(0, 6, 25).astype(float))  # with ties
    flags = rng.random(25) < 0.4
    pairs = itertools.product(values[flags], values[~flags])
    wins = [1.0 if bad > good else 0.5 if bad == good else 0.0 for bad, good in pairs]
    found = mislabel_auc(eager.asarray(values), eager.asarray(flags))
    assert found == pytest.approx(np.mean(wins), abs=1e-12)


def test_bad_input_is_named():
    x, flags = np.arange(4.0), np.array([True, False, True, False])
    with pytest.raises(ValueError, match=r"must have the same shape; got \(4,\) and \(3,\)"):
        leave_one_out(x, x[:3])
    with pytest.raises(ValueError, match="at least two entries"):
        leave_one_out(x[:1], x[:1])
    with pytest.raises(ValueError, match="`actual` must be finite"):
        leave_one_out(x, np.array([1, 2, 3, np.nan]))
    with pytest.raises(TypeError, match="`predicted` must be an array"):
        leave_one_out([1.0, 2.0], x)
    with pytest.raises(TypeError, match="`is_mislabelled` must be an array of bool"):
        mislabel_auc(x, x)
    with pytest.raises(ValueError, match="both kinds; got 0 True and 4 False"):
        mislabel_auc(x, flags & ~flags)
    with pytest.raises(ValueError, match="the same shape"):
        mislabel_auc(x[:3], flags)
    subsets, losses = np.ones((2, 4), dtype=bool), np.array([[1.0], [2.0]])
    with pytest.raises(ValueError, match="must have the shapes"):
        linear_datamodelling_score(x, subsets, losses)
    with pytest.raises(ValueError, match="must differ from model to model"):
        linear_datamodelling_score(x[None], subsets, losses)
    with pytest.raises(ValueError, match="at least two models"):
        linear_datamodelling_score(x[None], subsets[:1], losses[:1])
