"""Hypergradients of live models against the implicit formula written out with dense matrices."""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

import lowrank_inverse as li

torch = pytest.importorskip("torch")

import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from lowrank_inverse.bilevel.diagnostics import HypergradientWarning
from lowrank_inverse_torch import HessianOperator, hypergradient

NUM_EXAMPLES, NUM_FEATURES, NUM_CLASSES, NUM_HIDDEN = 8, 3, 2, 4
N = NUM_HIDDEN * (NUM_FEATURES + 1) + NUM_CLASSES * (NUM_HIDDEN + 1)
N_LINEAR = NUM_CLASSES * (NUM_FEATURES + 1)

Tree = dict[str, Tensor]


# Problems and the dense oracle.


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(NUM_FEATURES, NUM_HIDDEN), nn.Tanh(), nn.Linear(NUM_HIDDEN, NUM_CLASSES)
    )


def linear() -> nn.Module:
    return nn.Linear(NUM_FEATURES, NUM_CLASSES)


class Tied(nn.Module):
    """Two layers with one weight, the same parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Problem:
    """Weighted classification: weights and decay of the inner loss are the hyperparameters.

    The two losses are written once, as functions of a forward pass, the parameters and the
    hyperparameters: the closures apply them to the live model, the oracle to tensors of its own.
    """

    def __init__(
        self,
        make: Callable[[], nn.Module] = mlp,
        *,
        dtype: torch.dtype = torch.float64,
        decay: float = 0.5,
    ) -> None:
        torch.manual_seed(3)
        # The same numbers in every dtype.
        self.model = make().to(torch.float64).to(dtype)
        draws = torch.randn(2, NUM_EXAMPLES, NUM_FEATURES, dtype=torch.float64).to(dtype)
        self.x, self.clean_x = draws
        self.y = torch.arange(NUM_EXAMPLES) % NUM_CLASSES
        self.clean_y = torch.arange(NUM_EXAMPLES) // 2 % NUM_CLASSES
        weights = torch.linspace(-1, 1, NUM_EXAMPLES, dtype=dtype)
        self.hparams: Tree = {
            "weights": weights.requires_grad_(),
            "log_decay": torch.tensor(math.log(decay), dtype=dtype, requires_grad=True),
        }

    def data_term(self, forward: Any, hparams: Tree) -> Tensor:
        losses = F.cross_entropy(forward(self.x), self.y, reduction="none")
        return (torch.sigmoid(hparams["weights"]) * losses).mean()

    def inner(self, forward: Any, params: Tree, hparams: Tree) -> Tensor:
        squares = sum((value**2).sum() for value in params.values())
        return self.data_term(forward, hparams) + 0.5 * hparams["log_decay"].exp() * squares

    def outer(self, forward: Any, params: Tree, hparams: Tree) -> Tensor:
        loss = F.cross_entropy(forward(self.clean_x), self.clean_y)
        return loss + 0.05 * (hparams["weights"] ** 2).sum()

    def trainable(self) -> Tree:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def inner_loss(self) -> Tensor:
        return self.inner(self.model, self.trainable(), self.hparams)

    def outer_loss(self) -> Tensor:
        return self.outer(self.model, self.trainable(), self.hparams)

    def hypergradient(self, **options: Any) -> Any:
        arguments = {
            "inner_loss": self.inner_loss,
            "outer_loss": self.outer_loss,
            "params": self.model,
            "hparams": self.hparams,
            "solver": li.Exact(),
            "accumulate_grad": False,
        }
        return hypergradient(**{**arguments, **options})

    def dense(self) -> Dense:
        def applied(loss: Any) -> Callable[[Tree, Tree], Tensor]:
            def function(params: Tree, hparams: Tree) -> Tensor:
                return loss(lambda x: functional_call(self.model, params, (x,)), params, hparams)

            return function

        return dense(applied(self.inner), applied(self.outer), self.trainable(), self.hparams)


class Dense(NamedTuple):
    """All that Eq. (3) is made of, in NumPy's float64."""

    hessian: np.ndarray
    mixed: np.ndarray
    inner_grad: np.ndarray
    outer_grad: np.ndarray
    direct: np.ndarray

    def ihvp(self, damping: Any = 0.0) -> np.ndarray:
        damped = self.hessian + damping * np.eye(len(self.hessian))
        return np.linalg.solve(damped, self.outer_grad)

    def at(self, q: np.ndarray) -> np.ndarray:
        return self.direct - self.mixed.T @ q


def dense(inner: Any, outer: Any, params: Tree, hparams: Tree) -> Dense:
    """Differentiate two functions of (params, hparams) by torch.func, on flat vectors."""

    def on_vectors(function: Any) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda t, p: function(split(t, params), split(p, hparams))

    f, g = on_vectors(inner), on_vectors(outer)
    at = (joined(params).double(), joined(hparams).double())
    gradient = torch.func.jacrev(f)
    parts = (
        torch.func.hessian(f)(*at),
        torch.func.jacrev(gradient, argnums=1)(*at),
        gradient(*at),
        *torch.func.jacrev(g, argnums=(0, 1))(*at),
    )
    return Dense(*(part.detach().numpy() for part in parts))


def joined(tree: Tree) -> Tensor:
    return torch.cat([value.detach().reshape(-1) for value in tree.values()])


def split(vector: Tensor, like: Tree) -> Tree:
    parts = vector.split([value.numel() for value in like.values()])
    return {
        name: part.reshape(value.shape)
        for (name, value), part in zip(like.items(), parts, strict=True)
    }


def leaves(tree: Any) -> list[Tensor]:
    """Tensors of any structure of dicts, lists and tuples, in order."""
    if tree is None:
        return []
    if isinstance(tree, Tensor):
        return [tree]
    children = tree.values() if isinstance(tree, dict) else tree
    return [leaf for child in children for leaf in leaves(child)]


def vector(tree: Any) -> np.ndarray:
    return np.concatenate([leaf.detach().double().numpy().reshape(-1) for leaf in leaves(tree)])


def relative(found: Any, wanted: Any) -> float:
    """Relative error of one flat vector, or of two structures of tensors."""
    found, wanted = (
        value if isinstance(value, np.ndarray) else vector(value) for value in (found, wanted)
    )
    assert found.shape == wanted.shape
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def richardson(matvec: Callable[[Tensor], Tensor], b: Tensor) -> Tensor:
    """Four steps of a solver that a user might bring."""
    x = torch.zeros_like(b)
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

    def __matmul__(self, v: Tensor) -> Tensor:
        self.count += 1 if v.ndim == 1 else v.shape[1]
        return super().__matmul__(v)

    def columns(self, indices: Any) -> Tensor:
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
    "nystrom-cg": (li.NystromCG(rank=8, rtol=1e-13), 0.0),
    "nystrom-cg, damped": (li.NystromCG(rank=8, rtol=1e-13, damping=0.3), 0.3),
    "nystrom of rank n": (li.Nystrom(rank=N, damping=0.3), 0.3),
    "nystrom of rank n, chunked": (
        li.Nystrom(rank=N, damping=0.3, memory="chunked", chunk_size=10),
        0.3,
    ),
    "nystrom of rank n, streamed": (li.Nystrom(rank=N, damping=0.3, memory="streamed"), 0.3),
}

each_solver = pytest.mark.parametrize(("solver", "damping"), SOLVERS.values(), ids=SOLVERS)


@each_solver
def test_hypergradient_equals_the_dense_implicit_formula_on_a_multi_tensor_network(solver, damping):
    problem = Problem()
    oracle = problem.dense()
    assert oracle.hessian.shape == (N, N)
    assert np.linalg.eigvalsh(oracle.hessian)[0] > 0
    out = problem.hypergradient(solver=solver, rng=0)
    q = oracle.ihvp(damping)
    assert relative(out.grads, oracle.at(q)) < 1e-8
    assert relative(out.ihvp, q) < 1e-8


@each_solver
def test_float32_hypergradient_agrees_with_the_dense_formula_to_rounding(solver, damping):
    out = Problem(dtype=torch.float32).hypergradient(solver=solver, rng=0)
    oracle = Problem().dense()
    assert all(leaf.dtype is torch.float32 for leaf in leaves([out.grads, out.ihvp]))
    assert relative(out.grads, oracle.at(oracle.ihvp(damping))) < 2e-5


def test_grads_are_the_sum_of_the_direct_and_the_implicit_part():
    problem = Problem()
    oracle = problem.dense()
    out = problem.hypergradient()
    assert np.linalg.norm(oracle.direct) > 0
    assert relative(out.direct, oracle.direct) < 1e-12
    assert relative(out.implicit, -oracle.mixed.T @ oracle.ihvp()) < 1e-8
    assert relative(out.grads, vector(out.direct) + vector(out.implicit)) < 1e-15


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
    out = problem.hypergradient(solver=li.Neumann(num_terms=200))
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


def mean_errors(solvers: list[Any]) -> list[float]:
    """Errors of hypergradients of the convex problem with a ridge, over five seeds."""
    problem = Problem(linear)
    options = {
        "inner_loss": lambda: problem.data_term(problem.model, problem.hparams),
        "ridge": 0.02,
    }

    def error(solver: Any, seed: int) -> float:
        wanted = problem.hypergradient(solver=li.Exact(damping=solver.damping), **options)
        found = problem.hypergradient(solver=solver, rng=seed, **options)
        return relative(found.grads, wanted.grads)

    return [float(np.mean([error(solver, seed) for seed in range(5)])) for solver in solvers]


