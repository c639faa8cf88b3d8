"""Operators: dense, sparse, or known by their products alone."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import scipy.sparse as sp
from array_api_compat import device
from scipy.sparse.linalg import LinearOperator as ScipyOperator
from scipy.sparse.linalg import aslinearoperator as scipy_operator

import lowrank_inverse as li
from lowrank_inverse.low_rank.preconditioner import NystromPreconditioner
from tests.conftest import host
from tests.oracles import damped
from tests.problems import WIDTH, CountingOperator, N, conditioned, matrix, rhs

A64 = matrix("polynomial")
INDICES = [5, 0, 11]
SPARSE = [
    sp.csr_array,
    sp.csc_array,
    sp.coo_array,
    sp.csr_matrix,
    sp.csc_matrix,
    sp.dia_matrix,
]


class Bare:
    """The least that is an operator."""

    def __init__(self, A):
        self.A, self.shape, self.dtype, self.like = A, A.shape, A.dtype, A[:0, 0]

    def __matmul__(self, block):
        return self.A @ block


class Complete(Bare):
    """An operator with its own columns and diagonal."""

    def columns(self, indices):
        return self.A[:, indices]

    def diagonal(self):
        return np.diagonal(self.A)


def tridiagonal(dtype="float64"):
    return sp.diags_array([-1.0, 2.5, -1.0], offsets=[-1, 0, 1], shape=(N, N)).astype(dtype)


def product(A, block):
    return li.aslinearoperator(A) @ block


def chosen_columns(A):
    return li.columns(A, INDICES)


def columns_in_chunks(A):
    return li.columns(A, INDICES, chunk_size=2)


def shifted_parts(A, damping, block):
    S = li.shifted(A, damping)
    return S @ block, S.columns(INDICES), S.diagonal()


def agree(x, y, eps):
    np.testing.assert_allclose(np.asarray(x, dtype=np.float64), y, rtol=0, atol=50 * eps)


# What qualifies


def test_a_dense_array_multiplies_vectors_and_blocks_as_its_matrix_does(backend):
    for block in (rhs(), rhs(width=WIDTH)):
        expected = backend.seen(A64) @ backend.seen(block)
        agree(backend.run(product, A64, block), expected, backend.eps)


def test_columns_of_a_dense_array_are_read_without_rounding(backend):
    expected = backend.seen(A64)[:, INDICES]
    np.testing.assert_array_equal(backend.run(chosen_columns, A64), expected)
    np.testing.assert_array_equal(backend.run(columns_in_chunks, A64), expected)


def test_the_diagonal_of_a_dense_array_is_read_without_rounding(backend):
    np.testing.assert_array_equal(backend.run(li.diagonal, A64), np.diagonal(backend.seen(A64)))


@pytest.mark.parametrize("form", SPARSE, ids=lambda form: form.__name__)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_sparse_form_gives_the_products_columns_and_diagonal_of_its_matrix(form, dtype):
    dense = tridiagonal(dtype).toarray()
    A = li.aslinearoperator(form(tridiagonal(dtype)))
    assert A.dtype == dtype
    for block in (rhs().astype(dtype), rhs(width=WIDTH).astype(dtype)):
        found = A @ block
        assert type(found) is np.ndarray and found.dtype == dtype
        agree(found, dense @ block, np.finfo(dtype).eps)
    columns = A.columns(INDICES)
    assert type(columns) is np.ndarray
    np.testing.assert_array_equal(columns, dense[:, INDICES])
    np.testing.assert_array_equal(A.diagonal(), np.diagonal(dense))


def test_a_sparse_system_is_solved_like_its_dense_twin():
    b = rhs()
    sparse, dense = li.cg(tridiagonal().tocsr(), b), li.cg(tridiagonal().toarray(), b)
    agree(sparse.value, dense.value, 1e-15)
    assert sparse.num_steps == dense.num_steps


def test_a_scipy_linear_operator_gives_columns_by_products_with_unit_vectors():
    A = li.aslinearoperator(scipy_operator(A64))
    agree(A @ rhs(width=WIDTH), A64 @ rhs(width=WIDTH), 1e-16)
    agree(A.columns(INDICES), A64[:, INDICES], 1e-16)
    agree(li.cg(A, rhs(), damping=0.1).value, li.cg(A64, rhs(), damping=0.1).value, 1e-13)


def test_a_scipy_linear_operator_with_a_matvec_alone_multiplies_blocks():
    A = ScipyOperator((N, N), matvec=lambda v: A64 @ v, dtype=np.float64)
    agree(li.aslinearoperator(A) @ rhs(width=WIDTH), A64 @ rhs(width=WIDTH), 1e-16)


def test_shape_dtype_and_product_are_enough_to_qualify(eager):
    A = li.aslinearoperator(Bare(eager.asarray(A64)))
    block = eager.asarray(rhs(width=WIDTH))
    agree(host(A @ block), eager.seen(A64) @ eager.seen(rhs(width=WIDTH)), eager.eps)
    agree(host(A.columns(INDICES)), eager.seen(A64)[:, INDICES], eager.eps)


def test_an_operator_with_columns_and_diagonal_of_its_own_is_taken_as_it_is():
    A = Complete(A64)
    assert li.aslinearoperator(A) is A


def test_wrapping_twice_is_wrapping_once():
    A = li.aslinearoperator(A64)
    assert li.aslinearoperator(A) is A


def test_products_keep_library_dtype_and_device(library):
    A, block = library.asarray(A64), library.asarray(rhs())
    function = li.FunctionOperator(lambda v: A @ v, N, like=block)
    for operator in (li.aslinearoperator(A), function, li.shifted(A, 0.5)):
        found = operator @ block
        assert type(found) is type(block)
        assert found.dtype == block.dtype
        assert device(found) == device(block)


def test_inverses_and_approximations_are_operators_too(library):
    A, b = library.asarray(A64), library.asarray(rhs())
    approx = li.nystrom(A, 8, rng=0)
    for operator in (
        approx,
        approx.inverse(0.1),
        approx.inverse(0.1, chunk_size=3),
        li.streamed_inverse(A, INDICES, damping=0.1),
    ):
        wrapped = li.aslinearoperator(operator)
        np.testing.assert_array_equal(host(wrapped @ b), host(operator @ b))
        assert tuple(wrapped.columns([3]).shape) == (N, 1)


def test_prepared_solvers_are_operators_too(eager):
    b = eager.asarray(rhs())
    prepared = li.Identity(scale=0.5).prepare(eager.asarray(A64))
    wrapped = li.aslinearoperator(prepared)
    np.testing.assert_array_equal(host(wrapped @ b), host(prepared @ b))
    np.testing.assert_array_equal(host(wrapped.columns([3]))[:, 0], 0.5 * np.eye(N)[3])


# Functions


def test_a_function_of_vectors_is_called_once_for_each_column_of_a_block(eager):
    A, calls = eager.asarray(A64), []

    def matvec(v):
        calls.append(tuple(v.shape))
        return A @ v

    operator = li.FunctionOperator(matvec, N, like=A[0, :])
    found = operator @ eager.asarray(rhs(width=WIDTH))
    assert calls == [(N,)] * WIDTH
    agree(host(found), eager.seen(A64) @ eager.seen(rhs(width=WIDTH)), eager.eps)


def test_a_function_of_blocks_is_called_once_for_a_block():
    calls = []

    def matmat(block):
        calls.append(block.shape)
        return A64 @ block

    operator = li.FunctionOperator(lambda v: A64 @ v, N, matmat=matmat)
    agree(operator @ rhs(width=WIDTH), A64 @ rhs(width=WIDTH), 1e-16)
    assert calls == [(N, WIDTH)]


def test_given_functions_for_columns_and_diagonal_are_used_in_place_of_products():
    def no_products(v):
        raise AssertionError("a product was taken")

    operator = li.FunctionOperator(
        no_products, N, columns=lambda K: A64[:, K], diagonal=lambda: np.diagonal(A64)
    )
    np.testing.assert_array_equal(li.columns(operator, INDICES), A64[:, INDICES])
    np.testing.assert_array_equal(li.diagonal(operator), np.diagonal(A64))


@pytest.mark.parametrize("shape", [(), (1,), (N,), (N, WIDTH)])
def test_the_library_and_dtype_of_products_are_those_of_like_in_any_shape(eager, shape):
    operator = li.FunctionOperator(lambda v: 2 * v, N, like=eager.asarray(np.ones(shape)))
    assert str(operator.dtype).endswith(eager.dtype)
    np.testing.assert_array_equal(host(operator @ eager.asarray(np.ones(N))), 2 * np.ones(N))


def test_a_torch_dtype_says_that_products_are_tensors():
    torch = pytest.importorskip("torch")
    operator = li.FunctionOperator(lambda v: 2 * v, 3, dtype=torch.float32)
    assert torch.equal(operator @ torch.ones(3), 2 * torch.ones(3))
    assert torch.equal(operator.columns([1]), 2 * torch.eye(3)[:, 1:2])


def test_a_dtype_given_beside_like_wins():
    operator = li.FunctionOperator(lambda v: v, 3, like=np.ones(3), dtype=np.float32)
    assert operator.dtype == np.float32


# Shifted


def test_a_shifted_operator_adds_the_damping_to_products_columns_and_diagonal(backend):
    block = rhs(width=WIDTH)
    expected = damped(backend.seen(A64), float(backend.seen(0.3)))
    found = backend.run(shifted_parts, A64, 0.3, block)
    agree(found[0], expected @ backend.seen(block), backend.eps)
    agree(found[1], expected[:, INDICES], backend.eps)
    agree(found[2], np.diagonal(expected), backend.eps)


@pytest.mark.parametrize("kind", [float, np.float64, np.float32])
def test_a_damping_that_is_a_numpy_scalar_keeps_library_and_dtype(library, kind):
    A, b, damping = library.asarray(A64), library.asarray(rhs()), kind(0.25)
    expected = damped(library.seen(A64), 0.25) @ library.seen(rhs())
    agree(host(li.shifted(A, damping) @ b), expected, library.eps)
    assert (li.shifted(A, damping) @ b).dtype == b.dtype
    x = li.cg(A, b, damping=damping).value
    assert x.dtype == b.dtype
    agree(host(x), host(li.cg(A, b, damping=0.25).value), 0)
    inverse = li.woodbury_inverse(li.nystrom(A, 8, rng=0), damping=damping)
    assert (inverse @ b).dtype == b.dtype


# Columns in chunks


@pytest.mark.parametrize(("chunk_size", "widths"), [(None, [5]), (1, [1] * 5), (2, [2, 2, 1])])
def test_columns_are_asked_for_chunk_size_at_a_time(chunk_size, widths):
    A = CountingOperator(A64)
    found = li.columns(A, [4, 3, 9, 0, 7], chunk_size=chunk_size)
    assert A.widths == widths
    agree(found, A64[:, [4, 3, 9, 0, 7]], 1e-16)


def test_indices_may_come_as_an_array_of_the_library_a_range_or_a_tuple(eager):
    A = eager.asarray(A64)
    for indices in (eager.asarray(np.arange(3)), range(3), (0, 1, 2), np.arange(3)):
        np.testing.assert_array_equal(host(li.columns(A, indices)), eager.seen(A64)[:, :3])


def test_inputs_are_never_written_to():
    A, b = A64.copy(), rhs(width=WIDTH)
    A.flags.writeable = b.flags.writeable = False
    solvers = (
        li.Nystrom(rank=4, damping=0.1, refine=2),
        li.Nystrom(rank=4, damping=0.1, memory="streamed"),
        li.NystromCG(rank=4, damping=0.1),
        li.Neumann(damping=0.1),
        li.Exact(damping=0.1),
    )
    for solver in solvers:
        li.solve(A, b, solver=solver, rng=0, certify=True)
    np.testing.assert_array_equal(A, A64)
    np.testing.assert_array_equal(b, rhs(width=WIDTH))


# Symmetry


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_a_matrix_that_is_not_symmetric_is_refused_at_every_scale(eager, scale):
    A = A64.copy()
    A[0, 5] += 0.01
    with pytest.raises(ValueError, match=r"`A` must be symmetric; A and A.T differ by"):
        li.aslinearoperator(eager.asarray(A * scale))


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_asymmetry_of_the_size_of_rounding_is_let_pass(eager, scale):
    A = conditioned(10) * (1 + 4 * eager.eps * np.triu(np.ones((N, N))))
    assert tuple(li.aslinearoperator(eager.asarray(A * scale)).shape) == (N, N)


def test_a_sparse_matrix_that_is_not_symmetric_is_refused():
    A = tridiagonal().tolil()
    A[0, 1] = 3.0
    with pytest.raises(ValueError, match=r"`A` must be symmetric; A - A\.T is not zero"):
        li.aslinearoperator(A.tocsr())


# Bad input


@pytest.mark.parametrize("shape", [(3, 4), (3,), (0, 0), (2, 2, 2)])
def test_what_is_not_square_is_refused(eager, shape):
    with pytest.raises(ValueError, match=r"`A` must be square, of shape \(n, n\) with n >= 1"):
        li.aslinearoperator(eager.asarray(np.ones(shape)))


def test_a_sparse_matrix_that_is_not_square_is_refused():
    with pytest.raises(ValueError, match="`A` must be square"):
        li.aslinearoperator(sp.csr_array(np.ones((2, 3))))


@pytest.mark.parametrize("kind", [int, complex, bool])
def test_integers_complex_numbers_and_booleans_are_refused(eager, kind):
    with pytest.raises(TypeError, match=r"`A` must have a real floating dtype"):
        li.aslinearoperator(eager.asarray(np.eye(3).astype(kind)))


@pytest.mark.parametrize("kind", [int, complex])
def test_sparse_integers_and_complex_numbers_are_refused(kind):
    with pytest.raises(TypeError, match=r"`A` must have a real floating dtype"):
        li.aslinearoperator(sp.csr_array(np.eye(3).astype(kind)))


def test_a_linear_operator_of_complex_numbers_is_refused():
    with pytest.raises(TypeError, match="real floating dtype"):
        li.aslinearoperator(scipy_operator(np.eye(3).astype(complex)))


def test_a_linear_operator_of_integers_multiplies_what_it_is_given():
    A = li.aslinearoperator(scipy_operator(2 * np.eye(3).astype(int)))
    np.testing.assert_array_equal(A @ np.ones(3), 2.0)


@pytest.mark.parametrize("kind", [int, complex])
def test_a_function_of_integers_or_complex_numbers_is_refused(kind):
    with pytest.raises(TypeError, match="real floating dtype"):
        li.FunctionOperator(lambda v: v, 3, dtype=kind)


@pytest.mark.parametrize("A", [[[1.0]], "A", None, 1.0, lambda v: v])
def test_what_has_no_shape_and_product_is_refused_with_a_remedy(A):
    with pytest.raises(
        TypeError, match=r"`A` must be an array or have \.shape and @.*FunctionOperator"
    ):
        li.aslinearoperator(A)


def test_a_matvec_that_cannot_be_called_is_refused():
    with pytest.raises(TypeError, match="`matvec` must be callable"):
        li.FunctionOperator(A64, N)


@pytest.mark.parametrize(
    ("n", "error", "message"),
    [
        (0, ValueError, "`n` must be at least 1; got 0"),
        (2.0, TypeError, "`n` must be a whole number"),
        (True, TypeError, "`n` must be a whole number"),
    ],
)
def test_a_size_that_is_no_positive_whole_number_is_refused(n, error, message):
    with pytest.raises(error, match=message):
        li.FunctionOperator(lambda v: v, n)


@pytest.mark.parametrize(
    "matvec",
    [lambda v: v[1:], lambda v: v[:, None], lambda v: v.astype("float32"), lambda v: list(v)],
    ids=["rows", "shape", "dtype", "list"],
)
def test_a_matvec_that_returns_something_else_is_reported(matvec):
    with pytest.raises(TypeError, match=r"`matvec` must return dtype float64 and shape \(3,\)"):
        li.FunctionOperator(matvec, 3) @ np.ones(3)


def test_a_matvec_that_returns_another_library_is_reported():
    torch = pytest.importorskip("torch")
    operator = li.FunctionOperator(lambda v: torch.ones(3), 3)
    with pytest.raises(TypeError, match="`matvec` must return dtype float64"):
        operator @ np.ones(3)


@pytest.mark.parametrize("shape", [(), (N + 1,), (N + 1, 2), (N, 2, 2)])
def test_a_block_that_does_not_fit_is_refused(eager, shape):
    A = li.aslinearoperator(eager.asarray(A64))
    with pytest.raises(ValueError, match=rf"`block` must have {N} rows"):
        A @ eager.asarray(np.ones(shape))


def test_a_block_of_another_dtype_is_refused(eager):
    A = li.aslinearoperator(eager.asarray(A64))
    if eager.name == "jax" and eager.is_narrow:
        other = eager.asarray(rhs()).astype("float16")
    else:
        other = eager.make(rhs().astype({"float32": "float64", "float64": "float32"}[eager.dtype]))
    with pytest.raises(TypeError, match="nothing is promoted silently"):
        A @ other


@pytest.mark.parametrize("kind", [int, complex])
def test_a_block_of_integers_or_complex_numbers_is_refused(eager, kind):
    A = li.aslinearoperator(eager.asarray(A64))
    with pytest.raises(TypeError, match="`block` must have a real floating dtype"):
        A @ eager.asarray(np.ones(N).astype(kind))


def test_a_block_of_another_library_is_refused():
    torch, jnp = pytest.importorskip("torch"), pytest.importorskip("jax.numpy")
    A32, b = A64.astype("float32"), np.ones(N, dtype="float32")
    blocks = {"numpy": b, "torch": torch.tensor(b), "jax": jnp.asarray(b)}
    operators = {"numpy": A32, "torch": torch.tensor(A32), "jax": jnp.asarray(A32)}
    for library, operator in operators.items():
        for other, block in blocks.items():
            if other != library:
                with pytest.raises(TypeError, match="must come from one library"):
                    li.aslinearoperator(operator) @ block


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([0, N], ValueError, rf"`indices` must lie in 0 … {N - 1}; got values from 0 to {N}"),
        ([-1, 2], ValueError, "`indices` must lie in 0"),
        ([3, 3], ValueError, "`indices` must be distinct; some are repeated"),
        ([0.0, 1.0], TypeError, "sequence of integers; got dtype float64"),
        ([True, False], TypeError, "sequence of integers; got dtype bool"),
        ([], TypeError, "`indices` must be a non-empty one-dimensional"),
        ([[0, 1]], TypeError, r"got dtype int64 and shape \(1, 2\)"),
        (3, TypeError, "one-dimensional"),
    ],
)
def test_bad_indices_are_refused(indices, error, message):
    for A in (A64, Bare(A64), tridiagonal()):
        with pytest.raises(error, match=message):
            li.columns(A, indices)


@pytest.mark.parametrize(
    ("chunk_size", "error"), [(0, ValueError), (-1, ValueError), (1.5, TypeError), ("2", TypeError)]
)
def test_a_chunk_size_that_is_no_positive_whole_number_is_refused(chunk_size, error):
    with pytest.raises(error, match="`chunk_size` must be"):
        li.columns(A64, INDICES, chunk_size=chunk_size)


def test_a_diagonal_that_nobody_supplies_is_an_error_with_remedies():
    for A in (Bare(A64), scipy_operator(A64), li.FunctionOperator(lambda v: v, N)):
        with pytest.raises(TypeError, match=r"has no diagonal\. .*`indices`, or pass `diagonal=`"):
            li.diagonal(A)


@pytest.mark.parametrize("damping", [-1.0, float("nan"), float("inf")])
def test_a_shift_that_is_negative_or_not_finite_is_refused(damping):
    with pytest.raises(ValueError, match="`damping` must be finite and >= 0"):
        li.shifted(A64, damping)


@pytest.mark.parametrize("damping", ["0.1", None, True, 1j, np.ones(2)])
def test_a_shift_that_is_no_number_is_refused(damping):
    with pytest.raises(TypeError, match="`damping` must be a real number"):
        li.shifted(A64, damping)


def test_traced_indices_give_the_columns_they_name(jax_backend):
    import jax

    A = jax_backend.asarray(A64)
    found = jax.jit(chosen_by)(A, jax_backend.asarray(np.array(INDICES)))
    np.testing.assert_array_equal(host(found), jax_backend.seen(A64)[:, INDICES])


def chosen_by(A, indices):
    return li.columns(A, indices)


@pytest.mark.parametrize("indices", [np.array([0.0, 1.0]), np.array([[0, 1]])])
def test_traced_indices_that_are_no_vector_of_integers_are_refused(jax_backend, indices):
    import jax

    with pytest.raises(TypeError, match=r"`indices` must be integers of shape \(k,\)"):
        jax.jit(chosen_by)(jax_backend.asarray(A64), jax_backend.asarray(indices))


# Sums, multiples and shifts


def combined(library):
    """Operators made of others, each with the dense matrix that it is."""
    dense, other = matrix("polynomial"), matrix("slightly")
    A = li.aslinearoperator(library.asarray(dense))
    B = li.FunctionOperator(
        lambda v: library.asarray(other) @ v,
        N,
        like=A.like,
        diagonal=lambda: library.asarray(np.diagonal(other).copy()),
    )
    d = np.linspace(0.5, 1.5, N)
    eye = np.eye(N)
    identity = li.DiagonalOperator(N, like=A.like)
    return {
        "A + B": (A + B, dense + other),
        "A - B": (A - B, dense - other),
        "A - array": (A - library.asarray(other), dense - other),
        "A + array": (A + library.asarray(other), dense + other),
        "c * A": (0.3 * A, 0.3 * dense),
        "A * c": (A * 0.3, 0.3 * dense),
        "NumPy's c * A": (np.float64(0.3) * A, 0.3 * dense),
        "A * 0-d c": (A * library.asarray(np.array(0.25)), 0.25 * dense),
        "-A": (-A, -dense),
        "A.T": (A.T, dense),
        "A + c * I": (A + 0.3 * identity, dense + 0.3 * eye),
        "c * I + A": (0.3 * identity + A, dense + 0.3 * eye),
        "A + diag(d)": (A + li.DiagonalOperator(N, library.asarray(d)), dense + np.diag(d)),
        "A + c * I + diag(d)": (
            A + 0.3 * identity + li.DiagonalOperator(N, library.asarray(d)),
            dense + 0.3 * eye + np.diag(d),
        ),
        "d + e": (
            li.DiagonalOperator(N, library.asarray(d)) + 0.3 * identity,
            np.diag(d) + 0.3 * eye,
        ),
        "c * diag(d)": (np.float64(2) * li.DiagonalOperator(N, library.asarray(d)), 2 * np.diag(d)),
        "diag(d) + array": (
            li.DiagonalOperator(N, library.asarray(d)) + library.asarray(other),
            np.diag(d) + other,
        ),
        "2 (A + c * I)": (2 * (A + 0.3 * identity), 2 * dense + 0.6 * eye),
        "A + c * I + B": (A + 0.3 * identity + B, dense + 0.3 * eye + other),
        "B - (A + c * I)": (B - (A + 0.3 * identity), other - dense - 0.3 * eye),
        "diag(d)": (li.DiagonalOperator(N, library.asarray(d)), np.diag(d)),
        "2 (A + B) - A": (2 * (A + B) - A, dense + 2 * other),
    }


def test_operators_combine_to_what_their_matrices_do(library):
    for name, (operator, dense) in combined(library).items():
        rounding = 100 * library.eps
        for block in (rhs(), rhs(width=WIDTH)):
            found = host(operator @ library.asarray(block))
            assert found.dtype == library.dtype, name
            assert np.max(np.abs(found - dense @ block)) < rounding * np.max(np.abs(block)), name
        columns = host(operator.columns([4, 3, 9]))
        assert np.max(np.abs(columns - dense[:, [4, 3, 9]])) < rounding, name
        assert np.max(np.abs(host(operator.diagonal()) - np.diagonal(dense))) < rounding, name


def test_entries_of_a_combination_can_be_read_where_those_of_its_parts_can(library):
    indices = np.array([4, 3, 9])
    for name, (operator, dense) in combined(library).items():
        assert hasattr(operator, "submatrix") == ("B" not in name), name
        if hasattr(operator, "submatrix"):
            found = host(operator.submatrix(indices)) - dense[np.ix_(indices, indices)]
            assert np.max(np.abs(found)) < 100 * library.eps, name


@pytest.mark.parametrize("shift", [0.3, np.linspace(0.2, 0.4, N)])
def test_a_diagonal_does_not_hide_the_entries_from_the_choice_of_columns(shift):
    A = matrix("exponential")
    system = li.aslinearoperator(A) + li.DiagonalOperator(N, shift)
    prepared = li.NystromCG(rank=8).prepare(system, rng=0)
    drawn = li.NystromCG(rank=8, sampling="rpcholesky").prepare(system, rng=0)
    np.testing.assert_array_equal(prepared @ rhs(), drawn @ rhs())


@pytest.mark.parametrize("shift", [0.3, np.linspace(0.2, 0.4, N)])
def test_a_diagonal_that_was_added_stays_out_of_what_is_approximated(shift):
    A, b = matrix("polynomial"), rhs()
    system = li.aslinearoperator(A) + li.DiagonalOperator(N, shift, like=A)
    full = li.solve(system, b, solver=li.Nystrom(rank=N))
    expected = np.linalg.solve(A + np.diag(np.broadcast_to(shift, N)), b)
    np.testing.assert_allclose(full.value, expected, rtol=1e-8)
    if np.ndim(shift) == 0:
        few = li.solve(system, b, solver=li.Nystrom(rank=5))
        damped = li.solve(A, b, solver=li.Nystrom(rank=5, damping=shift))
        np.testing.assert_allclose(few.value, damped.value, rtol=1e-12)


@pytest.mark.parametrize("combine", [lambda A, D: A + (D + A), lambda A, D: 2 * (A + 0.5 * D)])
def test_a_diagonal_stays_out_however_the_sum_is_written(combine):
    A, b = li.aslinearoperator(matrix("polynomial")), rhs()
    few = li.solve(combine(A, 0.3 * li.DiagonalOperator(N)), b, solver=li.Nystrom(rank=5))
    damped = li.solve(2 * A, b, solver=li.Nystrom(rank=5, damping=0.3))
    np.testing.assert_allclose(few.value, damped.value, rtol=1e-12)


def test_an_array_may_stand_on_the_left(eager):
    if eager.name == "array_api_strict":
        pytest.skip("array_api_strict refuses what it does not know on its right")
    A, other, c = eager.asarray(A64), eager.asarray(matrix("linear")), eager.asarray(np.array(0.25))
    operator, block = li.aslinearoperator(A), eager.asarray(rhs(width=WIDTH))
    for total, dense in (
        (other + operator, matrix("linear") + A64),
        (other - operator, matrix("linear") - A64),
        (c * operator, 0.25 * A64),
    ):
        agree(host(total @ block), dense @ rhs(width=WIDTH), 4 * eager.eps)


def test_a_nystrom_approximation_of_a_sum_is_that_of_the_dense_sum(library):
    dense = matrix("polynomial") + matrix("linear") + 0.3 * np.eye(N)
    A, B = (library.asarray(matrix(name)) for name in ("polynomial", "linear"))
    combined = li.aslinearoperator(A) + B + 0.3 * li.DiagonalOperator(N, like=A)
    block = rhs(width=WIDTH)
    found = li.nystrom(combined, indices=range(N)) @ library.asarray(block)
    assert np.max(np.abs(host(found) - dense @ block)) < 1e4 * library.eps
    few = li.nystrom(combined, indices=INDICES) @ library.asarray(block)
    same = li.nystrom(library.asarray(dense), indices=INDICES) @ library.asarray(block)
    assert np.max(np.abs(host(few) - host(same))) < 1e4 * library.eps


@pytest.mark.parametrize("solver", [None, li.CG(), li.NystromCG(rank=5), li.Exact()])
def test_a_diagonal_may_be_subtracted(solver):
    A, b = matrix("polynomial") + 2 * np.eye(N), rhs()
    system = li.aslinearoperator(A) - 0.5 * li.DiagonalOperator(N)
    found = li.solve(system, b, solver=solver, rtol=1e-12)
    np.testing.assert_allclose(found.value, np.linalg.solve(A - 0.5 * np.eye(N), b), rtol=1e-8)


@pytest.mark.parametrize("form", [*SPARSE, scipy_operator])
def test_what_scipy_makes_may_be_added(form):
    A, other = li.aslinearoperator(A64), form(tridiagonal())
    expected = A64 + tridiagonal().toarray()
    for total in (A + other, other + A):
        agree(total @ rhs(width=WIDTH), expected @ rhs(width=WIDTH), 1e-15)
        agree(total.columns(INDICES), expected[:, INDICES], 1e-15)


def test_an_approximation_or_an_inverse_may_be_added():
    A, b = li.aslinearoperator(A64), rhs()
    for other in (li.nystrom(A64, 8), li.Exact(damping=0.5).prepare(A64)):
        dense = A64 + other @ np.eye(N)
        agree((A + other) @ b, dense @ b, 1e-14)
        agree((A + other).columns(INDICES), dense[:, INDICES], 1e-14)
        with pytest.raises(TypeError, match="SumOperator has no diagonal"):
            (A + other).diagonal()


@pytest.mark.parametrize("make", [li.NystromCG, li.Nystrom])
def test_numpy_scalars_keep_the_dtype_of_a_diagonal_ridge(make):
    d = np.linspace(0.5, 1.5, N, dtype="float32")
    system = li.aslinearoperator(A64.astype("float32")) + li.DiagonalOperator(N, d)
    solver = make(rank=5, damping=np.float64(0.1))
    assert li.solve(system, rhs().astype("float32"), solver=solver).value.dtype == "float32"


def combined_products(A, c, block):
    operator = li.aslinearoperator(A)
    total = operator * c + li.DiagonalOperator(N, like=A) * c - operator
    return total @ block, total.columns(INDICES), total.diagonal()


def test_operators_combine_under_transformations(backend):
    block, c = rhs(width=WIDTH), np.array(0.25)
    expected = -0.75 * backend.seen(A64) + 0.25 * np.eye(N)
    found = backend.run(combined_products, A64, c, block)
    agree(found[0], expected @ backend.seen(block), backend.eps)
    agree(found[1], expected[:, INDICES], backend.eps)
    agree(found[2], np.diagonal(expected), backend.eps)


def test_what_cannot_be_added_or_multiplied_is_refused():
    A = li.aslinearoperator(np.eye(3))
    with pytest.raises(ValueError, match=r"must have the same shape; got \(3, 3\) and \(2, 2\)"):
        A + np.eye(2)
    for wrong in (lambda: A + li.DiagonalOperator(2), lambda: li.DiagonalOperator(2) + A):
        with pytest.raises(ValueError, match="must have the same shape"):
            wrong()
    with pytest.raises(ValueError, match="`B` must be symmetric"):
        A + np.triu(np.ones((3, 3)))


@pytest.mark.parametrize("A", [li.aslinearoperator(np.eye(3)), li.DiagonalOperator(3)])
@pytest.mark.parametrize("factor", [np.ones(3), np.eye(3), True, np.bool_(True), 1j, "c", None])
def test_what_is_no_real_number_is_refused_as_a_factor(A, factor):
    for refused in (lambda: A * factor, lambda: factor * A, lambda: A * A):
        with pytest.raises(TypeError):
            refused()


def test_a_number_is_refused_as_a_summand():
    A = li.aslinearoperator(np.eye(3))
    for refused in (lambda: A + 1.0, lambda: 1.0 + A, lambda: A - 1.0, lambda: 1.0 - A):
        with pytest.raises(TypeError):
            refused()


def test_summands_of_two_dtypes_or_libraries_are_refused():
    torch = pytest.importorskip("torch")
    A = li.aslinearoperator(np.eye(3))
    for other in (
        np.eye(3, dtype="float32"),
        li.DiagonalOperator(3, np.ones(3, dtype="float32")),
        torch.eye(3, dtype=torch.float64),
        li.DiagonalOperator(3, torch.ones(3, dtype=torch.float64)),
    ):
        with pytest.raises(TypeError, match="the same library and dtype; got numpy float64 and"):
            A + other


@pytest.mark.parametrize(
    ("entries", "kind", "message"),
    [
        (np.ones(2), ValueError, "`entries` must have 3 rows"),
        (np.eye(3), ValueError, r"`entries` must be a number or have shape \(3,\)"),
        (np.arange(3), TypeError, "`entries` must have a real floating dtype"),
        ([1.0, 2.0, 3.0], TypeError, "`entries` must be an array"),
        (np.ones(3, dtype="float32"), TypeError, "dtype float64 and `entries` float32"),
    ],
)
def test_a_diagonal_that_does_not_fit_is_refused(entries, kind, message):
    with pytest.raises(kind, match=message):
        li.DiagonalOperator(3, entries, like=np.ones(1))


# Print


def test_operators_and_inverses_print_kind_size_and_cost():
    A = np.diag([4.0, 1.0, 0.0])
    approx = li.nystrom(A, indices=[0, 1])
    for operator, printed in (
        (li.aslinearoperator(A), "DenseOperator(n=3, dtype=float64)"),
        (li.FunctionOperator(lambda v: v, 3), "FunctionOperator(n=3, dtype=float64)"),
        (
            li.KernelOperator(np.ones((3, 2))),
            "KernelOperator(n=3, dtype=float64, kernel=rbf, num_features=2)",
        ),
        (
            approx.inverse(0.5),
            "WoodburyInverse(n=3, dtype=float64, rank=2, damping=0.5, num_products=2)",
        ),
        (
            approx.inverse(0.5, chunk_size=1),
            "ChunkedWoodburyInverse(n=3, dtype=float64, rank=2, damping=0.5, num_products=2, "
            "chunk_size=1)",
        ),
        (
            NystromPreconditioner(approx, 0.5),
            "NystromPreconditioner(n=3, dtype=float64, rank=2, num_products=2)",
        ),
        (2 * li.aslinearoperator(A), "ScaledOperator(n=3, dtype=float64, factor=2)"),
        (li.shifted(A, 0.5), "ShiftedOperator(n=3, dtype=float64, shift=0.5)"),
        (li.DiagonalOperator(3), "DiagonalOperator(n=3, dtype=float64, entries=1.0)"),
        (li.DiagonalOperator(3, np.ones(3)), "DiagonalOperator(n=3, dtype=float64)"),
        (li.aslinearoperator(A) + A, "SumOperator(n=3, dtype=float64)"),
        (
            li.KernelOperator(np.ones((3, 2)), partial(np.inner)),
            "KernelOperator(n=3, dtype=float64, kernel=partial, num_features=2)",
        ),
        (
            li.streamed_inverse(A, [0, 1], damping=0.5),
            "RecomputedInverse(n=3, dtype=float64, rank=2, num_products=4)",
        ),
        (
            li.Exact().prepare(A),
            "PreparedInverse(n=3, dtype=float64, rank=2, num_products=3, negative_curvature=False)",
        ),
        (li.CG().prepare(A), "PreparedInverse(n=3, dtype=float64, num_products=0)"),
    ):
        assert repr(operator) == printed


def test_values_unknown_while_jax_traces_are_printed_as_traced(jax_backend):
    import jax

    printed = []

    def function(A):
        approx = li.nystrom(A, indices=[0, 1])
        for operator in (approx.inverse(A[0, 0]), A[0, 0] * li.aslinearoperator(A)):
            printed.append(repr(operator))
        return A

    jax.jit(function)(jax_backend.asarray(np.diag([4.0, 1.0, 0.0])))
    assert printed == [
        f"WoodburyInverse(n=3, dtype={jax_backend.dtype}, rank=traced, damping=traced, "
        "num_products=2)",
        f"ScaledOperator(n=3, dtype={jax_backend.dtype}, factor=traced)",
    ]
