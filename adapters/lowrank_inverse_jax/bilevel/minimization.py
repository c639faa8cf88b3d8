"""Bilevel problems of functions of pytrees, to the optimum."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import Any

import numpy as np
from jax.sharding import Mesh

from lowrank_inverse._typing import RNG, Scalar, SolveFunction, Solver
from lowrank_inverse.bilevel.minimization import check_bounds, minimize, seed_of
from lowrank_inverse.bilevel.minimum import BilevelMinimum
from lowrank_inverse_jax.bilevel.problem import OptimizerStep, Problem, host, is_optimizer, side
from lowrank_inverse_jax.parameters import as_parameters

__all__ = ["minimize_bilevel"]


def minimize_bilevel(
    inner_loss: Callable[..., Any],
    outer_loss: Callable[..., Any],
    params: Any,
    hparams: Any,
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
    """Minimise the outer loss at the minimiser of the inner one by hyperparameters.

    With f the inner loss and g the outer one: ``min_φ g(θ(φ), φ)``, ``θ(φ) = argmin_θ f(θ, φ)``.
    By default L-BFGS-B takes the outer steps [1]_, on hypergradients whose inner and linear
    tolerances fall with the outer gradient [2]_. The losses are compiled; the loop is not, and so
    it is not for ``jax.jit``.

    Parameters
    ----------
    inner_loss : callable (params, hparams, *inner_args) -> scalar
    outer_loss : callable (params, hparams, *outer_args) -> scalar
        Give large arrays of data as arguments: what a loss reads beside them is compiled in.
    params, hparams : pytree
        Where θ and φ start.
    inner : "lbfgs", optax optimizer, or callable (params, hparams, rng) -> params
        What minimises the inner loss, from where it was last. SciPy's L-BFGS, preconditioned by
        the pairs that the hypergradients keep; an optimizer, which starts afresh each time and
        takes at most `inner_steps` steps; or a function of your own. It is given a NumPy Generator,
        seeded by `rng` and the number of the evaluation.
    outer : "lbfgs" or optax optimizer
        What minimises the outer loss; "lbfgs" is SciPy's L-BFGS-B.
    solver : settings such as ``lowrank_inverse.NystromCG(...)``, or callable ``solve(matvec, b)``
        Of the linear systems. Default: CG with recycled pairs, to the tolerance that is needed.
    ridge : float, array, structure of `params`, or callable (hparams) -> one of these, optional
        As in `hypergradient`.
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
        as if it had never stopped, if all else is the same. Of several processes, each has a
        folder in it.
    rng : int or numpy.random.Generator, optional
        Seed of what is drawn; None for fresh entropy.
    chunk_size, mesh
        As in `hypergradient`. The loop holds a few vectors of the parameters on the host, and each
        process all of them.

    Returns
    -------
    BilevelMinimum
        With `reason` and ``explain()``. Numerical trouble is a reason, and not an exception.

    Raises
    ------
    ValueError
        As `hypergradient`; for bounds out of order; for a checkpoint of another minimisation.
    TypeError
        An `inner` or `outer` of another kind.

    Notes
    -----
    The value of an evaluation is the outer loss less ``<q, r>``, with q the inverse product and r
    the inner gradient: the error of the inner solve, to first order [3]_. Differences of values
    that are below the rounding are taken from the gradients. Steps to where a loss is not finite,
    or the inner problem has no minimum, are rejected, and a shorter one is taken.

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