def test_nystrom_comes_closer_to_the_exact_hypergradient_as_its_rank_grows():
    errors = mean_errors([li.Nystrom(rank=rank, damping=0.01) for rank in (1, 2, 3, N_LINEAR)])
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1
    assert errors[-1] < 1e-8


def test_refining_steps_bring_nystrom_closer():
    errors = mean_errors([li.Nystrom(rank=2, damping=0.01, refine=steps) for steps in (0, 1, 2, 8)])
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 * errors[0]


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


@pytest.mark.parametrize("inside", [True, False], ids=["decay in the loss", "decay as ridge"])
@pytest.mark.parametrize(
    "solver",
    [li.Exact(), li.CG(rtol=1e-12), li.NystromCG(rank=2, rtol=1e-12)],
    ids=["exact", "cg", "nystrom-cg"],
)
def test_at_the_minimiser_it_equals_finite_differences_of_the_inner_problem_solved_anew(
    solver, inside
):
    problem = Ridged()
    x, y, clean_x, clean_y = map(
        torch.from_numpy, (problem.x, problem.y, problem.clean_x, problem.clean_y)
    )
    theta = torch.from_numpy(problem.minimiser(problem.phi)).requires_grad_()
    phi = torch.from_numpy(problem.phi).requires_grad_()

    def inner() -> Tensor:
        loss = 0.5 * (phi[:9].exp() * (x @ theta - y) ** 2).sum()
        return loss + 0.5 * (phi[9:].exp() * theta**2).sum() if inside else loss

    def outer() -> Tensor:
        return 0.5 * ((clean_x @ theta - clean_y) ** 2).sum() + 0.1 * (phi**3).sum()

    ridge = None if inside else phi[9:].exp()
    out = hypergradient(inner, outer, theta, phi, solver=solver, ridge=ridge, rng=0)
    assert out.info.inner_grad_norm < 1e-12
    assert relative(out.grads, problem.finite_differences()) < 1e-8


def test_the_error_of_nystrom_stays_below_the_bound_of_theorem_1():
    problem = Problem(linear, decay=1e-12)
    oracle = problem.dense()
    H, n = oracle.hessian, N_LINEAR
    assert np.linalg.eigvalsh(H)[0] > -1e-12
    norm = np.linalg.norm
    tightest = math.inf
    for seed in range(6):
        for rank in (1, 2, 4):
            indices = np.random.default_rng(seed).choice(n, rank, replace=False)
            C, W = H[:, indices], H[np.ix_(indices, indices)]
            missed = norm(H - C @ np.linalg.pinv(W, rcond=1e-12, hermitian=True) @ C.T, 2)
            for damping in (1e-3, 1e-2, 1e-1):
                solver = li.Nystrom(damping=damping, indices=tuple(indices))
                found = vector(problem.hypergradient(solver=solver).grads)
                error = norm(found - oracle.at(oracle.ihvp(damping)))
                bound = norm(oracle.outer_grad) * norm(oracle.mixed, 2)
                bound *= missed / (damping * (damping + missed))
                assert error <= bound + 1e-12
                tightest = min(tightest, bound / error)
    assert tightest < 20  # the bound says something on this problem


# Forms of the parameters.


def test_live_parameters_may_come_in_any_structure_and_the_ihvp_comes_back_in_it():
    problem = Problem()
    first, second = problem.model[0], problem.model[2]
    wanted = problem.hypergradient()
    assert list(wanted.ihvp) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    forms = {
        "list": list(problem.model.parameters()),
        "iterator": problem.model.parameters(),
        "dict": dict(problem.model.named_parameters()),
        "modules": [first, second],
        "nested": {"a": (first.weight, [first.bias]), "b": second},
    }
    found = {name: problem.hypergradient(params=form) for name, form in forms.items()}
    for out in found.values():
        assert relative(out.grads, wanted.grads) < 1e-14
        assert relative(out.ihvp, wanted.ihvp) < 1e-14
    assert isinstance(found["list"].ihvp, list)
    assert isinstance(found["iterator"].ihvp, list)
    assert list(found["dict"].ihvp) == list(wanted.ihvp)
    assert list(found["modules"].ihvp[1]) == ["weight", "bias"]
    nested = found["nested"].ihvp
    assert isinstance(nested["a"], tuple)
    assert nested["a"][0].shape == first.weight.shape
    assert nested["a"][1][0].shape == first.bias.shape


def test_a_single_tensor_of_any_shape_is_a_parameter():
    x, y = torch.randn(6, 2, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)
    w = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    h = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)

    def inner(p: Tree, h: Tree) -> Tensor:
        return ((x @ p["w"] - y) ** 2).sum() + h["h"].exp() * (p["w"] ** 2).sum()

    def outer(p: Tree, h: Tree) -> Tensor:
        return (p["w"] ** 3).sum()

    oracle = dense(inner, outer, {"w": w}, {"h": h})
    out = hypergradient(
        lambda: inner({"w": w}, {"h": h}), lambda: outer({"w": w}, {}), w, h, solver=li.CG()
    )
    assert out.ihvp.shape == (2, 3)
    assert out.grads.shape == ()
    assert relative(out.grads, oracle.at(oracle.ihvp())) < 1e-8


def test_a_scalar_problem_has_the_textbook_answer():
    # argmin (w - 3)² / 2 + h w² / 2 is 3 / (1 + h); the derivative of its square is known.
    h = torch.tensor(2.0, requires_grad=True)
    w = torch.tensor(1.0, requires_grad=True)
    out = hypergradient(
        lambda: 0.5 * (w - 3) ** 2, lambda: w**2, w, h, solver=li.Nystrom(rank=1, damping=1e-7),
        ridge=h,
    )  # fmt: skip
    assert out.grads.item() == pytest.approx(-2 * 3**2 / 3**3, rel=1e-5)
    assert out.ihvp.item() == pytest.approx(2 / 3, rel=1e-5)


def test_parameters_that_are_no_leaves_are_differentiated_by():
    problem = Problem(linear)
    raw = joined(problem.trainable()).requires_grad_()
    params = {name: 1.0 * value for name, value in split(raw, problem.trainable()).items()}

    def forward(x: Tensor) -> Tensor:
        return functional_call(problem.model, params, (x,))

    out = problem.hypergradient(
        inner_loss=lambda: problem.inner(forward, params, problem.hparams),
        outer_loss=lambda: problem.outer(forward, params, problem.hparams),
        params=params,
    )
    assert relative(out.grads, problem.hypergradient().grads) < 1e-14


def test_frozen_parameters_are_constants_and_none_in_the_ihvp():
    problem = Problem()
    problem.model[0].bias.requires_grad_(False)
    problem.model[2].weight.requires_grad_(False)
    oracle = problem.dense()
    assert oracle.outer_grad.size == N - NUM_HIDDEN * (1 + NUM_CLASSES)
    out = problem.hypergradient()
    assert relative(out.grads, oracle.at(oracle.ihvp())) < 1e-8
    assert out.ihvp["0.bias"] is None
    assert out.ihvp["2.weight"] is None
    assert relative(out.ihvp, oracle.ihvp()) < 1e-8


def test_tied_parameters_count_once():
    problem = Problem(Tied)
    oracle = problem.dense()
    assert oracle.outer_grad.size == 9 + 3 + 3
    out = problem.hypergradient()
    assert relative(out.grads, oracle.at(oracle.ihvp())) < 1e-8
    assert out.ihvp["first.weight"].shape == (3, 3)
    assert list(out.ihvp) == [name for name, _ in problem.model.named_parameters()]


def test_tied_tensors_of_a_list_share_their_part_of_the_ihvp():
    problem = Problem(Tied)
    first, second = problem.model.first, problem.model.second
    out = problem.hypergradient(params=[first.weight, first.bias, second.weight, second.bias])
    assert out.ihvp[0] is out.ihvp[2]
    assert relative(out.grads, problem.hypergradient().grads) < 1e-14


def dead_relu() -> nn.Module:
    model = nn.Sequential(
        nn.Linear(NUM_FEATURES, NUM_HIDDEN), nn.ReLU(), nn.Linear(NUM_HIDDEN, NUM_CLASSES)
    )
    with torch.no_grad():
        model[0].bias[1:3] = -100.0
    return model


def test_dead_relus_and_their_zero_columns_are_no_trouble():
    problem = Problem(dead_relu, decay=1e-300)
    oracle = problem.dense()
    H, damping = oracle.hessian, 0.5
    dead = np.abs(H).max(axis=0) < 1e-100
    assert dead.sum() >= 2 * (NUM_FEATURES + 1)
    out = problem.hypergradient(solver=li.Exact(damping=damping))
    assert relative(out.grads, oracle.at(oracle.ihvp(damping))) < 1e-8
    # The dead columns, and those of the last layer, where the Hessian is positive semidefinite.
    zero = np.flatnonzero(dead)
    live = np.array([i for i in range(NUM_HIDDEN * (NUM_FEATURES + 1), N) if not dead[i]])
    W = H[np.ix_(live, live)]
    H_k = H[:, live] @ np.linalg.pinv(W, rcond=1e-10, hermitian=True) @ H[:, live].T
    q = np.linalg.solve(H_k + damping * np.eye(N), oracle.outer_grad)
    solver = li.Nystrom(damping=damping, indices=(*live, *zero))
    out = problem.hypergradient(solver=solver)
    assert relative(out.grads, oracle.at(q)) < 1e-7
    assert out.info.rank == np.linalg.matrix_rank(W, tol=1e-10)


