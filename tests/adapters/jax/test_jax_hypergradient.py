"""Hypergradients of functions of pytrees against the implicit formula with dense matrices."""

from __future__ import annotations

import dataclasses
import math
import sys
from typing import Any, NamedTuple

import numpy as np
import pytest

import lowrank_inverse as li

jax = pytest.importorskip("jax")

import jax.numpy as jnp

from lowrank_inverse_jax import HessianOperator, hypergradient
from tests.adapters.jax.jax_oracle import (
    N,
    Problem,
    Tree,
    data_term,
    flat,
    forward,
    inner,
    outer,
    relative,
)

pytestmark = pytest.mark.usefixtures("wide")


def decay_of(hparams: Tree) -> Any:
    """Return the coefficient of the term that the data term leaves out."""
    return jnp.exp(hparams["log_decay"])


def richardson(matvec: Any, b: Any) -> Any:
    """Four steps of a solver that a user might bring."""
    x = jnp.zeros_like(b)
    for _ in range(4):
        x = x + 0.2 * (b - matvec(x))
    return x


class CountingOperator(HessianOperator):
    """Count products at the entrances, by the width of what comes in."""

    made: list[CountingOperator]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.count = 0
        super().__init__(*args, **kwargs)
        self.made.append(self)

    def __matmul__(self, v: Any) -> Any:
        self.count += 1 if v.ndim == 1 else v.shape[1]
        return super().__matmul__(v)

    def columns(self, indices: Any) -> Any:
        self.count += len(indices)
        return super().columns(indices)


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> list[CountingOperator]:
    """The Hessian operators made since, each of which counts its products."""
    made: list[CountingOperator] = []
    monkeypatch.setattr(CountingOperator, "made", made, raising=False)
    module = sys.modules[hypergradient.__module__]  # the function hides it in the package
    monkeypatch.setattr(module, "HessianOperator", CountingOperator)
    return made


# The value: the dense formula, finite differences, Theorem 1.

SOLVERS = {
    "exact": (li.Exact(), 0.0),
    "exact, damped": (li.Exact(damping=0.3), 0.3),
    "cg": (li.CG(rtol=1e-13), 0.0),
    "cg, damped": (li.CG(rtol=1e-13, damping=0.3), 0.3),
    "nystrom-cg": (li.NystromCG(rank=5, rtol=1e-13), 0.0),
    "nystrom-cg, damped": (li.NystromCG(rank=5, rtol=1e-13, damping=0.3), 0.3),
    "nystrom of rank n": (li.Nystrom(rank=N, damping=0.3), 0.3),
    "nystrom of rank n, chunked": (
        li.Nystrom(rank=N, damping=0.3, memory="chunked", chunk_size=5),
        0.3,
    ),
    "nystrom of rank n, streamed": (
        li.Nystrom(rank=N, damping=0.3, memory="streamed", chunk_size=5),
        0.3,
    ),
}


def jitted(problem: Problem, *, hparams: Any = None, **options: Any) -> Any:
    """Return the hypergradient by one compiled call."""
    run = jax.jit(lambda p, h: problem.hypergradient(params=p, hparams=h, chunk_size=8, **options))
    return run(problem.params, problem.hparams if hparams is None else hparams)


@pytest.mark.parametrize(("solver", "damping"), SOLVERS.values(), ids=SOLVERS)
def test_hypergradient_equals_the_dense_implicit_formula_on_a_network_in_nested_pytrees(
    solver, damping
):
    problem = Problem()
    oracle = problem.dense()
    assert oracle.hessian.shape == (N, N)
    assert np.linalg.eigvalsh(oracle.hessian)[0] > 0
    out = jitted(problem, solver=solver, rng=0)
    q = oracle.ihvp(damping)
    assert relative(out.grads, oracle.at(q)) < 1e-8
    assert relative(out.ihvp, q) < 1e-8
    for found, like in ((out.grads, problem.hparams), (out.ihvp, problem.params)):
        assert jax.tree_util.tree_structure(found) == jax.tree_util.tree_structure(like)
        shapes = [jax.tree_util.tree_map(jnp.shape, tree) for tree in (found, like)]
        assert shapes[0] == shapes[1]


def test_grads_are_the_sum_of_the_direct_and_the_implicit_part():
    problem = Problem()
    oracle = problem.dense()
    out = jitted(problem, solver=li.Exact())
    assert np.linalg.norm(oracle.direct) > 0
    assert relative(out.direct, oracle.direct) < 1e-12
    assert relative(out.implicit, -oracle.mixed.T @ oracle.ihvp()) < 1e-8
    assert relative(out.grads, flat(out.direct) + flat(out.implicit)) < 1e-15


def test_identity_puts_its_scale_in_the_place_of_the_inverse():
    problem = Problem()
    oracle = problem.dense()
    out = problem.hypergradient(solver=li.Identity(scale=0.7))
    assert relative(out.grads, oracle.at(0.7 * oracle.outer_grad)) < 1e-10


