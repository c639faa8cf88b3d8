"""One problem and one seed: the same hypergradient in NumPy, torch and jax.

Softmax regression with a weight for each example and a decay. With bias and weights in the order
of their names, the flat vector is a matrix of one row for the bias and one for each feature, in
torch and in jax alike. NumPy has all derivatives in closed form and a dense Hessian.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import lowrank_inverse as li
from lowrank_inverse.bilevel.implicit_gradient import implicit_gradient
from lowrank_inverse.bilevel.info import hypergradient_info
from tests.adapters.jax.conftest import quick_compilation  # noqa: F401
from tests.conftest import x64

NUM_EXAMPLES, NUM_FEATURES, NUM_CLASSES = 12, 5, 3
N = (NUM_FEATURES + 1) * NUM_CLASSES
SEED = 0
"""Draws no three columns of one feature, which would be linearly dependent without a decay."""


@dataclass(frozen=True)
class Data:
    """All arrays of the problem in one dtype; the same numbers, held exactly, in each."""

    theta: np.ndarray
    x: np.ndarray
    y: np.ndarray
    clean_x: np.ndarray
    clean_y: np.ndarray
    log_decay: np.ndarray
    weights: np.ndarray


def data(dtype: str) -> Data:
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32).astype(dtype)

    def classes() -> np.ndarray:
        return np.eye(NUM_CLASSES, dtype=dtype)[rng.integers(0, NUM_CLASSES, NUM_EXAMPLES)]

    return Data(
        theta=draw(NUM_FEATURES + 1, NUM_CLASSES),
        x=draw(NUM_EXAMPLES, NUM_FEATURES),
        y=classes(),
        clean_x=draw(NUM_EXAMPLES, NUM_FEATURES),
        clean_y=classes(),
        log_decay=np.asarray(-1.5, dtype=dtype),
        weights=np.linspace(-1, 1, NUM_EXAMPLES, dtype=np.float32).astype(dtype),
    )


@dataclass(frozen=True)
class Answer:
    """What the frameworks are to agree on, in NumPy; the gradient with the decay first."""

    grads: np.ndarray
    ihvp: np.ndarray
    num_products: int
    rank: int | None
    reason: int


@dataclass(frozen=True)
class Case:
    """Settings, where the decay goes, and the relative error that float32 is to meet."""

    solver: Any
    ridge: str = "inside"
    float32: float = 2e-5


# Ranks below n, so that other columns would give other answers.
CASES = {
    "exact": Case(li.Exact(damping=0.05)),
    "cg": Case(li.CG(rtol=1e-6)),
    "cg, few steps": Case(li.CG(max_steps=4)),
    "nystrom": Case(li.Nystrom(rank=7, damping=0.05)),
    "nystrom, chunked": Case(li.Nystrom(rank=7, damping=0.05, memory="chunked", chunk_size=3)),
    "nystrom, streamed": Case(li.Nystrom(rank=7, damping=0.05, memory="streamed", chunk_size=3)),
    "nystrom, refined": Case(li.Nystrom(rank=7, damping=0.05, refine=3)),
    "nystrom-cg": Case(li.NystromCG(rank=7, damping=0.05, rtol=1e-6)),
    "neumann": Case(li.Neumann(num_terms=7)),
    "neumann, step size": Case(li.Neumann(num_terms=7, step_size=0.5, damping=0.05)),
    "identity": Case(li.Identity(scale=0.3)),
    "cg, ridge": Case(li.CG(rtol=1e-6), "number"),
    "nystrom, ridge": Case(li.Nystrom(rank=7, damping=0.05), "number"),
    "nystrom, ridge for each": Case(li.Nystrom(rank=7, damping=0.05), "for each"),
    "nystrom-cg, ridge for each": Case(li.NystromCG(rank=7, rtol=1e-6), "for each"),
}


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def with_ones(x: np.ndarray) -> np.ndarray:
    return np.concatenate([np.ones((len(x), 1), x.dtype), x], axis=1)


def by_numpy(case: Case, dtype: str) -> Answer:
    d = data(dtype)
    theta, X, clean = d.theta, with_ones(d.x), with_ones(d.clean_x)
    p, sigma, decay = softmax(X @ theta), 1 / (1 + np.exp(-d.weights)), np.exp(d.log_decay)
    curvature = p[:, :, None] * np.eye(NUM_CLASSES, dtype=dtype) - p[:, :, None] * p[:, None, :]
    share = sigma / NUM_EXAMPLES
    H = np.einsum("i,ia,ib,icd->acbd", share, X, X, curvature).reshape(N, N)
    residual = X[:, :, None] * (p - d.y)[:, None, :]
    by_weights = (residual * (share * (1 - sigma))[:, None, None]).reshape(NUM_EXAMPLES, N)
    mixed = np.concatenate([decay * theta.reshape(1, N), by_weights]).astype(dtype)
    gradient = (residual * share[:, None, None]).sum(axis=0) + decay * theta
    outer_grad = clean.T @ (softmax(clean @ theta) - d.clean_y) / NUM_EXAMPLES
    direct = np.append(np.zeros(1, dtype), (0.1 * d.weights).astype(dtype))
    if case.ridge == "inside":
        H = H + decay * np.eye(N, dtype=dtype)
    result = implicit_gradient(
        np.asarray(H, dtype),
        np.asarray(outer_grad.reshape(-1), dtype),
        lambda q: [mixed @ q],
        [direct],
        solver=case.solver,
        ridge={
            "inside": None,
            "number": float(decay),
            "for each": decay * np.ones(N, dtype),
        }[case.ridge],
        rng=SEED,
    )
    info = hypergradient_info(result, outer_grad.reshape(-1), gradient.reshape(-1), ())
    (grads,) = result.grads
    solution = result.solution
    return Answer(grads, solution.value, info.num_products, info.rank, int(solution.reason))


def by_torch(case: Case, dtype: str) -> Answer:
    torch = pytest.importorskip("torch")
    from lowrank_inverse_torch import hypergradient

    torch.set_num_threads(1)
    d = data(dtype)
    x, y, clean_x, clean_y = map(torch.from_numpy, (d.x, d.y, d.clean_x, d.clean_y))
    params = {
        "bias": torch.tensor(d.theta[0], requires_grad=True),
        "weight": torch.tensor(d.theta[1:], requires_grad=True),
    }
    hparams = {
        "log_decay": torch.tensor(d.log_decay, requires_grad=True),
        "weights": torch.tensor(d.weights, requires_grad=True),
    }

    def errors(x: Any, y: Any) -> Any:
        return -(y * torch.log_softmax(x @ params["weight"] + params["bias"], dim=1)).sum(dim=1)

    def inner() -> Any:
        fit = (torch.sigmoid(hparams["weights"]) * errors(x, y)).mean()
        squares = sum((value**2).sum() for value in params.values())
        return fit + (0.5 * hparams["log_decay"].exp() * squares if case.ridge == "inside" else 0)

    def outer() -> Any:
        return errors(clean_x, clean_y).mean() + 0.05 * (hparams["weights"] ** 2).sum()

    decay = hparams["log_decay"].exp()
    ridge = {"inside": None, "number": decay, "for each": decay * torch.ones(N, dtype=x.dtype)}
    out = hypergradient(
        inner, outer, params, hparams,
        solver=case.solver, ridge=ridge[case.ridge], rng=SEED, accumulate_grad=False,
    )  # fmt: skip

    def flat(tree: Any, names: tuple[str, str]) -> np.ndarray:
        return np.concatenate([tree[name].numpy().reshape(-1) for name in names])

    return Answer(
        flat(out.grads, ("log_decay", "weights")),
        flat(out.ihvp, ("bias", "weight")),
        out.info.num_products,
        out.info.rank,
        int(out.solution.reason),
    )


def by_jax(case: Case, dtype: str, *, jit: bool = True) -> Answer:
    jax = pytest.importorskip("jax")
    import jax.numpy as jnp

    from lowrank_inverse_jax import hypergradient

    d = data(dtype)

    def errors(params: Any, x: Any, y: Any) -> Any:
        return -jnp.sum(y * jax.nn.log_softmax(x @ params["weight"] + params["bias"]), axis=1)

    def inner(params: Any, hparams: Any) -> Any:
        fit = jnp.mean(jax.nn.sigmoid(hparams["weights"]) * errors(params, d.x, d.y))
        squares = sum(jnp.sum(value**2) for value in params.values())
        decay = 0.5 * jnp.exp(hparams["log_decay"])
        return fit + (decay * squares if case.ridge == "inside" else 0)

    def outer(params: Any, hparams: Any) -> Any:
        fit = jnp.mean(errors(params, d.clean_x, d.clean_y))
        return fit + 0.05 * jnp.sum(hparams["weights"] ** 2)

    def ridge(hparams: Any) -> Any:
        decay = jnp.exp(hparams["log_decay"])
        return decay if case.ridge == "number" else decay * jnp.ones(N, dtype)

    def run(params: Any, hparams: Any) -> Any:
        return hypergradient(
            inner, outer, params, hparams,
            solver=case.solver, ridge=None if case.ridge == "inside" else ridge, rng=SEED,
        )  # fmt: skip

    with x64(dtype == "float64"):
        params = {"bias": jnp.asarray(d.theta[0]), "weight": jnp.asarray(d.theta[1:])}
        hparams = {"log_decay": jnp.asarray(d.log_decay), "weights": jnp.asarray(d.weights)}
        out = (jax.jit(run) if jit else run)(params, hparams)

        def flat(tree: Any) -> np.ndarray:
            leaves = jax.tree_util.tree_leaves(tree)  # in the order of the names
            return np.concatenate([np.asarray(leaf).reshape(-1) for leaf in leaves])

        return Answer(
            flat(out.grads),
            flat(out.ihvp),
            int(out.info.num_products),
            None if out.info.rank is None else int(out.info.rank),
            int(out.solution.reason),
        )


def relative(found: np.ndarray, wanted: np.ndarray) -> float:
    difference = np.asarray(found, np.float64) - np.asarray(wanted, np.float64)
    return float(np.linalg.norm(difference) / np.linalg.norm(wanted))


FRAMEWORKS = {
    "torch": by_torch,
    "jax": by_jax,
    "eager jax": lambda case, dtype: by_jax(case, dtype, jit=False),
}
QUICK = ("exact", "cg", "nystrom", "nystrom-cg", "nystrom, ridge for each")
"""What jax is asked in float32 too, where time is short."""


def table(quick: Any) -> Any:
    """Run every case in every framework; slow are eager jax, and jax where not `quick`."""
    return pytest.mark.parametrize(
        ("case", "framework"),
        [
            pytest.param(
                case,
                framework,
                id=f"{name}-{framework}",
                marks=[]
                if framework == "torch" or (framework == "jax" and name in quick)
                else [pytest.mark.slow],
            )
            for name, case in CASES.items()
            for framework in FRAMEWORKS
        ],
    )


@table(quick=CASES)
def test_in_float64_all_frameworks_give_one_hypergradient_for_one_seed(case, framework):
    wanted = by_numpy(case, "float64")
    found = FRAMEWORKS[framework](case, "float64")
    assert found.grads.dtype == found.ihvp.dtype == np.float64
    assert relative(found.grads, wanted.grads) < 1e-10
    assert relative(found.ihvp, wanted.ihvp) < 1e-10
    assert found.num_products == wanted.num_products
    assert found.rank == wanted.rank
    assert found.reason == wanted.reason


@table(quick=QUICK)
def test_in_float32_all_frameworks_agree_to_rounding(case, framework):
    wanted = by_numpy(case, "float64")
    found = FRAMEWORKS[framework](case, "float32")
    assert found.grads.dtype == found.ihvp.dtype == np.float32
    assert relative(found.grads, wanted.grads) < case.float32
    assert relative(found.ihvp, wanted.ihvp) < case.float32
    assert found.num_products == wanted.num_products
    assert found.rank == wanted.rank


@pytest.mark.parametrize("name", ["nystrom", "nystrom, streamed", "nystrom, ridge for each"])
def test_other_columns_would_show(name):
    case = CASES[name]
    wanted = by_numpy(case, "float64")
    other = Case(li.Nystrom(damping=0.05, indices=tuple(range(7))), case.ridge)
    assert relative(by_numpy(other, "float64").grads, wanted.grads) > 1e-3


def test_the_closed_form_is_that_of_the_loss_by_finite_differences_of_its_gradient():
    """The NumPy answer with the exact inverse against one from differences alone."""
    d = data("float64")
    h = 1e-6

    def gradient(theta: np.ndarray, log_decay: float, weights: np.ndarray) -> np.ndarray:
        X = with_ones(d.x)
        p = softmax(X @ theta.reshape(d.theta.shape))
        sigma = 1 / (1 + np.exp(-weights))
        fit = X.T @ ((p - d.y) * sigma[:, None]) / NUM_EXAMPLES
        return fit.reshape(-1) + np.exp(log_decay) * theta

    def validation(theta: np.ndarray) -> float:
        z = with_ones(d.clean_x) @ theta.reshape(d.theta.shape)
        return float(-np.mean(np.sum(d.clean_y * np.log(softmax(z)), axis=1)))

    def differences(function: Any, at: np.ndarray) -> np.ndarray:
        steps = h * np.eye(at.size)
        return np.stack([(function(at + e) - function(at - e)) / (2 * h) for e in steps])

    theta, log_decay = d.theta.reshape(-1), float(d.log_decay)
    H = differences(lambda t: gradient(t, log_decay, d.weights), theta)
    phi = np.append(log_decay, d.weights)
    mixed = differences(lambda p: gradient(theta, p[0], p[1:]), phi)
    q = np.linalg.solve(H, differences(validation, theta))
    wanted = np.append(0.0, 0.1 * d.weights) - mixed @ q
    assert relative(by_numpy(Case(li.Exact()), "float64").grads, wanted) < 1e-7
