"""Minimisers that are differentiated by the implicit function theorem."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor, nn

from lowrank_inverse._typing import RNG, SolveFunction, Solver
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
    """Make the result of a training function differentiable by its hyperparameters.

    Parameters
    ----------
    inner_loss : callable (params, hparams, *args) -> scalar
        What the function minimises. It may read further tensors and modules.
    solver : settings such as ``lowrank_inverse.NystromCG(...)``
        Inverts the Hessian of the inner loss.
    rng : int or numpy.random.Generator, optional
        Seed of the columns.
    chunk_size : int
        Hessian products taken at a time.
    module : Module or iterable of Modules, optional
        What the inner loss runs, so that its buffers and mode are left as they are.
    ridge : float, Tensor, structure of the parameters, or callable (hparams) -> one of these
        Weight decay that `inner_loss` leaves out; see :func:`lowrank_inverse_torch.hypergradient`.
    keep_state : bool
        Start each solve from that of the backward pass before: for a loop over one problem.

    Returns
    -------
    decorator
        For a function ``train(init, hparams, *args, **options) -> params``, all of them tensors or
        structures of tensors. Its derivative by `hparams`, by `args`, and by every leaf tensor
        that the inner loss reads beside them, becomes ``-(∂²f/∂θ² + damping I)^{-1} ∂²f/∂θ∂φ``,
        whatever the function does inside; the derivative by `init` is zero. `train` is given
        `hparams` and `args` detached; `options` go to it alone, and have no derivative.

        The attribute `minimizer` of the decorated function has `info`, the HypergradientInfo of
        the latest backward pass, and `state`, with which it ended. What `info.findings()` says is
        warned of, once of each kind.

    Raises
    ------
    RuntimeError
        For a second derivative, and for forward mode; where the inner loss has another value in
        the backward pass than at the end of training, for something that it reads has changed.
    TypeError, ValueError
        As :func:`lowrank_inverse_torch.HessianOperator`, when differentiated.

    Notes
    -----
    The backward pass costs a gradient, the products of the solver, and one more. One evaluation
    of the loss at the result finds the tensors that it reads; under ``torch.no_grad()`` there is
    none.

    ``torch.func.grad``, ``vjp``, ``jacrev`` and ``vmap`` work, the last by a loop. They see
    arguments alone, never what the loss reads beside them. A training function that calls
    ``backward()`` should name its ``inputs``, or it fills ``.grad`` of all that the loss reads.

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
        def wrapped(init: Any, hparams: Any, *args: Any, **options: Any) -> Any:
            problem = Problem(minimizer, init, hparams, args, options)
            return problem.minimise(init, hparams, args)

        wrapped.minimizer = minimizer  # type: ignore[attr-defined]
        return wrapped

    return decorator