def test_neumann_sums_the_terms_of_its_series():
    problem = Problem()
    oracle = problem.dense()
    step, damping = 0.3, 0.1
    contraction = np.eye(N) - step * (oracle.hessian + damping * np.eye(N))
    powers = [np.linalg.matrix_power(contraction, j) for j in range(6)]
    q = step * sum(powers) @ oracle.outer_grad
    solver = li.Neumann(num_terms=6, step_size=step, damping=damping)
    assert relative(problem.hypergradient(solver=solver).grads, oracle.at(q)) < 1e-10


def test_neumann_finds_a_step_size_that_converges():
    problem = Problem()
    oracle = problem.dense()
    out = jitted(problem, solver=li.Neumann(num_terms=200))
    assert out.solution.message == "converged"
    assert relative(out.grads, oracle.at(oracle.ihvp())) < 1e-4


def test_a_function_of_matvec_and_b_is_a_solver():
    problem = Problem()
    oracle = problem.dense()
    q = np.zeros(N)
    for _ in range(4):
        q = q + 0.2 * (oracle.outer_grad - oracle.hessian @ q)
    out = problem.hypergradient(solver=richardson)
    assert relative(out.grads, oracle.at(q)) < 1e-10
    assert out.info.num_products == 4 + 1


def test_the_cg_of_jax_is_a_solver():
    problem = Problem()
    oracle = problem.dense()

    def solver(matvec: Any, b: Any) -> Any:
        return jax.scipy.sparse.linalg.cg(matvec, b, tol=1e-12)[0]

    assert relative(jitted(problem, solver=solver).grads, oracle.at(oracle.ihvp())) < 1e-8


def mean_errors(solvers: list[Any]) -> list[float]:
    """Errors of hypergradients at damping 0.01, the decay a ridge, over five seeds."""
    problem = Problem()
    oracle = problem.dense()
    exact = oracle.at(oracle.ihvp(0.01))

    def mean(solver: Any) -> float:
        @jax.jit
        def run(indices: Any) -> Any:
            chosen = dataclasses.replace(solver, indices=indices)
            options = {"inner_loss": data_term, "ridge": decay_of}
            return problem.hypergradient(solver=chosen, chunk_size=8, **options).grads

        draws = [np.random.default_rng(s).choice(N, solver.rank, replace=False) for s in range(5)]
        return float(np.mean([relative(run(jnp.asarray(draw)), exact) for draw in draws]))

    return [mean(solver) for solver in solvers]


def test_nystrom_comes_closer_to_the_exact_hypergradient_as_its_rank_grows():
    errors = mean_errors([li.Nystrom(rank=rank, damping=0.01) for rank in (1, 5, N)])
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1
    assert errors[-1] < 0.01


def test_refining_steps_bring_nystrom_closer():
    errors = mean_errors([li.Nystrom(rank=5, damping=0.01, refine=steps) for steps in (0, 2, 8)])
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-2 * errors[0]


class Ridged:
    """Weighted least squares with a decay for each coefficient, solved in closed form."""

    def __init__(self) -> None:
        rng = np.random.default_rng(5)
        self.x, self.y = rng.standard_normal((9, 4)), rng.standard_normal(9)
        self.clean_x, self.clean_y = rng.standard_normal((7, 4)), rng.standard_normal(7)
        self.phi = np.concatenate([rng.standard_normal(9), 0.3 * rng.standard_normal(4)])

    def minimiser(self, phi: np.ndarray) -> np.ndarray:
        weights, decay = np.exp(phi[:9]), np.exp(phi[9:])
        normal = (self.x.T * weights) @ self.x + np.diag(decay)
        return np.linalg.solve(normal, self.x.T @ (weights * self.y))

    def outer_value(self, phi: np.ndarray) -> float:
        residual = self.clean_x @ self.minimiser(phi) - self.clean_y
        return float(0.5 * residual @ residual + 0.1 * np.sum(phi**3))

    def finite_differences(self, h: float = 1e-5) -> np.ndarray:
        steps = h * np.eye(self.phi.size)
        return np.array(
            [
                (self.outer_value(self.phi + s) - self.outer_value(self.phi - s)) / (2 * h)
                for s in steps
            ]
        )


@pytest.mark.parametrize(
    ("solver", "inside"),
    [
        pytest.param(li.Exact(), True, id="exact, decay in the loss"),
        pytest.param(li.CG(rtol=1e-12), True, id="cg, decay in the loss"),
        pytest.param(li.CG(rtol=1e-12), False, id="cg, decay as ridge"),
        pytest.param(li.NystromCG(rank=2, rtol=1e-12), False, id="nystrom-cg, decay as ridge"),
    ],
)
def test_at_the_minimiser_it_equals_finite_differences_of_the_inner_problem_solved_anew(
    solver, inside
):
    problem = Ridged()

    def inner(theta: Any, phi: Any) -> Any:
        loss = 0.5 * (jnp.exp(phi[:9]) * (problem.x @ theta - problem.y) ** 2).sum()
        return loss + 0.5 * (jnp.exp(phi[9:]) * theta**2).sum() if inside else loss

    def outer(theta: Any, phi: Any) -> Any:
        return 0.5 * ((problem.clean_x @ theta - problem.clean_y) ** 2).sum() + 0.1 * (phi**3).sum()

    @jax.jit
    def run(theta: Any, phi: Any) -> Any:
        ridge = None if inside else lambda phi: jnp.exp(phi[9:])
        return hypergradient(inner, outer, theta, phi, solver=solver, ridge=ridge, rng=0)

    out = run(problem.minimiser(problem.phi), problem.phi)
    assert out.info.inner_grad_norm < 1e-12
    assert relative(out.grads, problem.finite_differences()) < 1e-8


