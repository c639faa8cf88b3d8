"""Minimisation of bilevel problems of PyTorch models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lowrank_inverse._typing import RNG, PyTree, Scalar, SolveFunction, Solver
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
    params: PyTree,
    hparams: PyTree,
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
    """Minimise the outer loss over the hyperparameters, at the minimiser of the inner loss.

    For the inner loss f and the outer loss g: ``min_φ g(θ(φ), φ)`` with ``θ(φ) = argmin_θ f(θ,
    φ)``. By default, L-BFGS-B [1]_ takes the outer steps. The tolerances of the inner problem and
    of the linear system tighten as the outer gradient falls [2]_.

    Parameters
    ----------
    inner_loss, outer_loss : closure () -> scalar, or list of closures
        The closures read `params` and `hparams`. A list stands for the mean.
    params, hparams : Module, Tensor, iterable of tensors, or pytree
        θ and φ, leaf tensors. Their values are the start, and receive the result.
    inner : "lbfgs", torch.optim.Optimizer, or callable (rng)
        Minimises the inner loss, starting from the previous inner minimum. "lbfgs" is SciPy's
        L-BFGS, preconditioned by the pairs that the hypergradients keep. An optimizer of `params`
        is reset for each inner problem and takes at most `inner_steps` steps. Your own function
        trains `params` in place; its argument is a NumPy Generator, seeded by `rng` and the number
        of the evaluation.
    outer : "lbfgs" or torch.optim.Optimizer
        Minimises the outer loss: SciPy's L-BFGS-B, or an optimizer of `hparams`.
    solver : settings such as ``lowrank_inverse.NystromCG(...)``, or callable ``solve(matvec, b)``
        Solves the linear systems. Default: CG with recycled pairs, to the required tolerance.
    ridge : float, structure of `params`, or closure () -> one of these, optional
        See `hypergradient`. If it depends on `hparams`, pass a closure.
    bounds : pair of float or structure of `hparams`, optional
        Lower and upper bounds of the hyperparameters, ``±inf`` for none.
    tol : float
        Stop when the norm of the projected gradient has fallen by this factor. The projected
        gradient has no components that point out of the bounds.
    max_evaluations : int
        Maximum number of hypergradients.
    inner_steps : int
        Maximum number of steps for one inner problem.
    callback : callable (evaluation, params, hparams), optional
        Called after each `Evaluation`. Return True to stop.
    progress : bool
        Show a progress bar (needs tqdm).
    checkpoint : path, optional
        Folder for the evaluations. A later call with the same arguments continues from them, with
        bitwise the same result as without interruption.
    rng : int or numpy.random.Generator, optional
        Seed of all random numbers; None draws a new one.
    chunk_size, module, mesh
        See `hypergradient`. With a mesh, the checkpoint has a file for each process, and `inner`
        and `outer` must do the same in all processes.

    Returns
    -------
    BilevelMinimum
        With `reason` and ``explain()``. Numerical failures are reasons, not exceptions.

    Raises
    ------
    ValueError
        See `hypergradient`. Also if a tensor is not a leaf, the bounds are not in order, or the
        checkpoint belongs to another minimisation.
    TypeError
        If `inner` or `outer` has the wrong type.

    Notes
    -----
    The value of an evaluation is the outer loss minus ``<q, r>``, with q the inverse product and r
    the inner gradient. This removes the error of the inner solve to first order [3]_. Differences
    of values below the rounding are computed from gradients. A step to a point where a loss is not
    finite or the inner problem has no minimum is rejected and shortened.

    Training mode, buffers, random state and ``.grad`` are restored, except for what your own
    `inner` changes.

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
