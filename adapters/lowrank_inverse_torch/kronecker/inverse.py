"""The inverse of blocks that are diagonal in a Kronecker product of two bases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowrank_inverse._typing import Array, OperatorLike, Scalar
from lowrank_inverse.operators.product import ProductOnly
from lowrank_inverse.results.solution import Solution, check_system
from lowrank_inverse.solvers.base import direct_solution
from lowrank_inverse_torch.kronecker.layers import Layer


class Block(NamedTuple):
    """``(Q_G x Q_A) diag(eigenvalues) (Q_G x Q_A).T`` for the matrix of a layer's parameters.

    Attributes
    ----------
    layer : Layer
    left, right : Tensor, shape (o, o) and (i, i), or None
        Q_G and Q_A, orthogonal; None for the identity.
    eigenvalues : Tensor, shape (o, i)
    """

    layer: Layer
    left: Tensor | None
    right: Tensor | None
    eigenvalues: Tensor

    def rotated(self, M: Tensor) -> Tensor:
        """Return the coefficients ``Q_G.T M Q_A``."""
        M = M if self.left is None else self.left.mT @ M
        return M if self.right is None else M @ self.right

    def rotated_back(self, M: Tensor) -> Tensor:
        """Return ``Q_G M Q_A.T``."""
        M = M if self.left is None else self.left @ M
        return M if self.right is None else M @ self.right.mT


class KroneckerInverse(ProductOnly):
    """``(C + damping * I)^{-1}`` for a C of blocks, and a diagonal elsewhere.

    Symmetric and positive definite. The product with a vector takes ``2 (o + i)`` operations for
    each parameter of a layer of shape (o, i).

    Parameters
    ----------
    blocks : sequence of Block
    diagonal : Tensor, shape (n,)
        Read only where no block is.
    damping : float, 0-d Tensor or Tensor of shape (n,)
        Positive. A vector is replaced by its mean over each block.
    """

    _parts = ()  # products are constants

    def __init__(self, blocks: Sequence[Block], diagonal: Tensor, damping: Scalar) -> None:
        n = len(diagonal)
        self.shape, self.dtype, self.like = (n, n), diagonal.dtype, diagonal[:0]
        shift = torch.as_tensor(damping, dtype=diagonal.dtype, device=diagonal.device)
        if shift.shape not in ((), (n,)) or not bool((shift > 0).all()):
            raise ValueError(
                f"`damping`, with the ridge, must be positive, a number or of shape ({n},); got "
                f"{damping if shift.ndim == 0 else tuple(shift.shape)}. Without it, "
                "a zero curvature has no inverse."
            )
        shift = shift.detach().expand(n)
        self._blocks, self._reciprocal = blocks, 1 / (diagonal + shift)
        self._divisors = [
            block.eigenvalues + torch.cat([shift[place] for place in block.layer.places]).mean()
            for block in blocks
        ]

    def _about(self) -> dict[str, Any]:
        return {"num_blocks": len(self._blocks)}

    def _multiply(self, block: Tensor) -> Tensor:
        rows = block.detach().mT.contiguous() if block.ndim == 2 else block.detach()[None]
        result = rows * self._reciprocal
        for part, divisors in zip(self._blocks, self._divisors, strict=True):
            coefficients = part.rotated(part.layer.matrices(rows)) / divisors
            part.layer.put(result, part.rotated_back(coefficients))
        return result.mT if block.ndim == 2 else result[0]


def solve_by(A: OperatorLike, inverse: Any, b: Array, x0: Array | None) -> Solution:
    """Take the product with an approximate inverse for the solution, and measure its residual."""
    check_system(A, b, 0.0)
    return direct_solution(A, 0.0, b, inverse @ b, 0)