def test_the_error_of_nystrom_stays_below_the_bound_of_theorem_1():
    rng = np.random.default_rng(2)
    X = rng.standard_normal((7, N)) * np.linspace(1, 0.01, N)
    mixed = rng.standard_normal((N, 3))

    def inner(theta: Any, phi: Any) -> Any:
        return 0.5 * jnp.sum((X @ theta) ** 2) + theta @ (mixed @ phi)

    def outer(theta: Any, phi: Any) -> Any:
        return jnp.sum(theta**3) / 3

    @jax.jit
    def run(theta: Any, indices: Any, damping: Any) -> Any:
        solver = li.Nystrom(damping=damping, indices=indices)
        return hypergradient(inner, outer, theta, jnp.ones(3), solver=solver).grads

    theta = rng.standard_normal(N)
    H, gradient, norm = X.T @ X, theta**2, np.linalg.norm
    tightest = math.inf
    for rank in (2, 5):
        for seed in range(6):
            indices = np.random.default_rng(seed).choice(N, rank, replace=False)
            C, W = H[:, indices], H[np.ix_(indices, indices)]
            missed = norm(H - C @ np.linalg.pinv(W, rcond=1e-12, hermitian=True) @ C.T, 2)
            for damping in (1e-3, 1e-2, 1e-1, 1.0):
                exact = -mixed.T @ np.linalg.solve(H + damping * np.eye(N), gradient)
                error = norm(np.asarray(run(theta, jnp.asarray(indices), damping)) - exact)
                bound = norm(gradient) * norm(mixed, 2) * missed / (damping * (damping + missed))
                assert error <= bound + 1e-12
                tightest = min(tightest, bound / error)
    assert tightest < 20  # the bound says something on this problem


def test_a_scalar_problem_has_the_textbook_answer():
    # argmin (w - 3)² / 2 + h w² / 2 is 3 / (1 + h); the derivative of its square is known.
    @jax.jit
    def run(w: Any, h: Any) -> Any:
        return hypergradient(
            lambda w, h: 0.5 * (w - 3) ** 2,
            lambda w, h: w**2,
            w,
            h,
            solver=li.Nystrom(rank=1, damping=1e-7),
            ridge=lambda h: h,
        )

    out = run(1.0, 2.0)
    assert float(out.grads) == pytest.approx(-2 * 3**2 / 3**3, rel=1e-5)
    assert float(out.ihvp) == pytest.approx(2 / 3, rel=1e-5)
    assert out.grads.shape == out.ihvp.shape == ()


# Forms of parameters and hyperparameters.


def test_leaves_that_are_no_arrays_of_floats_are_carried_and_come_back_as_none():
    problem = Problem()
    wanted = problem.hypergradient(solver=li.CG(rtol=1e-12))
    extra = {"steps": 5, "mask": jnp.asarray([1, 0]), "name": "x", "f": jnp.tanh, "none": None}
    seen: list[Tree] = []

    def watched(params: Tree, hparams: Tree, x: Any, y: Any) -> Any:
        seen.extend([params, hparams])
        return inner(params, hparams, x, y) * hparams["steps"] / params["steps"]

    out = problem.hypergradient(
        inner_loss=watched,
        params={**problem.params, **extra},
        hparams={**problem.hparams, **extra},
        solver=li.CG(rtol=1e-12),
    )
    assert seen
    for tree in seen:
        assert tree.keys() >= extra.keys()
        assert all(tree[name] is extra[name] for name in extra)
    for tree in (out.grads, out.direct, out.implicit, out.ihvp):
        assert tree.keys() >= extra.keys()
        assert all(tree[name] is None for name in extra)
    assert relative(out.grads, wanted.grads) < 1e-12
    assert relative(out.ihvp, wanted.ihvp) < 1e-12


