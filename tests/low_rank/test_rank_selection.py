"""A rank that grows until it is enough."""

from __future__ import annotations

import numpy as np
import pytest

import lowrank_inverse as li
from lowrank_inverse.low_rank.column_sampling import DRAWN, SAMPLINGS
from lowrank_inverse.low_rank.preconditioner import NystromPreconditioner
from lowrank_inverse.low_rank.rank_selection import norm_missed, steps_left
from tests.conftest import host
from tests.oracles import damped_solve, norm, operator_norm, relative_error
from tests.problems import CountingOperator, exactly_psd, symmetric

M = 200
EXPONENTIAL = symmetric(np.exp(-np.arange(M) / 6.0))
POLYNOMIAL = symmetric(1.0 / np.arange(1, M + 1) ** 2)
B = np.random.default_rng(3).standard_normal((M, 2))
DAMPINGS = (1e-1, 1e-2, 1e-3, 1e-4)
every_sampling = pytest.mark.parametrize("sampling", SAMPLINGS)


def error(approx, A):
    return operator_norm(A - approx @ np.eye(len(A)))


@every_sampling
@pytest.mark.parametrize("damping", [1e-1, 1e-2, 1e-4])
def test_with_a_damping_what_is_left_is_of_its_size(sampling, damping):
    approx = li.nystrom(EXPONENTIAL, "auto", sampling=sampling, damping=damping, rng=0)
    assert approx.stopped in ("residual_trace", "effective_dimension")
    assert error(approx, EXPONENTIAL) < 10 * damping
    if approx.stopped == "residual_trace":
        assert error(approx, EXPONENTIAL) <= damping * (1 + 1e-9)
    else:
        assert approx.sufficient_rank(damping) <= approx.num_columns


@every_sampling
def test_the_rank_grows_as_the_damping_falls(sampling):
    ranks = [
        li.nystrom(POLYNOMIAL, "auto", sampling=sampling, damping=damping, rng=0).num_columns
        for damping in (1e-1, 1e-3, 1e-5)
    ]
    assert ranks[0] < ranks[1] < ranks[2]


@every_sampling
@pytest.mark.parametrize("rtol", [1e-1, 1e-3])
def test_without_a_damping_the_residual_trace_is_a_fraction_of_the_trace(sampling, rtol):
    approx = li.nystrom(EXPONENTIAL, "auto", sampling=sampling, rtol=rtol, rng=0)
    assert approx.stopped == "residual_trace"
    residual = np.trace(EXPONENTIAL - approx @ np.eye(M))
    assert residual <= rtol * np.trace(EXPONENTIAL) * (1 + 1e-9)
    assert approx.residual_trace == pytest.approx(residual, rel=1e-6)


@every_sampling
@pytest.mark.parametrize("rtol", [1e-1, 1e-4])
def test_with_a_right_hand_side_the_certificate_proves_the_error(sampling, rtol):
    damping = 1e-2
    approx = li.nystrom(
        EXPONENTIAL, "auto", sampling=sampling, damping=damping, b=B, rtol=rtol, rng=0
    )
    assert approx.stopped == "certificate"
    x = approx.inverse(damping) @ B
    exact = damped_solve(EXPONENTIAL, damping, B)
    assert np.all(norm(x - exact) <= rtol * norm(x))


@every_sampling
def test_what_is_exhausted_is_not_asked_for_more(sampling):
    A = exactly_psd(np.random.default_rng(0), 40, 5)
    approx = li.nystrom(A, "auto", sampling=sampling, rtol=0, rng=0)
    assert approx.stopped in ("exhausted", "residual_trace")
    assert relative_error(approx @ np.eye(40), A) < 1e-9
    if sampling in ("greedy", "rpcholesky"):
        assert approx.num_columns == 5


