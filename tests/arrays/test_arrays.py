"""The helpers under everything else: norms without overflow, wide sums in blocks of rows."""

from __future__ import annotations

import contextlib
import itertools
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from lowrank_inverse.arrays import conversion
from lowrank_inverse.arrays.conversion import scatter, take
from lowrank_inverse.arrays.decompositions import eigh
from lowrank_inverse.arrays.linalg import (
    BLOCK_NUMBERS,
    MAX_BLOCKS,
    add_to,
    cholesky,
    column_norm,
    copy_where,
    row_blocks,
    scale_and_add,
    tall_dot,
    tall_times,
)
from lowrank_inverse.arrays.scale import matrix_scale
from tests.conftest import host
from tests.oracles import relative_error
from tests.problems import symmetric

SHAPE = np.array([1.0, -0.5, 0.25])
ROWS = 2 * BLOCK_NUMBERS // 3 + 7


@pytest.mark.parametrize("share", [0.45, 0.26, 1e-3])
def test_a_norm_near_the_largest_number_is_neither_infinite_nor_zero(eager, share):
    size = share * float(np.finfo(eager.dtype).max)
    norm = host(column_norm(eager.asarray(size * SHAPE))).astype(np.float64)
    assert norm / size == pytest.approx(np.linalg.norm(SHAPE), rel=1e-6)
    block = eager.asarray(size * np.stack([SHAPE, 1e-3 * SHAPE], axis=1))
    norms = host(column_norm(block)).astype(np.float64) / size
    np.testing.assert_allclose(norms, np.linalg.norm(SHAPE) * np.array([1, 1e-3]), rtol=1e-6)


@pytest.mark.parametrize("factor", [4.0, 100.0, 1e10])
def test_a_norm_near_the_smallest_normal_number_is_not_zero(eager, factor):
    size = factor * float(np.finfo(eager.dtype).tiny)
    norm = host(column_norm(eager.asarray(size * SHAPE))).astype(np.float64)
    assert norm / size == pytest.approx(np.linalg.norm(SHAPE), rel=1e-6)


def test_a_zero_column_has_norm_zero_and_one_that_is_not_finite_has_no_finite_norm(eager):
    block = np.array([[0.0, np.nan, np.inf, 3.0], [0.0, 1.0, 1.0, -4.0]])
    with np.errstate(invalid="ignore"):
        norms = host(column_norm(eager.asarray(block)))
    assert norms[0] == 0
    assert not np.any(np.isfinite(norms[1:3]))
    assert norms[3] == 5


def tall(n):
    return np.lib.stride_tricks.as_strided(np.zeros(1), shape=(n, 1), strides=(0, 0))


@pytest.mark.parametrize("n", [1, 1024, 1025, 10**6, 10**8 + 1])
@pytest.mark.parametrize("width", [1, 20, 1000])
def test_blocks_of_rows_cover_every_row_once_and_fit_a_cache(n, width):
    blocks = row_blocks(tall(n), width)
    assert blocks[0].start == 0 and blocks[-1].stop == n
    for one, following in itertools.pairwise(blocks):
        assert one.stop == following.start
    assert all((block.stop - block.start) * width <= 4 * BLOCK_NUMBERS for block in blocks)


def test_a_compiled_program_has_few_blocks():
    jax = pytest.importorskip("jax")
    counts = []

    def count(x):
        counts.append(len(row_blocks(x, 20)))
        return x

    jax.eval_shape(count, jax.ShapeDtypeStruct((10**8, 20), "float32"))
    assert counts == [MAX_BLOCKS]


@pytest.mark.parametrize("width", [None, 2])
def test_tall_products_are_summed_wide_over_all_blocks(eager, width):
    if eager.is_narrow:
        pytest.skip("has nothing wider to sum in")
    rng = np.random.default_rng(0)
    X = rng.standard_normal((ROWS, 3))
    Y = rng.standard_normal(ROWS if width is None else (ROWS, width))
    found = tall_dot(eager.asarray(X), eager.asarray(Y))
    assert str(found.dtype).endswith("float64")
    expected = eager.seen(X).T @ eager.seen(Y)
    # float32 would lose six digits more.
    assert relative_error(host(found), expected) < 1e-12


@pytest.mark.parametrize("width", [None, 2])
def test_tall_products_with_a_small_wide_matrix_are_rounded_once(eager, width):
    if eager.is_narrow:
        pytest.skip("has nothing wider to sum in")
    rng = np.random.default_rng(0)
    X = rng.standard_normal((ROWS, 3))
    small = np.array([1e6, 1.0, -1e6]) if width is None else rng.standard_normal((3, width))
    X[:, 2] = X[:, 0]  # the large parts cancel
    wide = eager.xp.float64
    found = tall_times(eager.asarray(X), eager.xp.asarray(eager.make(small), dtype=wide))
    assert found.dtype == eager.asarray(X).dtype
    assert tuple(found.shape) == (ROWS, *small.shape[1:])
    # In float32 the large parts would cancel to an error of 1e-1.
    assert relative_error(host(found), eager.seen(X) @ small) < max(10 * eager.eps, 1e-9)


