"""Derivatives of solutions in torch, against those of the dense formula."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

import lowrank_inverse as li

torch = pytest.importorskip("torch")

from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from lowrank_inverse_torch import HessianOperator

F64 = torch.float64
N = 4
SOLVERS: dict[str, Callable[[Any], Any]] = {
    "auto": lambda d: None,
    "CG": lambda d: li.CG(damping=d, rtol=1e-14),
    "NystromCG": lambda d: li.NystromCG(rank=2, damping=d, rtol=1e-14),
    "Nystrom": lambda d: li.Nystrom(rank=N, damping=d, sampling="uniform"),
    "Nystrom, streamed": lambda d: li.Nystrom(
        rank=N, damping=d, sampling="uniform", memory="streamed"
    ),
    "Exact": lambda d: li.Exact(damping=d),
    "Neumann": lambda d: li.Neumann(damping=d, num_terms=300, rtol=1e-14),
    "function": lambda d: (
        lambda matvec, b: li.cg(li.FunctionOperator(matvec, N, like=b), b, rtol=1e-14).value
    ),
}
Function = Callable[..., Tensor]


def tensors(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    rng = np.random.default_rng(seed)
    return [torch.tensor(rng.standard_normal(shape)) for shape in shapes]


def system() -> list[Tensor]:
    """A matrix that is symmetric in its entries alone, a right-hand side and a damping."""
    B, b = tensors((N, N), (N,))
    return [B @ B.T / N + torch.eye(N, dtype=F64) / 2, b, torch.tensor(0.3, dtype=F64)]


def points() -> list[Tensor]:
    """Points of which two are equal, lengthscales, a right-hand side and a damping."""
    X, b = tensors((N, 2), (N,))
    X[1] = X[0]
    return [X, torch.tensor([0.9, 1.3], dtype=F64), b, torch.tensor(0.3, dtype=F64)]


def dense_solution(B: Tensor, b: Tensor, damping: Tensor) -> Tensor:
    A = (B + B.T) / 2
    return torch.linalg.solve(A + damping * torch.eye(len(A), dtype=F64), b)


def dense_kernel_solution(X: Tensor, lengthscale: Tensor, b: Tensor, damping: Tensor) -> Tensor:
    squares = ((X[:, None] - X[None]) / lengthscale).square().sum(-1)
    return dense_solution(torch.exp(-squares / 2), b, damping)


def solution(name: str) -> Function:
    def solve(B: Tensor, b: Tensor, damping: Tensor) -> Tensor:
        A, solver = (B + B.T) / 2, SOLVERS[name](damping)
        if solver is None or callable(solver):
            return li.solve(A, b, damping=damping, solver=solver).value
        return li.solve(A, b, solver=solver).value

    return solve


def kernel_solution(name: str, chunk_size: int | None = None) -> Function:
    def solve(X: Tensor, lengthscale: Tensor, b: Tensor, damping: Tensor) -> Tensor:
        A = li.KernelOperator(X, lengthscale=lengthscale, chunk_size=chunk_size)
        solver = SOLVERS[name](damping)
        if solver is None or callable(solver):
            return li.solve(A, b, damping=damping, solver=solver).value
        return li.solve(A, b, solver=solver).value

    return solve


def both_derivatives(f: Function, args: Sequence[Tensor]) -> list[Tensor]:
    """First derivatives of a sum that weighs f's entries, and second ones along directions."""
    args = [x.clone().requires_grad_() for x in args]
    weights = torch.arange(1.0, N + 1, dtype=F64)
    first = torch.autograd.grad(weights @ f(*args), args, create_graph=True)
    along = sum((g * torch.cos(torch.ones_like(g).cumsum(0))).sum() for g in first)
    second = torch.autograd.grad(along, args)
    return [x.detach() for x in (*first, *second)]


def close(found: Sequence[Tensor], expected: Sequence[Tensor], rtol: float = 1e-9) -> None:
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", SOLVERS)
def test_both_derivatives_are_those_of_the_dense_formula(name):
    found = both_derivatives(solution(name), system())
    close(found, both_derivatives(dense_solution, system()))


