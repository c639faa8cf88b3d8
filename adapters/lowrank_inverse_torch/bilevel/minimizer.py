"""Minimisers with derivatives by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor, nn

from lowrank_inverse._typing import RNG, PyTree, SolveFunction, Solver
from lowrank_inverse.bilevel.ridge import default_solver
from lowrank_inverse_torch.bilevel.training import Minimizer, Problem
from lowrank_inverse_torch.curvature.mean_operator import Modules

__all__ = ["implicit_minimizer"]


def implicit_minimizer(
    inner_loss: Callable[..., Tensor],
    *,
    solver: Solver | SolveFunction | None = None,
    rng: RNG = 0,
    chunk_size: int = 1,
    module: Modules | None = None,
    ridge: Any = None,
    keep_state: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a training function differentiable with respect to its hyperparameters [1]_.

    Parameters
    ----------
    inner_loss : callable (params, hparams, *args) -> scalar
        The loss that the training function minimises. It may read further tensors and modules.
    solver : settings such as ``lowrank_inverse.NystromCG(...)``
        Inverts the Hessian of the inner loss.
    rng : int or numpy.random.Generator, optional
        Seed of the sampled columns.
    chunk_size : int
        Hessian products computed at a time.
    module : Module or iterable of Modules, optional
        Modules that the inner loss runs, whose buffers and mode are to be restored.
    ridge : float, Tensor, structure of the parameters, or callable (hparams) -> one of these
        Weight decay that `inner_loss` does not include; see
        :func:`lowrank_inverse_torch.hypergradient`.
    keep_state : bool
        Start each solve from the state of the previous backward pass, for a loop over one problem.

    Returns
    -------
    decorator
        For a function ``train(init, hparams, *args, **options) -> params``, with tensors or
        structures of tensors. The derivative of its result with respect to `hparams`, `args` and
        every leaf tensor that the inner loss reads becomes ``-(∂²f/∂θ² + damping I)^{-1}
        ∂²f/∂θ∂φ``, whatever the function does inside. The derivative with respect to `init` is
        zero. `train` receives `hparams` and `args` detached. `options` are passed to it only, and
        have no derivative.

        The decorated function has an attribute `minimizer`, with the HypergradientInfo of the last
        backward pass as `info` and its final state as `state`. Each kind of problem in
        `info.findings()` raises a warning once.

    Raises
    ------
    RuntimeError
        For second derivatives and forward mode. Also if the value of the inner loss in the backward
        pass differs from that at the end of training, because something that it reads has changed.
    TypeError, ValueError
        During differentiation; see :func:`lowrank_inverse_torch.HessianOperator`.

    Notes
    -----
    The backward pass costs a gradient, the products of the solver, and one more product. The
    forward pass evaluates the loss once at the result, to find the tensors that it reads, except
    under ``torch.no_grad()``.

    ``torch.func.grad``, ``vjp``, ``jacrev`` and ``vmap`` are supported, the last by a loop. They
    differentiate with respect to arguments only, not other tensors that the loss reads. A training
    function that calls ``backward()`` should pass ``inputs``; otherwise it fills ``.grad`` of every
    tensor that the loss reads.

    References
    ----------
    .. [1] M. Blondel et al. Efficient and Modular Implicit Differentiation. NeurIPS 2022.

    Examples
    --------
    >>> import torch
    >>> import lowrank_inverse as li
    >>> def inner(w, h):
    ...     return 0.5 * ((w - 3) ** 2 + h * w**2)
    >>> @implicit_minimizer(inner, solver=li.CG())
    ... def train(init, h):
    ...     return 3 / (1 + h)
    >>> h = torch.tensor(1.0, requires_grad=True)
    >>> train(torch.tensor(0.0), h).backward()
    >>> print(h.grad.item())
    -0.75
    """
    settings = default_solver(solver)
    if not callable(inner_loss):
        raise TypeError(
            f"`inner_loss` must be a function; got {type(inner_loss).__name__}. Pass the function, "
            "not its value."
        )
    guarded = [module] if isinstance(module, nn.Module) else list(module or ())

    def decorator(train: Callable[..., Any]) -> Callable[..., Any]:
        minimizer = Minimizer(
            train,
            inner_loss,
            solver=settings,
            ridge=ridge,
            rng=rng,
            chunk_size=chunk_size,
            modules=guarded,
            keep_state=keep_state,
        )

        @wraps(train)
        def wrapped(init: PyTree, hparams: PyTree, *args: Any, **options: Any) -> Any:
            problem = Problem(minimizer, init, hparams, args, options)
            return problem.minimise(init, hparams, args)

        wrapped.minimizer = minimizer  # type: ignore[attr-defined]
        return wrapped

    return decorator
