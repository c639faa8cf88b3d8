"""The damped inverse of the approximation, by Woodbury's identity."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from array_api_compat import device
from hypothesis import given, settings
from hypothesis import strategies as st

import lowrank_inverse as li
from lowrank_inverse.arrays.linalg import BLOCK_NUMBERS
from tests.conftest import host, open_backend
from tests.oracles import (
    damped_inverse,
    damped_solve,
    equation_6,
    nystrom,
    nystrom_truncated,
    operator_norm,
    relative_error,
)
from tests.problems import (
    ACCURACY,
    INDEFINITE,
    PSD,
    RANK,
    WIDTH,
    CountingOperator,
    N,
    conditioned,
    indices,
    largest,
    matrix,
    orthogonal,
    rhs,
    symmetric,
)

K = indices()
EXACT = {"float32": 1e-4, "float64": 1e-10}


def full_rank_inverse(A, damping, block):
    return li.nystrom(A, N, rng=0).inverse(damping) @ block


def inverse(A, damping, block):
    return li.nystrom(A, indices=K).inverse(damping) @ block


def by_algorithm_1(A, damping, block, chunk_size):
    return (
        li.woodbury_inverse(li.nystrom(A, indices=K), damping=damping, chunk_size=chunk_size)
        @ block
    )


def recomputed(A, damping, block, chunk_size):
    return li.chunked_inverse(A, K, damping=damping, chunk_size=chunk_size) @ block


def streamed(A, damping, block, chunk_size):
    return li.streamed_inverse(A, K, damping=damping, chunk_size=chunk_size) @ block


@functools.cache
def by_chunks(form):
    return lambda A, damping, block: tuple(form(A, damping, block, size) for size in (3, RANK))


def make_inverse(form, A, chosen, damping):
    if form == "chunked":
        return li.chunked_inverse(A, chosen, damping=damping, chunk_size=2)
    if form == "streamed":
        return li.streamed_inverse(A, chosen, damping=damping, chunk_size=2)
    chunk_size = {"batched": None, "Algorithm 1": 2}[form]
    return li.nystrom(A, indices=chosen).inverse(damping, chunk_size=chunk_size)


every_form = pytest.mark.parametrize("form", ["batched", "Algorithm 1", "chunked", "streamed"])


# All columns


@pytest.mark.parametrize("name", PSD)
def test_all_columns_reproduce_the_dense_inverse(backend, name):
    shares = (1e-1, 1e-2) if backend.dtype == "float32" else (1e-1, 1e-2, 1e-4)
    for share in shares:
        damping = float(backend.seen(share * largest(name)))
        found = backend.run(full_rank_inverse, matrix(name), damping, np.eye(N))
        expected = damped_inverse(backend.seen(matrix(name)), damping)
        assert relative_error(found, expected) < EXACT[backend.dtype]


# Theorem 1


@st.composite
def psd_problems(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.integers(1, 24))
    decay = draw(st.floats(0, 3))
    rank = draw(st.integers(0, n))
    eigenvalues = np.where(np.arange(n) < rank, rng.random(n) * np.exp(-decay * np.arange(n)), 0)
    A = 10 ** draw(st.floats(-2, 2)) * symmetric(eigenvalues, int(rng.integers(1000)))
    chosen = rng.choice(n, draw(st.integers(1, n)), replace=False)
    damping = 10 ** draw(st.floats(-3, 1)) * max(operator_norm(A), 1e-3)
    return A, chosen, damping, rng


@settings(max_examples=150)
@given(psd_problems())
def test_theorem_1_bounds_the_error_of_the_inverse_and_of_hypergradients(problem):
    A, chosen, damping, rng = problem
    n = len(A)
    approx = li.nystrom(A, indices=chosen)
    found = approx.inverse(damping) @ np.eye(n)
    difference = damped_inverse(A, damping).astype(np.float64) - found
    E = operator_norm(A - approx @ np.eye(n))
    bound = E / (damping * (damping + E))
    rounding = 1e-12 / damping
    assert operator_norm(difference) <= bound + rounding

    g, F = rng.standard_normal(n), rng.standard_normal((n, 4))
    error = np.linalg.norm(g @ difference @ F)
    assert error <= np.linalg.norm(g) * operator_norm(F) * (bound + rounding)


def test_theorem_1_is_attained_so_that_the_test_above_is_sharp():
    A, damping = np.diag([2.0, 1.0, 0.5]), 0.1
    approx = li.nystrom(A, indices=[1, 2])  # misses the eigenvalue 2: E = 2
    difference = damped_inverse(A, damping) - approx.inverse(damping) @ np.eye(3)
    assert operator_norm(difference) == pytest.approx(2 / (damping * (damping + 2)), rel=1e-12)


# One inverse, however it is computed


@pytest.mark.parametrize("name", ["linear", "polynomial", "step", "clusters", "network"])
def test_the_inverse_is_that_of_the_dense_approximation(backend, name):
    A, damping = backend.seen(matrix(name)), float(backend.seen(0.01 * largest(name)))
    expected = damped_solve(nystrom(A, K), damping, backend.seen(rhs(width=WIDTH)))
    found = backend.run(inverse, matrix(name), damping, rhs(width=WIDTH))
    assert relative_error(found, expected) < 1e3 * backend.eps


@pytest.mark.parametrize("form", [by_algorithm_1, recomputed, streamed])
@pytest.mark.parametrize("name", PSD)
def test_every_form_in_chunks_gives_the_batched_inverse(backend, name, form):
    damping = (0.1 if form is streamed else 0.01) * largest(name)
    expected = backend.run(inverse, matrix(name), damping, rhs(width=WIDTH))
    tolerance = {
        by_algorithm_1: 200 * backend.eps,
        recomputed: 1e-3 if backend.is_narrow else EXACT[backend.dtype],
        streamed: {"float32": 1e-2, "float64": 1e-11}[backend.dtype],
    }[form]
    for found in backend.run(by_chunks(form), matrix(name), damping, rhs(width=WIDTH)):
        assert relative_error(found, expected) < tolerance


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("chunk_size", range(1, RANK + 2))
def test_all_chunk_sizes_from_one_to_beyond_all_columns_agree(chunk_size, dtype):
    recomputed_to = {"float32": 1e-4, "float64": 1e-10}[dtype]
    for name in ("linear", "exponential", "network"):
        A, b, damping = matrix(name).astype(dtype), rhs().astype(dtype), 0.01 * largest(name)
        approx = li.nystrom(A, indices=K)
        expected = approx.inverse(damping) @ b
        stored = approx.inverse(damping, chunk_size=chunk_size) @ b
        assert relative_error(stored, expected) < 200 * np.finfo(dtype).eps
        recomputed = li.chunked_inverse(A, K, damping=damping, chunk_size=chunk_size) @ b
        assert relative_error(recomputed, expected) < recomputed_to


@pytest.mark.parametrize("name", PSD)
def test_streamed_equals_stored_in_float64_at_every_chunk_size(name):
    for share, tolerance in ((1e-1, 1e-11), (1e-2, 1e-9), (1e-3, 1e-8)):
        damping = share * largest(name)
        expected = inverse(matrix(name), damping, rhs(width=WIDTH))
        for chunk_size in (1, 3, RANK, RANK + 1):
            operator = li.streamed_inverse(matrix(name), K, damping=damping, chunk_size=chunk_size)
            assert relative_error(operator @ rhs(width=WIDTH), expected) < tolerance


def test_one_approximation_serves_every_damping(library):
    A = library.seen(matrix("polynomial"))
    approx = li.nystrom(library.asarray(matrix("polynomial")), indices=K)
    for damping in (1e-3, 1e-2, 1.0, 100.0):
        expected = damped_solve(nystrom(A, K), float(library.seen(damping)), library.seen(rhs()))
        found = host(approx.inverse(damping) @ library.asarray(rhs()))
        assert relative_error(found, expected) < 1e3 * library.eps / min(damping, 1) ** 0.5


@every_form
def test_a_block_is_solved_like_its_columns(form, library):
    operator = make_inverse(form, library.asarray(matrix("polynomial")), K, 0.1)
    B = rhs(width=WIDTH)
    together = host(operator @ library.asarray(B))
    for j in range(WIDTH):
        alone = host(operator @ library.asarray(B[:, j]))
        assert relative_error(together[:, j], alone) < 100 * library.eps


@every_form
def test_inverses_keep_library_dtype_and_device(form, library):
    b = library.asarray(rhs())
    operator = make_inverse(form, library.asarray(matrix("polynomial")), K, 0.1)
    found = operator @ b
    assert type(found) is type(b)
    assert found.dtype == b.dtype == operator.dtype
    assert device(found) == device(b)
    assert tuple(operator.shape) == (N, N)


def test_the_error_of_the_inverse_falls_with_rank():
    A, damping, order = matrix("exponential"), 0.01, indices(rank=N)
    exact = damped_inverse(A, damping)
    errors = []
    for k in (1, 2, 4, 8, 16, N):
        errors.append(
            operator_norm(li.nystrom(A, indices=order[:k]).inverse(damping) @ np.eye(N) - exact)
        )
    assert np.all(np.diff(errors) < 1e-9)
    assert errors[-1] < 1e-8 * errors[0]


def test_a_matrix_of_many_rows_is_worked_on_in_blocks(library):
    n = 2 * BLOCK_NUMBERS // 8 + 7
    X = np.random.default_rng(0).integers(-3, 4, (n, 5)).astype(float)
    factor, damping = library.asarray(X), 0.5
    operator = li.FunctionOperator(
        lambda v: factor @ (factor.T @ v),
        n,
        like=factor[:, 0],
        columns=lambda chosen: library.asarray(X @ X[chosen].T),
    )
    approx = li.nystrom(operator, 8, rng=0)
    assert approx.rank == 5
    v = X @ np.arange(1.0, 6) + 0.01 * rhs(n)
    expected = (v - X @ np.linalg.solve(X.T @ X + damping * np.eye(5), X.T @ v)) / damping
    # What is left of v is a hundred thousandth of it: the rest cancels.
    # The sums over n rows are taken in float64.
    rounding = max(60 * library.eps, n * np.finfo(float).eps)
    tolerance = rounding * np.linalg.norm(v) / np.linalg.norm(damping * expected)
    for chunk_size in (None, 3):
        found = approx.inverse(damping, chunk_size=chunk_size) @ library.asarray(v)
        assert relative_error(host(found), expected) < tolerance
    assert approx.logdet(damping) == pytest.approx(
        np.linalg.slogdet(X.T @ X + damping * np.eye(5))[1] + (n - 5) * np.log(damping), rel=1e-6
    )


# Columns without a use, and negative curvature


@every_form
def test_dead_and_repeated_columns_change_nothing(form, library):
    A = np.zeros((N, N))
    A[2:, 2:] = conditioned(100, N - 2)
    A[2] = A[3]
    A[:, 2] = A[:, 3]
    chosen = [0, 2, 5, 1, 3, 9]  # two dead ones, and 2 repeats 3
    operator = make_inverse(form, library.asarray(A), chosen, 0.1)
    expected = damped_solve(nystrom(library.seen(A), [3, 5, 9]), float(library.seen(0.1)), rhs())
    assert relative_error(host(operator @ library.asarray(rhs())), expected) < 1e3 * library.eps
    if form in ("chunked", "streamed"):
        assert (operator.rank, operator.num_dropped, operator.num_negative) == (3, 3, 0)


@every_form
@pytest.mark.parametrize("name", [*PSD, *INDEFINITE])
def test_the_inverse_is_positive_definite_and_at_most_one_over_damping(form, name):
    damping = 0.1 * largest(name)
    found = make_inverse(form, matrix(name), K, damping) @ np.eye(N)
    assert relative_error(found, found.T) < 1e-9
    eigenvalues = np.linalg.eigvalsh((found + found.T) / 2)
    assert eigenvalues[0] > 0
    assert eigenvalues[-1] < (1 + 1e-9) / damping


@pytest.mark.parametrize("form", ["chunked", "streamed"])
def test_recomputed_forms_count_negative_curvature_as_the_stored_form_does(form):
    A = matrix("half")
    approx = li.nystrom(A, indices=K)
    operator = make_inverse(form, A, K, 0.1)
    assert approx.num_negative > 0
    assert operator.num_negative == approx.num_negative
    assert operator.num_dropped == approx.num_dropped
    assert operator.rank == approx.rank


# Float32


@functools.cache
def accuracy_matrix(name):
    Q = orthogonal(1500)
    H = (Q * ACCURACY[name][0](1500)) @ Q.T
    return (H + H.T) / 2


@functools.cache
def accuracy_draw(name, seed):
    """50 columns, a vector in the range of H, and the left singular form of H_k."""
    H, rng = accuracy_matrix(name), np.random.default_rng(seed)
    chosen = np.sort(rng.choice(len(H), 50, replace=False))
    v = H @ rng.standard_normal(len(H))
    C = H[:, chosen]
    # H_k = F F.T with F = C L^{-T}, where W = L L.T.
    L = np.linalg.cholesky(C[chosen])
    U, s, _ = np.linalg.svd(np.linalg.solve(L, C.T).T, full_matrices=False)
    return chosen, C, v / np.linalg.norm(v), U, s


def accuracy_reference(name, seed, damping):
    _, _, v, U, s = accuracy_draw(name, seed)
    return (v - U @ (s**2 / (s**2 + damping) * (U.T @ v))) / damping


def median_error(name, damping, apply):
    """Median over three draws of the relative error of ``apply(H, indices, C, v)``."""
    errors = []
    for seed in range(3):
        chosen, C, v, _, _ = accuracy_draw(name, seed)
        found = apply(accuracy_matrix(name), chosen, C, v)
        errors.append(relative_error(found, accuracy_reference(name, seed, damping)))
    return float(np.median(errors))


def stored_error(name, damping, library, *, wide):
    with open_backend(library, "float32", wide=wide) as backend:

        def apply(H, chosen, C, v):
            approx = li.NystromApproximation(backend.asarray(C), chosen)
            return host(approx.inverse(damping) @ backend.asarray(v))

        return median_error(name, damping, apply)


every_accuracy = pytest.mark.parametrize(
    ("name", "damping"), [(name, damping) for name, case in ACCURACY.items() for damping in case[1]]
)


@every_accuracy
@pytest.mark.parametrize("library", ["numpy", "array_api_strict", "torch", "jax"])
def test_float32_columns_meet_the_accuracy_promised(library, name, damping):
    promised, _ = ACCURACY[name][1][damping]
    assert stored_error(name, damping, library, wide=True) <= promised


@every_accuracy
def test_float32_without_float64_stays_within_twice_the_accuracy_of_a_stacked_qr(name, damping):
    _, promised = ACCURACY[name][1][damping]
    assert stored_error(name, damping, "jax", wide=False) <= 2 * promised


@every_accuracy
def test_equation_6_as_it_stands_is_far_worse_in_float32(name, damping):
    def plain(H, chosen, C, v):
        C = C.astype("float32")
        return equation_6(C, C[chosen], damping, v.astype("float32"))

    ours = stored_error(name, damping, "numpy", wide=True)
    assert ours < median_error(name, damping, plain) / 50


@every_accuracy
def test_algorithm_1_and_recomputed_columns_meet_about_the_same_accuracy(name, damping):
    promised, _ = ACCURACY[name][1][damping]

    def in_chunks(H, chosen, C, v):
        approx = li.NystromApproximation(C.astype("float32"), chosen)
        return approx.inverse(damping, chunk_size=10) @ v.astype("float32")

    def recomputed(H, chosen, C, v):
        inverse = li.chunked_inverse(H.astype("float32"), chosen, damping=damping, chunk_size=25)
        return inverse @ v.astype("float32")

    assert median_error(name, damping, in_chunks) <= 2 * promised
    assert median_error(name, damping, recomputed) <= 3 * promised


@every_accuracy
def test_streamed_in_float32_errs_less_than_the_approximation_where_damping_is_not_tiny(
    name, damping
):
    if name == "exponential":  # the smallest eigenvalues of W are below the rounding of H v
        damping = 1e-2
    H = accuracy_matrix(name)
    chosen, _, v, _, _ = accuracy_draw(name, 0)
    reference = accuracy_reference(name, 0, damping)
    exact = np.linalg.solve(H + damping * np.eye(len(H)), v)
    inverse = li.streamed_inverse(H.astype("float32"), chosen, damping=damping, chunk_size=25)
    own_error = np.linalg.norm(inverse @ v.astype("float32") - reference)
    assert own_error < np.linalg.norm(reference - exact)


@pytest.mark.parametrize("unit", [1e-30, 1.0, 1e30])
def test_a_streamed_inverse_with_a_column_of_zeros_is_that_of_the_dense_matrix(unit):
    A = np.diag([3.0, 0.0, 2.0, 1.0]) + 0.5 * np.outer([1, 0, 1, 1], [1, 0, 1, 1])
    b = np.asarray([1.0, 2.0, -1.0, 3.0])
    inverse = li.streamed_inverse(
        (unit * A).astype("float32"), range(4), damping=0.1 * unit, chunk_size=2
    )
    found = inverse @ b.astype("float32")
    wanted = np.linalg.solve(A + 0.1 * np.eye(4), b / unit)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


@every_accuracy
def test_float64_columns_are_accurate_to_many_more_digits(name, damping):
    def apply(H, chosen, C, v):
        return li.NystromApproximation(C, chosen).inverse(damping) @ v

    assert median_error(name, damping, apply) < 1e-7


# Costs


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 8])
def test_recomputed_columns_cost_the_products_that_are_documented(chunk_size):
    A = CountingOperator(matrix("linear"))
    operator = li.chunked_inverse(A, K, damping=0.1, chunk_size=chunk_size)
    chunks = -(-RANK // chunk_size)
    sizes = [min(chunk_size, RANK - i * chunk_size) for i in range(chunks)]
    # Chunk i is computed on its own, then once more beside each chunk before it.
    expected = sum(size * (i + 1) for i, size in enumerate(sizes))
    assert operator.num_products == A.num_products == expected
    if RANK % chunk_size == 0:
        assert expected == RANK * (RANK // chunk_size + 1) // 2
    assert max(A.widths) <= chunk_size

    for width in (None, WIDTH):
        before = A.num_products
        operator @ rhs(width=width)
        assert A.num_products - before == operator.apply_cost(width or 1) == RANK + (width or 1)


@pytest.mark.parametrize("chunk_size", [1, 3, 8])
def test_streaming_costs_two_products_a_column_and_two_a_vector(chunk_size):
    A = CountingOperator(matrix("linear"))
    operator = li.streamed_inverse(A, K, damping=0.1, chunk_size=chunk_size)
    assert operator.num_products == A.num_products == 2 * RANK
    assert max(A.widths) <= chunk_size
    for width in (None, WIDTH):
        before = A.num_products
        operator @ rhs(width=width)
        assert A.num_products - before == operator.apply_cost(width or 1) == 2 * (width or 1)


def test_stored_columns_cost_no_product_after_the_first_k():
    A = CountingOperator(matrix("linear"))
    approx = li.nystrom(A, indices=K)
    for damping in (0.1, 1.0):
        approx.inverse(damping) @ rhs()
        approx.inverse(damping, chunk_size=2) @ rhs()
    assert A.num_products == RANK


# Scale


@every_form
@pytest.mark.parametrize("scale", [2.0**66, 2.0**-66])
def test_scaling_matrix_and_damping_scales_the_answer_and_nothing_else(form, scale, library):
    A, b = matrix("polynomial"), library.asarray(rhs())
    expected = host(make_inverse(form, library.asarray(A), K, 0.01) @ b)
    found = host(make_inverse(form, library.asarray(A * scale), K, 0.01 * scale) @ b)
    if not library.is_narrow:
        np.testing.assert_array_equal(found, expected / np.asarray(scale, dtype=library.dtype))
    # An eigendecomposition in float32 scales its matrix on the way.
    assert relative_error(found.astype(np.float64) * scale, expected) < 1e-4


@every_form
@pytest.mark.parametrize("scale", [1e20, 1e-20])
def test_scaling_the_vector_scales_the_answer_and_nothing_else(form, scale, library):
    operator = make_inverse(form, library.asarray(matrix("polynomial")), K, 0.1)
    expected = host(operator @ library.asarray(rhs())).astype(np.float64)
    found = host(operator @ library.asarray(rhs() * scale)).astype(np.float64)
    assert relative_error(found / scale, expected) < 100 * library.eps


# Bad input


@pytest.mark.parametrize("damping", [0.0, -0.1, np.nan, np.inf])
def test_a_damping_that_is_not_positive_is_refused_with_its_reason(damping):
    approx = li.nystrom(np.eye(3), 2, rng=0)
    message = r"`damping` must be finite and > 0; got .*exists only with a positive damping"
    for make in (
        lambda: approx.inverse(damping),
        lambda: approx.inverse(damping, chunk_size=1),
        lambda: li.woodbury_inverse(approx, damping=damping),
        lambda: li.chunked_inverse(np.eye(3), [0], damping=damping, chunk_size=1),
        lambda: li.streamed_inverse(np.eye(3), [0], damping=damping),
    ):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("damping", ["1", None, True, 1j])
def test_a_damping_that_is_no_number_is_refused(damping):
    with pytest.raises(TypeError, match="`damping` must be a real number"):
        li.nystrom(np.eye(3), 2, rng=0).inverse(damping)


@pytest.mark.parametrize(
    ("chunk_size", "error"), [(0, ValueError), (-3, ValueError), (1.0, TypeError)]
)
def test_a_chunk_size_that_is_no_positive_whole_number_is_refused(chunk_size, error):
    for make in (
        lambda: li.nystrom(np.eye(3), 2, rng=0).inverse(0.1, chunk_size=chunk_size),
        lambda: li.chunked_inverse(np.eye(3), [0], damping=0.1, chunk_size=chunk_size),
        lambda: li.streamed_inverse(np.eye(3), [0], damping=0.1, chunk_size=chunk_size),
    ):
        with pytest.raises(error, match="`chunk_size` must be"):
            make()


@pytest.mark.parametrize(
    ("chosen", "message"),
    [([0, 3], "`indices` must lie in 0 … 2"), ([1, 1], "`indices` must be distinct")],
)
def test_bad_indices_are_refused(chosen, message):
    for make in (
        lambda: li.chunked_inverse(np.eye(3), chosen, damping=0.1, chunk_size=1),
        lambda: li.streamed_inverse(np.eye(3), chosen, damping=0.1),
    ):
        with pytest.raises(ValueError, match=message):
            make()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("position", [0, 2])
def test_a_column_that_is_not_finite_is_refused(bad, position):
    A = np.eye(3)
    A[position, position] = bad
    operator = li.FunctionOperator(lambda v: v, 3, columns=lambda chosen: A[:, chosen])
    for make in (
        lambda: li.chunked_inverse(operator, [0, 1, 2], damping=0.1, chunk_size=1),
        lambda: li.streamed_inverse(operator, [0, 1, 2], damping=0.1),
    ):
        with pytest.raises(ValueError, match="`columns of A` must be finite"):
            make()


def test_truncation_of_the_core_is_that_of_a_pseudo_inverse():
    A, damping = matrix("geometric"), 1e-3
    reference = nystrom_truncated(A.astype("float32"), K, np.finfo("float32").eps)
    expected = damped_solve(reference, damping, rhs())
    found = inverse(A.astype("float32"), damping, rhs().astype("float32"))
    assert relative_error(found, expected) < 1e-3