def test_hparams_may_be_a_vector_a_list_or_a_bare_float():
    problem = Problem()
    _x, _y = problem.inner_args
    wanted = problem.hypergradient(solver=li.CG(rtol=1e-12)).grads
    weights, decay = problem.hparams["weights"], problem.hparams["log_decay"]

    def run(hparams: Any, as_tree: Any) -> Any:
        return jitted(
            problem,
            inner_loss=lambda p, h, x, y: inner(p, as_tree(h), x, y),
            outer_loss=lambda p, h, x, y: outer(p, as_tree(h), x, y),
            hparams=hparams,
            solver=li.CG(rtol=1e-12),
        ).grads

    vector = run(jnp.append(weights, decay), lambda h: {"weights": h[:-1], "log_decay": h[-1]})
    assert relative(vector, [wanted["weights"], wanted["log_decay"]]) < 1e-12
    several = run([weights, decay], lambda h: {"weights": h[0], "log_decay": h[1]})
    assert isinstance(several, list)
    assert relative(several, [wanted["weights"], wanted["log_decay"]]) < 1e-12
    bare = run(float(decay), lambda h: {"weights": weights, "log_decay": h})
    assert bare.shape == ()
    assert float(bare) == pytest.approx(float(wanted["log_decay"]), rel=1e-12)


def test_hparams_may_have_another_dtype_than_the_parameters():
    problem = Problem()
    wanted = problem.hypergradient(solver=li.CG(rtol=1e-12))
    hparams = jax.tree_util.tree_map(lambda leaf: leaf.astype(jnp.float32), problem.hparams)
    out = jax.jit(lambda h: problem.hypergradient(hparams=h, solver=li.CG(rtol=1e-12)))(hparams)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree_util.tree_leaves(out.grads))
    assert all(leaf.dtype == jnp.float64 for leaf in jax.tree_util.tree_leaves(out.ihvp))
    assert relative(out.grads, wanted.grads) < 1e-6


def test_arguments_of_the_losses_reach_them_and_default_to_none():
    problem = Problem()
    wanted = problem.hypergradient(solver=li.CG(rtol=1e-12))
    found = problem.hypergradient(
        inner_loss=lambda p, h: inner(p, h, *problem.inner_args),
        outer_loss=lambda p, h: outer(p, h, *problem.outer_args),
        inner_args=(),
        outer_args=(),
        solver=li.CG(rtol=1e-12),
    )
    assert relative(found.grads, wanted.grads) < 1e-14


def test_aux_of_both_losses_comes_back_as_they_return_it():
    problem = Problem()

    def inner_aux(params: Tree, hparams: Tree, x: Any, y: Any) -> Any:
        return inner(params, hparams, x, y), {"predictions": forward(params, x), "name": "inner"}

    def outer_aux(params: Tree, hparams: Tree, x: Any, y: Any) -> Any:
        return outer(params, hparams, x, y), None

    out = problem.hypergradient(
        inner_loss=inner_aux, outer_loss=outer_aux, has_aux=True, solver=li.CG(rtol=1e-12)
    )
    plain = problem.hypergradient(solver=li.CG(rtol=1e-12))
    assert plain.aux == ()
    assert relative(out.grads, plain.grads) < 1e-14
    inner_out, outer_out = out.aux
    assert inner_out["name"] == "inner"
    np.testing.assert_allclose(
        inner_out["predictions"], forward(problem.params, problem.inner_args[0]), rtol=1e-14
    )
    assert outer_out is None


# Hyperparameters without a path.


@pytest.mark.parametrize(
    "wrap",
    [lambda f: f, jax.jit, pytest.param(jax.checkpoint, marks=pytest.mark.slow)],
    ids=["plain", "jit", "remat"],
)
def test_hparams_without_path_are_named_and_have_zeros(wrap):
    problem = Problem()
    hparams = {**problem.hparams, "unused": jnp.ones((2, 3)), "other": [jnp.ones(())]}
    out = problem.hypergradient(
        inner_loss=wrap(inner), outer_loss=wrap(outer), hparams=hparams, solver=li.CG(rtol=1e-12)
    )
    assert out.info.hparams_without_path == ("['other'][0]", "['unused']")
    for part in (out.grads, out.direct, out.implicit):
        np.testing.assert_array_equal(part["unused"], np.zeros((2, 3)))
        np.testing.assert_array_equal(part["other"][0], 0.0)
    wanted = problem.hypergradient(solver=li.CG(rtol=1e-12)).grads
    assert relative({name: out.grads[name] for name in wanted}, wanted) < 1e-10


def test_every_hparam_that_reaches_a_loss_has_a_path():
    problem = Problem()
    assert problem.hypergradient(solver=li.CG()).info.hparams_without_path == ()


def test_hparams_of_the_outer_loss_alone_have_a_direct_part_and_no_implicit_one():
    problem = Problem()
    out = problem.hypergradient(
        outer_loss=lambda p, h, x, y: outer(p, h, x, y) + jnp.sum(h["late"] ** 2),
        hparams={**problem.hparams, "late": jnp.asarray([3.0, -1.0])},
        solver=li.CG(),
    )
    assert out.info.hparams_without_path == ()
    np.testing.assert_allclose(out.grads["late"], [6.0, -2.0])
    np.testing.assert_array_equal(out.implicit["late"], [0.0, 0.0])