@every_sampling
def test_a_largest_rank_is_kept_to_and_reported(sampling):
    approx = li.nystrom(POLYNOMIAL, "auto", sampling=sampling, damping=1e-9, max_rank=20, rng=0)
    assert approx.stopped == "max_rank"
    assert approx.num_columns == 20
    assert "stopped='max_rank'" in repr(approx)
    assert "more columns would help" in approx.summary(1e-9)


@every_sampling
def test_a_largest_rank_beyond_the_matrix_is_its_size(sampling):
    approx = li.nystrom(np.eye(5), "auto", sampling=sampling, rtol=0, max_rank=50, rng=0)
    # The Krylov space of any vector has one dimension here.
    assert approx.num_columns == (1 if sampling == "krylov" else 5)
    assert approx.stopped in ("exhausted", "residual_trace")


@pytest.mark.parametrize("sampling", ["uniform", "gaussian"])
@pytest.mark.parametrize("with_b", [False, True])
def test_no_column_is_read_twice_and_every_product_is_counted(sampling, with_b):
    A = CountingOperator(EXPONENTIAL)
    arguments = {"b": B, "rtol": 1e-3} if with_b else {}
    approx = li.nystrom(A, "auto", sampling=sampling, damping=1e-3, rng=0, **arguments)
    assert approx.num_columns > 16  # so that it has grown
    assert approx.num_products == A.num_products
    if not with_b:
        assert A.num_products == approx.num_columns


@pytest.mark.parametrize("sampling", ["greedy", "rpcholesky"])
def test_pivots_stop_at_the_goal_and_not_at_the_next_power_of_two(sampling):
    A = li.FunctionOperator(lambda v: EXPONENTIAL @ v, M, diagonal=lambda: np.diagonal(EXPONENTIAL))
    approx = li.nystrom(A, "auto", sampling=sampling, rtol=1e-2, rng=0)
    assert approx.stopped == "residual_trace"
    assert approx.num_products == approx.num_columns
    fewer = li.pivoted_cholesky(A, approx.num_columns - 1, method=sampling, rng=0)
    assert fewer.residual_trace > 1e-2 * np.trace(EXPONENTIAL) >= approx.residual_trace


@every_sampling
def test_the_growing_rank_is_the_same_on_every_library(library, sampling):
    A = exactly_psd(np.random.default_rng(1), 60, 40)
    arguments = {"sampling": sampling, "damping": float(0.25 * np.trace(A) / 60), "rng": 2}
    expected = li.nystrom(A, "auto", **arguments)
    found = li.nystrom(library.asarray(A), "auto", **arguments)
    assert found.stopped == expected.stopped
    assert found.num_columns == expected.num_columns
    assert relative_error(host(found.eigenvalues), expected.eigenvalues) < 1e4 * library.eps


@every_sampling
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("scale", [1e20, 1e-20])
def test_the_scale_does_not_choose_the_rank(sampling, dtype, scale):
    for arguments in ({"damping": 1e-3}, {"rtol": 1e-2}, {"damping": 1e-2, "b": B[:, 0]}):
        expected = li.nystrom(
            EXPONENTIAL.astype(dtype),
            "auto",
            sampling=sampling,
            rng=0,
            **{k: v.astype(dtype) if k == "b" else v for k, v in arguments.items()},
        )
        scaled = {
            "damping": lambda v: scale * v,
            "rtol": lambda v: v,
            "b": lambda v: (1e-15 * v).astype(dtype),
        }
        found = li.nystrom(
            (scale * EXPONENTIAL).astype(dtype),
            "auto",
            sampling=sampling,
            rng=0,
            **{name: scaled[name](value) for name, value in arguments.items()},
        )
        assert (found.stopped, found.num_columns) == (expected.stopped, expected.num_columns)


# The settings


