"""Hypergradients of PyTorch models by implicit differentiation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lowrank_inverse._typing import RNG, PyTree, Scalar, SolveFunction, Solver
from lowrank_inverse.arrays.spread import gathered, is_spread
from lowrank_inverse.bilevel.hessian_check import HessianCheck
from lowrank_inverse.bilevel.implicit_gradient import ImplicitGradient, implicit_gradient
from lowrank_inverse.bilevel.info import HypergradientInfo, hypergradient_info
from lowrank_inverse.results.solution import Reason, Solution
from lowrank_inverse.solvers.state import HypergradientState
from lowrank_inverse_torch.bilevel.outer_gradients import outer_gradients
from lowrank_inverse_torch.bilevel.ridge import Ridge, sums
from lowrank_inverse_torch.curvature.check import check_along
from lowrank_inverse_torch.curvature.hessian import HessianOperator, Loss
from lowrank_inverse_torch.curvature.mean_operator import Modules
from lowrank_inverse_torch.model_guard import warn_of_ranks
from lowrank_inverse_torch.parameters import Parameters, as_parameters

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Hypergradient", "hypergradient"]


class Hypergradient(NamedTuple):
    """The result of `hypergradient`.

    Attributes
    ----------
    grads : structure of `hparams`
        The hypergradient, ``direct + implicit``.
    direct : structure of `hparams`
        Gradient of the outer loss at fixed parameters.
    implicit : structure of `hparams`
        Contribution through the parameters.
    ihvp : structure of `params`
        ``(H + ridge + damping)^{-1}`` times the outer gradient (inverse-Hessian-vector product).
    state : HypergradientState
        Pass it to the next call as `state`, for a warm start and a preconditioner.
    info : HypergradientInfo
        Cost and accuracy, as Python numbers.
    solution : Solution
        Solution of the linear system.
    """

    grads: Any
    direct: Any
    implicit: Any
    ihvp: Any
    state: HypergradientState
    info: HypergradientInfo
    solution: Solution

    def explain(self) -> str:
        """Describe cost and accuracy, the problems found, and what to do about them."""
        return self.info.explain()


def hypergradient(
    inner_loss: Loss | Sequence[Loss],
    outer_loss: Loss | Sequence[Loss],
    params: PyTree,
    hparams: PyTree,
    *,
    solver: Solver | SolveFunction | None = None,
    ridge: Scalar = None,
    state: HypergradientState | Solution | None = None,
    accumulate_grad: bool = False,
    rng: RNG = 0,
    chunk_size: int = 1,
    module: Modules | None = None,
    mesh: DeviceMesh | None = None,
) -> Hypergradient:
    """Differentiate the outer loss at the inner minimiser with respect to hyperparameters.

    For the inner loss f, the outer loss g and ``θ(φ) = argmin f``: ``dg/dφ = ∂g/∂φ - ∂g/∂θ (∂²f/∂θ²
    + damping I)^{-1} ∂²f/∂θ∂φ`` (Eq. 3 of [1]_).

    Parameters
    ----------
    inner_loss, outer_loss : closure () -> scalar, scalar Tensor with its graph, or list of closures
        The closures read `params` and `hparams`. A list stands for the mean; only one graph at a
        time is in memory.
    params : Module, Tensor, iterable of tensors, or pytree
        θ, at or near the minimum of the inner loss. Frozen tensors are ignored, and tied ones
        count once.
    hparams : Module, Tensor, iterable of tensors, or pytree
        φ. If neither loss depends on one of them, its gradient is zero and the info names it.
    solver : settings such as ``lowrank_inverse.Nystrom(...)``, or callable ``solve(matvec, b)``
        Solves the linear system; its damping is added to the Hessian. Default:
        ``CG(max_steps=40)``.
    ridge : float, Tensor, or structure of `params`, optional
        Coefficient r of a term ``r / 2 * sum(θ ** 2)`` of the inner problem (weight decay) that
        `inner_loss` does not include: a number, a flat tensor of shape (n,), or the structure of
        `params` with a number or tensor for each tensor, where None means zero. The solver treats
        it exactly. It may depend on `hparams`.
    state : HypergradientState, optional
        For a sequence of outer steps: ``HypergradientState()`` in the first call, then the
        ``.state`` of the previous result. CG and NystromCG start from it and recycle its pairs.
        The Solution of a similar system also serves as a start. None keeps no pairs.
    accumulate_grad : bool
        Also add the result to ``.grad`` of the hyperparameters, like ``backward()``.
    rng : int or numpy.random.Generator, optional
        Seed of the sampled columns: the same seed gives the same result. None draws a new one.
    chunk_size : int
        Hessian products computed at a time; see `HessianOperator`.
    module : Module or iterable of Modules, optional
        Further modules that the losses run; see `HessianOperator`.
    mesh : DeviceMesh, optional
        One-dimensional mesh of data-parallel processes, each with closures over its own data; see
        `HessianOperator`. The losses are the means over the closures of all processes.
        Hyperparameters are either the same in all processes, or DTensors, such as one weight for
        each example of a process. `grads` and `ihvp` are distributed like `hparams` and `params`;
        `state` and `solution` are sharded.

    Returns
    -------
    Hypergradient

    Raises
    ------
    ValueError
        If a loss is not a finite scalar or does not depend on `params`, neither loss depends on
        any hyperparameter, or a tensor is both parameter and hyperparameter.

    Notes
    -----
    Cost: two gradients, the products of the solver at about two gradients each (see ``info``), and
    one product for the mixed derivative. If the inner loss detaches a tensor that depends on the
    parameters, a check takes one more product and two gradients. Training mode, buffers, random
    state and ``.grad`` of the parameters are restored.

    References
    ----------
    .. [1] R. Hataya, M. Yamada. Nyström Method for Accurate and Scalable Implicit
       Differentiation. AISTATS 2023.

    Examples
    --------
    The minimiser of ``(w - 3)² / 2 + h w² / 2`` is ``3 / (1 + h)``, with derivative -3/4 at h = 1.

    >>> import torch
    >>> import lowrank_inverse as li
    >>> w, h = (
    ...     torch.tensor([1.5], requires_grad=True),
    ...     torch.tensor(1.0, requires_grad=True),
    ... )
    >>> def inner():
    ...     return 0.5 * ((w - 3) ** 2 + h * w**2).sum()
    >>> out = hypergradient(inner, lambda: w.sum(), w, h, solver=li.CG())
    >>> print(out.grads.item(), out.info.inner_grad_norm)
    -0.75 0.0
    """
    params = as_parameters(params, gather=mesh is not None)
    hparams = as_parameters(hparams, name="hparams", spread=mesh is not None)
    _check_distinct(params, hparams)
    if mesh is None:
        warn_of_ranks()
    modules = [*params.modules, *hparams.modules, *_modules(module)]
    # Before the operator is made: Embedding(max_norm=...) writes to its weights.
    outer_grad, direct = outer_gradients(outer_loss, params, hparams, modules, mesh)
    H = HessianOperator(
        inner_loss, params, chunk_size=chunk_size, module=modules, mesh=mesh, name="inner_loss"
    )
    known = None if ridge is None else Ridge(ridge, params)
    coefficients = None if known is None else H.laid(known.coefficients)
    if H.processes is not None:
        common = [tensor for tensor in hparams.tensors if not is_spread(tensor)]
        H.processes.agree(solver=solver, ridge=ridge, rng=rng, hyperparameters=common)
        if rng is None:
            raise ValueError("`rng` must be a whole number with a `mesh`; got None.")

    def mixed_vjp(q: Tensor) -> list[Tensor | None]:
        parts = H.vjp(q, hparams.tensors)
        return parts if known is None else sums(parts, known.vjp(gathered(q), hparams.tensors))

    result = implicit_gradient(
        H, outer_grad, mixed_vjp, direct, solver=solver, ridge=coefficients, rng=rng, state=state
    )
    without_path = tuple(
        name for name, grad in zip(hparams.names, result.grads, strict=True) if grad is None
    )
    if len(without_path) == len(hparams.names):
        raise ValueError(
            "`hparams` must reach one of the losses; neither depends on any of "
            f"{', '.join(map(repr, without_path))}. Use the tensors themselves inside the "
            "closures, without detach(). A learning rate or an initial value does not move the "
            "minimum, so it has no hypergradient."
        )
    if accumulate_grad:
        _accumulate(hparams.tensors, result.grads)
    return Hypergradient(
        grads=_restore(hparams, result.grads),
        direct=_restore(hparams, direct),
        implicit=_restore(hparams, result.implicit),
        ihvp=params.restore(gathered(result.solution.value)),
        state=result.state,
        info=record(result, outer_grad, H, coefficients, without_path),
        solution=result.solution,
    )


def record(
    result: ImplicitGradient,
    outer_grad: Tensor,
    H: HessianOperator,
    ridge: Tensor | None,
    without_path: tuple[str, ...] = (),
) -> HypergradientInfo:
    """Collect the record of a hypergradient as Python numbers."""
    theta = H.laid(H.params.flatten(H.params.tensors))
    inner_grad = H.gradient if ridge is None else H.gradient + ridge * theta
    info = hypergradient_info(result, outer_grad, inner_grad, without_path, theta)
    return replace(
        info,
        relative_residual=info.relative_residual.item(),
        inner_grad_norm=info.inner_grad_norm.item(),
        negative_curvature=bool(info.negative_curvature),
        num_steps=int(info.num_steps),
        reason=Reason(int(info.reason)),
        inner_step=float(info.inner_step),
        error_bound=float(info.error_bound),
        asymmetry=None if info.asymmetry is None else float(info.asymmetry),
        num_zeros=int(info.num_zeros),
        support_grad_norm=info.support_grad_norm.item(),
        hessian_check=_checked(H, result.solution.value),
    )


def _checked(H: HessianOperator, q: Tensor) -> HessianCheck | None:
    """Compare H q with a difference of gradients where the loss detaches what it depends on."""
    theta, q = H.params.flatten(H.params.tensors), gathered(q)
    scale = (theta.norm() / q.norm()).item()
    movable = all(tensor.is_leaf for tensor in H.params.tensors)
    if not H.detached or not movable or not math.isfinite(scale) or scale == 0:
        return None
    return check_along(H, scale * q)


def _check_distinct(params: Parameters, hparams: Parameters) -> None:
    own = {id(tensor) for tensor in params.tensors}
    for tensor, name in zip(hparams.tensors, hparams.names, strict=True):
        if id(tensor) in own:
            raise ValueError(
                f"`hparams` and `params` must be distinct; {name!r} is in both. Freeze it in one "
                "of them with requires_grad_(False), or remove it."
            )


def _modules(module: Modules | None) -> list[nn.Module]:
    if module is None:
        return []
    return [module] if isinstance(module, nn.Module) else list(module)


def _accumulate(tensors: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    for tensor, grad in zip(tensors, grads, strict=True):
        if grad is not None and tensor.is_leaf:
            if tensor.grad is None:
                tensor.grad = grad.clone()
            else:
                tensor.grad.detach().add_(grad)


def _restore(hparams: Parameters, grads: Sequence[Tensor | None]) -> Any:
    return hparams.restore(
        [
            torch.zeros_like(tensor) if grad is None else grad
            for tensor, grad in zip(hparams.tensors, grads, strict=True)
        ]
    )
