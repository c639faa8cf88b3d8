"""Square roots of the Hessian of a loss by the outputs of a network, example by example."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowrank_inverse.arrays.decompositions import converged_eigh
from lowrank_inverse_torch.curvature.gradient_graph import GradientGraph

MOST_OUTPUTS = 64
"""Of an example: up to which its Hessian is decomposed, and a root has all its columns."""

Root = Callable[[Tensor], Tensor]


def output_root(losses: Callable[[Tensor], Tensor], z: Tensor, generator: torch.Generator) -> Root:
    """Return ``e -> S e`` with ``S S.T`` the Hessian of the losses by the outputs `z`.

    Parameters
    ----------
    losses : callable (outputs) -> Tensor, shape (size,)
        One for each example, of its own outputs.
    z : Tensor, shape (size, ...)
        Where the Hessian is taken; `e` has its shape.
    generator : torch.Generator
        Of the vectors that tell which kind of Hessian it is.

    Raises
    ------
    ValueError
        For more than 64 outputs an example where the Hessian is neither diagonal, as that of a
        squared error, nor that of a softmax over the last axis.

    Notes
    -----
    The softmax of z has the Hessian ``w (diag(p) - p p.T)``, with weights w of each position such
    as 0 for padding, and the root ``sqrt(w) (diag(sqrt(p)) - p sqrt(p).T)``. Which one it is, two
    products with the Hessian tell. Others are decomposed; negative eigenvalues, of a loss that is
    not convex in the outputs, are left out.
    """
    at = z.detach().requires_grad_()
    graph = GradientGraph(losses(at).sum(), [at], by="outputs")

    def product(e: Tensor) -> Tensor:
        (he,) = graph.product([e])
        return torch.zeros_like(e) if he is None else he.detach()

    at = at.detach()
    tolerance = torch.finfo(z.dtype).eps ** 0.5
    v = torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z.device)
    hv = product(v)

    def explains(found: Tensor) -> bool:
        return bool((hv - found).norm() <= tolerance * hv.norm())

    sign = signs(z, generator)
    d = product(sign) * sign
    if explains(d * v):
        half = d.clamp(min=0).sqrt()
        return lambda e: half * e
    p = torch.softmax(at, dim=-1)
    u = p * v - p * (p * v).sum(dim=-1, keepdim=True)
    square = (u * u).sum(dim=-1, keepdim=True)
    w = (u * hv).sum(dim=-1, keepdim=True) / torch.where(square > 0, square, 1)
    if explains(w * u):
        root, scale = p.sqrt(), w.clamp(min=0).sqrt()
        return lambda e: scale * (root * e - p * (root * e).sum(dim=-1, keepdim=True))
    size, num = len(z), z[0].numel()
    if num > MOST_OUTPUTS:
        raise ValueError(
            f"`loss` must be a squared error, or a cross-entropy of the softmax over the last axis "
            f"of the outputs, for more than {MOST_OUTPUTS} outputs of an example; got {num} with "
            "another Hessian. Use NystromCG instead."
        )
    units = torch.eye(num, dtype=z.dtype, device=z.device)
    columns = [product(e.expand(size, num).reshape(z.shape)).reshape(size, num) for e in units]
    eigenvalues, Q = converged_eigh(torch.stack(columns, dim=-1))
    S = Q * eigenvalues.clamp(min=0).sqrt()[:, None, :]
    return lambda e: (S @ e.reshape(size, num, 1)).reshape(z.shape)


def signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return random signs of the shape and kind of a tensor."""
    drawn = torch.randint(0, 2, like.shape, generator=generator)
    return (2 * drawn - 1).to(like)
