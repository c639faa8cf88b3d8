"""What conjugate gradients and the Neumann series have in common."""

from __future__ import annotations

import numpy as np
import pytest
from array_api_compat import device

import lowrank_inverse as li
from lowrank_inverse import Reason
from tests.conftest import host
from tests.iterative.claims import check_claims
from tests.oracles import LONG, relative_error
from tests.problems import WIDTH, CountingOperator, conditioned, rhs


def by_cg(A, b, damping):
    return li.cg(A, b, damping=damping)


def by_neumann(A, b, damping):
    return li.neumann(A, b, damping=damping)


def by_long_neumann(A, b, damping):
    return li.neumann(A, b, damping=damping, num_terms=500)


each_method = pytest.mark.parametrize("run", [by_cg, by_neumann], ids=["cg", "neumann"])


@each_method
@pytest.mark.parametrize("width", [None, WIDTH])
def test_solutions_keep_library_dtype_and_device(library, run, width):
    b = library.asarray(rhs(width=width))
    solution = run(library.asarray(conditioned(10)), b, 0.1)
    assert type(solution.value) is type(b)
    assert device(solution.value) == device(b)
    assert solution.value.dtype == solution.residual_norm.dtype == b.dtype
    assert tuple(solution.value.shape) == tuple(b.shape)
    for part in (solution.residual_norm, solution.num_steps, solution.converged, solution.reason):
        assert tuple(part.shape) == tuple(b.shape)[1:]
    assert isinstance(solution.num_products, int)


@each_method
def test_zero_columns_of_a_block_are_done_at_once_and_disturb_no_other(backend, run):
    A, B = conditioned(10), rhs(width=WIDTH)
    B[:, 1] = 0
    solution = backend.run(run, A, B, 0.0)
    check_claims(backend.seen(A), backend.seen(B), solution)
    assert solution.reason[1] == Reason.CONVERGED
    assert solution.num_steps[1] == 0 and np.all(solution.num_steps[[0, 2]] > 0)
    assert not np.any(solution.value[:, 1])


@pytest.mark.parametrize("c", [1.0, 2.0**66, 2.0**-66])
@pytest.mark.parametrize("s", [1.0, 2.0**66, 2.0**-66])
@each_method
def test_scaling_by_powers_of_two_changes_not_one_bit_of_the_answer(backend, run, c, s):
    if backend.dtype == "float32" and abs(np.log2(s / c)) > 100:
        pytest.skip("the answer itself is beyond float32")
    A, b = conditioned(1e3), rhs(width=WIDTH)
    expected = backend.run(run, A, b, 0.01)
    found = backend.run(run, c * A, s * b, c * 0.01)
    narrow = expected.value.dtype.type
    np.testing.assert_array_equal(found.num_steps, expected.num_steps)
    np.testing.assert_array_equal(found.reason, expected.reason)
    np.testing.assert_array_equal(found.value, expected.value * narrow(s / c))
    np.testing.assert_array_equal(found.residual_norm, expected.residual_norm * narrow(s))


@pytest.mark.parametrize("c", [1e20, 1e-20])
@pytest.mark.parametrize("s", [1.0, 1e20, 1e-20])
@each_method
def test_scaling_by_powers_of_ten_changes_no_more_than_rounding_does(backend, run, c, s):
    if backend.dtype == "float32" and not 1e-30 < s / c < 1e30:
        pytest.skip("the answer itself is beyond float32")
    A, b = conditioned(10), rhs()
    expected = backend.run(run, A, b, 0.01)
    found = backend.run(run, c * A, s * b, c * 0.01)
    assert found.num_steps == expected.num_steps
    assert found.reason == expected.reason
    rescaled = np.asarray(found.value, dtype=LONG) * LONG(c) / LONG(s)
    assert relative_error(rescaled, expected.value) < 100 * backend.eps


class Failing:
    """A dense operator whose products hold `bad` after some good ones."""

    def __init__(self, A, bad, good):
        self.A, self.bad, self.good = A, bad, good
        self.shape, self.dtype, self.like = tuple(A.shape), A.dtype, A[:0, 0]

    def __matmul__(self, block):
        self.good -= 1
        product = self.A @ block
        return product if self.good >= 0 else product + self.bad


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("good", [0, 1, 4])
@pytest.mark.parametrize("width", [None, WIDTH])
@pytest.mark.parametrize(
    "run", [li.cg, lambda A, b: li.neumann(A, b, step_size=0.5)], ids=["cg", "neumann"]
)
def test_a_product_that_is_not_finite_is_a_reason_and_the_value_stays_finite(
    library, run, bad, good, width
):
    A, b = library.asarray(conditioned(100)), library.asarray(rhs(width=width))
    solution = host(run(Failing(A, bad, good), b))
    assert np.all(solution.reason == Reason.NONFINITE)
    assert not np.any(solution.converged)
    assert np.all(np.isfinite(solution.value))
    assert np.all(solution.num_steps <= good)


