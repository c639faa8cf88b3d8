"""Kernel matrices that are never formed whole."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from array_api_compat import device

import lowrank_inverse as li
from lowrank_inverse.operators.kernels.distances import MAX_COMPILED, squared_distances
from tests.conftest import host, open_backend
from tests.oracles import LONG, relative_error
from tests.problems import WIDTH, rhs

NUM, NEW, CHUNK = 24, 7, 10
FEW, SOME, MANY = 3, MAX_COMPILED - 4, MAX_COMPILED + 4
CASES = {
    "rbf": {"kernel": "rbf"},
    "laplacian": {"kernel": "laplacian"},
    "matern 1/2": {"kernel": "matern", "nu": 0.5},
    "matern 3/2": {"kernel": "matern", "nu": 1.5},
    "matern 5/2": {"kernel": "matern", "nu": 2.5},
    "polynomial": {"kernel": "polynomial", "degree": 2, "coef0": 0.5},
}
every_kernel = pytest.mark.parametrize("case", CASES)
dimensions = pytest.mark.parametrize("d", [FEW, SOME, MANY])


def points(d=FEW, n=NUM, seed=0, shift=0.0):
    """Return normal points, of which the last repeats the first."""
    X = np.random.default_rng([seed, d, n]).standard_normal((n, d)) + shift
    X[-1] = X[0]
    return X


def oracle(X, Z, kernel="rbf", lengthscale=1.0, nu=2.5, degree=3, coef0=1.0):
    """Return the kernel entry by entry, in long double, as the textbooks write it."""
    X, Z = (np.asarray(P, dtype=LONG) / np.asarray(lengthscale, dtype=LONG) for P in (X, Z))
    K = np.empty((len(X), len(Z)), dtype=LONG)
    for i, x in enumerate(X):
        for j, z in enumerate(Z):
            r = np.sqrt(((x - z) ** 2).sum())
            s = np.sqrt(LONG(2 * nu)) * r
            K[i, j] = {
                "rbf": np.exp(-(r**2) / 2),
                "laplacian": np.exp(-np.abs(x - z).sum()),
                "polynomial": (x @ z + LONG(coef0)) ** degree,
                "matern": np.exp(-s) * {0.5: 1, 1.5: 1 + s, 2.5: 1 + s + s**2 / 3}[nu],
            }[kernel]
    return K


def operator(X, case, **settings):
    return li.KernelOperator(
        X, **{"lengthscale": 2.0, "chunk_size": CHUNK} | CASES[case], **settings
    )


def parts(case):
    """Return one function a case: products, columns, diagonal and products with other points."""

    def compute(X, v, V, Z):
        A = operator(X, case)
        return A @ v, A @ V, A.columns([5, 0, NUM - 1]), A.diagonal(), A.cross(Z, V), A.cross(Z, v)

    return compute


PARTS = {case: parts(case) for case in CASES}


# The numbers


@dimensions
@every_kernel
def test_products_columns_and_diagonal_are_those_of_the_textbook_on_every_backend(case, d, backend):
    X, Z, v, V = points(d), points(d, NEW, seed=1), rhs(NUM), rhs(NUM, WIDTH)
    found = backend.run(PARTS[case], X, v, V, Z)
    X, Z, v, V = (backend.seen(x) for x in (X, Z, v, V))
    K = oracle(X, X, lengthscale=2.0, **CASES[case])
    cross = oracle(Z, X, lengthscale=2.0, **CASES[case])
    expected = K @ v, K @ V, K[:, [5, 0, NUM - 1]], np.diagonal(K), cross @ V, cross @ v
    for part, wanted in zip(found, expected, strict=True):
        assert part.shape == wanted.shape
        assert relative_error(part, wanted) < 20 * backend.eps


@pytest.mark.parametrize("d", [FEW, 30])
def test_kernels_are_those_of_scikit_learn(d):
    pairwise = pytest.importorskip("sklearn.metrics.pairwise", reason="compares with scikit-learn")
    from sklearn.gaussian_process.kernels import Matern

    X, identity = points(d), np.eye(NUM)
    scale = 1.7
    expected = {
        "rbf": pairwise.rbf_kernel(X, gamma=0.5 / scale**2),
        "laplacian": pairwise.laplacian_kernel(X, gamma=1 / scale),
        "polynomial": pairwise.polynomial_kernel(X, degree=2, gamma=1 / scale**2, coef0=0.5),
        **{
            f"matern {name}": Matern(scale, nu=nu)(X)
            for name, nu in (("1/2", 0.5), ("3/2", 1.5), ("5/2", 2.5))
        },
    }
    for case, K in expected.items():
        A = li.KernelOperator(X, lengthscale=scale, chunk_size=CHUNK, **CASES[case])
        assert relative_error(A @ identity, K) < 1e-14, case


def test_each_feature_may_have_its_own_lengthscale(library):
    X, scales = points(), np.array([0.5, 1.0, 4.0])
    A = li.KernelOperator(library.asarray(X), lengthscale=library.asarray(scales), chunk_size=CHUNK)
    expected = oracle(library.seen(X), library.seen(X), lengthscale=scales)
    assert relative_error(host(A @ library.asarray(np.eye(NUM))), expected) < 20 * library.eps


@pytest.mark.parametrize("name", ["nu", "degree", "coef0", "lengthscale", "kernel"])
def test_every_parameter_has_an_effect(name):
    base = {"kernel": "matern" if name in ("nu", "lengthscale", "kernel") else "polynomial"}
    other = {"nu": 0.5, "degree": 2, "coef0": 0.0, "lengthscale": 3.0, "kernel": "rbf"}[name]
    first, second = (
        li.KernelOperator(points(), **settings) for settings in (base, base | {name: other})
    )
    assert relative_error(first @ rhs(NUM), second @ rhs(NUM)) > 1e-3


@pytest.mark.parametrize("chunk_size", [1, 7, NUM, 100])
def test_tiles_change_nothing_but_rounding(chunk_size):
    X, v = points(), rhs(NUM)
    A = li.KernelOperator(X, chunk_size=chunk_size)
    assert relative_error(A @ v, li.KernelOperator(X) @ v) < 1e-15
    np.testing.assert_array_equal(A.columns([3, 1]), li.KernelOperator(X).columns([3, 1]))


# Accuracy


@dimensions
@pytest.mark.parametrize("shift", [0.0, 1e3])
def test_equal_points_have_distance_zero_exactly(d, shift, library):
    X = library.asarray(points(d, shift=shift))
    squares = host(squared_distances(X, X))
    np.testing.assert_array_equal(np.diagonal(squares), 0)
    assert squares[0, -1] == squares[-1, 0] == 0
    assert np.sum(squares == 0) == NUM + 2
    np.testing.assert_allclose(squares, squares.T, rtol=10 * library.eps)


@dimensions
@pytest.mark.parametrize("case", ["rbf", "laplacian", "matern 1/2", "matern 3/2", "matern 5/2"])
def test_the_diagonal_of_a_stationary_kernel_is_one_exactly(case, d, library):
    A = operator(library.asarray(points(d, shift=100.0)), case)
    C = host(A.columns(np.arange(NUM)))
    np.testing.assert_array_equal(np.diagonal(C), 1)
    assert C[0, -1] == C[-1, 0] == 1
    np.testing.assert_array_equal(host(A.diagonal()), 1)
    # Each of the two is off by the rounding of a sum of d squares, times the exponent, and its own.
    bound = 2 * (d + 4) * (1 + np.abs(np.log(C))) * library.eps
    assert np.all(np.abs(C - C.T) <= bound * C)


@dimensions
def test_distances_far_from_the_origin_lose_no_digits(d, library):
    X = library.seen(points(d, shift=1e3))
    squares = host(squared_distances(library.asarray(X), library.asarray(X)))
    expected = ((X[:, None].astype(LONG) - X[None].astype(LONG)) ** 2).sum(-1)
    assert np.max(np.abs(squares - expected)) < 20 * library.eps * np.max(expected)
    # |x|² + |y|² - 2 x·y in this dtype, as it is often written, is off by the size of the shift
    X = X.astype(library.dtype)
    naive = (X**2).sum(1)[:, None] + (X**2).sum(1) - 2 * X @ X.T
    assert np.max(np.abs(naive - expected)) > 1e3 * np.max(np.abs(squares - expected))


def of_magnitudes(kind, n=NUM, d=MANY):
    """Return points of which some lie, or lie apart, on scales far from those of others."""
    X = points(d, n)
    if kind == "one outlier":
        X[3] = 1e8
    elif kind == "half of them outliers":
        X[::2] *= 1e8
    elif kind == "two clusters":
        X[::2] += 1e6
    elif kind == "a cluster on every scale":
        X *= 10.0 ** np.linspace(-8, 8, n)[:, None]
    elif kind == "near duplicates":
        X[1::2] = X[::2] * (1 + 1e-6)
    return X


@pytest.mark.parametrize(
    "kind",
    [
        "one outlier",
        "half of them outliers",
        "two clusters",
        "a cluster on every scale",
        "near duplicates",
    ],
)
def test_each_distance_is_right_to_its_own_digits(kind, eager):
    X = eager.seen(of_magnitudes(kind))
    expected = ((X[:, None].astype(LONG) - X[None].astype(LONG)) ** 2).sum(-1)
    for rows in (slice(0, NUM), slice(4, NUM)):  # a tile with the outlier, and one without
        x = eager.asarray(X[rows])
        squares = host(squared_distances(x, eager.asarray(X))).astype(LONG)
        error = np.abs(squares - expected[rows])
        assert np.all(error <= max(4e-12, eager.eps) * (MANY + 2) * expected[rows])


def test_squares_that_overflow_are_infinite_and_spoil_no_others():
    X = points(MANY)
    X[3] = 1e200
    with np.errstate(over="ignore", invalid="ignore"):
        squares = squared_distances(X, X)
    rest = np.delete(np.arange(NUM), 3)
    assert np.all(squares[3, rest] == np.inf)
    assert squares[3, 3] == 0
    expected = squared_distances(X[rest], X[rest])
    np.testing.assert_allclose(squares[np.ix_(rest, rest)], expected, rtol=1e-9)


@pytest.mark.parametrize("case", ["rbf", "matern 1/2"])
def test_while_jax_traces_an_outlier_spoils_no_other_entry(case):
    with open_backend("jax_jit", "float64") as traced:
        X = of_magnitudes("one outlier")
        found = traced.run(PARTS[case], X, rhs(NUM), rhs(NUM, WIDTH), points(MANY, NEW, seed=1))
    K = oracle(X, X, lengthscale=2.0, **CASES[case])
    np.testing.assert_allclose(found[2], K[:, [5, 0, NUM - 1]].astype(float), atol=1e-7)


def test_without_float64_differences_keep_the_digits_of_many_features():
    with open_backend("jax_jit", "float32") as narrow:
        X = narrow.seen(points(MANY, shift=1e3))
        found = narrow.run(PARTS["rbf"], X, rhs(NUM), rhs(NUM, WIDTH), points(MANY, NEW, seed=1))
    K = oracle(X, X, lengthscale=2.0)
    assert relative_error(found[2], K[:, [5, 0, NUM - 1]]) < 20 * np.finfo("float32").eps
    assert found[2][0, 1] == found[2][NUM - 1, 1] == 1


@dimensions
@pytest.mark.parametrize("power", [-30, 30])
def test_points_and_lengthscale_in_another_unit_give_the_same_matrix(d, power, library):
    unit = 2.0**power
    X, v = points(d), library.asarray(rhs(NUM))
    for case in CASES:
        A = operator(library.asarray(X), case)
        B = li.KernelOperator(
            library.asarray(unit * X), lengthscale=2.0 * unit, chunk_size=CHUNK, **CASES[case]
        )
        np.testing.assert_array_equal(host(B @ v), host(A @ v))


@every_kernel
def test_kernel_matrices_are_positive_semidefinite_to_rounding(case):
    for d in (FEW, MANY):
        K = operator(points(d, n=60), case).columns(np.arange(60))
        w = np.linalg.eigvalsh((K + K.T) / 2)
        assert w[0] > -1e-13 * w[-1]


@dimensions
@every_kernel
def test_a_submatrix_is_read_by_itself(case, d, library):
    A = operator(library.asarray(points(d)), case)
    expected = host(A.columns([5, 0, 11]))[[5, 0, 11]]
    assert relative_error(host(A.submatrix([5, 0, 11])), expected) < 20 * library.eps


# A kernel of the caller's own


def inverse_multiquadric(x, y):
    return 1 / (1 + squared_distances(x, y))


def test_a_function_is_a_kernel(backend):
    def compute(X, V, Z):
        A = li.KernelOperator(X, inverse_multiquadric, chunk_size=CHUNK)
        return A @ V, A.columns([1, 2]), A.diagonal(), A.cross(Z, V)

    X, Z, V = points(), points(n=NEW, seed=1), rhs(NUM, WIDTH)
    found = backend.run(compute, X, V, Z)
    X, Z, V = (backend.seen(x) for x in (X, Z, V))
    K, cross = (1 / (1 + ((P[:, None] - X[None]) ** 2).sum(-1)) for P in (X, Z))
    for part, wanted in zip(found, (K @ V, K[:, [1, 2]], np.diagonal(K), cross @ V), strict=True):
        assert relative_error(part, wanted) < 20 * backend.eps


def test_a_product_evaluates_half_of_the_matrix_and_columns_only_themselves():
    evaluated = []

    def kernel(x, y):
        evaluated.append(x.shape[0] * y.shape[0])
        return inverse_multiquadric(x, y)

    A = li.KernelOperator(points(n=40), kernel, chunk_size=10)
    A @ rhs(40)
    assert sum(evaluated) == 40 * 40 / 2 + 4 * 10 * 10 / 2
    assert max(evaluated) == 10 * 10
    evaluated.clear()
    A.columns([3, 1, 7])
    assert sum(evaluated) == 3 * 40


@pytest.mark.parametrize(
    "kernel", [lambda x, y: x, lambda x, y: None, lambda x, y: np.ones((len(x), len(y)), "float32")]
)
def test_a_function_whose_blocks_do_not_fit_is_reported(kernel):
    with pytest.raises(TypeError, match=r"`kernel` must return dtype float64 and shape \(10, 10\)"):
        li.KernelOperator(points(), kernel, chunk_size=10) @ rhs(NUM)


# Memory


def peak_bytes(function):
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@dimensions
def test_a_product_never_holds_the_matrix(d):
    n = 1500
    A = li.KernelOperator(points(d, n), chunk_size=100)
    for work in (lambda: A @ rhs(n), lambda: A.cross(points(d, n), rhs(n))):
        assert peak_bytes(work) < 0.1 * 8 * n**2


@pytest.fixture
def on_disk(tmp_path):
    """Return many points in memory and the same points in a file."""
    X = np.random.default_rng(0).standard_normal((3000, 200))
    stored = np.memmap(tmp_path / "points.bin", dtype=X.dtype, mode="w+", shape=X.shape)
    stored[:] = X
    stored.flush()
    return X, np.memmap(tmp_path / "points.bin", dtype=X.dtype, mode="r", shape=X.shape)


def test_points_in_a_file_are_never_copied_whole(on_disk):
    X, stored = on_disk
    A = li.KernelOperator(stored, lengthscale=20.0, chunk_size=100)
    for work in (
        lambda: li.KernelOperator(stored, chunk_size=100),
        lambda: A.columns([5, 1000, 2999]),
        lambda: A @ X[:, 0],
        lambda: A.cross(stored, X[:, 0]),
        lambda: A.diagonal(),
    ):
        assert peak_bytes(work) < 0.4 * X.nbytes


def test_points_in_a_file_give_the_numbers_of_points_in_memory(on_disk):
    X, stored = on_disk
    A, B = (li.KernelOperator(P, lengthscale=20.0) for P in (X, stored))
    for found, expected in (
        (B @ X[:, 0], A @ X[:, 0]),
        (B.columns([7, 3]), A.columns([7, 3])),
        (B.cross(stored[:5], X[:, :2]), A.cross(X[:5], X[:, :2])),
    ):
        assert type(found) is np.ndarray
        np.testing.assert_array_equal(found, expected)


# As an operator


def test_a_kernel_operator_is_solved_and_sampled_as_it_is():
    A = li.KernelOperator(points(n=300), "matern", lengthscale=2.0, chunk_size=64)
    assert li.aslinearoperator(A) is A
    dense, b = A.columns(np.arange(300)), rhs(300)
    exact = np.linalg.solve(dense + 0.1 * np.eye(300), b)
    for solver in (li.CG(damping=0.1, rtol=1e-10), li.NystromCG(rank=40, damping=0.1, rtol=1e-10)):
        found = li.solve(A, b, solver=solver, rng=0, certify=True)
        assert relative_error(found.value, exact) < 1e-8
        assert found.error_bound >= np.linalg.norm(found.value - exact)
    approx = li.nystrom(A, 40, sampling="diagonal", rng=0)
    np.testing.assert_allclose(approx.core, dense[np.ix_(approx.indices, approx.indices)], 1e-12)


def test_library_dtype_and_device_are_kept(library):
    X, V = library.asarray(points()), library.asarray(rhs(NUM, WIDTH))
    A = li.KernelOperator(X, chunk_size=CHUNK)
    for part in (A @ V, A.columns([0]), A.diagonal(), A.cross(X, V)):
        assert type(part) is type(V)
        assert part.dtype == V.dtype
        assert device(part) == device(V)


# Bad input


@pytest.mark.parametrize(
    ("X", "settings", "error", "message"),
    [
        ([[1.0]], {}, TypeError, "`X` must be an array"),
        (np.ones((3, 2), int), {}, TypeError, "`X` must have a real floating dtype"),
        (np.ones(3), {}, ValueError, r"`X` must have shape \(n, d\).*use X\[:, None\]"),
        (np.ones((3, 0)), {}, ValueError, r"`X` must have shape \(n, d\)"),
        (np.full((3, 1), np.nan), {}, ValueError, "`X` must be finite"),
        (np.ones((3, 1)), {"kernel": "cosine"}, ValueError, "`kernel` must be one of 'rbf'"),
        (np.ones((3, 1)), {"nu": 2}, ValueError, "`nu` must be one of 0.5, 1.5, 2.5"),
        (np.ones((3, 1)), {"degree": 0}, ValueError, "`degree` must be at least 1"),
        (np.ones((3, 1)), {"degree": 1.5}, TypeError, "`degree` must be a whole number"),
        (np.ones((3, 1)), {"coef0": -1}, ValueError, "`coef0` must be finite and >= 0"),
        (np.ones((3, 1)), {"lengthscale": 0}, ValueError, "`lengthscale` must be finite and > 0"),
        (np.ones((3, 1)), {"lengthscale": "1"}, TypeError, "`lengthscale` must be a real number"),
        (np.ones((3, 1)), {"lengthscale": np.ones(2)}, ValueError, "`lengthscale` must have 1 row"),
        (np.ones((3, 1)), {"lengthscale": np.zeros(1)}, ValueError, "`lengthscale` must be > 0"),
        (
            np.ones((3, 1)),
            {"lengthscale": np.ones(1, "float32")},
            ValueError,
            r"`lengthscale` must be a number or have shape \(1,\) and dtype float64",
        ),
        (np.ones((3, 1)), {"chunk_size": 0}, ValueError, "`chunk_size` must be at least 1"),
    ],
)
def test_bad_input_is_refused(X, settings, error, message):
    with pytest.raises(error, match=message):
        li.KernelOperator(X, **settings)


@pytest.mark.parametrize(
    ("Z", "error", "message"),
    [
        (np.ones((2, 2)), ValueError, "`Z` must have 3 features of dtype float64"),
        (np.ones((2, 3), "float32"), ValueError, "`Z` must have 3 features of dtype float64"),
        (np.ones(3), ValueError, r"`Z` must have shape \(n, d\)"),
    ],
)
def test_other_points_that_do_not_fit_are_refused(Z, error, message):
    with pytest.raises(error, match=message):
        li.KernelOperator(points()).cross(Z, rhs(NUM))


def test_a_block_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="must have 24 rows"):
        li.KernelOperator(points()) @ np.ones(3)
    with pytest.raises(TypeError, match="promoted silently"):
        li.KernelOperator(points()).cross(points(), np.ones(NUM, "float32"))