@pytest.mark.parametrize("name", ["CG", "Nystrom", "Exact"])
def test_both_derivatives_by_a_kernel_are_those_of_the_dense_formula(name):
    found = both_derivatives(kernel_solution(name), points())
    close(found, both_derivatives(dense_kernel_solution, points()))


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLVERS)
def test_torch_finds_the_derivatives_right(name):
    problems = [(solution(name), system())]
    if name != "Neumann":  # the terms of which are many
        problems.append((kernel_solution(name, 3), points()))
    for f, args in problems:
        args = [x.clone().requires_grad_() for x in args]
        assert gradcheck(f, args)
        assert gradgradcheck(f, args)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", ["CG", "Nystrom"])
def test_torch_finds_the_forward_derivatives_right(name):
    for f, args in ((solution(name), system()), (kernel_solution(name, 3), points())):
        args = [x.clone().requires_grad_() for x in args]
        assert gradcheck(f, args, check_forward_ad=True, check_backward_ad=False)


def test_tiles_are_computed_again_with_the_same_derivatives():
    found = both_derivatives(kernel_solution("CG", chunk_size=3), points())
    close(found, both_derivatives(dense_kernel_solution, points()))


def test_every_eigenvalue_may_be_equal():
    b, weights = tensors((N,), (N,))
    for solver in (li.CG(rtol=1e-12), li.Exact(), li.Nystrom(rank=N, damping=1e-9)):
        A = (2 * torch.eye(N, dtype=F64)).requires_grad_()
        x = li.solve(A, b, solver=solver).value
        (found,) = torch.autograd.grad(weights @ x, A)
        torch.testing.assert_close(found, -torch.outer(weights, b) / 4, rtol=1e-6, atol=1e-6)


def test_blocks_and_prepared_inverses_are_differentiated():
    B, _, damping = system()
    (block,) = tensors((N, 3))
    forms: list[Function] = [
        lambda B, d, b: li.cg((B + B.T) / 2, b, damping=d, rtol=1e-14).value,
        lambda B, d, b: li.neumann((B + B.T) / 2, b, damping=d, num_terms=300, rtol=1e-14).value,
        lambda B, d, b: li.Exact(damping=d).prepare((B + B.T) / 2) @ b,
        lambda B, d, b: li.NystromCG(rank=2, damping=d, rtol=1e-14).prepare((B + B.T) / 2) @ b,
        lambda B, d, b: li.CG(rtol=1e-14).prepare(li.shifted((B + B.T) / 2, d)).solve(b).value,
    ]

    def grads(f: Function) -> Sequence[Tensor]:
        args = [x.clone().requires_grad_() for x in (B, damping, block)]
        return torch.autograd.grad(f(*args).square().sum(), args)

    for form in forms:
        close(grads(form), grads(lambda B, d, b: dense_solution(B, b, d)))


def test_sums_multiples_and_diagonals_are_differentiated():
    B, b, _ = system()
    (D,) = tensors((N,), seed=1)

    def solve(B: Tensor, D: Tensor, c: Tensor) -> Tensor:
        A = li.aslinearoperator((B + B.T) / 2)
        operator = c * (A + A) + li.DiagonalOperator(N, D.square())
        return li.solve(operator, b, solver=li.NystromCG(rank=2, rtol=1e-14)).value

    def dense(B: Tensor, D: Tensor, c: Tensor) -> Tensor:
        return torch.linalg.solve(c * (B + B.T) + torch.diag(D.square()), b)

    args = [B, D, torch.tensor(1.5, dtype=F64)]
    close(both_derivatives(solve, args), both_derivatives(dense, args))