@each_method
def test_a_matrix_with_nan_is_a_flag_and_no_crash(backend, run):
    A = conditioned(10)
    A[3, 3] = np.nan
    solution = backend.run(run, A, rhs(width=WIDTH), 0.1)
    assert np.all(solution.reason == Reason.NONFINITE)
    assert not np.any(solution.converged)
    assert np.all(np.isfinite(solution.value))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("run", [by_cg, by_long_neumann], ids=["cg", "neumann"])
def test_a_traced_right_hand_side_that_is_not_finite_is_a_flag(jax_backend, run, bad):
    import jax

    B = rhs(width=WIDTH)
    B[4, 1] = bad
    solution = host(jax.jit(run)(*map(jax_backend.asarray, (conditioned(5), B, 0.0))))
    assert solution.reason.tolist() == [Reason.CONVERGED, Reason.NONFINITE, Reason.CONVERGED]
    assert solution.converged.tolist() == [True, False, True]
    assert np.all(np.isfinite(solution.value))


@pytest.mark.parametrize("width", [None, 1, WIDTH])
@pytest.mark.parametrize("condition", [5, 1e4, 1e7])
@pytest.mark.parametrize(
    "options",
    [{"rtol": 1e-5}, {"rtol": 1e-30}, {"x0": True}, {"num_terms": 7}, {"step_size": 0.5}],
    ids=lambda options: next(iter(options)),
)
def test_num_products_is_what_the_operator_counted(width, condition, options):
    for dtype in ("float32", "float64"):
        A, b = CountingOperator(conditioned(condition).astype(dtype)), rhs(width=width)
        b = b.astype(dtype)
        options = {**options, "x0": b} if "x0" in options else options
        method = li.cg if "rtol" in options or "x0" in options else li.neumann
        solution = method(A, b, damping=1e-6, **options)
        assert solution.num_products == A.num_products
        alone = width or 1 if method is li.neumann else 1  # a block has fewer directions in the end
        assert solution.num_products >= np.max(solution.num_steps) * alone


# Bad input.

BAD_B = {
    "no dimension": (np.ones(()), ValueError, r"`b` must have 3 rows to match .*\(3, 3\)"),
    "rows": (np.ones(4), ValueError, "`b` must have 3 rows"),
    "rows of a block": (np.ones((4, 2)), ValueError, "`b` must have 3 rows"),
    "dimensions": (np.ones((3, 2, 2)), ValueError, "`b` must have 3 rows"),
    "NaN": (np.array([1.0, np.nan, 1.0]), ValueError, "`b` must be finite; it holds NaN or Inf"),
    "Inf": (np.array([1.0, -np.inf, 1.0]), ValueError, "`b` must be finite"),
    "integers": (np.ones(3, int), TypeError, "`b` must have a real floating dtype"),
    "complex": (np.ones(3, complex), TypeError, "`b` must have a real floating dtype"),
    "truth values": (np.ones(3, bool), TypeError, "`b` must have a real floating dtype"),
}


@each_method
@pytest.mark.parametrize(("b", "error", "message"), BAD_B.values(), ids=BAD_B)
def test_a_right_hand_side_that_does_not_fit_is_refused(eager, run, b, error, message):
    with pytest.raises(error, match=message):
        run(eager.asarray(np.eye(3)), eager.asarray(b), 0.0)


@each_method
def test_what_is_no_array_or_of_another_dtype_is_refused(run):
    A, b = np.eye(3), np.ones(3)
    with pytest.raises(TypeError, match="`b` must be an array of NumPy, CuPy, PyTorch or JAX"):
        run(A, [1.0, 1.0, 1.0], 0.0)
    with pytest.raises(
        TypeError, match=r"`b` has dtype float32 and `A` has float64.* promoted sil"
    ):
        run(A, b.astype("float32"), 0.0)
    with pytest.raises(TypeError, match=r"`b` has dtype float64 and `A` has float32"):
        run(A.astype("float32"), b, 0.0)


@each_method
def test_mixed_libraries_are_refused(run):
    torch, jnp = pytest.importorskip("torch"), pytest.importorskip("jax.numpy")
    A, b = np.eye(3, dtype="float32"), np.ones(3, dtype="float32")
    for matrix, vector in (
        (A, torch.tensor(b)),
        (torch.tensor(A), b),
        (A, jnp.asarray(b)),
        (jnp.asarray(A), b),
        (jnp.asarray(A), torch.tensor(b)),
    ):
        with pytest.raises(TypeError, match=r"must come from one library|nothing is promoted"):
            run(matrix, vector, 0.0)


@each_method
@pytest.mark.parametrize("damping", [-1.0, np.nan, np.inf])
def test_a_negative_damping_is_refused(run, damping):
    with pytest.raises(ValueError, match="`damping` must be finite and >= 0"):
        run(np.eye(3), np.ones(3), damping)