def test_an_offset_of_the_inner_loss_is_no_path():
    problem = Problem()
    out = problem.hypergradient(
        inner_loss=lambda p, h, x, y: inner(p, h, x, y) + jnp.sum(h["offset"]),
        hparams={**problem.hparams, "offset": jnp.ones(2)},
        solver=li.CG(),
    )
    assert out.info.hparams_without_path == ("['offset']",)
    np.testing.assert_array_equal(out.grads["offset"], [0.0, 0.0])


def test_hparams_may_act_through_the_ridge_alone():
    problem = Problem()
    out = problem.hypergradient(inner_loss=data_term, ridge=decay_of, solver=li.CG(rtol=1e-12))
    assert out.info.hparams_without_path == ()
    oracle = problem.dense()
    assert relative(out.grads, oracle.at(oracle.ihvp())) < 1e-8


# The ridge.


def spread() -> np.ndarray:
    return np.linspace(0.3, 1.5, N)


def split(vector: Any) -> Tree:
    """Put a vector in the structure of the parameters of the problem, in the order of jax."""
    leaves, structure = jax.tree_util.tree_flatten(Problem().params)
    places = np.cumsum([leaf.size for leaf in leaves])[:-1]
    parts = zip(jnp.split(jnp.asarray(vector), places), leaves, strict=True)
    return jax.tree_util.tree_unflatten(
        structure, [part.reshape(leaf.shape) for part, leaf in parts]
    )


class Decayed(NamedTuple):
    """A form of the ridge, and its coefficients; times the decay where that is differentiated."""

    ridge: Any
    coefficients: Any
    depends: bool = False


RIDGES: dict[str, Decayed] = {
    "float": Decayed(0.4, 0.4),
    "int": Decayed(1, 1.0),
    "numpy scalar": Decayed(np.float64(0.4), 0.4),
    "array of no dimension": Decayed(np.asarray(0.4), 0.4),
    "flat": Decayed(spread(), spread()),
    "structure": Decayed(lambda h: split(spread()), spread()),
    "number of hparams": Decayed(decay_of, 1.0, True),
    "flat of hparams": Decayed(lambda h: decay_of(h) * spread(), spread(), True),
    "structure of hparams": Decayed(lambda h: split(decay_of(h) * spread()), spread(), True),
}

RIDGE_SOLVERS = {
    "cg": (li.CG(rtol=1e-13), 0.0),
    "nystrom-cg": (li.NystromCG(rank=5, rtol=1e-13, damping=0.1), 0.1),
    "exact": (li.Exact(damping=0.1), 0.1),
    "nystrom": (li.Nystrom(rank=N, damping=0.1), 0.1),
    "callable": (lambda A, b: jax.scipy.sparse.linalg.cg(A, b, tol=1e-13)[0], 0.0),
}
QUICK_RIDGES = (
    ("float", "cg"),
    ("flat", "cg"),
    ("structure", "cg"),
    ("number of hparams", "nystrom-cg"),
    ("flat of hparams", "cg"),
    ("structure of hparams", "nystrom-cg"),
)


@pytest.mark.parametrize(
    ("case", "solver", "damping"),
    [
        pytest.param(
            case,
            *options,
            id=f"{name}-{label}",
            marks=[] if (name, label) in QUICK_RIDGES else [pytest.mark.slow],
        )
        for name, case in RIDGES.items()
        for label, options in RIDGE_SOLVERS.items()
    ],
)
def test_ridge_equals_a_further_term_of_the_inner_loss_in_the_dense_formula(case, solver, damping):
    problem = Problem()
    theta, oracle = flat(problem.params), problem.dense()
    decay = np.exp(float(problem.hparams["log_decay"])) if case.depends else 1.0
    ridge = decay * np.broadcast_to(case.coefficients, N)
    q = oracle.ihvp(ridge + damping)
    mixed = oracle.mixed.copy()
    if case.depends:  # the decay comes first in the order of jax
        mixed[:, 0] += ridge * theta
    out = problem.hypergradient(ridge=case.ridge, solver=solver, rng=0)
    assert relative(out.ihvp, q) < 1e-8
    assert relative(out.grads, oracle.direct - mixed.T @ q) < 1e-8
    inner_grad = oracle.inner_grad + ridge * theta
    assert float(out.info.inner_grad_norm) == pytest.approx(np.linalg.norm(inner_grad))
    system = oracle.hessian + np.diag(ridge + damping)
    residual = system @ flat(out.ihvp) - oracle.outer_grad
    wanted = np.linalg.norm(residual) / np.linalg.norm(oracle.outer_grad)
    assert float(out.info.relative_residual) == pytest.approx(wanted, abs=1e-11)


def test_a_ridge_for_a_single_matrix_may_be_flat_or_of_its_shape():
    W, ridge = jnp.asarray([[1.0, 2.0, 0.5], [0.3, 1.0, 2.0]]), np.asarray([[1.0, 2, 3], [4, 5, 6]])

    @jax.jit
    def run(W: Any) -> Any:
        def ihvp(ridge: Any) -> Any:
            return hypergradient(
                lambda W, h: jnp.sum(h * W), lambda W, h: jnp.sum(W**2), W, 1.0, solver=li.CG(),
                ridge=ridge,
            ).ihvp  # fmt: skip

        return [ihvp(r) for r in (ridge, ridge.reshape(-1), jnp.asarray(ridge, jnp.float32))]

    for found in run(W):
        np.testing.assert_allclose(found, 2 * W / ridge, rtol=1e-12)