@pytest.mark.parametrize("kind", [li.Nystrom, li.NystromCG])
@every_sampling
def test_the_settings_grow_the_rank_and_say_why_it_ended(kind, sampling):
    solver = kind(rank="auto", damping=1e-3, sampling=sampling)
    inverse = solver.prepare(EXPONENTIAL, rng=0)
    approx = inverse.preconditioner.approx
    assert approx.stopped in ("residual_trace", "effective_dimension", "steps")
    assert inverse.rank == approx.rank
    exact = damped_solve(EXPONENTIAL, 1e-3, B)
    tolerance = 1e-3 if kind is li.NystromCG else 1.0
    assert relative_error(inverse.solve(B).value, exact) < tolerance
    capped = kind(rank="auto", damping=1e-3, sampling=sampling, max_rank=8)
    assert capped.prepare(EXPONENTIAL, rng=0).preconditioner.approx.stopped == "max_rank"


def test_the_direct_inverse_asks_for_more_columns_than_the_preconditioner():
    ranks = np.array(
        [
            [
                kind(rank="auto", damping=damping).prepare(POLYNOMIAL, rng=0).rank
                for damping in DAMPINGS
            ]
            for kind in (li.NystromCG, li.Nystrom)
        ]
    )
    assert np.all(ranks[0] <= ranks[1])
    assert np.sum(ranks[0] < ranks[1]) >= 2


def test_the_enough_of_the_theorem_is_enough():
    """2 ceil(1.5 d) + 1 columns of a Gaussian sketch: a condition number of 28 in the mean."""
    for name, A in (("exponential", EXPONENTIAL), ("polynomial", POLYNOMIAL)):
        for damping in (1e-2, 1e-4):
            conditions = []
            for seed in range(5):
                approx = li.nystrom(A, "auto", damping=damping, sampling="gaussian", rng=seed)
                P = NystromPreconditioner(approx, damping) @ np.eye(M)
                preconditioned = np.linalg.eigvals(P @ (A + damping * np.eye(M))).real
                conditions.append(np.max(preconditioned) / np.min(preconditioned))
            assert np.mean(conditions) < 28, name


def test_no_more_columns_are_taken_than_pay_for_themselves_in_steps():
    X = np.random.default_rng(0).uniform(-1, 1, (600, 2))
    y = np.sin(3 * X[:, 0]) * X[:, 1]
    K = li.KernelOperator(X, "matern", nu=2.5, lengthscale=0.5)
    by_products = CountingOperator(K.columns(np.arange(600)))
    dampings = (1e-3, 1e-1, 10.0)
    for A, sampling, chosen in (
        (K, "rpcholesky", dampings[:1]),  # beyond that, its columns are much cheaper than products
        (by_products.A, "rpcholesky", dampings),
        (by_products, "gaussian", dampings),
    ):
        for damping in chosen:
            shared = {"damping": damping, "rtol": 1e-8}
            plain = li.solve(A, y, solver=li.CG(**shared))
            auto = li.NystromCG(rank="auto", sampling=sampling, **shared)
            solution = li.solve(A, y, solver=auto, rng=0)
            assert solution.converged
            assert solution.num_products <= plain.num_products + 32, (sampling, damping)
    stopped = auto.prepare(A, rng=0).approximation.stopped
    assert stopped in ("steps", "effective_dimension")


@pytest.mark.parametrize("rank", [40, 80])
def test_the_steps_left_are_no_fewer_than_those_that_are_taken(rank):
    A = symmetric(np.arange(1, M + 1) ** -2.0)
    approx = li.nystrom(A, rank, sampling="gaussian", rng=0)
    P = NystromPreconditioner(approx, 1e-6)
    taken = li.cg(A, B[:, 0], damping=1e-6, preconditioner=P, rtol=1e-8).num_steps
    missed = norm_missed(li.aslinearoperator(A), approx)
    true = np.linalg.norm(A - approx @ np.eye(M), 2)
    assert true / 2 < missed <= (1 + 1e-10) * true
    assert taken <= steps_left(true, 1e-6, 1e-8)


