"""Solvers in the form that TorchOpt expects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lowrank_inverse._typing import RNG, PyTree, SolveFunction, Solver
from lowrank_inverse.solvers.solve import as_solve as core_as_solve

__all__ = ["as_solve"]


def as_solve(
    solver: Solver | SolveFunction | None = None, *, rng: RNG = 0, sign: int | None = None
) -> Callable[[Callable[[Any], Any], Any], Any]:
    """Return a function ``solve(matvec, b) -> x`` on structures of tensors, as TorchOpt expects it.

    Parameters
    ----------
    solver : settings such as ``lowrank_inverse.NystromCG(...)``, optional
        Default: CG.
    rng : int or numpy.random.Generator, optional
        Seed of the sampled columns.
    sign : 1 or -1, optional
        Sign of the matrix. ``torchopt.diff.implicit.custom_root`` of a gradient passes the Hessian:
        1. The residual of a fixed point of gradient descent passes the negative Hessian times the
        step size: -1; the damping of the solver is then added to the matrix with its sign changed.
        Default: the sign of ``b.T A b``.

    Returns
    -------
    callable (matvec, b, **ignored) -> x
        Two extra products test the symmetry of the matrix; it warns if they differ.

    Examples
    --------
    >>> import torch
    >>> import lowrank_inverse as li
    >>> solve = as_solve(li.CG())
    >>> print(solve(lambda x: {"a": -2.0 * x["a"]}, {"a": torch.ones(2)}))
    {'a': tensor([-0.5000, -0.5000])}
    """
    solve_flat = core_as_solve(solver, rng=rng, sign=sign)

    def solve(matvec: Callable[[Any], Any], b: Any, **ignored: Any) -> Any:
        leaves, structure = pytree.tree_flatten(b)
        _check(leaves)
        shapes = [leaf.shape for leaf in leaves]
        sizes = [leaf.numel() for leaf in leaves]

        def flat(tree: PyTree) -> Tensor:
            return torch.cat([part.detach().reshape(-1) for part in pytree.tree_flatten(tree)[0]])

        def tree(vector: Tensor) -> Any:
            parts = zip(vector.split(sizes), shapes, strict=True)
            return pytree.tree_unflatten([part.reshape(shape) for part, shape in parts], structure)

        return tree(solve_flat(lambda vector: flat(matvec(tree(vector))), flat(b)))

    return solve


def _check(leaves: list[Any]) -> None:
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TypeError(
                f"`b` must be a tensor of floats, or a structure of them; got {kind} in it."
            )
