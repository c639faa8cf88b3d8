"""What may be given as an operator or an array, and what is said of what may not."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.sparse.linalg as sla

import lowrank_inverse as li
from lowrank_inverse.operators.composition import scaled_by_diagonal
from tests.problems import WIDTH, N, matrix, rhs

A = matrix("polynomial") + 0.1 * np.eye(N)
SOLVERS = [
    li.CG(rtol=1e-10),
    li.NystromCG(rank=5, rtol=1e-10),
    li.NystromCG(rank=5, sampling="gaussian", rtol=1e-10),
    li.NystromCG(rank=5, sampling="greedy", rtol=1e-10),
    li.Nystrom(rank=N, damping=0.1),
    li.Nystrom(rank=N, damping=0.1, memory="chunked", chunk_size=3),
    li.Nystrom(rank=N, damping=0.1, memory="streamed", chunk_size=3),
    li.Nystrom(rank=N, damping=0.1, sampling="gaussian", chunk_size=3),
    li.Neumann(num_terms=20),
    li.Exact(),
    li.Identity(),
]


class Workspace:
    """Functions that write each product into the same array."""

    def __init__(self, matrix):
        n = len(matrix)
        self.matrix, self.held = matrix, {}
        self.operator = li.FunctionOperator(
            self.times, n, matmat=self.times, columns=self.columns, diagonal=self.diagonal
        )
        self.by_vectors = li.FunctionOperator(self.times, n)

    def _into(self, values):
        out = self.held.setdefault(values.shape, np.empty_like(values))
        out[...] = values
        return out

    def times(self, v):
        return self._into(self.matrix @ v)

    def columns(self, indices):
        return self._into(self.matrix[:, indices])

    def diagonal(self):
        return self._into(np.diagonal(self.matrix))


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_a_function_may_write_its_products_into_one_array(solver):
    for width in (None, WIDTH):
        b = rhs(width=width)
        wanted = li.solve(A, b, solver=solver, rng=0).value
        found = li.solve(Workspace(A).operator, b, solver=solver, rng=0).value
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-9)


def test_a_function_of_vectors_may_write_its_products_into_one_array():
    operator = Workspace(A).by_vectors
    np.testing.assert_allclose(operator @ np.eye(N), A, rtol=1e-14)
    np.testing.assert_allclose(operator.columns([3, 1]), A[:, [3, 1]], rtol=1e-14)
    first = operator @ rhs()
    operator @ rhs(seed=1)
    np.testing.assert_array_equal(first, A @ rhs())


def test_a_kernel_function_may_write_its_tiles_into_one_array():
    X = np.random.default_rng(0).standard_normal((20, 3))
    held = {}

    def kernel(x, y):
        out = held.setdefault((len(x), len(y)), np.empty((len(x), len(y))))
        out[...] = np.exp(-((x[:, None] - y[None]) ** 2).sum(-1))
        return out

    K = li.KernelOperator(X, kernel, chunk_size=4)
    expected = np.exp(-((X[:, None] - X[None]) ** 2).sum(-1))
    np.testing.assert_allclose(K.columns([0, 7]), expected[:, [0, 7]], rtol=1e-14)
    np.testing.assert_allclose(K @ np.eye(20), expected, rtol=1e-14)
    np.testing.assert_allclose(K.diagonal(), 1)


# Pickles


KEPT = {
    "dense": li.aslinearoperator(A),
    "sparse": li.aslinearoperator(sp.csr_array(A)),
    "SciPy's": li.aslinearoperator(sla.aslinearoperator(A)),
    "shifted": li.shifted(A, 0.1),
    "sum": li.aslinearoperator(A) + li.DiagonalOperator(N, rhs() ** 2),
    "scaled": scaled_by_diagonal(li.aslinearoperator(A), rhs()),
    "kernel": li.KernelOperator(A),
    "approximation": li.nystrom(A, 5, rng=0),
    "woodbury": li.nystrom(A, 5, rng=0).inverse(0.1),
    "preconditioner": li.NystromCG(rank=5).prepare(A).preconditioner,
    "streamed": li.streamed_inverse(A, [0, 5], damping=0.1),
    **{f"{solver}": solver.prepare(A) for solver in SOLVERS},
}


@pytest.mark.parametrize("name", KEPT)
def test_operators_and_inverses_are_pickled_and_copied(name):
    operator = KEPT[name]
    for other in (pickle.loads(pickle.dumps(operator)), copy.deepcopy(operator)):
        np.testing.assert_array_equal(other @ rhs(), operator @ rhs())
        if hasattr(operator, "solve"):
            found, wanted = other.solve(rhs(width=WIDTH)), operator.solve(rhs(width=WIDTH))
            np.testing.assert_array_equal(found.value, wanted.value)
            np.testing.assert_array_equal(found.reason, wanted.reason)


def test_inverses_go_to_other_processes():
    joblib = pytest.importorskip("joblib")
    inverse = li.NystromCG(rank=5).prepare(A)
    calls = [joblib.delayed(inverse.__matmul__)(rhs(seed=seed)) for seed in range(2)]
    for seed, found in enumerate(joblib.Parallel(n_jobs=2)(calls)):
        np.testing.assert_allclose(found, inverse @ rhs(seed=seed), rtol=1e-12)


# Sparse matrices, and operators without a dtype


def test_the_entries_of_a_sparse_matrix_can_be_read():
    S = li.aslinearoperator(sp.coo_array(A))
    np.testing.assert_array_equal(S.columns([4, 2]), A[:, [4, 2]])
    np.testing.assert_array_equal(S.submatrix(np.array([4, 2])), A[np.ix_([4, 2], [4, 2])])
    np.testing.assert_array_equal(S.diagonal(), np.diagonal(A))
    solution = li.solve(sp.csr_array(A), rhs())
    assert solution.converged
    assert solution.method == f"Exact: n = {N} is small and the entries can be read"


def test_a_large_sparse_matrix_is_solved_by_products():
    n = 1200
    S = sp.diags_array([-1.0, 2.5, -1.0], offsets=[-1, 0, 1], shape=(n, n)).tocsr()
    solution = li.solve(S, np.ones(n))
    assert solution.converged
    assert solution.method == "CG: A is sparse, so that its products are cheap"


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
@pytest.mark.parametrize("layout", ["to_sparse", "to_sparse_csr"])
def test_a_sparse_tensor_is_an_operator(layout):
    torch = pytest.importorskip("torch")
    S = getattr(torch.tensor(A), layout)()
    wanted = np.linalg.solve(A, rhs(width=WIDTH))
    for solver in (None, li.NystromCG(rank=5)):
        solution = li.solve(S, torch.tensor(rhs(width=WIDTH)), solver=solver, rtol=1e-10, rng=0)
        np.testing.assert_allclose(solution.value.numpy(), wanted, rtol=1e-6)


def test_a_dtype_that_scipy_found_with_whole_numbers_is_none():
    operator = sla.LinearOperator((5, 5), matvec=lambda v: 2 * v)
    assert operator.dtype.kind == "i"
    np.testing.assert_allclose(li.solve(operator, np.ones(5), solver=li.CG()).value, 0.5)


# What is refused


class Table:
    """What pandas and polars have in common."""

    shape, __matmul__ = (N, N), None

    def to_numpy(self):
        return A


REFUSED = {
    "matrix": (lambda: np.matrix(A), r"`A` cannot be numpy.matrix.* numpy.asarray"),
    "table": (Table, r"`A` cannot be .*Table. Use its .to_numpy\(\)"),
    "masked": (lambda: np.ma.array(A), r"`A` cannot be numpy.*MaskedArray.*\.filled\(value\)"),
    "bytes": (lambda: A.astype(A.dtype.newbyteorder()), r"newbyteorder\('='\)"),
    "half": (lambda: A.astype(np.float16), r"Use .astype\(numpy.float64\)"),
    "complex": (lambda: A + 0j, r"Split a Hermitian system"),
    "whole numbers": (lambda: A.astype(int), r"Convert it to float32 or float64"),
    "sparse whole numbers": (lambda: sp.csr_array(A.astype(int)), r"Use A.astype\(float\)"),
}


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_matrix_is_refused_with_its_conversion(kind):
    make, message = REFUSED[kind]
    with pytest.raises(TypeError, match=message):
        li.solve(make(), rhs())


def test_a_masked_right_hand_side_is_refused():
    b = np.ma.array(rhs(), mask=np.arange(N) == 3)
    with pytest.raises(TypeError, match=r"`b` cannot be numpy.*MaskedArray"):
        li.solve(A, b, solver=li.CG())


def test_sparse_tensors_and_those_of_another_library_are_refused():
    torch = pytest.importorskip("torch")
    T = torch.tensor(A)
    with pytest.raises(TypeError, match=r"`b` cannot be .* It is sparse: use .to_dense\(\)"):
        li.cg(T, torch.tensor(rhs()).to_sparse())
    with pytest.raises(TypeError, match=r"A multiplies arrays of torch and b is one of numpy"):
        li.cg(T, rhs())


@pytest.mark.parametrize("name", ["diagonal", "columns", "matmat"])
def test_an_array_in_the_place_of_a_function_is_refused(name):
    with pytest.raises(TypeError, match=rf"`{name}` must be a function; got numpy.ndarray"):
        li.FunctionOperator(lambda v: v, N, **{name: np.ones(N)})


def test_a_path_without_dampings_is_refused():
    with pytest.raises(ValueError, match="`dampings` must hold at least one positive number"):
        li.nystrom(A, 4).solve_path(rhs(), [])


def test_lengthscales_may_come_as_a_list():
    X = np.random.default_rng(0).standard_normal((9, 2))
    found = li.KernelOperator(X, lengthscale=[1.0, 2.0]).columns([3])
    wanted = li.KernelOperator(X, lengthscale=np.array([1.0, 2.0])).columns([3])
    np.testing.assert_array_equal(found, wanted)
