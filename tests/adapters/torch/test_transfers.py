"""What an accelerator sends to the host in a solve, counted on one that is emulated.

A read makes the host wait until the device is done: one a step is the stopping test.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import lowrank_inverse as li
import lowrank_inverse_torch as lit
from tests.adapters.torch.accelerator import Away, Transfers
from tests.conftest import host
from tests.problems import matrix

N, FEATURES, HIDDEN, CLASSES, EXAMPLES = 60, 4, 3, 3, 12


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.gpu)])
def send(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor]:
    """Return what puts a tensor on the device."""
    if request.param == "emulated":
        return Away
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    return lambda x: x.cuda()


def system(send: Any, width: int | None = None) -> tuple[Any, Tensor]:
    """Return an operator known by products alone, and right-hand sides."""
    A = send(torch.tensor(matrix("polynomial", N)))
    shape = (N,) if width is None else (N, width)
    b = send(torch.tensor(np.random.default_rng(0).standard_normal(shape)))
    return li.FunctionOperator(lambda v: A @ v, N, like=b), b


def counted(run: Callable[[], Any]) -> tuple[Any, Transfers]:
    """Return what a function returns, and what it sent to the host."""
    with Transfers() as transfers:
        found = run()
    return found, transfers


STEPS = {
    "CG": lambda A, b, steps, **more: li.cg(A, b, rtol=0.0, max_steps=steps, **more),
    "CG, columns": lambda A, b, steps, **more: li.cg(
        A, b, rtol=0.0, max_steps=steps, block_size=1, **more
    ),
    "Neumann": lambda A, b, steps: li.neumann(A, b, num_terms=steps, rtol=0.0, step_size=0.5),
}


@pytest.mark.parametrize("solver", STEPS)
def test_a_step_sends_one_number_to_the_host_the_stopping_test(send, solver):
    A, b = system(send, 3 if solver.endswith("columns") else None)
    few, many = (counted(partial(STEPS[solver], A, b, steps))[1] for steps in (3, 8))
    assert many.reads - few.reads == 5
    assert not many.copies and not many.waits


@pytest.mark.parametrize("solver", ["CG", "CG, columns"])
def test_checked_seldom_a_solve_reads_as_seldom(send, solver):
    A, b = system(send, 3 if solver.endswith("columns") else None)
    few, many = (counted(partial(STEPS[solver], A, b, k, check_every=5))[1] for k in (5, 10))
    assert many.reads - few.reads == 1
    assert not many.copies and not many.waits


SOLVERS: dict[str, Any] = {
    "CG": li.CG(damping=0.5),
    "Neumann": li.Neumann(damping=0.5, num_terms=8),
    "Krylov": li.Nystrom(rank=6, damping=0.5),
    "stored": li.Nystrom(rank=6, damping=0.5, sampling="uniform"),
    "chunked": li.Nystrom(rank=6, damping=0.5, sampling="uniform", memory="chunked", chunk_size=2),
    "streamed": li.Nystrom(rank=6, damping=0.5, sampling="uniform", memory="streamed"),
    "Gaussian": li.Nystrom(rank=6, damping=0.5, sampling="gaussian"),
    "Nyström-CG": li.NystromCG(rank=6, damping=0.5, sampling="uniform"),
    "exact": li.Exact(damping=0.5),
}


@pytest.mark.parametrize("width", [None, 3])
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_every_solver_stays_on_the_device_and_answers_as_on_the_host(send, solver, width):
    A, b = system(send, width)
    found, transfers = counted(lambda: li.solve(A, b, solver=solver))
    assert not transfers.copies and not transfers.waits
    assert found.value.device == b.device
    A, b = system(lambda x: x, width)
    expected = li.solve(A, b, solver=solver)
    np.testing.assert_allclose(host(found.value), expected.value.numpy(), rtol=1e-6, atol=1e-8)


class Problem:
    """A network with weighted examples on a device."""

    def __init__(self, send: Any) -> None:
        torch.manual_seed(0)
        layers = nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, CLASSES)
        self.model = copy.deepcopy(nn.Sequential(*layers)).double()
        for part in self.model.modules():
            for name, p in list(part.named_parameters(recurse=False)):
                setattr(part, name, nn.Parameter(send(p.detach())))
        x = torch.randn(EXAMPLES, FEATURES, dtype=torch.float64)
        self.x, self.y = send(x), send(torch.arange(EXAMPLES) % CLASSES)
        self.w = send(torch.zeros(EXAMPLES, dtype=torch.float64)).requires_grad_()

    def losses(self) -> Tensor:
        return cross_entropy(self.model(self.x), self.y, reduction="none")

    def hypergradient(self, solver: Any, **options: Any) -> Any:
        return lit.hypergradient(
            lambda: (torch.sigmoid(self.w) * self.losses()).mean(),
            lambda: self.losses().mean(),
            self.model,
            self.w,
            solver=solver,
            **options,
        )


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
def test_hypergradients_stay_on_the_device_and_are_those_of_the_host(send, solver):
    problem = Problem(send)
    found, transfers = counted(lambda: problem.hypergradient(solver, chunk_size=3))
    assert not transfers.copies and not transfers.waits
    expected = Problem(lambda x: x).hypergradient(solver, chunk_size=3).grads
    np.testing.assert_allclose(host(found.grads), expected.numpy(), rtol=1e-6, atol=1e-9)


def test_a_state_adds_no_copies_and_a_step_of_cg_one_read(send):
    problem = Problem(send)
    reads = []
    for steps in (2, 5):
        solver = li.CG(damping=0.5, rtol=0.0, max_steps=steps)
        cold = partial(problem.hypergradient, solver, state=li.HypergradientState())
        first, _ = counted(cold)
        problem.w.data += 1  # else the first step is at the end
        _, transfers = counted(partial(problem.hypergradient, solver, state=first.state))
        assert not transfers.copies and not transfers.waits
        reads.append(transfers.reads)
    assert reads[1] - reads[0] == 3


@pytest.mark.parametrize("place", ["device", "host"])
def test_influence_brings_back_scores_and_losses_and_nothing_else(send, place):
    problem = Problem(send)

    def scores(problem: Any, train: Any) -> Any:
        loss = partial(cross_entropy, reduction="none")
        f = lit.InfluenceFunction(problem.model, loss, train, damping=0.5, rng=0)
        return f.scores(train)

    plain = Problem(lambda x: x)
    train = (problem.x, problem.y) if place == "device" else (plain.x, plain.y)
    found, transfers = counted(lambda: scores(problem, train))
    sizes = {int(np.prod(shape)) for shape in transfers.copies}
    assert sizes <= {1, EXAMPLES, EXAMPLES**2}
    assert not transfers.waits
    expected = scores(plain, (plain.x, plain.y))
    np.testing.assert_allclose(host(found), expected.numpy(), rtol=1e-6, atol=1e-9)