# Forms of the hyperparameters.


def test_hparams_may_be_a_dict_a_list_or_a_single_tensor():
    problem = Problem()
    weights, log_decay = problem.hparams.values()
    wanted = problem.hypergradient()
    assert list(wanted.grads) == ["weights", "log_decay"]
    assert wanted.grads["weights"].shape == weights.shape
    assert wanted.grads["log_decay"].shape == ()
    for part in (wanted.direct, wanted.implicit):
        assert list(part) == ["weights", "log_decay"]
    listed = problem.hypergradient(hparams=[weights, log_decay])
    assert isinstance(listed.grads, list)
    assert relative(listed.grads, wanted.grads) < 1e-14
    nested = problem.hypergradient(hparams=((log_decay,), {"w": weights}))
    assert relative(nested.grads[1]["w"], wanted.grads["weights"]) < 1e-14
    single = problem.hypergradient(hparams=weights)
    assert isinstance(single.grads, Tensor)
    assert relative(single.grads, wanted.grads["weights"]) < 1e-14


def test_hparams_may_be_a_module_such_as_a_weight_network():
    problem = Problem()
    weigh = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    names = {name: p for name, p in weigh.named_parameters()}

    def inner(forward: Any, params: Tree, hparams: Tree) -> Tensor:
        losses = F.cross_entropy(forward(problem.x), problem.y, reduction="none")
        weights = functional_call(weigh, hparams, (losses.detach()[:, None],))
        squares = sum((value**2).sum() for value in params.values())
        return (torch.sigmoid(weights[:, 0]) * losses).mean() + 0.3 * squares

    def outer(forward: Any, params: Tree, hparams: Tree) -> Tensor:
        return F.cross_entropy(forward(problem.clean_x), problem.clean_y)

    with torch.no_grad():
        fixed = F.cross_entropy(problem.model(problem.x), problem.y, reduction="none")

    def functional_inner(params: Tree, hparams: Tree) -> Tensor:
        losses = F.cross_entropy(
            functional_call(problem.model, params, (problem.x,)), problem.y, reduction="none"
        )
        weights = functional_call(weigh, hparams, (fixed[:, None],))
        squares = sum((value**2).sum() for value in params.values())
        return (torch.sigmoid(weights[:, 0]) * losses).mean() + 0.3 * squares

    def functional_outer(params: Tree, hparams: Tree) -> Tensor:
        z = functional_call(problem.model, params, (problem.clean_x,))
        return F.cross_entropy(z, problem.clean_y)

    oracle = dense(functional_inner, functional_outer, problem.trainable(), names)
    out = problem.hypergradient(
        inner_loss=lambda: inner(problem.model, problem.trainable(), names),
        outer_loss=lambda: outer(problem.model, problem.trainable(), names),
        hparams=weigh,
        accumulate_grad=True,
    )
    assert list(out.grads) == list(names)
    assert relative(out.grads, oracle.at(oracle.ihvp())) < 1e-8
    assert all(torch.equal(p.grad, out.grads[name]) for name, p in names.items())
    assert np.all(vector(out.direct) == 0)


def test_hparams_that_are_no_leaves_give_gradients_that_flow_on_by_hand():
    problem = Problem()
    wanted = problem.hypergradient()
    raw = [value.detach() / 2 for value in problem.hparams.values()]
    for value in raw:
        value.requires_grad_()
    problem.hparams = {"weights": 2 * raw[0], "log_decay": 2 * raw[1]}
    out = problem.hypergradient(accumulate_grad=True)
    assert relative(out.grads, wanted.grads) < 1e-14
    assert all(value.grad is None for value in raw)
    torch.autograd.backward(list(problem.hparams.values()), list(out.grads.values()))
    assert relative([value.grad for value in raw], 2 * vector(wanted.grads)) < 1e-14


