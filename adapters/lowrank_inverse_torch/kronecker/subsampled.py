"""The largest terms of the Gauss-Newton matrix of a PyTorch model, as a preconditioner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_inverse._typing import RNG, Array, Batch, Data, OperatorLike, PyTree
from lowrank_inverse.arrays.checks import check_count
from lowrank_inverse.influence.dataset import Examples
from lowrank_inverse.influence.engine import GRADIENTS, MEMORY_BUDGET
from lowrank_inverse.low_rank.approximation import NystromApproximation
from lowrank_inverse.operators.composition import scaled, scaled_by_diagonal, split_diagonal
from lowrank_inverse.solvers.base import PreparedInverse, differentiable
from lowrank_inverse.solvers.recycled import preconditioner_of
from lowrank_inverse_torch.influence.backend import TorchBackend
from lowrank_inverse_torch.influence.data import flatten
from lowrank_inverse_torch.influence.example_losses import Split
from lowrank_inverse_torch.kronecker.collection import measured, opened, seed_of, vectors_at
from lowrank_inverse_torch.kronecker.inverse import solve_by

__all__ = ["SubsampledGaussNewton"]


class SubsampledGaussNewton:
    """The largest terms of the Gauss-Newton matrix, as a preconditioner [1]_, [2]_.

    Let J_i be the Jacobian of the outputs of example i with respect to the parameters, and ``S_i
    S_i.T`` the Hessian of its loss with respect to the outputs. The Gauss-Newton matrix is the mean
    of ``J_i.T S_i S_i.T J_i``, a sum of one term ``u u.T`` for each example and each column of S_i.
    In a fully trained network few terms are large: those of examples that it is uncertain about.
    The `rank` terms with the largest columns of S_i are kept. With
    ``solver=li.CG(preconditioner=...)``, an influence function takes a fraction of the products to
    the same residual. As ``solver=`` itself, the inverse of these terms plus damping replaces the
    inverse; the residual measures the error.

    Parameters
    ----------
    model, loss, train, params, batch_size, split, memory_budget
        See :class:`lowrank_inverse_torch.InfluenceFunction`; the mean is over the same examples.
    rank : int
        Number of terms, each at the cost of one gradient and n numbers.
    rng : int or numpy.random.Generator, optional
        Seed of the random vectors that replace the columns of S_i for more than 64 outputs.

    Attributes
    ----------
    columns : Tensor, shape (n, rank)
        The vectors u, divided by the square root of the number of examples.

    Raises
    ------
    TypeError, ValueError
        See :class:`lowrank_inverse_torch.KFAC`.

    Notes
    -----
    Cost: two passes over the examples and a gradient per term; a product takes two gradients of
    *all* examples. The preconditioned ``C + damping * I`` has a condition number of at most ``(g +
    R + damping) / damping`` [2]_, with g the smallest eigenvalue of the terms kept, and R the
    largest eigenvalue of the others. The preconditioner takes ``4 n rank`` operations per column,
    compared with ``6 n num_train`` or more for a product. Memory: ``3 n rank`` numbers.

    References
    ----------
    .. [1] R. H. Byrd, G. M. Chin, W. Neveitt, J. Nocedal. On the Use of Stochastic Hessian
       Information in Optimization Methods for Machine Learning. SIAM J. Optim. 21, 2011.
    .. [2] Z. Frangella, J. A. Tropp, M. Udell. Randomized Nyström Preconditioning. SIAM J. Matrix
       Anal. Appl. 44, 2023. The form of the preconditioner.

    Examples
    --------
    With all terms of a linear model, conjugate gradients converge in one step.

    >>> import torch
    >>> import lowrank_inverse as li
    >>> import lowrank_inverse_torch as lit
    >>> model = torch.nn.Linear(2, 1)
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    >>> train = x, torch.zeros(3, 1)
    >>> def loss(output, target):
    ...     return ((output - target) ** 2).sum(dim=1) / 2
    >>> terms = lit.SubsampledGaussNewton(model, loss, train, rank=3)
    >>> solver = li.CG(preconditioner=terms)
    >>> influence = lit.InfluenceFunction(
    ...     model, loss, train, solver=solver, damping=0.1
    ... )
    >>> _ = influence.scores(train, reduction="sum")
    >>> print(terms, int(influence.info.num_steps[0]))
    SubsampledGaussNewton(n=3, rank=3) 1
    """

    damping = 0.0
    """That of the system is taken."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        train: Data,
        *,
        rank: int = 500,
        params: PyTree = None,
        batch_size: int | None = None,
        split: Split | None = None,
        rng: RNG = 0,
        memory_budget: int = MEMORY_BUDGET,
    ) -> None:
        check_count("rank", rank)
        backend, examples = measured(model, loss, train, params, split, batch_size, memory_budget)
        seed = seed_of(rng)
        squares = torch.cat(
            [
                (S * S).flatten(2).sum(dim=2)  # (size, columns)
                for _, S, _ in _roots(backend, examples, seed)
            ]
        )
        order = squares.reshape(-1).argsort(descending=True, stable=True)[:rank]
        chosen = torch.zeros_like(squares, dtype=torch.bool)
        chosen.view(-1)[order] = True
        chosen &= squares > 0
        parts, start = [], 0
        for batch, S, read in _roots(backend, examples, seed):
            rows, columns = chosen[start : start + len(S)].nonzero(as_tuple=True)
            start += len(S)
            along = _along(backend, read)
            for i in range(0, len(rows), GRADIENTS):
                r, c = rows[i : i + GRADIENTS], columns[i : i + GRADIENTS]
                parts.append(along.gradients((_picked(batch, r), S[r, c])))
        if not parts:
            raise ValueError("the Gauss-Newton matrix is 0: `loss` is linear in the outputs.")
        self.columns = torch.cat(parts, dim=1) / examples.num**0.5

    def __repr__(self) -> str:
        n, rank = self.columns.shape
        return f"{type(self).__name__}(n={n}, rank={rank})"

    @differentiable
    def prepare(self, A: OperatorLike, *, rng: RNG = 0, b: Array | None = None) -> PreparedInverse:
        """Return the inverse of these terms plus the shift of `A`, in place of ``A^{-1}``.

        A solve takes one product with `A`, for the residual.
        """
        _, damping, s = split_diagonal(A, 0.0)
        C: Any = scaled(self.columns, s)
        core = torch.eye(C.shape[1], dtype=C.dtype, device=C.device)
        approx = NystromApproximation(C, None, core=core)
        inverse = approx.inverse(damping)
        if s is not None:
            inverse = scaled_by_diagonal(inverse, s)
        return PreparedInverse(
            A,
            partial(solve_by, A, inverse),
            apply=inverse.__matmul__,
            rank=approx.rank,
            preconditioner=preconditioner_of(A, 0.0, approx),
        )


def _roots(
    backend: TorchBackend, examples: Examples, seed: int
) -> Iterator[tuple[Any, Tensor, Callable[[Any], Tensor]]]:
    """Yield each batch, its columns of S_i, shape (size, columns, ...), and how to read outputs.

    The same ones again for the same seed.
    """
    generator = torch.Generator().manual_seed(seed)
    for _, batch in examples.parts():
        with opened(backend, batch, generator) as (_, out):
            found = [out.root(e) for e in vectors_at(out.values, None, generator)]
        yield batch, torch.stack(found, dim=1), out.read


def _along(backend: TorchBackend, read: Callable[[Any], Tensor]) -> TorchBackend:
    """Return the backend for ``<s, outputs>`` with batches ``(batch, s)``."""
    other = backend.measuring(lambda output, s: (read(output) * s).flatten(1).sum(dim=1))

    def split(pair: Any) -> tuple[Any, Any]:
        return backend.split_batch(pair[0])[0], pair[1]

    other.split = split
    return other


def _picked(batch: Batch, rows: Tensor) -> Any:
    leaves, rebuild = flatten(batch)
    return rebuild([x[rows] if isinstance(x, Tensor) and x.ndim > 0 else x for x in leaves])
