"""Solvers in the form that TorchOpt takes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lowrank_inverse.operators.function import FunctionOperator
from lowrank_inverse.solvers.base import as_settings

__all__ = ["as_solve"]


def as_solve(
    solver: Any, *, rng: Any = 0, sign: int | None = None
) -> Callable[[Callable[[Any], Any], Any], Any]:
    """Return ``solve(matvec, b) -> x`` on structures of tensors, such as TorchOpt takes.

    Parameters
    ----------
    solver : settings such as ``lowrank_inverse.NystromCG(...)``
    rng : int or numpy.random.Generator, optional
        Seed of the columns.
    sign : {1, -1}, optional
        That of the matrix. ``torchopt.diff.implicit.custom_root`` of a gradient has the Hessian:
        1. The residual of a fixed point of gradient descent has minus the Hessian times the step:
        -1, and the damping of the solver then is that of the matrix with its sign changed.
        Default: the sign of ``b.T A b``, for one product.

    Returns
    -------
    callable (matvec, b, **ignored) -> x

    Examples
    --------
    >>> import torch
    >>> import lowrank_inverse as li
    >>> solve = as_solve(li.CG())
    >>> print(solve(lambda x: {"a": -2.0 * x["a"]}, {"a": torch.ones(2)}))
    {'a': tensor([-0.5000, -0.5000])}
    """
    settings = as_settings(solver)
    if sign not in (None, 1, -1):
        raise ValueError(f"`sign` must be 1, -1 or None; got {sign!r}.")

    def solve(matvec: Callable[[Any], Any], b: Any, **ignored: Any) -> Any:
        leaves, structure = pytree.tree_flatten(b)
        _check(leaves)
        shapes = [leaf.shape for leaf in leaves]
        sizes = [leaf.numel() for leaf in leaves]

        def flat(tree: Any) -> Tensor:
            return torch.cat([part.detach().reshape(-1) for part in pytree.tree_flatten(tree)[0]])

        def tree(vector: Tensor) -> Any:
            parts = zip(vector.split(sizes), shapes, strict=True)
            return pytree.tree_unflatten([part.reshape(shape) for part, shape in parts], structure)

        def multiply(vector: Tensor) -> Tensor:
            return flat(matvec(tree(vector)))

        rhs = flat(b)
        positive = sign
        if positive is None:
            positive = -1 if float(rhs @ multiply(rhs)) < 0 else 1
        A = FunctionOperator(lambda v: positive * multiply(v), rhs.shape[0], like=rhs)
        return tree(settings.prepare(A, rng=rng).solve(positive * rhs).value)

    return solve


def _check(leaves: list[Any]) -> None:
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
            kind = leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__
            raise TypeError(
                f"`b` must be a tensor of floats, or a structure of them; got {kind} in it."
            )