@pytest.mark.parametrize("name", ["CG", "Nystrom"])
def test_the_transforms_of_torch_pass_through(name):
    B, b, damping = system()

    def value(f: Function, d: Tensor) -> Tensor:
        return f(B, b, d).square().sum()

    dampings = torch.tensor([0.1, 0.4], dtype=F64)
    transforms: list[Callable[..., Any]] = [
        lambda f: torch.func.hessian(f)(damping),
        lambda f: torch.func.jvp(f, (damping,), (torch.ones_like(damping),))[1],
        lambda f: torch.vmap(f)(dampings),
        lambda f: torch.vmap(torch.func.grad(f))(dampings),
    ]
    for transform in transforms:
        found, expected = (
            transform(lambda d, f=f: value(f, d)) for f in (solution(name), dense_solution)
        )
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    (several,) = tensors((3, N), seed=2)
    for f in (torch.vmap, torch.func.jacrev, torch.func.jacfwd):
        given = several if f is torch.vmap else b
        found = f(lambda b: solution(name)(B, b, damping))(given)
        expected = f(lambda b: dense_solution(B, b, damping))(given)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_several_matrices_are_solved_under_vmap():
    B, b, damping = system()
    several = torch.stack([B, 2 * B])
    found = torch.vmap(torch.func.grad(lambda B: solution("NystromCG")(B, b, damping).sum()))
    expected = torch.vmap(torch.func.grad(lambda B: dense_solution(B, b, damping).sum()))
    torch.testing.assert_close(found(several), expected(several), rtol=1e-8, atol=1e-8)


def test_an_approximate_inverse_stands_for_the_inverse_in_both_places():
    B, b, damping = system()
    (g,) = tensors((N,), seed=1)
    A, A_live = (B + B.T) / 2, ((B + B.T) / 2).requires_grad_()
    for solver in (li.Nystrom(rank=2, damping=damping), li.Neumann(damping=0.3, num_terms=3)):
        S = solver.prepare(A) @ torch.eye(N, dtype=F64)
        inverse = solver.prepare(A_live)
        live = b.clone().requires_grad_()
        found = torch.autograd.grad(g @ inverse.solve(live).value, (A_live, live))
        close(found, (-torch.outer(S @ g, S @ b), S @ g))


def test_the_identity_is_differentiated_as_the_multiple_that_it_is():
    B, b, _ = system()
    scale = torch.tensor(0.5, dtype=F64, requires_grad=True)
    x = li.solve((B + B.T) / 2, b.requires_grad_(), solver=li.Identity(scale=scale)).value
    close(torch.autograd.grad(x.sum(), (b, scale)), (0.5 * torch.ones_like(b), b.detach().sum()))


def test_what_else_a_solution_has_is_constant():
    B, b, damping = (x.requires_grad_() for x in system())
    found = li.solve((B + B.T) / 2, b, damping=damping, solver=li.CG(), certify=True)
    assert found.value.requires_grad
    assert not any(isinstance(x, Tensor) and x.requires_grad for x in found[1:])
    following = li.solve((B + B.T) / 2, b, state=li.HypergradientState(), solver=li.CG()).state
    assert not any(x.requires_grad for x in following)


def test_a_start_serves_the_first_solve_alone():
    B, b, damping = system()
    A, exact = (B + B.T) / 2, dense_solution(B, b, damping)
    b.requires_grad_()
    x = li.cg(A, b, damping=damping, x0=exact, rtol=1e-13)
    assert x.num_steps == 0
    (found,) = torch.autograd.grad(x.value.sum(), b)
    expected = dense_solution(B, torch.ones(N, dtype=F64), damping)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0.0)


def test_under_no_grad_nothing_is_recorded():
    B, b, _ = (x.requires_grad_() for x in system())
    with torch.no_grad():
        assert not li.solve((B + B.T) / 2, b).value.requires_grad


# Operators that do not tell their tensors


def test_what_a_function_reads_has_first_derivatives():
    B, b, _ = system()
    A, t = (B + B.T) / 2, torch.tensor(2.0, dtype=F64, requires_grad=True)
    for solver in (li.CG(rtol=1e-14), li.Nystrom(rank=N, damping=0.3, sampling="uniform")):
        operator = li.FunctionOperator(lambda v: t * (A @ v), N, like=b)
        found = torch.autograd.grad(li.solve(operator, b, solver=solver).value.sum(), t)
        damping = 0.3 * isinstance(solver, li.Nystrom)
        dense = dense_solution(t * A, b, torch.tensor(damping, dtype=F64)).sum()
        close(found, torch.autograd.grad(dense, t))
        close(torch.autograd.grad((solver.prepare(operator) @ b).sum(), t), found)


