"""KFAC and EK-FAC of PyTorch models, as a solver and as a preconditioner."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_inverse._typing import RNG, Array, Data, OperatorLike, PyTree, Scalar
from lowrank_inverse.arrays.checks import check_count
from lowrank_inverse.arrays.decompositions import eigh
from lowrank_inverse.influence.engine import MEMORY_BUDGET
from lowrank_inverse.operators.diagonal import ShiftedOperator
from lowrank_inverse.solvers.base import PreparedInverse, differentiable
from lowrank_inverse_torch.influence.example_losses import Split
from lowrank_inverse_torch.kronecker.collection import Collection, measured, seed_of
from lowrank_inverse_torch.kronecker.inverse import Block, KroneckerInverse, solve_by
from lowrank_inverse_torch.kronecker.layers import Layer

__all__ = ["KFAC"]

LARGEST = 4096
"""Rows of a Kronecker factor up to which it is decomposed; of larger ones the diagonal is taken."""
NUMBERS = 2**22
"""In the gradients of single examples that are held at a time."""


class KFAC:
    """A Kronecker-factored Gauss-Newton matrix: KFAC [1]_ with corrected eigenvalues, EK-FAC [2]_.

    As the solver of an influence function, ``solver=kfac``, its approximate inverse replaces the
    inverse, as in EK-FAC influence [3]_; the residual measures the error. It is also a
    preconditioner, ``solver=li.CG(preconditioner=kfac)``, which leads to the exact answer. A fully
    trained network however has a few examples of large curvature, which a Kronecker product cannot
    separate from the others: there, conjugate gradients took more products with this preconditioner
    than without. :class:`lowrank_inverse_torch.SubsampledGaussNewton` is the preconditioner for
    that case.

    Each linear layer and convolution whose weight is used nowhere else has a block ``G x A``. A is
    the mean of ``a a.T`` over its inputs, with a 1 appended for the bias. G is the mean of ``g
    g.T`` over the gradients with respect to its outputs, as given by the Hessian of the loss with
    respect to the outputs of the network. Positions in an image [4]_ or a sequence are treated as
    independent [5]_. The correction replaces the eigenvalues by the diagonal of the Gauss-Newton
    matrix in the basis of eigenvectors, which is the best diagonal there. All other parameters,
    such as those of normalisations and embeddings, get an unbiased estimate of the diagonal of the
    Gauss-Newton matrix.

    Parameters
    ----------
    model, loss, train, params, batch_size, split, memory_budget
        See :class:`lowrank_inverse_torch.InfluenceFunction`; the mean is over the same examples.
    eigenvalue_correction : bool
        False gives KFAC, at half the cost.
    num_samples : int, optional
        Number of random vectors at the outputs in each pass, at one backward pass each. Default:
        the unit vectors of all outputs of an example, which makes the blocks exact; one random
        vector if there are more than 64 outputs.
    rng : int or numpy.random.Generator, optional
        Seed of the random vectors.

    Attributes
    ----------
    blocks : list of Block
        One per layer.
    diagonal : Tensor, shape (n,)
        Diagonal for the parameters outside the blocks.
    names : list of str
        Names of those parameters.
    num_bytes : int
        Memory of eigenvectors, eigenvalues and diagonal; the latter two again for each damping.

    Raises
    ------
    TypeError, ValueError
        See `InfluenceFunction`. Also if a loss has more than 64 outputs per example and its Hessian
        is neither diagonal nor that of a softmax over the last axis, or a factor is not finite.

    Notes
    -----
    Cost: two passes over the examples, or one without the correction, each with one forward pass
    and one backward pass per vector at the outputs; and the eigenvectors of two factors per layer.
    Memory for a layer of shape (o, i): ``o**2 + i**2`` numbers for factors and eigenvectors, ``o
    i`` for eigenvalues, and the inputs of all layers for a batch, within a quarter of
    `memory_budget`. For a factor of more than 4096 rows, only the diagonal is kept.

    A ridge that varies within a block is replaced by its mean there. Conjugate gradients still
    reach the exact answer; otherwise the residual shows the difference.

    The first axis of a layer's input must count the examples, or examples and positions.

    References
    ----------
    .. [1] J. Martens, R. Grosse. Optimizing Neural Networks with Kronecker-factored Approximate
       Curvature. ICML 2015.
    .. [2] T. George et al. Fast Approximate Natural Gradient Descent in a Kronecker-factored
       Eigenbasis. NeurIPS 2018.
    .. [3] R. Grosse et al. Studying Large Language Model Generalization with Influence Functions.
       2023.
    .. [4] R. Grosse, J. Martens. A Kronecker-factored Approximate Fisher Matrix for Convolution
       Layers. ICML 2016.
    .. [5] R. Eschenhagen et al. Kronecker-Factored Approximate Curvature for Modern Neural Network
       Architectures. NeurIPS 2023. KFAC-expand.

    Examples
    --------
    For a linear model with a squared loss, EK-FAC is exact.

    >>> import torch
    >>> import lowrank_inverse as li
    >>> import lowrank_inverse_torch as lit
    >>> model = torch.nn.Linear(2, 1)
    >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    >>> train = x, torch.zeros(3, 1)
    >>> def loss(output, target):
    ...     return ((output - target) ** 2).sum(dim=1) / 2
    >>> kfac = lit.KFAC(model, loss, train)
    >>> scorer = lit.InfluenceFunction(model, loss, train, solver=kfac, damping=0.1)
    >>> _ = scorer.scores(train)
    >>> print(float(scorer.info.relative_residual.max()) < 1e-5)
    True
    """

    damping = 0.0
    """That of the system is taken."""

    def __init__(
        self,
        model: nn.Module,
        loss: Callable[[Any, Any], Tensor],
        train: Data,
        *,
        params: PyTree = None,
        eigenvalue_correction: bool = True,
        num_samples: int | None = None,
        batch_size: int | None = None,
        split: Split | None = None,
        rng: RNG = 0,
        memory_budget: int = MEMORY_BUDGET,
    ) -> None:
        if num_samples is not None:
            check_count("num_samples", num_samples)
        backend, examples = measured(model, loss, train, params, split, batch_size, memory_budget)
        generator = torch.Generator().manual_seed(seed_of(rng))
        data = Collection(backend, examples, num_samples, generator, memory_budget)
        self.num_vectors = data.num_vectors
        self.names = [backend.names[i] for i in data.others]
        self.diagonal = torch.zeros_like(backend.vector())
        self._others = [backend.params.offsets[i : i + 2] for i in data.others]
        self.is_corrected = bool(eigenvalue_correction)
        self.blocks = self._factored(data, examples.num)
        if self.is_corrected:
            self.blocks = self._corrected(data, examples.num)
            self.diagonal /= 2  # the mean of the two passes

    def _factored(self, data: Collection, num: int) -> list[Block]:
        """Return blocks from the factors: one pass."""
        A: dict[Layer, Any] = dict.fromkeys(data.layers, 0.0)
        G, num_rows = dict(A), dict.fromkeys(data.layers, 0)
        for opened in data.pieces():
            with opened as piece:
                for layer in data.layers:
                    a = piece.inputs(layer).flatten(0, 1)
                    A[layer], num_rows[layer] = A[layer] + _gram(a), num_rows[layer] + len(a)
                for by_layer, others in piece.gradients():
                    self._add_squares(others, num)
                    for layer, g in by_layer.items():
                        G[layer] = G[layer] + _gram(g.flatten(0, 1))
        blocks = []
        for layer in data.layers:
            g, left = _decomposed(G[layer] / num, layer)
            a, right = _decomposed(A[layer] / num_rows[layer], layer)
            blocks.append(Block(layer, left, right, torch.outer(g, a)))
        return blocks

    def _corrected(self, data: Collection, num: int) -> list[Block]:
        """Return the blocks with the diagonal of the curvature in their bases: one more pass."""
        blocks = [block._replace(eigenvalues=0 * block.eigenvalues) for block in self.blocks]
        for opened in data.pieces():
            with opened as piece:
                a = [_times(piece.inputs(block.layer), block.right) for block in blocks]
                for by_layer, others in piece.gradients():
                    self._add_squares(others, num)
                    for block, inputs in zip(blocks, a, strict=True):
                        _add_squares(
                            block.eigenvalues, _times(by_layer[block.layer], block.left), inputs
                        )
        return [block._replace(eigenvalues=block.eigenvalues / num) for block in blocks]

    def _add_squares(self, grads: Sequence[Tensor | None], num: int) -> None:
        for (start, stop), grad in zip(self._others, grads, strict=True):
            if grad is not None:
                self.diagonal[start:stop] += grad.detach().reshape(-1) ** 2 / num

    @property
    def num_bytes(self) -> int:
        """Memory of eigenvectors, eigenvalues and diagonal; eigenvalues again for each damping."""
        parts = [self.diagonal]
        for block in self.blocks:
            parts += [x for x in (block.left, block.right, block.eigenvalues) if x is not None]
        return sum(x.numel() * x.dtype.itemsize for x in parts)

    def __repr__(self) -> str:
        n, inside = len(self.diagonal), sum(block.eigenvalues.numel() for block in self.blocks)
        return (
            f"{'EK-FAC' if self.is_corrected else 'KFAC'} of {n} parameters: {len(self.blocks)} "
            f"blocks with {inside}, {n - inside} on the diagonal; {self.num_vectors} "
            f"backward passes; {self.num_bytes / 2**20:.3g} MiB"
        )

    def inverse(self, damping: Scalar) -> KroneckerInverse:
        """Return ``(C + damping * I)^{-1}``, positive definite, for the approximate curvature C.

        Parameters
        ----------
        damping : float or Tensor, shape (n,)
            Positive.
        """
        return KroneckerInverse(self.blocks, self.diagonal, damping)

    @differentiable
    def prepare(self, A: OperatorLike, *, rng: RNG = 0, b: Array | None = None) -> PreparedInverse:
        """Return the inverse of the approximate curvature plus the shift of `A`.

        A solve takes one product with `A`, for the residual.
        """
        shift = A.shift if isinstance(A, ShiftedOperator) else 0.0
        inverse = self.inverse(shift)
        run = partial(solve_by, A, inverse)
        return PreparedInverse(A, run, apply=inverse.__matmul__, preconditioner=inverse)


def _gram(rows: Tensor) -> Tensor:
    """Return ``rows.T rows``, or the diagonal alone of a large one."""
    return rows.mT @ rows if rows.shape[1] <= LARGEST else (rows * rows).sum(dim=0)


def _decomposed(M: Tensor, layer: Layer) -> tuple[Tensor, Tensor | None]:
    """Return eigenvalues and eigenvectors of a factor, None for the identity."""
    if not bool(torch.isfinite(M).all()):
        raise ValueError(
            f"the Kronecker factors of layer {layer.name!r} must be finite; some entries are not. "
            "Look for a root, a norm or an absolute value at 0 in the loss, or use float64."
        )
    if M.ndim == 1:
        return M, None
    eigenvalues, vectors = eigh(M)
    return eigenvalues.clamp(min=0), vectors


def _times(rows: Tensor, basis: Tensor | None) -> Tensor:
    return rows if basis is None else rows @ basis


def _add_squares(total: Tensor, g: Tensor, a: Tensor) -> None:
    """Add the squares of ``sum_r g_r a_r.T`` of each example, in place."""
    if a.shape[1] == 1:
        total += (g[:, 0] ** 2).mT @ a[:, 0] ** 2
        return
    step = max(1, NUMBERS // total.numel())
    for start in range(0, len(a), step):
        total += ((g[start : start + step].mT @ a[start : start + step]) ** 2).sum(dim=0)