@pytest.mark.parametrize("flat_ridge", [False, True], ids=["number", "for each"])
def test_a_ridge_treated_exactly_is_far_better_than_one_that_is_sampled(flat_ridge):
    problem = Problem()
    oracle = problem.dense()
    exact = oracle.at(oracle.ihvp(1e-6))
    solver = li.Nystrom(rank=8, damping=1e-6)
    known = jitted(
        problem,
        inner_loss=data_term,
        ridge=lambda h: decay_of(h) * (jnp.ones(N) if flat_ridge else 1.0),
        solver=solver,
        rng=0,
    )
    sampled = jitted(problem, solver=solver, rng=0)
    assert relative(sampled.grads, exact) > 100 * relative(known.grads, exact)


# What the info says.


def diagonal(curvatures: Any, solver: Any) -> Any:
    """Return the record for an inner loss with these curvatures along the axes."""
    return hypergradient(
        lambda w, h: 0.5 * jnp.sum(curvatures * w**2) + h * jnp.sum(w),
        lambda w, h: jnp.sum(w**2),
        jnp.ones(3),
        1.0,
        solver=solver,
        rng=0,
    ).info


PRODUCTS = {
    "identity": li.Identity(),
    "neumann": li.Neumann(num_terms=3),
    "cg": li.CG(max_steps=4),
    "nystrom-cg": li.NystromCG(rank=5, max_steps=2),
    "nystrom": li.Nystrom(rank=5, damping=1e-2),
    "nystrom, refined": li.Nystrom(rank=5, refine=2, damping=1e-2),
    "nystrom, chunked": li.Nystrom(rank=5, memory="chunked", chunk_size=2, damping=1e-2),
    "nystrom, streamed": li.Nystrom(rank=5, memory="streamed", damping=1e-2),
    "exact": li.Exact(),
    "callable": richardson,
}


@pytest.mark.parametrize(
    ("solver", "ridge"),
    [
        pytest.param(
            solver,
            ridge,
            id=f"{name}{label}",
            marks=[] if ridge is None or name in ("cg", "nystrom") else [pytest.mark.slow],
        )
        for name, solver in PRODUCTS.items()
        for label, ridge in {"": None, ", ridge": 0.5, ", ridges": np.full(N, 0.5)}.items()
    ],
)
def test_num_products_is_what_the_hessian_was_asked_for(operators, solver, ridge):
    out = Problem().hypergradient(solver=solver, rng=0, ridge=ridge)
    (operator,) = operators
    assert out.info.num_products == operator.count
    assert out.solution.num_products == operator.count


def test_inner_grad_norm_is_zero_at_the_minimum_and_the_norm_elsewhere():
    problem = Problem()
    found = float(problem.hypergradient(solver=li.Identity()).info.inner_grad_norm)
    assert found == pytest.approx(np.linalg.norm(problem.dense().inner_grad))
    out = jitted(problem, inner_loss=lambda p, h, x, y: 0 * inner(p, h, x, y), solver=li.Identity())
    assert float(out.info.inner_grad_norm) == 0.0


@pytest.mark.parametrize(
    "solver",
    [
        li.CG(),
        li.NystromCG(rank=3),
        li.Nystrom(rank=3, damping=0.1),
        li.Nystrom(rank=3, damping=0.1, memory="streamed"),
        li.Neumann(num_terms=4),
        li.Exact(),
    ],
    ids=lambda solver: type(solver).__name__,
)
def test_negative_curvature_of_the_inner_loss_is_reported_and_none_where_there_is_none(solver):
    run = jax.jit(lambda curvatures: diagonal(curvatures, solver).negative_curvature)
    assert bool(run(jnp.asarray([1.0, -2.0, 3.0])))
    assert not bool(run(jnp.asarray([1.0, 2.0, 3.0])))


def test_rank_is_the_number_of_columns_that_were_of_use():
    def run(solver: Any) -> Any:
        return jax.jit(lambda curvatures: diagonal(curvatures, solver).rank)(
            jnp.asarray([1.0, 2.0, 0.0])
        )

    assert run(li.Nystrom(rank=3, damping=1e-2)) == 2
    assert run(li.Nystrom(rank=3, memory="streamed", damping=1e-2)) == 2
    assert run(li.Exact()) == 2
    assert run(li.NystromCG(rank=3, damping=0.1)) == 2
    assert run(li.CG(damping=0.1)) is None


