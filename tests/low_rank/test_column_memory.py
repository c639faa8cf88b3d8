"""Columns held in less: budgets, lower precision, the host's memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

import lowrank_inverse as li
from lowrank_inverse.low_rank.column_memory import plan_storage
from tests.conftest import host
from tests.oracles import relative_error
from tests.problems import CountingOperator, N, indices, matrix, rhs

K = 8
SMALL = 32 * K * K  # bytes of what is k×k
ITEMSIZES = {"float32": 4, "float64": 8}


def held_bytes(n, columns, itemsize):
    return n * columns * itemsize + SMALL


# The plan


@pytest.mark.parametrize("itemsize", [4, 8])
def test_the_plan_is_the_fastest_that_fits(itemsize):
    n = 10**6
    stored = held_bytes(n, K, itemsize)
    for budget, storage, chunk in (
        (stored, "stored", None),
        (stored - 1, "streamed", 3),
        (held_bytes(n, 4, itemsize), "streamed", 2),
        (held_bytes(n, 2, itemsize), "streamed", 1),
    ):
        plan = plan_storage(n, K, itemsize, memory_budget=budget)
        assert plan[:2] == (storage, chunk)
        assert plan.num_bytes <= budget


def test_a_chunk_size_is_an_upper_limit():
    plan = plan_storage(10**6, K, 4, chunk_size=2, memory_budget=held_bytes(10**6, 7, 4))
    assert plan[:2] == ("streamed", 2)
    assert plan.num_bytes == held_bytes(10**6, 4, 4)


def test_a_budget_below_one_column_is_refused_with_what_is_needed():
    with pytest.raises(ValueError, match=r"`memory_budget` must be at least 8e\+06 bytes.*1e\+06"):
        plan_storage(10**6, K, 4, memory_budget=1e6)


@pytest.mark.parametrize("settings", [{"storage": "auto"}, {"memory_budget": 1e9}])
def test_a_budget_and_auto_need_each_other(settings):
    with pytest.raises(ValueError, match="need each other"):
        li.Nystrom(**settings)


@pytest.mark.parametrize("budget", [0, -1.0, np.nan])
def test_a_budget_that_is_not_positive_is_refused(budget):
    with pytest.raises(ValueError, match="`memory_budget` must be"):
        li.Nystrom(storage="auto", memory_budget=budget, damping=1e-2)


@pytest.mark.parametrize("settings", [{"rank": "auto"}, {"sampling": "greedy"}])
def test_a_budget_needs_columns_drawn_beforehand(settings):
    with pytest.raises(ValueError, match="holds its columns"):
        li.Nystrom(storage="auto", memory_budget=1e9, **settings)


# The choice


@pytest.mark.parametrize(("columns", "storage"), [(K, "stored"), (2, "streamed")])
def test_auto_gives_the_answer_of_the_storage_it_names(library, columns, storage):
    A, b = library.asarray(matrix("low rank")), library.asarray(rhs())
    operator = CountingOperator(A)
    budget = held_bytes(N, columns, ITEMSIZES[library.dtype])
    auto = li.Nystrom(rank=K, damping=0.1, storage="auto", memory_budget=budget)
    inverse = auto.prepare(operator, rng=0)
    assert inverse.storage.storage == storage
    assert inverse.storage.num_bytes <= budget
    assert inverse.num_products == operator.num_products
    expected = li.Nystrom(rank=K, damping=0.1, storage=storage).prepare(A, rng=0) @ b
    assert relative_error(host(inverse @ b), host(expected)) < 100 * library.eps


def test_a_damping_too_small_for_the_streamed_form_is_chunked_instead(library):
    A = library.asarray(matrix("low rank"))
    largest = float(np.linalg.eigvalsh(library.seen(A))[-1])
    operator = CountingOperator(A)
    budget = held_bytes(N, 4, ITEMSIZES[library.dtype])
    settings = li.Nystrom(rank=K, damping=3e-4 * largest, storage="auto", memory_budget=budget)
    inverse = settings.prepare(operator, rng=0)
    assert inverse.storage.storage == ("chunked" if library.dtype == "float32" else "streamed")
    assert inverse.storage.chunk_size == 2
    assert inverse.num_products == operator.num_products
    assert inverse.num_products == 2 * K + (
        K * (K // 2 + 1) // 2 if library.dtype == "float32" else 0
    )
    b = library.asarray(matrix("low rank") @ rhs())
    expected = li.Nystrom(rank=K, damping=3e-4 * largest).prepare(A, rng=0) @ b
    assert relative_error(host(inverse @ b), host(expected)) < 1e6 * library.eps


# Lower precision, and the host


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32"])
def test_columns_in_a_lower_precision_err_by_no_more_than_that(eager, name):
    A, damping = matrix("linear"), 0.1
    if name == "bfloat16" and eager.name in ("numpy", "array_api_strict"):
        with pytest.raises(ValueError, match="`column_dtype`='bfloat16' is not to be had"):
            li.nystrom(eager.asarray(A), K, rng=0, column_dtype=name)
        return
    if name == "float16" and eager.name == "array_api_strict":
        pytest.skip("the standard has no float16")
    if eager.is_narrow:
        with pytest.raises(ValueError, match="need float64"):
            li.nystrom(eager.asarray(A), K, rng=0, column_dtype=name)
        return
    approx = li.nystrom(eager.asarray(A), K, rng=0, column_dtype=name)
    assert str(approx.columns.dtype).endswith(name)
    unit = {"float16": 2**-10, "bfloat16": 2**-7, "float32": 2**-23}[name]
    v = eager.asarray(A @ rhs())
    found = approx.inverse(damping) @ v
    assert found.dtype == v.dtype
    expected = host(li.nystrom(eager.asarray(A), K, rng=0).inverse(damping) @ v)
    amplification = np.linalg.eigvalsh(A)[-1] / damping
    error = relative_error(host(found), expected)
    assert error < max(unit, eager.eps) * amplification
    if name != "float32":
        assert error > eager.eps  # it is held in less indeed
    for chunk_size in (3, K):
        chunked = host(approx.inverse(damping, chunk_size=chunk_size) @ v)
        assert relative_error(chunked, host(found)) < 1e4 * eager.eps


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_columns_of_any_size_fit_half_precision(library, size):
    A, b = matrix("linear"), rhs()
    if library.name == "array_api_strict":
        pytest.skip("the standard has no float16")
    plain = li.Nystrom(rank=K, damping=0.1, column_dtype="float16").prepare(
        library.asarray(A), rng=0
    )
    scaled = li.Nystrom(rank=K, damping=0.1 * size, column_dtype="float16").prepare(
        library.asarray(A * size), rng=0
    )
    expected = host(plain @ library.asarray(b))
    assert relative_error(size * host(scaled @ library.asarray(b)), expected) < 0.05


def test_columns_on_the_host_give_the_same_answer(library):
    A, b = library.asarray(matrix("exponential")), library.asarray(rhs())
    approx = li.nystrom(A, K, rng=0, offload=True)
    expected = li.nystrom(A, K, rng=0)
    np.testing.assert_array_equal(host(approx.columns), host(expected.columns))
    found = approx.inverse(0.1) @ b
    assert relative_error(host(found), host(expected.inverse(0.1) @ b)) < 100 * library.eps


@pytest.mark.parametrize("rank", [K, "auto"])
@pytest.mark.parametrize("sampling", ["uniform", "greedy", "gaussian"])
def test_what_is_read_before_it_is_chosen_cannot_be_kept_in_less(rank, sampling):
    if (rank, sampling) == (K, "uniform"):
        pytest.skip("can be")
    with pytest.raises(ValueError, match="need columns drawn before any is read"):
        li.nystrom(matrix("low rank"), rank, sampling=sampling, rng=0, column_dtype="float16")


def test_a_dtype_unknown_is_refused():
    with pytest.raises(ValueError, match="`column_dtype` must be 'float16'"):
        li.Nystrom(column_dtype="int8", damping=1e-2)


@pytest.mark.parametrize(("settings", "numbers"), [({}, 2.3), ({"column_dtype": "float16"}, 1.2)])
def test_the_peak_of_memory_is_as_planned(settings, numbers):
    n, k = 200_000, 20
    d = np.linspace(1, 2, n)

    def columns(chosen):
        C = np.zeros((len(chosen), n))
        C[np.arange(len(chosen)), chosen] = d[chosen]
        return C.T

    A = li.FunctionOperator(lambda v: d * v, n, columns=columns)
    tracemalloc.start()
    approx = li.nystrom(A, k, rng=0, chunk_size=4, **settings)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert approx.rank == k
    assert peak < numbers * n * k * 8


def test_indices_of_the_caller_may_be_kept_in_less():
    chosen = indices(rank=K)
    approx = li.nystrom(matrix("exponential"), indices=chosen, column_dtype="float32")
    np.testing.assert_array_equal(approx.indices, chosen)
    assert approx.columns.dtype == np.float32


# In a hypergradient


def test_a_hypergradient_says_how_its_columns_were_held():
    torch = pytest.importorskip("torch")
    import lowrank_inverse_torch as lit

    generator = torch.Generator().manual_seed(0)
    X = torch.randn(30, N, generator=generator, dtype=torch.float64)
    theta = torch.zeros(N, dtype=torch.float64, requires_grad=True)
    weight = torch.ones(30, dtype=torch.float64, requires_grad=True)

    def inner():
        return (weight * (X @ theta - 1) ** 2).mean()

    budget = held_bytes(N, 2, 8)
    out = lit.hypergradient(
        inner,
        lambda: ((theta - 1) ** 2).sum(),
        theta,
        weight,
        solver=li.Nystrom(rank=K, damping=0.1, storage="auto", memory_budget=budget),
        rng=0,
    )
    assert out.info.storage == ("streamed", 1, budget)
    assert out.info.num_products == 2 * K + 2 + 1
    assert "columns streamed" in out.info.explain()
