"""A matrix and right-hand sides in other units take the same steps to the same end."""

from __future__ import annotations

import functools

import numpy as np
import pytest

import lowrank_inverse as li
from lowrank_inverse.low_rank.column_sampling import SAMPLINGS
from tests.problems import rhs, symmetric

SIZE = 60
DAMPING = 1e-3
SPECTRA = {
    "exponential": np.exp(-np.arange(SIZE) / 4),
    "polynomial": 1.0 / np.arange(1, SIZE + 1) ** 2,
    "low rank": np.where(np.arange(SIZE) < 20, np.exp(-np.arange(SIZE) / 4), 0.0),
    "indefinite": np.where(np.arange(SIZE) < 50, 1.0 / np.arange(1, SIZE + 1), -0.02),
}
SOLVERS = {
    "cg": functools.partial(li.CG, rtol=1e-4),
    "refined": functools.partial(li.Nystrom, rank=12, refine=4),
    **{
        f"{kind.__name__} {rank} {sampling}": functools.partial(kind, rank=rank, sampling=sampling)
        for kind in (li.NystromCG, li.Nystrom)
        for rank in (12, "auto")
        for sampling in SAMPLINGS
    },
}
each_spectrum = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("polynomial", "indefinite") else [pytest.mark.slow])
        for name in SPECTRA
    ],
)
EXACT_UNITS = [2.0**66, 2.0**-66]
"""7.4e19 and 1.4e-20: they round nothing."""
UNITS = [1e20, 1e-20]


def solve(name, solver, dtype, c=1.0, s=1.0):
    A = (c * symmetric(SPECTRA[name])).astype(dtype)
    b = (s * rhs(SIZE, 2)).astype(dtype)
    inverse = SOLVERS[solver](damping=DAMPING * c).prepare(A, rng=3)
    return inverse, inverse.solve(b)


def representable(dtype, c, s):
    """Whether the answer, of the size of s / c, is within the range of `dtype`."""
    return dtype == "float64" or 1e-30 < s / c < 1e30


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("solver", SOLVERS)
@each_spectrum
def test_units_change_neither_steps_nor_reasons_nor_columns(name, solver, dtype):
    before, expected = solve(name, solver, dtype)
    for c in (1.0, *EXACT_UNITS):
        for s in (1.0, *EXACT_UNITS):
            if representable(dtype, c, s):
                inverse, found = solve(name, solver, dtype, c, s)
                np.testing.assert_array_equal(found.num_steps, expected.num_steps)
                np.testing.assert_array_equal(found.reason, expected.reason)
                assert inverse.rank == before.rank
                assert inverse.num_products == before.num_products
                assert inverse.negative_curvature == before.negative_curvature
                value = found.value.astype(np.float64) * (c / s)
                difference = np.linalg.norm(value - expected.value)
                assert difference <= 1e-3 * np.linalg.norm(expected.value)


@pytest.mark.parametrize("solver", SOLVERS)
@each_spectrum
def test_units_that_round_each_entry_anew_change_no_reason_and_hardly_a_step(name, solver):
    """The last steps of a solve depend on the rounding of A, here at the end of the precision."""
    before, expected = solve(name, solver, "float64")
    for c, s in ((UNITS[0], 1.0), (UNITS[1], UNITS[0]), (1.0, UNITS[1])):
        inverse, found = solve(name, solver, "float64", c, s)
        np.testing.assert_array_equal(found.reason, expected.reason)
        assert np.all(np.abs(found.num_steps - expected.num_steps) <= 2 + expected.num_steps // 10)
        assert abs(inverse.rank - before.rank) <= 2 if before.rank is not None else True
        assert inverse.negative_curvature == before.negative_curvature
