"""The framework-free parts of influence functions: data sets, stores, factors, checks."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import lowrank_inverse as li
from lowrank_inverse.estimators.extreme_eigenvalues import lowest_ritz
from lowrank_inverse.estimators.trace import auto_damping
from lowrank_inverse.influence.checkpoint import Store, digest
from lowrank_inverse.influence.damped_solver import (
    Factor,
    KeptColumns,
    checked_damping,
    from_record,
    to_record,
)
from lowrank_inverse.influence.dataset import Examples, in_batches
from lowrank_inverse.influence.results import merged, top
from tests import problems
from tests.conftest import host


def flatten(batch: Any) -> Any:
    return list(batch), tuple


def examples(source: Any, **options: Any) -> Examples:
    arguments = {"name": "train", "flatten": flatten, "batch_size": None, "memory_budget": 2**20}
    return Examples(source, **{**arguments, **options})


def joined(data: Examples) -> np.ndarray:
    return np.concatenate([batch[0] for _, batch in data.parts()])


# Data sets


@pytest.mark.parametrize("batch_size", [None, 1, 3, 4, 10, 50])
@pytest.mark.parametrize("memory_budget", [1, 2**20])
def test_batches_hold_all_examples_in_their_order(batch_size, memory_budget):
    x = np.arange(20.0).reshape(10, 2)
    source = [(x[:4], x[:4, 0]), (x[4:8], x[4:8, 0]), (x[8:], x[8:, 0])]
    data = examples(source, batch_size=batch_size, memory_budget=memory_budget)
    assert data.num == 10
    assert np.array_equal(joined(data), x)
    assert [start for start, _ in data.parts()] == list(np.cumsum([0, *data.sizes[:-1]]))
    if memory_budget > 1:
        size = batch_size or 512
        assert data.sizes == [min(size, 10 - start) for start in range(0, 10, size)]
    else:
        assert data.sizes == [4, 4, 2]
    for limit in (1, 3, 100):
        parts = list(data.parts(limit))
        assert max(len(batch[0]) for _, batch in parts) <= limit
        assert all(
            np.array_equal(batch[0], x[start : start + len(batch[0])]) for start, batch in parts
        )


def test_small_examples_make_larger_batches():
    assert examples([(np.ones(5000, np.float32),)]).sizes == [4096, 904]
    budget = {"memory_budget": 2**30}
    assert examples([(np.ones((1300, 256), np.float32),)], **budget).sizes == [1024, 276]  # a MiB
    assert examples([(np.ones((600, 1024), np.float32),)], **budget).sizes == [512, 88]


def test_arrays_beyond_the_budget_are_read_slice_by_slice():
    x = np.arange(3000.0).reshape(1500, 2)
    data = x, x[:, 0]
    whole = in_batches(data, flatten, None, x.nbytes + x[:, 0].nbytes)
    assert [batch[0].shape for batch in whole] == [(1500, 2)]
    for size, sizes in ((None, [1500]), (700, [700, 700, 100])):
        slices = in_batches(data, flatten, size, 2**10)
        parts = list(examples(slices, batch_size=size, memory_budget=2**10).parts())
        assert [len(batch[0]) for _, batch in parts] == sizes
        assert np.array_equal(np.concatenate([batch[0] for _, batch in parts]), x)
        assert all(np.shares_memory(batch[0], x) for _, batch in parts)
    for uneven in ((x, x[:3, 0]), (x, "a name"), (x, np.array(1.0))):
        assert list(in_batches(uneven, flatten, None, 1)) == [uneven]


def test_batches_that_cannot_be_joined_stay_as_they_are():
    source = [(np.ones((2, 3)), np.ones(2)), (np.ones((3, 5)), np.ones(3))]
    assert examples(source, batch_size=1).sizes == [2, 3]
    named = [(np.ones((2, 3)), "a"), (np.ones((3, 3)), "b")]
    assert examples(named).sizes == [2, 3]


def test_batches_are_read_in_any_order_and_a_changed_one_is_refused():
    source = [(np.full((2, 1), float(i)),) for i in range(4)]
    data = examples(source, memory_budget=1)
    for i in (2, 3, 0, 0, 1, 3):
        assert data.get(i)[0][0, 0] == i
    source.pop()
    with pytest.raises(RuntimeError, match="had 2 examples in batch 3 at first and has 0 now"):
        data.get(3)


def test_the_digest_is_that_of_the_examples_and_not_of_their_batches():
    x = np.random.default_rng(0).standard_normal((7, 2))
    whole = examples([(x, x[:, 0])]).digest()
    assert examples([(x[:5], x[:5, 0]), (x[5:], x[5:, 0])], memory_budget=1).digest() == whole
    assert examples([(x[::-1], x[:, 0])]).digest() != whole


def test_data_without_examples_or_rows_are_refused():
    with pytest.raises(ValueError, match="`train` must hold at least one example"):
        examples([])
    with pytest.raises(
        ValueError, match="one row for each example; batch 0 holds arrays of shapes"
    ):
        examples([(np.ones((2, 2)), np.ones(3))])
    with pytest.raises(ValueError, match="one row for each example"):
        examples([("text",)])
    with pytest.raises(TypeError, match=r"can be iterated only once: it is a list_iterator"):
        examples(iter([(np.ones(2),)]))


# Stores


def test_a_store_computes_once_and_belongs_to_one_key(tmp_path):
    store, calls = Store(tmp_path, {"a": "1"}), []

    def compute() -> np.ndarray:
        calls.append(None)
        return np.arange(3.0)

    template = np.zeros(0)
    assert np.array_equal(store.get("x", compute, template), np.arange(3.0))
    again = Store(tmp_path, {"a": "1"})
    assert np.array_equal(again.get("x", compute, template), np.arange(3.0))
    assert len(calls) == 1
    with pytest.raises(ValueError, match="another computation: a differ"):
        Store(tmp_path, {"a": "2"})
    nothing = Store(None, {})
    nothing.get("x", compute, template)
    nothing.get("x", compute, template)
    assert len(calls) == 3


def test_a_write_that_fails_leaves_no_file(tmp_path):
    store = Store(tmp_path, {})
    with pytest.raises(TypeError, match=r"cannot be saved: it is numpy\.ndarray"):
        store.get("x", lambda: np.array([object()]), np.zeros(0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["about.npz"]


def test_the_digest_tells_values_dtypes_and_shapes_apart():
    x = np.arange(4.0)
    others = [x + 1e-15, x.astype(np.float32), x.reshape(2, 2), x[::-1]]
    assert len({digest(x), *map(digest, others)}) == 5
    assert digest(x, 1) == digest(x.copy(), 1) != digest(x, 2)


# The largest scores


@pytest.mark.parametrize("kind", ["helpful", "harmful", "absolute"])
def test_merging_blocks_gives_the_same_as_sorting_all(kind):
    rng = np.random.default_rng(0)
    scores = rng.integers(-5, 6, (4, 30)).astype(float)  # with ties
    best = None
    for start in range(0, 30, 7):
        best = merged(best, top(scores[:, start : start + 7], 9, kind, start), 9, kind)
    whole = top(scores, 9, kind)
    assert np.array_equal(best.indices, whole.indices)
    assert np.array_equal(best.scores, whole.scores)
    ranked = {"helpful": scores, "harmful": -scores, "absolute": np.abs(scores)}[kind]
    taken = np.take_along_axis(ranked, best.indices, axis=1)
    assert np.array_equal(taken, -np.sort(-ranked, axis=1)[:, :9])


# Factors


def factor(A: Any, solver: Any, **options: Any) -> Factor:
    arguments = {"ridge": 0.0, "damping": 0.1, "seed": 0, "name": "matrix"}
    return Factor(A, solver, **{**arguments, **options})


def test_a_factor_solves_with_ridge_and_damping(library):
    A = problems.matrix("network")
    b = library.asarray(problems.rhs(width=3))
    expected = np.linalg.solve(
        library.seen(A) + 0.3 * np.eye(len(A)), library.seen(problems.rhs(width=3))
    )
    for solver in (
        li.CG(),
        li.NystromCG(rank=9),
        li.Exact(),
        li.Nystrom(rank=len(A), damping=1e-2),
    ):
        solution = factor(library.asarray(A), solver, ridge=0.2).solve(b)
        error = np.abs(host(solution.value).astype(np.float64) - expected).max()
        assert error <= 1e-3 * np.abs(expected).max()


def test_the_columns_are_kept_for_another_damping_and_come_from_the_source():
    A, B = problems.matrix("network"), problems.matrix("polynomial")
    first = factor(A, li.NystromCG(rank=7), source=B)
    b = problems.rhs()
    first.solve(b)
    assert np.array_equal(first.A.kept, B[:, first.A.indices])
    products = first.A.num_products
    second = factor(A, li.NystromCG(rank=7), source=B, damping=0.5, kept=first.A)
    solution = second.solve(b)
    assert second.A.num_products - products == solution.num_products
    assert np.allclose(A @ solution.value + 0.5 * solution.value, b, atol=1e-4)
    assert factor(A, li.CG(), source=B).A.source.matrix is A
    streamed = factor(A, li.Nystrom(rank=5, memory="streamed", damping=1e-2))
    streamed.solve(b)
    assert streamed.A.kept is None


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_the_lowest_ritz_value_is_near_the_lowest_eigenvalue(scale):
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.standard_normal((60, 60)))[0]
    w = np.concatenate([[-0.3, -0.1], np.linspace(0.01, 2, 58)])
    A = scale * (Q * w) @ Q.T
    value, residual, largest = lowest_ritz(li.aslinearoperator((A + A.T) / 2), 0, np.zeros(60))
    assert value == pytest.approx(-0.3 * scale, rel=0.02)
    assert residual <= 0.01 * 0.3 * scale
    assert largest == pytest.approx(2 * scale, rel=0.1)


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
def test_an_indefinite_matrix_is_named_with_a_damping_that_does(scale):
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.standard_normal((40, 40)))[0]
    A = scale * (Q * np.concatenate([[-0.3], np.linspace(0.01, 2, 39)])) @ Q.T
    A, b = (A + A.T) / 2, problems.rhs(40)
    for solver in (li.CG(), li.Exact(), li.NystromCG(rank=5)):
        with pytest.raises(ValueError, match=r"the matrix .* is not positive definite") as error:
            factor(A, solver, damping=0.05 * scale).solve(b)
        enough = float(str(error.value).split("A damping of ")[1].split(" would")[0])
        assert 0.3 * scale < enough < 0.6 * scale
        factor(A, solver, damping=enough).solve(b)


def test_the_auto_damping_is_a_tenth_of_the_mean_eigenvalue():
    A = np.diag(np.linspace(0, 2, 50))  # for a diagonal matrix the estimate is exact
    assert auto_damping(A, 0) == pytest.approx(0.1, rel=1e-12)
    with pytest.raises(ValueError, match=r"positive mean eigenvalue; it is about -1\."):
        auto_damping(-A, 0)
    with pytest.raises(ValueError, match="must be a number or 'auto'"):
        checked_damping("none")
    assert checked_damping("auto") == "auto"


def test_settings_survive_their_record_and_functions_have_none():
    for settings in (
        li.NystromCG(rank=7, rtol=1e-3, indices=[1, 5, 6]),
        li.Nystrom(rank=3, damping=0.5, memory="streamed"),
        li.CG(atol=1e-3),
        li.Neumann(num_terms=3),
        li.Exact(),
        li.Identity(scale=2.0),
    ):
        assert from_record(json.loads(json.dumps(to_record(settings)))) == settings
    with pytest.raises(TypeError, match="`solver` must be settings such as NystromCG"):
        to_record(lambda matvec, b: b)


def test_kept_columns_count_products_once():
    A = problems.matrix("network")
    kept = KeptColumns(A)
    kept @ np.ones((len(A), 3))
    assert kept.num_products == 3
    assert np.array_equal(kept.columns([4, 2]), A[:, [4, 2]])
    assert np.array_equal(kept.columns(np.array([4, 2])), A[:, [4, 2]])
    assert kept.num_products == 5
    kept.columns([4, 3])
    assert kept.num_products == 7