def test_taking_undoes_scattering(eager):
    indices = np.array([7, 0, 3])
    for values in (np.arange(1.0, 4), np.arange(6.0).reshape(3, 2)):
        spread = scatter(eager.asarray(values), indices, 9)
        assert tuple(spread.shape) == (9, *values.shape[1:])
        np.testing.assert_array_equal(host(take(spread, indices)), values)
        assert np.count_nonzero(host(spread)) == np.count_nonzero(values)


@pytest.mark.parametrize("width", [None, 2])
def test_vectors_are_written_over_where_the_library_can(eager, width):
    rng = np.random.default_rng(0)
    shape = ROWS if width is None else (ROWS, width)
    x, y = rng.standard_normal(shape), rng.standard_normal(shape)
    factor = rng.standard_normal(() if width is None else width)
    rounding = 1e-6 if eager.dtype == "float32" else 1e-15
    for function, expected in (
        (add_to, x + factor * y),
        (scale_and_add, factor * x + y),
    ):
        before, addend = eager.asarray(x), eager.asarray(y)
        found = function(before, eager.asarray(factor), addend)
        assert relative_error(host(found), expected) < rounding
        np.testing.assert_array_equal(host(addend), eager.seen(y))
        assert (found is before) == (eager.name != "jax")


def test_a_copy_is_taken_where_the_condition_holds(eager):
    x, kept = np.array([[1.0, 2.0], [3.0, 4.0]]), np.zeros((2, 2))
    mixed = copy_where(
        eager.asarray(np.array([True, False])), eager.asarray(x), eager.asarray(kept)
    )
    np.testing.assert_array_equal(host(mixed), [[1, 0], [3, 0]])
    for condition in (True, False):
        source = eager.asarray(x[0])
        found = copy_where(eager.asarray(np.array(condition)), source, eager.asarray(kept[0]))
        np.testing.assert_array_equal(host(found), x[0] if condition else kept[0])
        assert found is not source


@pytest.mark.parametrize("rank", [1, 5])
@pytest.mark.parametrize("zeros", [0.0, 0.9])
def test_matrices_of_low_rank_with_rows_of_zeros_have_eigenvectors(rank, zeros, eager):
    # For some of them torch's own eigh does not converge in float32.
    n, rng = 200, np.random.default_rng(0)
    X = rng.random((rank, n)) * (rng.random((rank, n)) > zeros)
    A = eager.seen(X.T @ X)
    w, V = (host(x).astype(float) for x in eigh(eager.asarray(A)))
    unit = 10 * n**0.5 * eager.eps
    assert np.linalg.norm(V.T @ V - np.eye(n), 2) < unit
    assert np.linalg.norm((V * w) @ V.T - A, 2) < unit * np.linalg.norm(A, 2)


@pytest.mark.parametrize("exponent", [-110, -66, 66, 110])
def test_the_bits_of_eigenvectors_do_not_depend_on_the_scale_of_the_matrix(eager, exponent):
    A = symmetric(np.exp(-np.arange(20.0) / 5), seed=3)
    w, V = (host(x) for x in eigh(eager.asarray(A)))
    far, same = (host(x) for x in eigh(eager.asarray(2.0**exponent * A)))
    np.testing.assert_array_equal(same, V)
    np.testing.assert_array_equal(far.astype(np.float64), 2.0**exponent * w.astype(np.float64))


@pytest.mark.parametrize("size", [0.0, 1e-45, np.inf])
def test_a_matrix_of_zeros_or_none_that_is_finite_has_the_scale_one(eager, size):
    A = eager.asarray(size * np.ones((3, 3)))
    expected = 1.0 if size != 1e-45 or eager.dtype == "float32" else 2.0 ** np.floor(np.log2(size))
    assert host(matrix_scale(A)) == expected


def test_a_matrix_has_a_cholesky_factor_if_it_is_positive_definite(eager):
    A = symmetric(np.linspace(0.5, 2, 12))
    L = host(cholesky(eager.asarray(A)))
    assert relative_error(L @ L.T, A) < 100 * eager.eps
    for lowest in (-1.0, -1e-3):
        assert cholesky(eager.asarray(symmetric(np.linspace(lowest, 2, 12)))) is None


def test_cupy_is_asked_to_raise_where_a_decomposition_fails(monkeypatch):
    asked = []

    def errstate(**settings):
        return contextlib.nullcontext(asked.append(settings))

    monkeypatch.setattr(conversion, "is_cupy_array", lambda x: True)
    monkeypatch.setitem(sys.modules, "cupyx", SimpleNamespace(errstate=errstate))
    assert cholesky(symmetric(np.linspace(-1, 2, 12))) is None
    assert asked == [{"linalg": "raise"}]
    w, _ = eigh(symmetric(np.linspace(-1, 2, 12)))
    assert w[0] == pytest.approx(-1)
    assert len(asked) == 2
