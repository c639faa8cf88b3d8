"""Which columns are drawn."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scipy.stats import chi2

import lowrank_inverse as li
from lowrank_inverse.low_rank.column_sampling import DRAWN, sample_columns
from tests.problems import CountingOperator, N, matrix

WEIGHTS = np.array([0.0, 4.0, 1.0, 0.5, 0.0, 2.0, 0.25, 0.25])
EXPECTED = {
    "uniform": np.full(8, 1 / 8),
    "diagonal": WEIGHTS / WEIGHTS.sum(),
    "diagonal_squared": WEIGHTS**2 / (WEIGHTS**2).sum(),
}
DRAWS = 4000
IMPROBABLE = 1e-6


def chi_square_is_plausible(counts, probabilities):
    possible = probabilities > 0
    assert not np.any(counts[~possible])
    expected = counts.sum() * probabilities[possible]
    statistic = np.sum((counts[possible] - expected) ** 2 / expected)
    return statistic < chi2.ppf(1 - IMPROBABLE, np.sum(possible) - 1)


@pytest.mark.parametrize("sampling", DRAWN)
def test_the_first_column_is_drawn_in_proportion_to_its_weight(sampling):
    A, rng = np.diag(WEIGHTS), np.random.default_rng(0)
    first = [sample_columns(A, 1, sampling=sampling, rng=rng)[0] for _ in range(DRAWS)]
    counts = np.bincount(first, minlength=8)
    assert chi_square_is_plausible(counts, EXPECTED[sampling])
    others = [EXPECTED[other] for other in DRAWN if other != sampling]
    assert not any(chi_square_is_plausible(counts + 1e-9, other + 1e-12) for other in others)


@pytest.mark.parametrize("sampling", ["diagonal", "diagonal_squared"])
def test_the_second_column_is_drawn_in_proportion_to_the_weights_that_are_left(sampling):
    A, rng = np.diag(WEIGHTS), np.random.default_rng(1)
    pairs = np.array([sample_columns(A, 2, sampling=sampling, rng=rng) for _ in range(DRAWS)])
    p = EXPECTED[sampling]
    joint = p[:, None] * p / (1 - p[:, None])
    np.fill_diagonal(joint, 0)
    np.testing.assert_allclose(joint.sum(), 1)
    # The rarest pairs are counted together, for the statistic to have its distribution.
    rare = joint < 5 / DRAWS
    counts = np.zeros((8, 8))
    np.add.at(counts, (pairs[:, 0], pairs[:, 1]), 1)
    assert chi_square_is_plausible(
        np.append(counts[~rare], counts[rare].sum()), np.append(joint[~rare], joint[rare].sum())
    )


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_uniform_sampling_takes_every_column_equally_often(rank):
    rng = np.random.default_rng(2)
    counts = np.zeros(8)
    for _ in range(DRAWS):
        counts[sample_columns(np.eye(8), rank, rng=rng)] += 1
    share = rank / 8
    deviation = np.abs(counts / DRAWS - share) / np.sqrt(share * (1 - share) / DRAWS)
    assert np.max(deviation) < 5


@pytest.mark.parametrize("sampling", DRAWN)
def test_columns_are_distinct_and_all_of_them_at_full_rank(sampling):
    A = np.diag(WEIGHTS)
    for seed in range(20):
        for rank in (1, 5, 8):
            drawn = sample_columns(A, rank, sampling=sampling, rng=seed)
            assert drawn.dtype == np.int64 and drawn.shape == (rank,)
            assert np.unique(drawn).size == rank
        assert sorted(drawn) == list(range(8))


@pytest.mark.parametrize("sampling", ["diagonal", "diagonal_squared"])
def test_columns_of_zero_weight_come_last(sampling):
    zero = set(np.flatnonzero(WEIGHTS == 0).tolist())
    for seed in range(50):
        drawn = sample_columns(np.diag(WEIGHTS), 8, sampling=sampling, rng=seed).tolist()
        assert set(drawn[6:]) == zero
        assert not zero & set(drawn[:6])


@pytest.mark.parametrize("sampling", ["diagonal", "diagonal_squared"])
def test_columns_of_zero_weight_are_drawn_uniformly_among_themselves(sampling):
    rng = np.random.default_rng(3)
    A = np.zeros((8, 8))
    first = [sample_columns(A, 3, sampling=sampling, rng=rng)[0] for _ in range(DRAWS)]
    assert chi_square_is_plausible(np.bincount(first, minlength=8), np.full(8, 1 / 8))


@pytest.mark.parametrize("sampling", ["diagonal", "diagonal_squared"])
def test_the_sign_and_the_scale_of_the_diagonal_do_not_matter(sampling):
    expected = sample_columns(np.diag(WEIGHTS), 5, sampling=sampling, rng=0)
    for factor in (-1.0, 2.0**-66, 2.0**66, 2.0**600, 2.0**-600):
        found = sample_columns(np.diag(WEIGHTS * factor), 5, sampling=sampling, rng=0)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("sampling", ["diagonal", "diagonal_squared"])
@pytest.mark.parametrize("small", [1e-150, 1e-155, 1e-300, 1e-310])
def test_a_diagonal_over_hundreds_of_orders_of_magnitude_is_no_obstacle(sampling, small):
    drawn = sample_columns(np.diag([small, 1.0, small]), 3, sampling=sampling, rng=0)
    assert drawn[0] == 1
    assert sorted(drawn) == [0, 1, 2]


@pytest.mark.parametrize("sampling", DRAWN)
def test_one_seed_gives_the_same_columns_on_every_backend(eager, sampling):
    diagonal = np.round(16 * np.diagonal(matrix("polynomial"))) / 16  # exact in float32
    expected = sample_columns(np.diag(diagonal), 8, sampling=sampling, rng=5)
    found = sample_columns(eager.asarray(np.diag(diagonal)), 8, sampling=sampling, rng=5)
    np.testing.assert_array_equal(found, expected)
    assert type(found) is np.ndarray


@pytest.mark.parametrize("sampling", DRAWN)
def test_a_seed_repeats_itself_and_another_seed_differs(sampling):
    A = np.diag(np.arange(1.0, 101))
    first, again = (sample_columns(A, 20, sampling=sampling, rng=7) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert set(first) != set(sample_columns(A, 20, sampling=sampling, rng=8))


@pytest.mark.parametrize("sampling", DRAWN)
def test_a_generator_is_used_and_moved_on(sampling):
    A, rng = np.diag(np.arange(1.0, 101)), np.random.default_rng(7)
    first = sample_columns(A, 20, sampling=sampling, rng=rng)
    np.testing.assert_array_equal(first, sample_columns(A, 20, sampling=sampling, rng=7))
    assert set(first) != set(sample_columns(A, 20, sampling=sampling, rng=rng))


def test_without_a_seed_every_draw_is_another():
    A = np.eye(1000)
    assert set(sample_columns(A, 500, rng=None)) != set(sample_columns(A, 500, rng=None))
    assert set(sample_columns(A, 500)) == set(sample_columns(A, 500))


def test_no_global_generator_is_read_or_moved():
    torch = pytest.importorskip("torch")
    A, b = matrix("polynomial"), np.ones(N)
    drawn = []
    for seed in (0, 1):
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        torch.manual_seed(seed)
        before = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()  # noqa: NPY002
        for sampling in DRAWN:
            drawn.append(tuple(sample_columns(A, 5, sampling=sampling, rng=3)))
        for solver in (
            li.NystromCG(rank=5, damping=0.1),
            li.Neumann(damping=0.1),
            li.Nystrom(rank=5, refine=1, damping=1e-2),
        ):
            li.solve(A, b, solver=solver, rng=3)
            li.solve(torch.tensor(A), torch.tensor(b), solver=solver, rng=3)
        after = np.random.get_state()[1], random.getstate(), torch.get_rng_state()  # noqa: NPY002
        np.testing.assert_array_equal(before[0], after[0])
        assert before[1] == after[1]
        assert torch.equal(before[2], after[2])
    assert drawn[:3] == drawn[3:]


def test_uniform_sampling_asks_nothing_of_the_operator():
    A = CountingOperator(matrix("polynomial"))
    assert sample_columns(A, 5, rng=0).size == 5
    assert A.num_products == 0


@pytest.mark.parametrize("sampling", ["diagonal", "diagonal_squared"])
def test_a_rule_on_the_diagonal_needs_one(sampling):
    with pytest.raises(TypeError, match=r"has no diagonal\. Sample columns uniformly"):
        sample_columns(li.FunctionOperator(lambda v: v, 3), 2, sampling=sampling)


def test_an_unknown_rule_is_refused():
    with pytest.raises(
        ValueError, match=r"`sampling` must be one of .*'uniform', .*; got 'best'.*pass `indices`"
    ):
        sample_columns(np.eye(3), 2, sampling="best")


@pytest.mark.parametrize(
    ("rank", "error", "message"),
    [
        (0, ValueError, "`rank` must be from 1 to 3; got 0"),
        (-2, ValueError, "`rank` must be from 1 to 3; got -2"),
        (4, ValueError, "`rank` must be from 1 to 3; got 4"),
        (1.0, TypeError, "`rank` must be a whole number"),
        (True, TypeError, "`rank` must be a whole number"),
        (None, TypeError, "`rank` must be a whole number"),
    ],
)
def test_a_rank_out_of_range_is_refused(rank, error, message):
    with pytest.raises(error, match=message):
        sample_columns(np.eye(3), rank)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_diagonal_that_is_not_finite_is_refused(bad):
    A = li.FunctionOperator(lambda v: v, 3, diagonal=lambda: np.array([1.0, bad, 1.0]))
    with pytest.raises(ValueError, match="`diagonal of A` must be finite; it holds NaN or Inf"):
        sample_columns(A, 2, sampling="diagonal", rng=0)


def test_a_traced_diagonal_is_refused_with_a_remedy(jax_backend):
    import jax

    def draw(A):
        return sample_columns(A, 2, sampling="diagonal", rng=0)

    with pytest.raises(TypeError, match=r"unknown while jax traces\. .*pass `indices`"):
        jax.jit(draw)(jax_backend.asarray(np.eye(3)))


@pytest.mark.parametrize(
    ("sampling", "memory"),
    [*((kind, "stored") for kind in ("auto", "greedy", "rpcholesky", "diagonal"))]
    + [(kind, memory) for kind in ("auto", "diagonal") for memory in ("chunked", "streamed")],
)
def test_a_matrix_of_zeros_has_a_damped_inverse_by_any_columns(sampling, memory):
    solver = li.Nystrom(rank=2, damping=0.5, sampling=sampling, memory=memory)
    b = np.asarray([1.0, -3.0, 2.0])
    np.testing.assert_array_equal(li.solve(np.zeros((3, 3)), b, solver=solver).value, 2 * b)