def test_closures_may_share_what_was_computed_from_the_hparams_before():
    problem = Problem(linear)
    weights = problem.hparams["weights"]
    positive = torch.sigmoid(weights)  # one graph, evaluated once, used by all closures

    def inner() -> Tensor:
        losses = F.cross_entropy(problem.model(problem.x), problem.y, reduction="none")
        squares = sum((p**2).sum() for p in problem.model.parameters())
        return (positive * losses).mean() + 0.1 * squares

    def outer() -> Tensor:
        losses = F.cross_entropy(problem.model(problem.clean_x), problem.clean_y, reduction="none")
        return (positive * losses).mean()

    def fresh(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            nonlocal positive
            positive = torch.sigmoid(weights)
            return loss()

        return closure

    options = {"hparams": weights}
    wanted = problem.hypergradient(inner_loss=fresh(inner), outer_loss=fresh(outer), **options)
    found = problem.hypergradient(inner_loss=inner, outer_loss=outer, **options)
    assert relative(found.grads, wanted.grads) < 1e-14
    found = problem.hypergradient(inner_loss=[inner, inner], outer_loss=[outer, outer], **options)
    assert relative(found.grads, wanted.grads) < 1e-14
    positive.sum().backward()  # and the caller may still use it


def test_frozen_hparams_have_no_gradient():
    problem = Problem()
    wanted = problem.hypergradient()
    problem.hparams["weights"].requires_grad_(False)
    out = problem.hypergradient(accumulate_grad=True)
    assert out.grads["weights"] is None
    assert problem.hparams["weights"].grad is None
    assert relative(out.grads["log_decay"], wanted.grads["log_decay"]) < 1e-14


def test_hparams_may_have_another_dtype_than_the_parameters():
    problem = Problem(dtype=torch.float32)
    wanted = problem.hypergradient()
    problem.hparams = {
        name: value.detach().double().requires_grad_() for name, value in problem.hparams.items()
    }
    for solver in (li.Exact(), li.NystromCG(rank=4, rtol=1e-6)):
        out = problem.hypergradient(solver=solver, rng=0)
        assert all(leaf.dtype is torch.float64 for leaf in leaves(out.grads))
        assert all(leaf.dtype is torch.float32 for leaf in leaves(out.ihvp))
        assert relative(out.grads, wanted.grads) < 1e-4


def test_hparams_without_path_are_named_and_have_zeros():
    problem = Problem()
    wanted = problem.hypergradient()
    idle = [torch.ones(2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    hparams = {**problem.hparams, "idle": {"a": idle[0]}, "more": [idle[1]]}
    out = problem.hypergradient(hparams=hparams, accumulate_grad=True)
    assert out.info.hparams_without_path == ("idle.a", "more.0")
    for part in (out.grads, out.direct, out.implicit):
        assert torch.equal(part["idle"]["a"], torch.zeros(2, 2, dtype=torch.float64))
        assert torch.equal(part["more"][0], torch.zeros(2, 2, dtype=torch.float64))
    assert idle[0].grad is None
    assert relative(out.grads["weights"], wanted.grads["weights"]) < 1e-14
    assert wanted.info.hparams_without_path == ()


def test_hparams_of_the_outer_loss_alone_have_a_direct_part_and_no_implicit_one():
    problem = Problem()
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    value = problem.outer_loss().item()
    out = problem.hypergradient(
        outer_loss=lambda: scale**2 * problem.outer_loss(), hparams={**problem.hparams, "s": scale}
    )
    assert out.grads["s"].item() == pytest.approx(2 * 1.5 * value, rel=1e-12)
    assert out.implicit["s"].item() == 0
    assert out.info.hparams_without_path == ()
    assert relative(out.implicit["weights"], 1.5**2 * vector(problem.hypergradient().implicit)[:-1])


# The model comes back as it was.


class Stochastic(nn.Module):
    """Dropout and BatchNorm in training mode, one layer in evaluation mode, a buffer assigned."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(NUM_FEATURES, NUM_HIDDEN), nn.BatchNorm1d(NUM_HIDDEN)
        self.drop, self.rest = nn.Dropout(0.4), nn.Dropout(0.5).eval()
        self.last = nn.Linear(NUM_HIDDEN, NUM_CLASSES)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return self.last(self.rest(self.drop(torch.tanh(self.norm(self.first(x))))))


def by_hand(problem: Problem, mask: Tensor) -> Dense:
    """The same network from its formulas, with a given mask."""

    def forward(params: Tree) -> Callable[[Tensor], Tensor]:
        def function(x: Tensor) -> Tensor:
            z = x @ params["first.weight"].T + params["first.bias"]
            z = (z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt()
            z = mask * torch.tanh(params["norm.weight"] * z + params["norm.bias"])
            return z @ params["last.weight"].T + params["last.bias"]

        return function

    return dense(
        lambda p, h: problem.inner(forward(p), p, h),
        lambda p, h: problem.outer(forward(p), p, h),
        problem.trainable(),
        problem.hparams,
    )


def snapshot(module: nn.Module) -> dict[str, Any]:
    named = list(module.named_parameters())
    return {
        "buffers": [(name, id(b), b._version, b.clone()) for name, b in module.named_buffers()],
        "modes": [part.training for part in module.modules()],
        "grads": [(name, id(p.grad), copy.deepcopy(p.grad)) for name, p in named],
        "values": [(name, id(p), p._version, p.detach().clone()) for name, p in named],
        "random": torch.get_rng_state(),
    }  # fmt: skip


def assert_same(before: dict[str, Any], now: dict[str, Any]) -> None:
    assert before["modes"] == now["modes"]
    assert torch.equal(before["random"], now["random"])
    for key in ("buffers", "grads", "values"):
        for old, new in zip(before[key], now[key], strict=True):
            assert old[:-1] == new[:-1]
            assert (old[-1] is None and new[-1] is None) or torch.equal(old[-1], new[-1])


def stochastic() -> Problem:
    problem = Problem(Stochastic, decay=2.0)  # enough for a positive definite Hessian
    problem.model.first.weight.grad = torch.ones_like(problem.model.first.weight)
    return problem


def test_batchnorm_and_dropout_in_training_mode_give_the_hypergradient_of_one_frozen_mask():
    problem = stochastic()
    state = torch.get_rng_state()
    mask = F.dropout(torch.ones(NUM_EXAMPLES, NUM_HIDDEN, dtype=torch.float64), 0.4)
    assert 0.0 in mask
    oracle = by_hand(problem, mask)
    n = len(oracle.hessian)
    for solver in (li.Exact(), li.CG(rtol=1e-12), li.Nystrom(rank=n, damping=0.1)):
        torch.set_rng_state(state)
        out = problem.hypergradient(solver=solver)
        assert relative(out.grads, oracle.at(oracle.ihvp(getattr(solver, "damping", 0)))) < 1e-8


@pytest.mark.parametrize("num_batches", [1, 2])
@pytest.mark.parametrize(
    "solver",
    [li.Exact(), li.CG(), li.Nystrom(rank=5, damping=1.0), li.Neumann(), li.Identity(), richardson],
    ids=["exact", "cg", "nystrom", "neumann", "identity", "callable"],
)
def test_buffers_mode_grads_and_random_state_come_back_as_they_were(solver, num_batches):
    problem = stochastic()
    before = snapshot(problem.model)
    problem.hypergradient(
        inner_loss=[problem.inner_loss] * num_batches,
        outer_loss=[problem.outer_loss] * num_batches,
        solver=solver,
        accumulate_grad=True,
    )
    assert_same(before, snapshot(problem.model))
    assert problem.hparams["weights"].grad is not None


def test_the_model_comes_back_as_it_was_after_an_error_too():
    problem = stochastic()
    before = snapshot(problem.model)

    def fails() -> Tensor:
        problem.outer_loss()
        problem.model.eval()
        raise KeyError("of the user")

    with pytest.raises(KeyError, match="of the user"):
        problem.hypergradient(outer_loss=fails, accumulate_grad=True)
    assert_same(before, snapshot(problem.model))
    assert problem.hparams["weights"].grad is None


def test_a_network_of_hyperparameters_comes_back_as_it_was():
    problem = Problem()
    weigh = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Dropout(0.2), nn.Linear(3, 1))
    weigh = weigh.double()
    before = snapshot(weigh)

    def inner() -> Tensor:
        losses = F.cross_entropy(problem.model(problem.x), problem.y, reduction="none")
        weights = torch.sigmoid(weigh(losses.detach()[:, None])[:, 0])
        squares = sum((p**2).sum() for p in problem.model.parameters())
        return (weights * losses).mean() + 0.3 * squares

    out = problem.hypergradient(inner_loss=inner, hparams=weigh)
    assert_same(before, snapshot(weigh))
    assert np.linalg.norm(vector(out.grads)) > 0


def test_a_module_named_beside_bare_tensors_is_guarded_too():
    problem = stochastic()
    params = list(problem.model.parameters())
    before = snapshot(problem.model)
    problem.hypergradient(params=params, module=problem.model)
    assert_same(before, snapshot(problem.model))
    problem.hypergradient(params=params, module=iter([problem.model]))
    assert_same(before, snapshot(problem.model))
    problem.hypergradient(params=params)
    assert problem.model.calls == 2  # nobody told that there was a module


# Accumulation.


def test_accumulate_grad_adds_to_what_is_there():
    problem = Problem()
    weights, log_decay = problem.hparams.values()
    weights.grad = torch.ones_like(weights)
    out = problem.hypergradient(accumulate_grad=True)
    assert torch.equal(weights.grad, 1 + out.grads["weights"])
    assert torch.equal(log_decay.grad, out.grads["log_decay"])
    problem.hypergradient(accumulate_grad=True)
    torch.testing.assert_close(weights.grad, 1 + 2 * out.grads["weights"])
    assert all(p.grad is None for p in problem.model.parameters())


def test_grads_are_returned_and_not_accumulated_unless_asked_for():
    problem = Problem()
    arguments = problem.inner_loss, problem.outer_loss, problem.model, problem.hparams
    out = hypergradient(*arguments)
    assert problem.hparams["weights"].grad is None
    again = hypergradient(*arguments, accumulate_grad=True)
    assert torch.equal(problem.hparams["weights"].grad, out.grads["weights"])
    assert torch.equal(again.grads["weights"], out.grads["weights"])


def test_without_a_solver_the_products_are_bounded_and_the_answer_is_close():
    problem = Problem()
    out = problem.hypergradient(solver=None)
    assert out.info.num_products <= 42
    exact = problem.hypergradient(solver=li.Exact())
    difference = (out.grads["weights"] - exact.grads["weights"]).norm()
    assert difference <= 1e-3 * exact.grads["weights"].norm()


def test_the_grads_returned_are_no_alias_of_what_was_accumulated():
    problem = Problem()
    out = problem.hypergradient(accumulate_grad=True)
    kept = out.grads["weights"].clone()
    problem.hparams["weights"].grad.zero_()
    assert torch.equal(out.grads["weights"], kept)


def test_without_accumulate_grad_the_grads_are_left_alone():
    problem = Problem()
    weights, log_decay = problem.hparams.values()
    mark = weights.grad = torch.full_like(weights, 7.0)
    problem.hypergradient(accumulate_grad=False)
    assert weights.grad is mark
    assert torch.equal(mark, torch.full_like(weights, 7.0))
    assert log_decay.grad is None


# The ridge.


class Decayed(NamedTuple):
    """A convex problem, with a ridge outside its inner loss and the same one inside."""

    problem: Problem
    ridge: Any
    hparams: Tree

    def outside(self, **options: Any) -> Any:
        problem = self.problem
        return problem.hypergradient(
            inner_loss=lambda: problem.data_term(problem.model, problem.hparams),
            hparams=self.hparams,
            ridge=self.ridge(self.hparams),
            **options,
        )

    def inside(self, **options: Any) -> Any:
        problem = self.problem

        def loss() -> Tensor:
            ridge = self.ridge(self.hparams)
            if isinstance(ridge, Tensor) and ridge.ndim == 1:
                ridge = split(ridge, problem.trainable())
            total = problem.data_term(problem.model, problem.hparams)
            for name, p in problem.trainable().items():
                r = ridge[name] if isinstance(ridge, dict) else ridge
                total = total + (0 if r is None else 0.5 * (r * p**2).sum())
            return total

        return problem.hypergradient(inner_loss=loss, hparams=self.hparams, **options)


SHAPES = {"weight": (NUM_CLASSES, NUM_FEATURES), "bias": (NUM_CLASSES,)}


def spread(*shape: int) -> Tensor:
    return torch.linspace(0.05, 2.0, math.prod(shape), dtype=torch.float64).reshape(shape)


RIDGES: dict[str, Callable[[Tree], Any]] = {
    "float": lambda h: 0.7,
    "zero": lambda h: 0.0,
    "int": lambda h: 2,
    "0-d": lambda h: torch.tensor(0.7, dtype=torch.float64),
    "0-d of hparams": lambda h: h["log_decay"].exp(),
    "hparam itself": lambda h: h["rate"],
    "flat": lambda h: spread(N_LINEAR),
    "flat of hparams": lambda h: (h["rates"] + h["log_decay"]).exp(),
    "structure": lambda h: {name: spread(*shape) for name, shape in SHAPES.items()},
    "structure of hparams": lambda h: {
        "weight": spread(*SHAPES["weight"]) * h["log_decay"].exp(),
        "bias": None,
    },
}
RIDGE_SOLVERS = {
    "exact": li.Exact(damping=0.1),
    "exact, undamped": li.Exact(),
    "cg": li.CG(damping=0.1, rtol=1e-13),
    "nystrom-cg": li.NystromCG(rank=4, damping=0.1, rtol=1e-13),
    "nystrom of rank n": li.Nystrom(rank=N_LINEAR, damping=0.1),
    "nystrom of rank n, chunked": li.Nystrom(rank=N_LINEAR, damping=0.1, memory="chunked"),
    "nystrom of rank n, streamed": li.Nystrom(rank=N_LINEAR, damping=0.1, memory="streamed"),
    "neumann": li.Neumann(damping=0.1, num_terms=5, step_size=0.2),
    "neumann, default step": li.Neumann(damping=0.1, num_terms=5),
    "identity": li.Identity(scale=0.5),
    "callable": richardson,
}


def decayed(ridge: Callable[[Tree], Any]) -> Decayed:
    problem = Problem(linear)
    rates = torch.linspace(-1, 1, N_LINEAR, dtype=torch.float64)
    rate = torch.tensor(0.4, dtype=torch.float64)
    hparams = {**problem.hparams, "rates": rates, "rate": rate}
    for value in hparams.values():
        value.requires_grad_()
    return Decayed(problem, ridge, hparams)


@pytest.mark.parametrize("solver", RIDGE_SOLVERS.values(), ids=RIDGE_SOLVERS)
@pytest.mark.parametrize("ridge", RIDGES.values(), ids=RIDGES)
def test_ridge_equals_the_same_term_inside_the_inner_loss(ridge, solver):
    case = decayed(ridge)
    outside, inside = case.outside(solver=solver, rng=0), case.inside(solver=solver, rng=0)
    assert relative(outside.grads, inside.grads) < 1e-8
    assert relative(outside.ihvp, inside.ihvp) < 1e-8
    assert outside.info.inner_grad_norm == pytest.approx(inside.info.inner_grad_norm, rel=1e-12)
    assert outside.info.hparams_without_path == inside.info.hparams_without_path
    assert outside.info.relative_residual == pytest.approx(
        inside.info.relative_residual, rel=1e-6, abs=1e-9
    )


def test_hypergradient_of_a_decay_for_each_parameter_equals_the_dense_formula():
    case = decayed(RIDGES["flat of hparams"])
    problem = case.problem

    def inner(params: Tree, hparams: Tree) -> Tensor:
        loss = problem.data_term(lambda x: functional_call(problem.model, params, (x,)), hparams)
        theta = torch.cat([value.reshape(-1) for value in params.values()])
        return loss + 0.5 * ((hparams["rates"] + hparams["log_decay"]).exp() * theta**2).sum()

    def outer(params: Tree, hparams: Tree) -> Tensor:
        forward = lambda x: functional_call(problem.model, params, (x,))  # noqa: E731
        return problem.outer(forward, params, hparams)

    oracle = dense(inner, outer, problem.trainable(), case.hparams)
    out = case.outside(solver=li.NystromCG(rank=4, rtol=1e-13), rng=0)
    assert relative(out.grads, oracle.at(oracle.ihvp())) < 1e-8
    assert out.info.inner_grad_norm == pytest.approx(np.linalg.norm(oracle.inner_grad), rel=1e-12)
    assert out.info.hparams_without_path == ("rate",)


def test_a_ridge_of_tied_and_frozen_parameters_follows_their_structure():
    problem = Problem(Tied)
    problem.model.first.bias.requires_grad_(False)
    rate = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    ridge = {
        name: rate * torch.ones_like(p) if p.requires_grad else None
        for name, p in problem.model.named_parameters()
    }
    hparams = {**problem.hparams, "rate": rate}

    def with_term() -> Tensor:
        squares = sum((p**2).sum() for p in problem.trainable().values())
        return problem.inner_loss() + 0.5 * rate * squares

    outside = problem.hypergradient(ridge=ridge, hparams=hparams)
    inside = problem.hypergradient(inner_loss=with_term, hparams=hparams)
    assert relative(outside.grads, inside.grads) < 1e-8
    flat = problem.hypergradient(ridge=rate.expand(9 + 3), hparams=hparams)
    assert relative(flat.grads, inside.grads) < 1e-8


def test_a_ridge_for_a_single_matrix_may_be_flat_or_of_its_shape():
    x = torch.randn(6, 2, dtype=torch.float64)
    w = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    h = torch.randn(6, 1, dtype=torch.float64, requires_grad=True)

    def run(ridge: Tensor) -> Tensor:
        return hypergradient(
            lambda: (h.exp() * (x @ w - 1) ** 2).sum(), lambda: (w**3).sum(), w, h,
            solver=li.Exact(), ridge=ridge,
        ).grads  # fmt: skip

    ridge = spread(2, 3)
    torch.testing.assert_close(run(ridge), run(ridge.reshape(-1)), rtol=1e-14, atol=0)


def test_hparams_may_act_through_the_ridge_alone():
    problem = Problem(linear)
    rate = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    out = problem.hypergradient(hparams=rate, ridge=rate.exp(), accumulate_grad=True)
    assert abs(out.grads.item()) > 1e-3
    assert torch.equal(rate.grad, out.grads)
    rate.exp().backward()


def test_a_ridge_graph_may_be_used_again_by_the_caller():
    problem = Problem(linear)
    ridge = problem.hparams["log_decay"].exp()
    first = problem.hypergradient(ridge=ridge)
    again = problem.hypergradient(ridge=ridge)
    assert relative(again.grads, first.grads) < 1e-14
    ridge.backward()


def test_a_ridge_of_another_precision_is_converted():
    problem = Problem(linear, dtype=torch.float32)
    wanted = problem.hypergradient(ridge=0.5)
    rate = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    hparams = [problem.hparams["weights"]]
    for ridge in (rate, rate * torch.ones(N_LINEAR, dtype=torch.float64)):
        out = problem.hypergradient(ridge=ridge)
        assert relative(out.grads, wanted.grads) < 1e-6
        assert problem.hypergradient(ridge=ridge, hparams=hparams).grads[0].dtype is torch.float32
        assert problem.hypergradient(ridge=ridge, hparams=rate).grads.dtype is torch.float64


def test_a_numpy_scalar_is_a_number_as_good_as_another_for_the_ridge():
    problem = Problem(linear)
    wanted = problem.hypergradient(ridge=0.5)
    for kind in (np.float64, np.float32):
        assert relative(problem.hypergradient(ridge=kind(0.5)).grads, wanted.grads) < 1e-14


def low_rank(num_params: int = 40) -> tuple[Any, Any, Tensor, Tensor, Tensor]:
    """Four examples for forty coefficients: data of rank 4, and a decay for each coefficient."""
    torch.manual_seed(0)
    x = torch.randn(4, num_params, dtype=torch.float64)
    theta = torch.randn(num_params, dtype=torch.float64, requires_grad=True)
    weights = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    ridge = torch.logspace(-1, 1, num_params, dtype=torch.float64)

    def inner() -> Tensor:
        return 0.5 * (weights.exp() * (x @ theta - 1) ** 2).sum()

    def outer() -> Tensor:
        return (theta**2).sum()

    return inner, outer, theta, weights, ridge


@pytest.mark.parametrize("flat", [True, False], ids=["one for each", "one number"])
def test_a_ridge_treated_exactly_is_far_better_than_one_that_is_sampled(flat):
    inner, outer, theta, weights, ridge = low_rank()
    ridge = ridge if flat else ridge[20]
    solver = li.Nystrom(rank=8, damping=1e-6)

    def with_ridge() -> Tensor:
        return inner() + 0.5 * (ridge * theta**2).sum()

    wanted = hypergradient(with_ridge, outer, theta, weights, solver=li.Exact()).grads
    for seed in range(3):
        options = {"solver": solver, "rng": seed}
        known = hypergradient(inner, outer, theta, weights, ridge=ridge, **options)
        sampled = hypergradient(with_ridge, outer, theta, weights, **options)
        assert relative(known.grads, wanted) < 1e-4
        assert relative(sampled.grads, wanted) > 1e3 * relative(known.grads, wanted)
        assert known.info.rank == 4


# Losses.


def batches(problem: Problem) -> tuple[list[Any], list[Any]]:
    """Inner and outer closures whose mean is the loss of the problem."""

    def inner(i: int) -> Callable[[], Tensor]:
        return lambda: (0.6 + 0.4 * i) * problem.inner_loss() + (i - 1) * tilt()

    def tilt() -> Tensor:
        weights = problem.hparams["weights"]
        return (torch.tanh(problem.model(problem.x)).sum(1) * weights).sum() / 10

    def outer(i: int) -> Callable[[], Tensor]:
        return lambda: (0.5 + 0.5 * i) * problem.outer_loss() + (i - 1) * tilt()

    return [inner(i) for i in range(3)], [outer(i) for i in range(3)]


@each_solver
def test_lists_of_closures_are_averaged(solver, damping):
    problem = Problem()
    inner, outer = batches(problem)
    oracle = problem.dense()
    out = problem.hypergradient(inner_loss=inner, outer_loss=outer, solver=solver, rng=0)
    assert relative(out.grads, oracle.at(oracle.ihvp(damping))) < 1e-8
    assert out.info.inner_grad_norm == pytest.approx(np.linalg.norm(oracle.inner_grad), rel=1e-12)


def test_one_of_several_outer_losses_may_lack_a_part():
    problem = Problem()
    weights = problem.hparams["weights"]
    out = problem.hypergradient(outer_loss=[problem.outer_loss, lambda: (weights**2).sum()])
    wanted = problem.hypergradient(
        outer_loss=lambda: (problem.outer_loss() + (weights**2).sum()) / 2
    )
    assert relative(out.grads, wanted.grads) < 1e-12
    constant = problem.hypergradient(
        outer_loss=[problem.outer_loss, lambda: torch.tensor(3.0, dtype=torch.float64)]
    )
    assert relative(constant.grads, vector(problem.hypergradient().grads) / 2) < 1e-12


def test_losses_may_be_evaluated_tensors_whose_graph_stays_usable():
    problem = Problem()
    wanted = problem.hypergradient()
    inner, outer = problem.inner_loss(), problem.outer_loss()
    for _ in range(2):
        out = problem.hypergradient(inner_loss=inner, outer_loss=outer)
        assert relative(out.grads, wanted.grads) < 1e-14
    (inner + outer).backward()
    assert problem.model[0].weight.grad is not None


def test_it_works_inside_no_grad():
    problem = Problem(linear)
    rate = problem.hparams["log_decay"].exp()
    bias = {"weight": None, "bias": rate * torch.ones(NUM_CLASSES, dtype=torch.float64)}
    for ridge in (rate, rate * spread(N_LINEAR), bias):
        wanted = problem.hypergradient(ridge=ridge)
        with torch.no_grad():
            out = problem.hypergradient(ridge=ridge, accumulate_grad=True)
            assert not torch.is_grad_enabled()
        assert relative(out.grads, wanted.grads) < 1e-14
        assert torch.equal(problem.hparams["weights"].grad, out.grads["weights"])
        problem.hparams["weights"].grad = None


def test_the_results_carry_no_graph():
    problem = Problem(linear)
    out = problem.hypergradient(ridge=problem.hparams["log_decay"].exp(), accumulate_grad=True)
    parts = [out.grads, out.direct, out.implicit, out.ihvp, out.state.value]
    assert not any(leaf.requires_grad for leaf in leaves(parts))
    assert not problem.hparams["weights"].grad.requires_grad


@pytest.mark.parametrize("chunk_size", [2, 7, 100])
def test_chunk_size_changes_how_many_products_are_taken_at_once_and_not_the_answer(chunk_size):
    problem = Problem()
    for solver in (li.Exact(), li.Nystrom(rank=9, damping=0.3)):
        wanted = problem.hypergradient(solver=solver, rng=0)
        out = problem.hypergradient(solver=solver, rng=0, chunk_size=chunk_size)
        assert relative(out.grads, wanted.grads) < 1e-12
        assert out.info.num_products == wanted.info.num_products


def test_chunk_size_reaches_the_operator(operators):
    problem = Problem()
    problem.hypergradient(chunk_size=7)
    assert operators[0].chunk_size == 7


# The record.

COUNTED = {
    "exact": li.Exact(),
    "cg": li.CG(),
    "cg, few steps": li.CG(max_steps=3),
    "nystrom-cg": li.NystromCG(rank=3, damping=0.1),
    "nystrom": li.Nystrom(rank=3, damping=1e-2),
    "nystrom, chunked": li.Nystrom(rank=5, memory="chunked", chunk_size=2, damping=1e-2),
    "nystrom, streamed": li.Nystrom(rank=5, memory="streamed", chunk_size=2, damping=1e-2),
    "nystrom, refined": li.Nystrom(rank=3, refine=2, damping=1e-2),
    "nystrom, streamed and refined": li.Nystrom(rank=3, memory="streamed", refine=2, damping=1e-2),
    "neumann": li.Neumann(num_terms=4),
    "neumann, step given": li.Neumann(num_terms=4, step_size=0.1),
    "identity": li.Identity(),
    "callable": richardson,
}
RECORD_RIDGES = {
    "no ridge": None,
    "one number": 0.3,
    "one for each": torch.linspace(0.1, 1, N_LINEAR, dtype=torch.float64),
}

each_counted = pytest.mark.parametrize("solver", COUNTED.values(), ids=COUNTED)
each_ridge = pytest.mark.parametrize("ridge", RECORD_RIDGES.values(), ids=RECORD_RIDGES)


@each_counted
@each_ridge
def test_num_products_is_what_the_hessian_was_asked_for(operators, solver, ridge):
    problem = Problem(linear)
    out = problem.hypergradient(solver=solver, ridge=ridge, rng=0)
    assert len(operators) == 1
    assert out.info.num_products == operators[0].count == operators[0].num_products
    assert out.solution.num_products == out.info.num_products
    assert isinstance(out.info.num_products, int)


def test_num_products_counts_those_of_the_mean_over_batches_once(operators):
    problem = Problem()
    inner, outer = batches(problem)
    out = problem.hypergradient(inner_loss=inner, outer_loss=outer, solver=li.CG())
    assert out.info.num_products == operators[0].count


@each_counted
@each_ridge
def test_relative_residual_is_that_of_the_whole_system(solver, ridge):
    problem = Problem(linear)
    oracle = problem.dense()
    out = problem.hypergradient(solver=solver, ridge=ridge, rng=0)
    added = 0.0 if ridge is None else np.asarray(ridge)
    diagonal = added + getattr(solver, "damping", 0.0) + np.zeros(N_LINEAR)
    q = vector(out.ihvp)
    residual = oracle.outer_grad - (oracle.hessian @ q + diagonal * q)
    wanted = np.linalg.norm(residual) / np.linalg.norm(oracle.outer_grad)
    assert out.info.relative_residual == pytest.approx(wanted, rel=1e-6, abs=1e-13)
    assert isinstance(out.info.relative_residual, float)


@pytest.mark.parametrize(
    "solver",
    [li.CG(rtol=1e-3), li.NystromCG(rank=1, rtol=1e-3), li.Nystrom(rank=2, refine=9, damping=1e-2)],
    ids=["cg", "nystrom-cg", "nystrom, refined"],
)
def test_converged_is_said_of_the_system_that_was_asked_for_whatever_the_ridge(solver):
    problem = Problem(linear)
    ridge = torch.logspace(-6, 4, N_LINEAR, dtype=torch.float64)
    out = problem.hypergradient(solver=solver, ridge=ridge, rng=0)
    rtol = getattr(solver, "rtol", 1e-5)
    assert bool(out.solution.converged) <= (out.info.relative_residual <= rtol)


def test_inner_grad_norm_is_zero_at_the_minimum_and_the_norm_elsewhere():
    problem = Problem(linear)
    out = problem.hypergradient(ridge=0.3)
    oracle = problem.dense()
    gradient = oracle.inner_grad + 0.3 * vector(problem.trainable())
    assert out.info.inner_grad_norm == pytest.approx(np.linalg.norm(gradient), rel=1e-12)
    assert isinstance(out.info.inner_grad_norm, float)
    theta = joined(problem.trainable())
    for _ in range(8):  # Newton, on the oracle
        oracle = problem.dense()
        gradient = oracle.inner_grad + 0.3 * theta.numpy()
        theta -= torch.from_numpy(
            np.linalg.solve(oracle.hessian + 0.3 * np.eye(N_LINEAR), gradient)
        )
        with torch.no_grad():
            for name, value in split(theta, problem.trainable()).items():
                problem.model.get_parameter(name).copy_(value)
    assert problem.hypergradient(ridge=0.3).info.inner_grad_norm < 1e-14


def saddle(**options: Any) -> Any:
    """An inner loss with curvatures 2, 1 and -1, and an outer gradient along all of them."""
    curvatures = torch.tensor([2.0, 1.0, -1.0], dtype=torch.float64)
    theta = torch.tensor([0.5, -1.0, 1.0], dtype=torch.float64, requires_grad=True)
    phi = torch.ones(3, dtype=torch.float64, requires_grad=True)
    return hypergradient(
        lambda: 0.5 * (curvatures * theta**2).sum() + (phi * theta).sum(),
        lambda: (torch.tensor([1.0, 1.0, 3.0], dtype=torch.float64) * theta).sum(),
        theta,
        phi,
        **options,
    )


CURVED = {
    "exact": li.Exact(),
    "cg": li.CG(),
    "nystrom-cg": li.NystromCG(rank=2),
    "nystrom-cg, column of it": li.NystromCG(indices=(2,)),
    "nystrom-cg, other column": li.NystromCG(indices=(0,)),
    "nystrom, other column": li.Nystrom(damping=0.1, indices=(0,)),
    "nystrom": li.Nystrom(rank=3, damping=0.1),
    "nystrom, chunked": li.Nystrom(rank=3, damping=0.1, memory="chunked"),
    "nystrom, streamed": li.Nystrom(rank=3, damping=0.1, memory="streamed"),
    "neumann": li.Neumann(),
    "identity": li.Identity(),
    "callable": lambda matvec, b: b,
}

each_curved = pytest.mark.parametrize("solver", CURVED.values(), ids=CURVED)


@each_curved
def test_negative_curvature_of_the_inner_loss_is_reported(solver):
    assert saddle(solver=solver, rng=0).info.negative_curvature is True


@each_curved
@pytest.mark.parametrize(
    "ridge", [4.0, torch.full((3,), 4.0, dtype=torch.float64)], ids=["one", "one for each"]
)
def test_negative_curvature_is_gone_where_the_ridge_makes_the_inner_problem_convex(solver, ridge):
    out = saddle(solver=solver, rng=0, ridge=ridge)
    assert out.info.negative_curvature is False
    if isinstance(solver, (li.Exact, li.CG, li.NystromCG)):
        wanted = torch.tensor([-1 / 6, -1 / 5, -1.0], dtype=torch.float64)
        torch.testing.assert_close(out.grads, wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "solver",
    [
        li.Exact(),
        li.CG(),
        li.NystromCG(rank=2, damping=0.1),
        li.Nystrom(rank=N_LINEAR, damping=1e-2),
        li.Neumann(),
        li.Identity(),
        richardson,
    ],
    ids=["exact", "cg", "nystrom-cg", "nystrom", "neumann", "identity", "callable"],
)
def test_no_negative_curvature_is_reported_on_a_convex_problem(solver):
    assert Problem(linear).hypergradient(solver=solver, rng=0).info.negative_curvature is False


def test_the_exact_inverse_of_an_indefinite_hessian_is_exact_all_the_same():
    out = saddle(solver=li.Exact())
    torch.testing.assert_close(
        out.grads, torch.tensor([-0.5, -1.0, 3.0], dtype=torch.float64), rtol=1e-12, atol=0
    )


def test_rank_is_the_number_of_columns_that_were_of_use():
    problem = Problem(linear, decay=1e-300)  # softmax: a shift of all classes changes nothing
    kept = N_LINEAR - NUM_FEATURES - 1
    assert np.linalg.matrix_rank(problem.dense().hessian, tol=1e-10) == kept
    assert problem.hypergradient(solver=li.CG()).info.rank is None
    assert problem.hypergradient(solver=li.Identity()).info.rank is None
    assert problem.hypergradient(solver=li.Nystrom(rank=2, damping=1e-2), rng=0).info.rank == 2
    assert problem.hypergradient(solver=li.NystromCG(rank=2, damping=0.1), rng=0).info.rank == 2
    assert Problem().hypergradient(solver=li.Exact()).info.rank == N
    full = problem.hypergradient(solver=li.Nystrom(rank=N_LINEAR, damping=1e-2))
    assert full.info.rank == kept


def test_an_outer_gradient_of_zero_leaves_the_direct_part():
    problem = Problem()
    weights = problem.hparams["weights"]
    for solver in (
        li.Exact(),
        li.CG(),
        li.NystromCG(rank=3),
        li.Nystrom(rank=3, damping=1e-2),
        li.Neumann(),
    ):
        out = problem.hypergradient(
            outer_loss=lambda: 0 * problem.outer_loss() + (weights**2).sum(), solver=solver, rng=0
        )
        assert torch.equal(out.grads["weights"], 2 * weights)
        assert out.info.relative_residual == 0
        assert not any(leaf.any() for leaf in leaves(out.ihvp))


# State and seeds.


@each_ridge
@pytest.mark.parametrize(
    "solver", [li.CG(), li.NystromCG(rank=3, damping=0.01)], ids=["cg", "nystrom-cg"]
)
def test_a_warm_start_from_the_solution_takes_no_steps(solver, ridge):
    problem = Problem(linear)
    cold = problem.hypergradient(solver=solver, ridge=ridge, rng=0)
    assert int(cold.solution.num_steps) > 0
    warm = problem.hypergradient(solver=solver, ridge=ridge, rng=1, state=cold.state)
    assert int(warm.solution.num_steps) == 0
    assert bool(warm.solution.converged)
    assert relative(warm.grads, cold.grads) < 1e-12


def test_a_warm_start_from_a_similar_problem_saves_steps():
    problem = Problem()
    before = problem.hypergradient(solver=li.CG())
    with torch.no_grad():
        for value in (*problem.model.parameters(), *problem.hparams.values()):
            value += 1e-4 * torch.ones_like(value)
    cold = problem.hypergradient(solver=li.CG())
    warm = problem.hypergradient(solver=li.CG(), state=before.state)
    assert int(warm.solution.num_steps) < int(cold.solution.num_steps) / 2
    assert warm.info.num_products < cold.info.num_products
    assert relative(warm.grads, cold.grads) < 1e-4


def test_solvers_without_a_start_leave_the_state_alone():
    problem = Problem()
    for solver in (
        li.Exact(),
        li.Nystrom(rank=5, damping=1e-2),
        li.Neumann(),
        li.Identity(),
        richardson,
    ):
        first = problem.hypergradient(solver=solver, rng=0)
        again = problem.hypergradient(solver=solver, rng=0, state=first.state)
        assert relative(again.grads, first.grads) < 1e-14
        assert again.info.num_products == first.info.num_products


def test_seeds_reproduce_and_differ():
    problem = Problem()
    solver = li.Nystrom(rank=3, damping=1e-2)
    first, again, other = (
        vector(problem.hypergradient(solver=solver, rng=seed).grads) for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again)
    assert relative(other, first) > 1e-3
    drawn = vector(problem.hypergradient(solver=solver, rng=np.random.default_rng(1)).grads)
    assert np.array_equal(first, drawn)
    generator = np.random.default_rng(1)
    two = [vector(problem.hypergradient(solver=solver, rng=generator).grads) for _ in range(2)]
    assert relative(two[1], two[0]) > 1e-3


def test_indices_choose_the_columns_whatever_the_seed():
    problem = Problem()
    solver = li.Nystrom(indices=(0, 5, 11), damping=1e-2)
    first, other = (vector(problem.hypergradient(solver=solver, rng=seed).grads) for seed in (1, 2))
    assert np.array_equal(first, other)


@pytest.mark.parametrize("rng", [None, 0])
def test_no_global_generator_is_read_or_moved(rng):
    problem = Problem()
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    problem.hypergradient(solver=li.Nystrom(rank=3, damping=1e-2), rng=rng)
    problem.hypergradient(solver=li.Neumann(), rng=rng)
    assert torch.equal(torch_state, torch.get_rng_state())
    after = np.random.get_state()  # noqa: NPY002
    assert np.array_equal(numpy_state[1], after[1])
    assert numpy_state[2] == after[2]
    torch.manual_seed(123)
    np.random.seed(123)  # noqa: NPY002
    seeded = problem.hypergradient(solver=li.Nystrom(rank=3, damping=1e-2), rng=0)
    torch.manual_seed(4)
    np.random.seed(4)  # noqa: NPY002
    again = problem.hypergradient(solver=li.Nystrom(rank=3, damping=1e-2), rng=0)
    assert np.array_equal(vector(seeded.grads), vector(again.grads))


# Errors.


def other_tensor(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.float64, requires_grad=True)


class Bad(NamedTuple):
    options: Callable[[Problem], dict[str, Any]]
    kind: Any
    message: str


BAD = {
    "inner loss no scalar": Bad(
        lambda p: {"inner_loss": lambda: p.model(p.x)},
        ValueError, r"`inner_loss` must be a scalar; got shape \(8, 2\). Take its mean or its sum",
    ),
    "outer loss no scalar": Bad(
        lambda p: {"outer_loss": lambda: p.model(p.x)},
        ValueError, r"`outer_loss` must be a scalar; got shape \(8, 2\). Take its mean or its sum",
    ),
    "inner loss no tensor": Bad(
        lambda p: {"inner_loss": lambda: 1.0}, TypeError, "`inner_loss` must be a scalar tensor",
    ),
    "outer loss no tensor": Bad(
        lambda p: {"outer_loss": 1.0}, TypeError, "`outer_loss` must be a scalar tensor.*got float",
    ),
    "inner loss NaN": Bad(
        lambda p: {"inner_loss": lambda: math.nan * p.inner_loss()},
        ValueError, "`inner_loss` must be finite; got nan",
    ),
    "outer loss infinite": Bad(
        lambda p: {"outer_loss": lambda: math.inf * p.outer_loss()},
        ValueError, "`outer_loss` must be finite; got inf",
    ),
    "outer gradient NaN": Bad(
        lambda p: {"outer_loss": lambda: (0 * p.model[0].bias).pow(2).sum().sqrt()},
        ValueError, "`gradient of the outer loss` must be finite",
    ),
    "inner loss list empty": Bad(
        lambda p: {"inner_loss": []}, ValueError, "`inner_loss` must hold at least one closure",
    ),
    "outer loss list empty": Bad(
        lambda p: {"outer_loss": []}, ValueError, "`outer_loss` must hold at least one closure",
    ),
    "inner loss without params": Bad(
        lambda p: {"inner_loss": lambda: (p.hparams["weights"] ** 2).sum()},
        ValueError, "`inner_loss` must depend on `params`.*none of the tensors there",
    ),
    "inner loss under no_grad": Bad(
        lambda p: {"inner_loss": torch.no_grad()(p.inner_loss)},
        ValueError, "`inner_loss` must depend on `params`.*torch.no_grad",
    ),
    "outer loss without params": Bad(
        lambda p: {"outer_loss": lambda: (p.hparams["weights"] ** 2).sum()},
        ValueError, "`outer_loss` must depend on `params`.*none of the tensors there",
    ),
    "outer loss under no_grad": Bad(
        lambda p: {"outer_loss": torch.no_grad()(p.outer_loss)},
        ValueError, "`outer_loss` must depend on `params`.*torch.no_grad",
    ),
    "params without grad": Bad(
        lambda p: {"params": [torch.ones(2)]},
        ValueError, "`params` must hold a tensor that requires grad; got 1 leaves",
    ),
    "params frozen": Bad(
        lambda p: {"params": p.model.requires_grad_(False)},
        ValueError, "`params` must hold a tensor that requires grad; got 4 leaves",
    ),
    "params no tensors": Bad(
        lambda p: {"params": "model"}, TypeError, "`params` must be a module or hold tensors",
    ),
    "hparams without grad": Bad(
        lambda p: {"hparams": torch.ones(2)},
        ValueError, "`hparams` must hold a tensor that requires grad; got 1 leaves",
    ),
    "hparams no tensors": Bad(
        lambda p: {"hparams": {"decay": 0.1}},
        TypeError, "`hparams` must be a module or hold tensors; got float at 'decay'",
    ),
    "hparams that reach nothing": Bad(
        lambda p: {"hparams": {"a": other_tensor(2), "b": [other_tensor(1)]}},
        ValueError, "`hparams` must reach one of the losses; neither depends on any of 'a', 'b.0'",
    ),
    "overlap": Bad(
        lambda p: {"hparams": [p.hparams["weights"], p.model[0].bias]},
        ValueError, "`hparams` and `params` must be distinct; '1' is in both",
    ),
    "overlap of modules": Bad(
        lambda p: {"params": p.model[0], "hparams": p.model},
        ValueError, "`hparams` and `params` must be distinct; '0.weight' is in both",
    ),
    "solver a number": Bad(
        lambda p: {"solver": 3}, TypeError, "`solver` must be settings.*got builtins.int",
    ),
    "solver a class": Bad(
        lambda p: {"solver": li.CG}, TypeError, "`solver` must be settings.*got builtins.type",
    ),
    "solver a name": Bad(
        lambda p: {"solver": "cg"}, TypeError, "`solver` must be settings.*got builtins.str",
    ),
    "solver of another shape": Bad(
        lambda p: {"solver": lambda matvec, b: b[:2]},
        ValueError, r"`solver` must return an array of the shape of b, \(26,\); got .*\(2,\)",
    ),
    "index above n": Bad(
        lambda p: {"solver": li.Nystrom(indices=(0, N), damping=1e-2)},
        ValueError,
        "`indices` must lie in 0",
    ),
    "sampling by a diagonal that is not known": Bad(
        lambda p: {"solver": li.Nystrom(rank=3, sampling="diagonal", damping=1e-2)},
        TypeError, "has no diagonal. Sample columns uniformly",
    ),
    "ridge negative": Bad(
        lambda p: {"ridge": -1.0}, ValueError, "`ridge` must be finite and >= 0; got -1.0",
    ),
    "ridge NaN": Bad(
        lambda p: {"ridge": torch.tensor(math.nan)},
        ValueError, "`ridge` must be finite and >= 0; got nan",
    ),
    "ridge negative somewhere": Bad(
        lambda p: {"ridge": torch.linspace(-1, 1, N, dtype=torch.float64)},
        ValueError, "`ridge` must be >= 0 everywhere; it holds negative entries",
    ),
    "ridge infinite somewhere": Bad(
        lambda p: {"ridge": torch.full((N,), math.inf, dtype=torch.float64)},
        ValueError, "`ridge` must be finite",
    ),
    "ridge too short": Bad(
        lambda p: {"ridge": torch.ones(N - 1, dtype=torch.float64)},
        ValueError, "`ridge` must have",
    ),
    "ridge of another structure": Bad(
        lambda p: {"ridge": {"0.weight": torch.ones(4, 3, dtype=torch.float64)}},
        ValueError, "`ridge` must have the structure of the parameters",
    ),
    "ridge of wrong shape in the structure": Bad(
        lambda p: {"ridge": {n: torch.ones(1, dtype=torch.float64) for n in p.trainable()}},
        ValueError, r"`ridge` at '0.weight' must have shape \(4, 3\); got \(1,\)",
    ),
    "ridge no number": Bad(
        lambda p: {"ridge": "strong"}, (TypeError, ValueError), "`ridge` must",
    ),
    "ridge zero where Nyström must divide by it": Bad(
        lambda p: {"ridge": torch.arange(N, dtype=torch.float64), "solver": li.NystromCG(rank=3)},
        ValueError, "`ridge` plus the damping of the solver must be > 0 everywhere",
    ),
    "state of another shape": Bad(
        lambda p: {"solver": li.CG(), "state": solution(N - 1)},
        ValueError, r"`state`.*\(26,\).*\(25,\)",
    ),
    "state of another shape, with a ridge for each": Bad(
        lambda p: {"solver": li.NystromCG(rank=3), "state": solution(N - 1),
                   "ridge": torch.ones(N, dtype=torch.float64)},
        ValueError, r"`state`.*\(26,\).*\(25,\)",
    ),
    "state NaN": Bad(
        lambda p: {"solver": li.CG(), "state": solution(N, math.nan)},
        ValueError, "`state`.*finite",
    ),
    "state no solution": Bad(
        lambda p: {"solver": li.CG(), "state": p.hypergradient(solver=li.CG())},
        TypeError, "`state` must be .*Solution.*got .*Hypergradient",
    ),
    "chunk size zero": Bad(
        lambda p: {"chunk_size": 0}, ValueError, "`chunk_size` must be at least 1; got 0",
    ),
}  # fmt: skip


def solution(n: int, value: float = 0.0) -> li.Solution:
    zero = torch.tensor(0)
    return li.Solution(torch.full((n,), value, dtype=torch.float64), zero, zero, 0, zero, zero)


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_bad_input_is_refused_by_name_and_leaves_everything_as_it_was(bad):
    problem = Problem()
    options = {**bad.options(problem), "accumulate_grad": True}
    before = snapshot(problem.model)
    with pytest.raises(bad.kind, match=bad.message):
        problem.hypergradient(**options)
    assert_same(before, snapshot(problem.model))
    assert all(value.grad is None for value in problem.hparams.values())


def test_inference_mode_is_refused():
    problem = Problem()
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match=r"cannot be taken inside torch.inference_mode\(\)"),
    ):
        problem.hypergradient()


def test_a_step_taken_by_a_closure_is_refused():
    problem = Problem()

    def steps() -> Tensor:
        loss = problem.outer_loss()
        with torch.no_grad():
            problem.model[0].weight.add_(1.0)
        return loss * 1.0

    with pytest.raises(RuntimeError, match="`outer_loss` changed `params` in place"):
        problem.hypergradient(outer_loss=steps)


def test_hparams_that_move_no_minimum_are_refused_with_the_reason():
    w, rate = torch.ones(2, requires_grad=True), torch.tensor(0.1, requires_grad=True)
    with pytest.raises(ValueError, match="A learning rate or an initial value moves no minimum"):
        hypergradient(lambda: (w**2).sum(), lambda: w.sum(), w, rate, solver=li.CG())


@pytest.mark.parametrize("rng", [torch.Generator(), "0", -1], ids=repr)
def test_a_seed_of_another_kind_is_refused_by_name(rng):
    with pytest.raises(TypeError, match="`rng` must be a whole number >= 0"):
        Problem().hypergradient(solver=li.NystromCG(rank=2), rng=rng)


def test_a_ridge_may_be_a_number_for_each_tensor():
    problem = Problem(linear)
    decay = torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)
    whole = {"weight": decay[0].expand(NUM_CLASSES, NUM_FEATURES), "bias": decay[1].expand(2)}
    wanted = problem.hypergradient(ridge=whole, hparams=decay).grads
    found = problem.hypergradient(ridge={"weight": decay[0], "bias": decay[1]}, hparams=decay)
    torch.testing.assert_close(found.grads, wanted)
    numbers = problem.hypergradient(ridge={"weight": 0.3, "bias": 0.7})
    tensors = problem.hypergradient(ridge={k: v.detach() for k, v in whole.items()})
    torch.testing.assert_close(numbers.ihvp, tensors.ihvp)
    with pytest.raises(TypeError, match=r"`ridge` at 'bias' must be a torch\.Tensor; got str"):
        problem.hypergradient(ridge={"weight": 0.3, "bias": "0.7"})


def test_sharded_parameters_are_refused_by_name():
    distributed = pytest.importorskip("torch.distributed.tensor")
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        w = distributed.distribute_tensor(torch.ones(4), mesh, [distributed.Shard(0)])
        w.requires_grad_()
        with pytest.raises(TypeError, match="`params` must hold whole tensors; '0' is a DTensor"):
            HessianOperator(lambda: (w**2).sum(), [w])
    finally:
        torch.distributed.destroy_process_group()


def test_ranks_that_see_a_part_of_the_data_each_are_warned_of(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.warns(HypergradientWarning, match="Each of the 2 ranks .* as a list of closures"):
        Problem(linear).hypergradient()


def test_at_the_minimum_of_a_lasso_the_support_is_named_and_the_formula_holds_there():
    rng = np.random.default_rng(0)
    X = torch.from_numpy(rng.standard_normal((40, 10)))
    truth = torch.cat([torch.tensor([2.0, -1.0, 1.0], dtype=torch.float64), torch.zeros(7)])
    y = X @ truth + 0.1 * torch.from_numpy(rng.standard_normal(40))
    A, L = X.mT @ X / 40, float(torch.linalg.eigvalsh(X.mT @ X / 40)[-1])

    def solved(penalty: float) -> Tensor:
        w = torch.zeros(10, dtype=torch.float64)
        for _ in range(2000):
            w = w - (A @ w - X.mT @ y / 40) / L
            w = w.sign() * torch.relu(w.abs() - penalty / L)
        return w

    h = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    whole = solved(0.1).requires_grad_()
    support = whole.detach() != 0
    free = whole.detach()[support].requires_grad_()

    def inner(w: Tensor) -> Tensor:
        return 0.5 * ((X @ w - y) ** 2).mean() + h * w.abs().sum()

    def outer(w: Tensor) -> Tensor:
        return ((w - truth) ** 2).sum()

    def placed() -> Tensor:
        return torch.zeros(10, dtype=torch.float64).masked_scatter(support, free)

    out = hypergradient(lambda: inner(whole), lambda: outer(whole), whole, h, solver=li.CG())
    assert [one.name for one in out.info.findings()] == ["not_smooth"]
    assert f"at the {int((~support).sum())} parameters that are exactly 0" in out.explain()
    out = hypergradient(
        lambda: inner(placed()), lambda: outer(placed()), free, h, solver=li.Exact()
    )
    assert out.info.findings() == ()
    difference = (outer(solved(0.1 + 1e-6)) - outer(solved(0.1 - 1e-6))).item() / 2e-6
    assert out.grads.item() == pytest.approx(difference, rel=1e-5)