def test_an_outer_gradient_of_zero_leaves_the_direct_part():
    problem = Problem()
    for solver in (li.CG(), li.Nystrom(rank=5, damping=1e-2), li.NystromCG(rank=5)):
        out = problem.hypergradient(
            outer_loss=lambda p, h, x, y: 0 * outer(p, h, x, y) + jnp.sum(h["weights"] ** 2),
            solver=solver,
            rng=0,
        )
        np.testing.assert_allclose(out.grads["weights"], 2 * problem.hparams["weights"])
        assert float(out.grads["log_decay"]) == 0.0
        assert float(out.info.relative_residual) == 0.0


# Warm starts.


@pytest.mark.parametrize("ridge", [None, 0.5, np.full(N, 0.5)], ids=["", "number", "for each"])
@pytest.mark.parametrize("solver", [li.CG(), li.NystromCG(rank=5)], ids=["cg", "nystrom-cg"])
def test_a_warm_start_from_the_solution_takes_no_steps(solver, ridge):
    problem = Problem()
    cold = problem.hypergradient(solver=solver, ridge=ridge, rng=0)
    warm = problem.hypergradient(solver=solver, ridge=ridge, rng=0, state=cold.state)
    assert int(cold.solution.num_steps) > 2
    assert int(warm.solution.num_steps) == 0
    assert relative(warm.grads, cold.grads) < 1e-12


def test_a_warm_start_from_a_similar_problem_saves_steps():
    problem = Problem()
    before = problem.hypergradient(solver=li.CG())
    hparams = jax.tree_util.tree_map(lambda leaf: leaf + 1e-4, problem.hparams)
    cold, warm = (
        problem.hypergradient(hparams=hparams, solver=li.CG(), state=state)
        for state in (None, before.state)
    )
    assert int(warm.solution.num_steps) <= int(cold.solution.num_steps) - 2
    assert relative(warm.grads, cold.grads) < 1e-4


def test_solvers_without_a_start_leave_the_state_alone():
    problem = Problem()
    state = problem.hypergradient(solver=li.CG()).state
    for solver in (li.Nystrom(rank=5, damping=1e-2), li.Neumann(num_terms=3), li.Identity()):
        cold, warm = (problem.hypergradient(solver=solver, rng=0, state=s) for s in (None, state))
        assert relative(warm.grads, cold.grads) == 0.0


# Which columns.


def test_rng_draws_the_columns_that_numpy_draws():
    problem = Problem()
    indices = np.random.default_rng(7).choice(N, 5, replace=False)
    wanted = problem.hypergradient(solver=li.Nystrom(indices=tuple(indices), damping=1e-2)).grads
    for rng in (7, np.random.default_rng(7)):
        assert (
            relative(
                problem.hypergradient(solver=li.Nystrom(rank=5, damping=1e-2), rng=rng).grads,
                wanted,
            )
            == 0
        )
    other = problem.hypergradient(solver=li.Nystrom(rank=5, damping=1e-2), rng=8).grads
    assert relative(other, wanted) > 1e-3


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey], ids=["key", "PRNGKey"])
@pytest.mark.parametrize(
    "solver", [li.Nystrom(rank=5, damping=1e-2), li.NystromCG(rank=5, max_steps=1)]
)
def test_a_key_draws_distinct_columns_uniformly(solver, make):
    problem = Problem()
    found = problem.hypergradient(solver=solver, key=make(3))
    drawn = jax.random.choice(make(3), N, (5,), replace=False)
    assert len(set(np.asarray(drawn).tolist())) == 5
    chosen = type(solver)(**{**vars(solver), "indices": drawn})
    assert relative(found.grads, problem.hypergradient(solver=chosen).grads) == 0
    other = problem.hypergradient(solver=solver, key=make(4))
    assert relative(other.grads, found.grads) > 1e-6


def test_indices_of_the_caller_are_taken_whatever_the_seed_or_key():
    problem = Problem()
    solver = li.Nystrom(indices=(4, 0, 2, 7, 9), damping=1e-2)
    wanted = problem.hypergradient(solver=solver).grads
    assert relative(problem.hypergradient(solver=solver, rng=3).grads, wanted) == 0
    assert relative(problem.hypergradient(solver=solver, key=jax.random.key(3)).grads, wanted) == 0


def test_no_global_generator_is_read_or_moved():
    problem = Problem()
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = problem.hypergradient(solver=li.Nystrom(rank=5, damping=1e-2), rng=0).grads
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
    np.random.seed(1)  # noqa: NPY002
    assert (
        relative(problem.hypergradient(solver=li.Nystrom(rank=5, damping=1e-2), rng=0).grads, first)
        == 0
    )


def test_chunk_size_changes_how_many_products_are_taken_at_once_and_not_the_answer():
    problem = Problem()
    solver = li.Nystrom(rank=5, damping=1e-2)
    wanted = problem.hypergradient(solver=solver, rng=0).grads
    for chunk_size in (2, 8):
        run = jax.jit(
            lambda h, c=chunk_size: problem.hypergradient(
                hparams=h, solver=solver, rng=0, chunk_size=c
            )
        )
        assert relative(run(problem.hparams).grads, wanted) < 1e-10


# Errors.


