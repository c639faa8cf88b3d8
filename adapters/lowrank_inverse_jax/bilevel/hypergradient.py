"""Hypergradients of functions of pytrees by implicit differentiation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval
from jax.sharding import Mesh

from lowrank_inverse._typing import RNG, PyTree, Scalar, SolveFunction, Solver
from lowrank_inverse.arrays.checks import describe
from lowrank_inverse.bilevel.implicit_gradient import implicit_gradient
from lowrank_inverse.bilevel.info import HypergradientInfo, hypergradient_info
from lowrank_inverse.bilevel.ridge import default_solver
from lowrank_inverse.results.solution import Solution
from lowrank_inverse.solvers.state import HypergradientState
from lowrank_inverse_jax.curvature.derivatives import full_precision
from lowrank_inverse_jax.curvature.hessian import HessianOperator
from lowrank_inverse_jax.curvature.losses import scalar
from lowrank_inverse_jax.keys import with_drawn_columns
from lowrank_inverse_jax.parameters import Parameters, as_parameters

__all__ = ["Hypergradient", "hypergradient"]

STATIC = ["hparams_without_path", "memory"]
fields = [field.name for field in dataclasses.fields(HypergradientInfo)]
jax.tree_util.register_dataclass(
    HypergradientInfo,
    data_fields=[name for name in fields if name not in STATIC],
    meta_fields=STATIC,
)


class Hypergradient(NamedTuple):
    """The result of `hypergradient`, a pytree.

    Attributes
    ----------
    grads : structure of `hparams`
        The hypergradient, ``direct + implicit``; None if a leaf is not an array of floats.
    direct, implicit : structure of `hparams`
        Gradient of the outer loss at fixed parameters, and contribution through the parameters.
    ihvp : structure of `params`
        ``(H + ridge + damping)^{-1}`` times the outer gradient (inverse-Hessian-vector product).
    state : HypergradientState
        Pass it to the next call as `state`, for a warm start and a preconditioner.
    info : HypergradientInfo
        Cost and accuracy.
    solution : Solution
        Solution of the linear system.
    aux : tuple
        With `has_aux`, the auxiliary outputs of the inner and the outer loss, else ().
    """

    grads: Any
    direct: Any
    implicit: Any
    ihvp: Any
    state: HypergradientState
    info: HypergradientInfo
    solution: Solution
    aux: Any = ()

    def explain(self) -> str:
        """Describe cost and accuracy, the problems found, and what to do about them."""
        return self.info.explain()


def hypergradient(
    inner_loss: Callable[..., Any],
    outer_loss: Callable[..., Any],
    params: PyTree,
    hparams: PyTree,
    *,
    inner_args: tuple[Any, ...] = (),
    outer_args: tuple[Any, ...] = (),
    has_aux: bool = False,
    solver: Solver | SolveFunction | None = None,
    ridge: Scalar = None,
    state: HypergradientState | Solution | None = None,
    key: Any = None,
    rng: RNG = None,
    chunk_size: int = 8,
    mesh: Mesh | None = None,
) -> Hypergradient:
    """Differentiate the outer loss at the inner minimiser with respect to hyperparameters.

    For the inner loss f, the outer loss g and ``θ(φ) = argmin f``: ``dg/dφ = ∂g/∂φ - ∂g/∂θ (∂²f/∂θ²
    + damping I)^{-1} ∂²f/∂θ∂φ`` (Eq. 3 of [1]_). The function is pure and supports ``jax.jit`` and
    ``jax.vmap``.

    Parameters
    ----------
    inner_loss : callable (params, hparams, *inner_args) -> scalar
        The loss that training minimises.
    outer_loss : callable (params, hparams, *outer_args) -> scalar
        The loss to differentiate.
    params, hparams : pytree
        θ, at or near the minimum of the inner loss, and φ. Arrays of floats are differentiated;
        other leaves are left alone.
    has_aux : bool
        Whether the losses return ``(scalar, aux)``.
    solver : settings such as ``lowrank_inverse.Nystrom(...)``, or callable ``solve(matvec, b)``
        Solves the linear system; its damping is added to the Hessian. Default:
        ``CG(max_steps=40)``.
    ridge : float, array, structure of `params`, or callable (hparams) -> one of these, optional
        Coefficient r of a term ``r / 2 * sum(θ ** 2)`` of the inner problem (weight decay) that
        `inner_loss` does not include: a number, a flat array of shape (n,), or the structure of
        `params`. The solver treats it exactly. If it depends on the hyperparameters, pass a
        callable.
    state : HypergradientState, optional
        For a sequence of outer steps: ``HypergradientState()`` in the first call, then the
        ``.state`` of the previous result. CG and NystromCG start from it and recycle its pairs.
        The Solution of a similar system also serves as a start. None keeps no pairs.
    key : jax PRNG key, optional
        Draws columns uniformly, also inside ``jax.jit``.
    rng : int or numpy.random.Generator, optional
        Host seed of the sampled columns, which are the same as in NumPy and PyTorch. Default: 0.
        Inside ``jax.jit`` they are drawn once, during tracing.
    chunk_size : int
        Hessian products computed at a time; see `HessianOperator`.
    mesh : jax.sharding.Mesh, optional
        Devices over which vectors and columns of the solver are sharded by rows. Parameters,
        hyperparameters and data may have any sharding on this mesh; the results are sharded like
        them.

    Returns
    -------
    Hypergradient

    Raises
    ------
    ValueError
        If a loss is not a finite scalar (not checked while tracing), neither loss depends on any
        hyperparameter, both `key` and `rng` are given, or an array is not on `mesh`.

    Notes
    -----
    Cost: two gradients, the products of the solver at about two gradients each, and one product for
    the mixed derivative.

    References
    ----------
    .. [1] R. Hataya, M. Yamada. Nyström Method for Accurate and Scalable Implicit
       Differentiation. AISTATS 2023.

    Examples
    --------
    The minimiser of ``(w - 3)² / 2 + h w² / 2`` is ``3 / (1 + h)``, with derivative -3/4 at h = 1.

    >>> import jax.numpy as jnp
    >>> import lowrank_inverse as li
    >>> def inner(w, h):
    ...     return 0.5 * ((w - 3) ** 2 + h * w**2)
    >>> w, h = jnp.asarray(1.5), jnp.asarray(1.0)
    >>> out = hypergradient(inner, lambda w, h: w, w, h, solver=li.CG())
    >>> print(out.grads, out.info.inner_grad_norm)
    -0.75 0.0
    """
    theta = as_parameters(params, mesh=mesh)
    phi = as_parameters(hparams, name="hparams", mesh=mesh)
    theta.layout.check(inner_args, "inner_args")
    theta.layout.check(outer_args, "outer_args")
    settings = default_solver(solver)
    if key is not None:
        settings = with_drawn_columns(settings, key, rng, theta.n)
    elif rng is None:
        rng = 0
    ridge_of = ridge if callable(ridge) else lambda hparams: ridge
    inner_value = _value(inner_loss, "inner_loss", has_aux)
    outer_value = _value(outer_loss, "outer_loss", has_aux)

    def inner(vector: jax.Array, hparams: PyTree) -> jax.Array:
        return inner_value(theta.replace(vector), hparams, *inner_args)

    def outer(vector: jax.Array, hparams: PyTree) -> jax.Array:
        return outer_value(theta.replace(vector), hparams, *outer_args)

    def inner_gradient(vector: jax.Array, hparams: PyTree) -> jax.Array:
        gradient = theta.gradient(lambda params: inner_value(params, hparams, *inner_args))(vector)
        coefficients = flat_ridge(ridge_of(hparams), theta)
        return gradient if coefficients is None else gradient + coefficients * vector

    without_path = _without_path(phi, theta, inner, inner_gradient, outer)
    with full_precision():
        hparams = phi.replace(phi.vector)
        H = HessianOperator(
            lambda params: inner_value(params, hparams, *inner_args), theta, chunk_size=chunk_size
        )
        outer_grads, direct = jax.grad(
            lambda arrays, h: outer_value(theta.build(arrays), phi.replace(h), *outer_args),
            argnums=(0, 1),
        )(theta.arrays(theta.vector), phi.vector)
        outer_grad = theta.joined(outer_grads)
        gradient, pull = jax.vjp(lambda h: inner_gradient(theta.vector, phi.replace(h)), phi.vector)
        result = implicit_gradient(
            H,
            outer_grad,
            pull,
            [direct],
            solver=settings,
            ridge=flat_ridge(ridge_of(hparams), theta),
            rng=rng,
            state=state,
        )
    implicit = _only(result.implicit)
    aux: tuple[Any, ...] = ()
    if has_aux:
        aux = (
            inner_loss(params, hparams, *inner_args)[1],
            outer_loss(params, hparams, *outer_args)[1],
        )
    info = hypergradient_info(result, outer_grad, gradient, without_path, theta.vector)
    return Hypergradient(
        grads=phi.restore(direct + implicit),
        direct=phi.restore(direct),
        implicit=phi.restore(implicit),
        ihvp=theta.restore(result.solution.value),
        state=result.state,
        info=info,
        solution=result.solution,
        aux=aux,
    )


def _value(loss: Callable[..., Any], name: str, has_aux: bool) -> Callable[..., jax.Array]:
    value = scalar(loss, name=name)  # refuses what is no function
    if not has_aux:
        return value

    def first(*args: Any) -> Any:
        pair = loss(*args)
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise TypeError(
                f"`{name}` must return (scalar, aux) with has_aux=True; got {describe(pair)}."
            )
        return pair[0]

    return scalar(first, name=name)


def flat_ridge(ridge: Scalar, theta: Parameters) -> Any:
    """Return None, a number as a 0-d array, or an array of shape (n,)."""
    if ridge is None:
        return None
    bare = jax.tree_util.all_leaves([ridge])
    if bare and (jnp.ndim(ridge) == 0 or jnp.shape(ridge) == (theta.n,)):
        return jnp.asarray(ridge, theta.dtype)
    return theta.collect(ridge, name="ridge", expand=True)


def _only(parts: list[Any]) -> jax.Array:
    (part,) = parts
    return part


def _without_path(
    phi: Parameters, theta: Parameters, inner: Any, gradient: Any, outer: Any
) -> tuple[str, ...]:
    """Name the hyperparameters on which neither the inner gradient nor the outer loss depends."""
    arrays = phi.arrays(phi.vector)

    def used_by(function: Any, *args: Any) -> list[bool]:
        jaxpr = jax.make_jaxpr(function)(*args).jaxpr
        return partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[1]

    for name, loss in (("inner_loss", inner), ("outer_loss", outer)):
        if not used_by(lambda v, loss=loss: loss(v, phi.build(arrays)), theta.vector)[0]:
            raise ValueError(
                f"`{name}` must depend on `params`. Use the argument `params` inside the loss."
            )

    def both(arrays: list[jax.Array]) -> Any:
        hparams = phi.build(arrays)
        return gradient(theta.vector, hparams), outer(theta.vector, hparams)

    used = used_by(both, arrays)
    missing = tuple(name for name, use in zip(phi.names, used, strict=True) if not use)
    if len(missing) == len(arrays):
        raise ValueError(
            "`hparams` must reach one of the losses; neither depends on any of "
            f"{', '.join(map(repr, missing))}. Use the argument `hparams` inside the losses. "
            "A learning rate or an initial value does not move the minimum, so it has no "
            "hypergradient."
        )
    return missing
