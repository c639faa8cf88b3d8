"""Bilevel problems of live torch models, to the optimum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lowrank_inverse._typing import RNG, Scalar, SolveFunction, Solver
from lowrank_inverse.bilevel.minimization import check_bounds, minimize, seed_of
from lowrank_inverse.bilevel.minimum import BilevelMinimum
from lowrank_inverse_torch.bilevel.problem import OptimizerStep, Problem, host, side
from lowrank_inverse_torch.curvature.hessian import Loss
from lowrank_inverse_torch.curvature.mean_operator import Modules
from lowrank_inverse_torch.parameters import as_parameters

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["minimize_bilevel"]


def minimize_bilevel(
    inner_loss: Loss | Sequence[Loss],
    outer_loss: Loss | Sequence[Loss],
    params: Any,
    hparams: Any,
    *,
    inner: Any = "lbfgs",
    outer: Any = "lbfgs",
    solver: Solver | SolveFunction | None = None,
    ridge: Scalar | Callable[[], Any] = None,
    bounds: tuple[Any, Any] | None = None,
    tol: float = 1e-5,
    max_evaluations: int = 200,
    inner_steps: int = 1000,
    callback: Callable[[Any, Any, Any], object] | None = None,
    progress: bool = False,
    checkpoint: str | PathLike[str] | None = None,
    rng: RNG = 0,
    chunk_size: int = 1,
    module: Modules | None = None,
    mesh: DeviceMesh | None = None,
) -> BilevelMinimum:
    """Minimise the outer loss at the minimiser of the inner one by hyperparameters.

    With f the inner loss and g the outer one: ``min_φ g(θ(φ), φ)``, ``θ(φ) = argmin_θ f(θ, φ)``.
    By default L-BFGS-B takes the outer steps [1]_, on hypergradients whose inner and linear
    tolerances fall with the outer gradient [2]_.

    Parameters
    ----------
    inner_loss, outer_loss : closure () -> scalar, or list of closures
        They read the live `params` and `hparams`. A list is averaged.
    params, hparams : Module, Tensor, iterable of tensors, or pytree
        θ and φ, leaves of the graph. Where they are is the start; the result is written to them.
    inner : "lbfgs", torch.optim.Optimizer, or callable (rng)
        What minimises the inner loss, from where it was last. SciPy's L-BFGS, preconditioned by
        the pairs that the hypergradients keep; an optimizer of `params`, which starts afresh
        each time and takes at most `inner_steps` steps; or a function of your own that trains
        `params` in place. It is given a NumPy Generator, seeded by `rng` and the number of the
        evaluation.
    outer : "lbfgs" or torch.optim.Optimizer
        What minimises the outer loss: SciPy's L-BFGS-B, or an optimizer of `hparams`.
    solver : settings such as ``lowrank_inverse.NystromCG(...)``, or callable ``solve(matvec, b)``
        Of the linear systems. Default: CG with recycled pairs, to the tolerance that is needed.
    ridge : float, structure of `params`, or closure () -> one of these, optional
        As in `hypergradient`. Give a closure where it depends on `hparams`.
    bounds : pair of float or structure of `hparams`, optional
        Least and largest values of the hyperparameters, ``±inf`` where there are none.
    tol : float
        It ends when the norm of the gradient, without the part that points out of the bounds, has
        fallen by this factor. The scale of the losses has no part in it.
    max_evaluations : int
        Hypergradients, at most.
    inner_steps : int
        Steps for one inner problem, at most.
    callback : callable (evaluation, params, hparams), optional
        Called after each `Evaluation`. It ends the minimisation where it returns True.
    progress : bool
        Show a bar (needs tqdm).
    checkpoint : path, optional
        A folder for the evaluations. A call that finds some there goes on from them, bit for bit
        as if it had never stopped, if all else is the same.
    rng : int or numpy.random.Generator, optional
        Seed of what is drawn; None for fresh entropy.
    chunk_size, module, mesh
        As in `hypergradient`; a checkpoint is then a file for each process. What `inner` and
        `outer` do must be the same in all processes.

    Returns
    -------
    BilevelMinimum
        With `reason` and ``explain()``. Numerical trouble is a reason, and not an exception.

    Raises
    ------
    ValueError
        As `hypergradient`; for tensors that are no leaves; for bounds out of order; for a
        checkpoint of another minimisation.
    TypeError
        An `inner` or `outer` of another kind.

    Notes
    -----
    The value of an evaluation is the outer loss less ``<q, r>``, with q the inverse product and r
    the inner gradient: the error of the inner solve, to first order [3]_. Differences of values
    that are below the rounding are taken from the gradients. Steps to where a loss is not finite,
    or the inner problem has no minimum, are rejected, and a shorter one is taken.

    Training mode, buffers, random state and ``.grad`` come back as they were, but for what an
    `inner` of your own does.

    References
    ----------
    .. [1] R. H. Byrd, P. Lu, J. Nocedal, C. Zhu. A Limited Memory Algorithm for Bound
       Constrained Optimization. SIAM J. Sci. Comput. 16, 1995.
    .. [2] F. Pedregosa. Hyperparameter Optimization with Approximate Gradient. ICML 2016.
    .. [3] R. Becker, R. Rannacher. An Optimal Control Approach to A Posteriori Error Estimation
       in Finite Element Methods. Acta Numerica, 2001.

    Examples
    --------
    The minimiser of ``(w - 3)² / 2 + h w² / 2`` is ``3 / (1 + h)``: at h = 1/2 it is 2.

    >>> import torch
    >>> w = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    >>> h = torch.ones(1, dtype=torch.float64, requires_grad=True)
    >>> def inner_loss():
    ...     return 0.5 * ((w - 3) ** 2 + h * w**2).sum()
    >>> found = minimize_bilevel(
    ...     inner_loss, lambda: ((w - 2) ** 2).sum(), w, h, bounds=(0, float("inf"))
    ... )
    >>> print(found.reason, round(h.item(), 4))
    converged 0.5
    """
    theta, phi = as_parameters(params), as_parameters(hparams, name="hparams")
    if mesh is not None and checkpoint is not None:  # a file of its own for each process
        path = Path(checkpoint)
        own = f"{path.stem}-{mesh.get_local_rank()}-of-{mesh.size()}{path.suffix}"
        checkpoint = path.with_name(own)
    problem = Problem(
        inner_loss, outer_loss, theta, phi, solver, ridge, seed_of(rng), chunk_size, module, mesh
    )
    train: Any = None
    if isinstance(inner, torch.optim.Optimizer):
        train = OptimizerStep(inner, theta, "inner")
    elif callable(inner):

        def train(x: np.ndarray, h: np.ndarray, rng: np.random.Generator) -> np.ndarray:
            problem.write(x, h)
            inner(rng)
            return host(theta)

    elif inner != "lbfgs":
        raise TypeError(
            '`inner` must be "lbfgs", an optimizer of torch.optim, or a function (rng) that trains '
            f"`params` in place; got {inner!r}."
        )
    step = None
    if isinstance(outer, torch.optim.Optimizer):
        step = OptimizerStep(outer, phi, "outer")
    elif outer != "lbfgs":
        raise TypeError(f'`outer` must be "lbfgs" or an optimizer of torch.optim; got {outer!r}.')
    return minimize(
        problem,
        inner=train,
        outer=step,
        bounds=None if bounds is None else check_bounds(*(side(bound, phi) for bound in bounds)),
        tol=tol,
        max_evaluations=max_evaluations,
        inner_steps=inner_steps,
        callback=callback,
        progress=progress,
        checkpoint=checkpoint,
        seed=problem.seed,
    )