def nothing_of_hparams(params: Tree, hparams: Tree, x: Any, y: Any) -> Any:
    return jnp.mean((forward(params, x) - y) ** 2)


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "solver class": ({"solver": li.CG}, TypeError, "`solver` must be settings"),
    "solver string": ({"solver": "cg"}, TypeError, "`solver` must be settings"),
    "solver of another shape": (
        {"solver": lambda A, b: b[:-1]},
        ValueError,
        "`solver` must return an array of the shape of b",
    ),
    "params without floats": ({"params": {"a": 1}}, ValueError, "`params` must hold a floating"),
    "hparams without floats": ({"hparams": {"a": 1}}, ValueError, "`hparams` must hold a floating"),
    "complex hparams": (
        {"hparams": {"weights": np.ones(1, complex)}},
        TypeError,
        "`hparams` must be real",
    ),
    "inner loss a vector": (
        {"inner_loss": lambda p, h, x, y: h["weights"]},
        ValueError,
        r"`inner_loss` must return a scalar; got shape \(6,\)",
    ),
    "outer loss a vector": (
        {"outer_loss": lambda p, h, x, y: h["weights"]},
        ValueError,
        r"`outer_loss` must return a scalar; got shape \(6,\)",
    ),
    "inner loss an integer": (
        {"inner_loss": lambda p, h, x, y: jnp.asarray(3)},
        TypeError,
        "`inner_loss` must be real and floating-point",
    ),
    "inner loss a value": (
        {"inner_loss": np.float64(3.0)},
        TypeError,
        "`inner_loss` must be a function",
    ),
    "outer loss a list": (
        {"outer_loss": [outer, outer]},
        TypeError,
        "`outer_loss` must be a function",
    ),
    "aux not said": (
        {"inner_loss": lambda p, h, x, y: (inner(p, h, x, y), 1)},
        TypeError,
        "`inner_loss` must return a scalar",
    ),
    "aux not given": ({"has_aux": True}, TypeError, "`inner_loss` must return .*aux"),
    "inner loss NaN": (
        {"inner_loss": lambda p, h, x, y: jnp.sqrt(-1 - inner(p, h, x, y))},
        ValueError,
        "must be finite",
    ),
    "outer loss NaN": (
        {"outer_loss": lambda p, h, x, y: jnp.sqrt(-1 - outer(p, h, x, y))},
        ValueError,
        "`gradient of the outer loss` must be finite",
    ),
    "hparams that reach nothing": (
        {"inner_loss": nothing_of_hparams, "outer_loss": nothing_of_hparams},
        ValueError,
        r"`hparams` must reach one of the losses; .*log_decay.*weights",
    ),
    "outer loss without params": (
        {"outer_loss": lambda p, h, x, y: jnp.sum(h["weights"] ** 2)},
        ValueError,
        "`outer_loss` must depend on `params`",
    ),
    "inner loss without params": (
        {"inner_loss": lambda p, h, x, y: jnp.sum(h["weights"] ** 2)},
        ValueError,
        "`inner_loss` must depend on `params`",
    ),
    "key and rng": (
        {"solver": li.Nystrom(rank=2, damping=1e-2), "key": jax.random.PRNGKey(0), "rng": 0},
        ValueError,
        "one of `key` and `rng`",
    ),
    "key for cg": ({"key": jax.random.PRNGKey(0)}, TypeError, "`key` needs Nystrom or NystromCG"),
    "key and diagonal": (
        {
            "solver": li.Nystrom(rank=2, sampling="diagonal", damping=1e-2),
            "key": jax.random.PRNGKey(0),
        },
        ValueError,
        "`key` draws columns uniformly",
    ),
    "key and a rank that grows": (
        {"solver": li.NystromCG(rank="auto"), "key": jax.random.PRNGKey(0)},
        ValueError,
        "`key` draws a number of columns",
    ),
    "diagonal": (
        {"solver": li.Nystrom(rank=2, sampling="diagonal", damping=1e-2)},
        TypeError,
        "HessianOperator has no diagonal",
    ),
    "negative ridge": ({"ridge": -1.0}, ValueError, "`ridge` must be finite and >= 0"),
    "negative ridge of one": ({"ridge": -np.ones(N)}, ValueError, "`ridge` must be >= 0 every"),
    "ridge NaN": ({"ridge": math.nan}, ValueError, "`ridge` must be finite"),
    "ridge of another shape": ({"ridge": np.ones(N - 1)}, ValueError, "`ridge` must have the str"),
    "ridge of another structure": (
        {"ridge": {"hidden": 1.0}},
        ValueError,
        "`ridge` must have the structure",
    ),
    "state of another shape": (
        {"state": li.Solution(jnp.ones(3), 0.0, 0, 0, True, 0)},
        ValueError,
        "`state` must",
    ),
    "chunk size": ({"chunk_size": 0}, ValueError, "`chunk_size` must be at least 1"),
}


@pytest.mark.parametrize(("options", "kind", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_by_name(options, kind, message):
    with pytest.raises(kind, match=message):
        Problem().hypergradient(**{"solver": li.CG(), **options})
