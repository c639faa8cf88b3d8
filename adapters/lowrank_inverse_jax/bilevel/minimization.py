"""Minimisation of bilevel problems of functions of pytrees."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import Any

import numpy as np
from jax.sharding import Mesh

from lowrank_inverse._typing import RNG, PyTree, Scalar, SolveFunction, Solver
from lowrank_inverse.bilevel.minimization import check_bounds, minimize, seed_of
from lowrank_inverse.bilevel.minimum import BilevelMinimum
from lowrank_inverse_jax.bilevel.problem import OptimizerStep, Problem, host, is_optimizer, side
from lowrank_inverse_jax.parameters import as_parameters

__all__ = ["minimize_bilevel"]


def minimize_bilevel(
    inner_loss: Callable[..., Any],
    outer_loss: Callable[..., Any],
    params: PyTree,
    hparams: PyTree,
    *,
    inner: Any = "lbfgs",
    outer: Any = "lbfgs",
    inner_args: tuple[Any, ...] = (),
    outer_args: tuple[Any, ...] = (),
    solver: Solver | SolveFunction | None = None,
    ridge: Scalar | Callable[[Any], Any] = None,
    bounds: tuple[Any, Any] | None = None,
    tol: float = 1e-5,
    max_evaluations: int = 200,
    inner_steps: int = 1000,
    callback: Callable[[Any, Any, Any], object] | None = None,
    progress: bool = False,
    checkpoint: str | PathLike[str] | None = None,
    rng: RNG = 0,
    chunk_size: int = 8,
    mesh: Mesh | None = None,
) -> BilevelMinimum:
    """Minimise the outer loss over the hyperparameters, at the minimiser of the inner loss.

    For the inner loss f and the outer loss g: ``min_φ g(θ(φ), φ)`` with ``θ(φ) = argmin_θ f(θ,
    φ)``. By default, L-BFGS-B [1]_ takes the outer steps. The tolerances of the inner problem and
    of the linear system tighten as the outer gradient falls [2]_. The losses are compiled. The loop
    is not, and cannot be called inside ``jax.jit``.

    Parameters
    ----------
    inner_loss : callable (params, hparams, *inner_args) -> scalar
        The loss that training minimises.
    outer_loss : callable (params, hparams, *outer_args) -> scalar
        The loss to minimise. Pass large data as arguments: other arrays that a loss reads are
        compiled in as constants.
    params, hparams : pytree
        Starting points of θ and φ.
    inner : "lbfgs", optax optimizer, or callable (params, hparams, rng) -> params
        Minimises the inner loss, starting from the previous inner minimum. "lbfgs" is SciPy's
        L-BFGS, preconditioned by the pairs that the hypergradients keep. An optimizer is reset for
        each inner problem and takes at most `inner_steps` steps. Your own function also gets a
        NumPy Generator, seeded by `rng` and the number of the evaluation.
    outer : "lbfgs" or optax optimizer
        Minimises the outer loss; "lbfgs" is SciPy's L-BFGS-B.
    solver : settings such as ``lowrank_inverse.NystromCG(...)``, or callable ``solve(matvec, b)``
        Solves the linear systems. Default: CG with recycled pairs, to the required tolerance.
    ridge : float, array, structure of `params`, or callable (hparams) -> one of these, optional
        See `hypergradient`.
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
        bitwise the same result as without interruption. Each of several processes has a folder in
        it.
    rng : int or numpy.random.Generator, optional
        Seed of all random numbers; None draws a new one.
    chunk_size, mesh
        See `hypergradient`. The loop keeps a few vectors of the parameters on the host, in each
        process.

    Returns
    -------
    BilevelMinimum
        With `reason` and ``explain()``. Numerical failures are reasons, not exceptions.

    Raises
    ------
    ValueError
        See `hypergradient`. Also if the bounds are not in order, or the checkpoint belongs to
        another minimisation.
    TypeError
        If `inner` or `outer` has the wrong type.

    Notes
    -----
    The value of an evaluation is the outer loss minus ``<q, r>``, with q the inverse product and r
    the inner gradient. This removes the error of the inner solve to first order [3]_. Differences
    of values below the rounding are computed from gradients. A step to a point where a loss is not
    finite or the inner problem has no minimum is rejected and shortened.

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

    >>> import jax.numpy as jnp
    >>> def inner_loss(w, h):
    ...     return 0.5 * ((w - 3) ** 2 + h * w**2)
    >>> found = minimize_bilevel(
    ...     inner_loss, lambda w, h: (w - 2) ** 2, 0.0, 1.0, bounds=(0, float("inf"))
    ... )
    >>> print(found.reason, round(float(found.hparams), 3))
    converged 0.5
    """
    theta = as_parameters(params, mesh=mesh)
    phi = as_parameters(hparams, name="hparams", mesh=mesh)
    problem = Problem(
        (inner_loss, outer_loss),
        (tuple(inner_args), tuple(outer_args)),
        theta,
        phi,
        solver=solver,
        ridge=ridge,
        rng=(seed := seed_of(rng)),
        chunk_size=chunk_size,
    )
    train: Any = None
    if is_optimizer(inner):
        train = OptimizerStep(inner, theta)
    elif callable(inner):

        def train(x: np.ndarray, h: np.ndarray, rng: np.random.Generator) -> np.ndarray:
            return host(theta.collect(inner(*problem.restore(x, h), rng), name="params"))

    elif inner != "lbfgs":
        raise TypeError(
            '`inner` must be "lbfgs", an optimizer of optax, or a function (params, hparams, rng) '
            f"-> params; got {inner!r}."
        )
    step = None
    if is_optimizer(outer):
        step = OptimizerStep(outer, phi)
    elif outer != "lbfgs":
        raise TypeError(f'`outer` must be "lbfgs" or an optimizer of optax; got {outer!r}.')
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
        checkpoint=theta.layout.folder(checkpoint),
        seed=seed,
    )