def test_a_second_derivative_by_what_a_function_reads_names_parameters():
    B, b, _ = system()
    t = torch.tensor(2.0, dtype=F64, requires_grad=True)
    operator = li.FunctionOperator(lambda v: t * (B @ v), N, like=b)
    x = li.solve(operator, b, solver=li.CG()).value
    (first,) = torch.autograd.grad(x.sum(), t, create_graph=True)
    with pytest.raises(RuntimeError, match="`parameters`"):
        first.backward()


def test_a_function_of_parameters_has_both_derivatives():
    B, b, _ = system()

    def solve(t: Tensor, b: Tensor) -> Tensor:
        A = li.FunctionOperator(lambda v, t, B: t * (B @ v), N, like=b, parameters=[t, B])
        return li.solve(A, b, solver=li.CG(rtol=1e-14)).value

    args = [torch.tensor(2.0, dtype=F64), b]
    expected = both_derivatives(lambda t, b: torch.linalg.solve(t * B, b), args)
    close(both_derivatives(solve, args), expected)


def test_a_function_without_a_graph_costs_no_product_more():
    B, b, _ = system()
    calls = itertools.count()
    operator = li.FunctionOperator(lambda v: (next(calls), B @ v)[1], N, like=b)
    found = li.solve(operator, b, solver=li.CG())
    assert not found.value.requires_grad
    assert next(calls) == found.num_products


# Memory


def test_no_graph_of_steps_is_held():
    def saved(steps: int) -> int:
        total = 0

        def pack(x: Tensor) -> Tensor:
            nonlocal total
            total += x.numel()
            return x

        B, b, damping = (x.clone().requires_grad_() for x in system())
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            solver = li.CG(damping=damping, rtol=0.0, max_steps=steps)
            li.solve((B + B.T) / 2, b, solver=solver).value.sum().backward()
        return total

    held = [saved(steps) for steps in (1, 3)]
    assert held[0] == held[1]


# Hessians


def curved(w: Tensor, h: Tensor) -> Tensor:
    (M,) = tensors((6, N), seed=4)
    return (M @ w).cosh().sum() + (h.exp() * w.square()).sum()


@pytest.mark.parametrize("batches", [1, 2])
def test_a_hessian_that_creates_a_graph_is_differentiated(batches):
    w, h, b = (x.requires_grad_(i < 2) for i, x in enumerate(tensors((N,), (N,), (N,))))
    losses = [lambda k=k: k * curved(w, h) for k in range(1, batches + 1)]
    H = torch.autograd.functional.hessian(lambda w: curved(w, h), w, create_graph=True)
    H = H * (1 + batches) / 2
    expected = torch.autograd.grad(dense_solution(H, b, torch.tensor(0.3)).sum(), (w, h))
    for solver in (
        li.CG(damping=0.3, rtol=1e-14),
        li.Nystrom(rank=N, damping=0.3, sampling="uniform"),
    ):
        operator = HessianOperator(losses, w, create_graph=True)
        x = li.solve(operator, b, solver=solver).value
        close(torch.autograd.grad(x.sum(), (w, h)), expected, rtol=1e-7)
        x = solver.prepare(operator) @ b
        close(torch.autograd.grad(x.sum(), (w, h)), expected, rtol=1e-7)


def test_a_hessian_without_a_graph_is_constant():
    w, h, b = (x.requires_grad_(i < 2) for i, x in enumerate(tensors((N,), (N,), (N,))))
    operator = HessianOperator(lambda: curved(w, h), w)
    assert not li.solve(operator, b, solver=li.CG()).value.requires_grad
    live = torch.ones(N, dtype=F64, requires_grad=True)
    (found,) = torch.autograd.grad(li.solve(operator, live, solver=li.CG()).value.sum(), live)
    assert found.isfinite().all()