@pytest.mark.slow
def test_columns_are_taken_where_the_least_eigenvalue_found_promises_too_few_steps():
    n = 3000  # a kernel whose eigenvalues fall late and fast, after Chen, Epperly, Tropp, Webber
    t = np.arange(n)
    points = np.exp(-1e-3 * n * (t / n) ** 1.5)[:, None]
    points = points * np.stack([np.cos(t / 200), np.sin(t / 200)], axis=1)
    A = li.KernelOperator(points, lengthscale=0.02).columns(t)
    shared = {"sampling": "rpcholesky", "damping": 1e-7 * n, "rtol": 1e-8, "max_steps": 1000}
    b = np.random.default_rng(1).standard_normal(n)
    auto, few = (
        li.solve(A, b, solver=li.NystromCG(rank=rank, **shared), rng=0).num_steps
        for rank in ("auto", 256)
    )
    assert auto < 0.1 * few


def test_nystrom_cg_grows_without_a_damping():
    A = symmetric(np.logspace(0, -6, M))
    solution = li.solve(A, B, solver=li.NystromCG(rank="auto", sampling="rpcholesky"), rng=0)
    assert np.all(solution.converged)
    plain = li.solve(A, B, solver=li.CG())
    assert np.max(solution.num_steps) < 0.5 * np.max(plain.num_steps)


# Bad input


def test_without_anything_to_aim_at_it_is_refused():
    with pytest.raises(ValueError, match="needs a target: a positive `damping`"):
        li.nystrom(CountingOperator(POLYNOMIAL), "auto", rng=0)
    with pytest.raises(ValueError, match="`b` needs a `damping`"):
        li.nystrom(POLYNOMIAL, "auto", b=B, rng=0)


@pytest.mark.parametrize("name", ["damping", "b", "rtol", "max_rank"])
def test_what_a_fixed_rank_has_no_use_for_is_refused(name):
    with pytest.raises(ValueError, match=rf"`{name}` are for rank='auto' only; got"):
        li.nystrom(POLYNOMIAL, 5, sampling="uniform", **{name: B if name == "b" else 1})


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rank": "all"}, ValueError, "`rank` must be a whole number or 'auto'; got 'all'"),
        ({"rank": "auto", "damping": -1.0}, ValueError, "`damping` must be finite and > 0"),
        ({"rank": "auto", "rtol": -1.0}, ValueError, "`rtol` must be finite and >= 0"),
        ({"rank": "auto", "max_rank": 0}, ValueError, "`max_rank` must be at least 1"),
        ({"rank": "auto", "indices": [1]}, ValueError, "pass exactly one of `rank`"),
        ({"rank": "auto", "damping": 1.0, "b": np.ones(3)}, ValueError, "`b` must have 200 rows"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        li.nystrom(POLYNOMIAL, **arguments)


@pytest.mark.parametrize("kind", [li.Nystrom, li.NystromCG])
def test_settings_out_of_range_are_refused_when_they_are_made(kind):
    for arguments, message in (
        ({"rank": "all"}, "`rank` must be a whole number or 'auto'"),
        ({"max_rank": 0}, "`max_rank` must be at least 1"),
        ({"diagonal_products": 0}, "`diagonal_products` must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            kind(**arguments)
    with pytest.raises(TypeError, match="`rank` must be a whole number or 'auto'; got None"):
        kind(rank=None)


@pytest.mark.parametrize("memory", ["chunked", "streamed"])
def test_memory_without_columns_is_refused_where_columns_are_looked_at(memory):
    for arguments in ({"rank": "auto"}, *({"sampling": s} for s in SAMPLINGS if s not in DRAWN)):
        with pytest.raises(ValueError, match=r"stores its columns; got .*Use memory='stored'"):
            li.Nystrom(memory=memory, **arguments)


def test_a_traced_matrix_is_refused_with_a_remedy(jax_backend):
    import jax

    def grow(A):
        return li.nystrom(A, "auto", damping=0.1, rng=0).eigenvalues

    with pytest.raises(TypeError, match=r"unknown while jax traces\. Compute the rank"):
        jax.jit(grow)(jax_backend.asarray(np.eye(3)))
