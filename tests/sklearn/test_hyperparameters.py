"""Hyperparameters in one vector, and where their likelihood is largest."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("sklearn", minversion="1.6", reason="scikit-learn 1.6 is not installed")
from lowrank_inverse.sklearn.hyperparameters import Hyperparameters, maximiser

TOP = np.array([0.3, -0.7])
WIDE = (-5.0, 5.0)


def parabola(noise, error):
    """Return a function with its top at `TOP`, whose gradient is off by `noise`."""

    def function(theta):
        return -float(np.sum((theta - TOP) ** 2)), -2 * (theta - TOP) + noise, error

    return function


@pytest.mark.parametrize("lengthscale", [2.0, np.array([2.0, 3.0])], ids=["one", "each"])
@pytest.mark.parametrize("fixed", [(), ("noise",), ("lengthscale", "noise")])
def test_logarithms_go_out_and_come_back(lengthscale, fixed):
    at = Hyperparameters(4.0, lengthscale, 0.1)
    theta = at.free(fixed)
    assert theta[0] == np.log(4.0)
    for name, value in at.with_free(theta + 1, fixed)._asdict().items():
        scale = 1.0 if name in fixed else np.e
        np.testing.assert_allclose(value, scale * np.asarray(getattr(at, name)), rtol=1e-14)


def test_the_top_of_a_known_function_is_found():
    found, missed = maximiser(parabola(0.0, 0.0), np.zeros(2), WIDE, 0, None)
    np.testing.assert_allclose(found, TOP, atol=1e-5)
    assert missed == ""


def test_an_estimate_is_climbed_as_far_as_its_gradient_tells():
    found, missed = maximiser(parabola(0.2, 0.5), np.full(2, 2.0), WIDE, 0, None)
    assert np.abs(found - TOP).max() < 0.3 and missed == ""


def test_an_estimate_that_is_left_on_a_slope_is_told():
    _, missed = maximiser(parabola(np.array([5.0, 0.0]), 0.1), TOP, WIDE, 0, None)
    assert "the optimiser ended early" in missed


def test_a_slope_out_of_the_bounds_is_an_end():
    found, missed = maximiser(parabola(0.0, 0.1), np.full(2, 3.0), (-1.0, 1.0), 0, None)
    np.testing.assert_allclose(found, 2.0)
    assert missed == ""


def test_what_is_nowhere_defined_is_told():
    def function(theta):
        raise np.linalg.LinAlgError

    found, missed = maximiser(function, TOP, WIDE, 2, np.random.RandomState(0))
    np.testing.assert_array_equal(found, TOP)
    assert "nowhere finite" in missed
