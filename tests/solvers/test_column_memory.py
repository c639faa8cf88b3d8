"""How columns are held, by name or by a number of bytes."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

import lowrank_inverse as li
from lowrank_inverse.solvers.column_memory import plan_memory
from tests.conftest import host
from tests.oracles import relative_error
from tests.problems import CountingOperator, N, matrix, rhs

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
    for budget, memory, chunk in (
        (stored, "stored", None),
        (stored - 1, "streamed", 3),
        (held_bytes(n, 4, itemsize), "streamed", 2),
        (held_bytes(n, 2, itemsize), "streamed", 1),
    ):
        plan = plan_memory(n, K, itemsize, memory=budget)
        assert plan[:2] == (memory, chunk)
        assert plan.num_bytes <= budget


def test_a_chunk_size_is_an_upper_limit():
    plan = plan_memory(10**6, K, 4, chunk_size=2, memory=held_bytes(10**6, 7, 4))
    assert plan[:2] == ("streamed", 2)
    assert plan.num_bytes == held_bytes(10**6, 4, 4)


def test_a_budget_below_one_column_is_refused_with_what_is_needed():
    with pytest.raises(ValueError, match=r"`memory` must be at least 8e\+06 bytes.*1e\+06"):
        plan_memory(10**6, K, 4, memory=1e6)


@pytest.mark.parametrize("memory", [0, -1.0, np.nan, np.inf, "auto", None, True])
def test_what_is_neither_a_way_nor_a_number_of_bytes_is_refused(memory):
    with pytest.raises(ValueError, match=r"`memory` must be 'stored', .* or a positive number of"):
        li.Nystrom(memory=memory, damping=1e-2)


@pytest.mark.parametrize("settings", [{"rank": "auto"}, {"sampling": "greedy"}])
def test_a_budget_needs_columns_drawn_beforehand(settings):
    with pytest.raises(ValueError, match="stores its columns"):
        li.Nystrom(memory=1e9, **settings)


# The choice


@pytest.mark.parametrize(("columns", "memory"), [(K, "stored"), (2, "streamed")])
def test_bytes_give_the_answer_of_the_way_that_they_choose(library, columns, memory):
    A, b = library.asarray(matrix("low rank")), library.asarray(rhs())
    operator = CountingOperator(A)
    budget = held_bytes(N, columns, ITEMSIZES[library.dtype])
    auto = li.Nystrom(rank=K, damping=0.1, memory=budget)
    inverse = auto.prepare(operator, rng=0)
    assert inverse.memory.memory == memory
    assert inverse.memory.num_bytes <= budget
    assert inverse.num_products == operator.num_products
    expected = li.Nystrom(rank=K, damping=0.1, memory=memory).prepare(A, rng=0) @ b
    assert relative_error(host(inverse @ b), host(expected)) < 100 * library.eps


def test_a_damping_too_small_for_the_streamed_form_is_chunked_instead(library):
    A = library.asarray(matrix("low rank"))
    largest = float(np.linalg.eigvalsh(library.seen(A))[-1])
    operator = CountingOperator(A)
    budget = held_bytes(N, 4, ITEMSIZES[library.dtype])
    settings = li.Nystrom(rank=K, damping=3e-4 * largest, memory=budget)
    inverse = settings.prepare(operator, rng=0)
    assert inverse.memory.memory == ("chunked" if library.dtype == "float32" else "streamed")
    assert inverse.memory.chunk_size == 2
    assert inverse.num_products == operator.num_products
    assert inverse.num_products == 2 * K + (
        K * (K // 2 + 1) // 2 if library.dtype == "float32" else 0
    )
    b = library.asarray(matrix("low rank") @ rhs())
    expected = li.Nystrom(rank=K, damping=3e-4 * largest).prepare(A, rng=0) @ b
    assert relative_error(host(inverse @ b), host(expected)) < 1e6 * library.eps


# What it takes


def test_the_peak_of_memory_is_as_planned():
    n, k = 200_000, 20
    d = np.linspace(1, 2, n)

    def columns(chosen):
        C = np.zeros((len(chosen), n))
        C[np.arange(len(chosen)), chosen] = d[chosen]
        return C.T

    A = li.FunctionOperator(lambda v: d * v, n, columns=columns)
    tracemalloc.start()
    approx = li.nystrom(A, k, rng=0, chunk_size=4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert approx.rank == k
    assert peak < 2.3 * n * k * 8


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
        solver=li.Nystrom(rank=K, damping=0.1, memory=budget),
        rng=0,
    )
    assert out.info.memory == ("streamed", 1, budget)
    assert out.info.num_products == 2 * K + 2 + 1
    assert "columns streamed" in out.info.explain()


def test_a_krylov_sketch_holds_its_vectors_too():
    A, b = CountingOperator(matrix("linear")), rhs()
    columns = li.Nystrom(rank=4, damping=0.1, sampling="uniform").prepare(A, b=b).memory
    sketch = li.Nystrom(rank=4, damping=0.1).prepare(A, b=b).memory
    assert sketch.num_bytes - columns.num_bytes == 4 * N * 8
    # Where both do not fit, columns alone are taken; and where these do not, none are held.
    for memory, way, found in (
        (sketch.num_bytes, "stored", sketch.num_bytes),
        (columns.num_bytes, "stored", columns.num_bytes),
        (columns.num_bytes - 1, "streamed", None),
    ):
        plan = li.Nystrom(rank=4, damping=0.1, memory=memory).prepare(A, b=b).memory
        assert plan.memory == way
        assert found is None or plan.num_bytes == found
