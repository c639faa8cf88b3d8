"""What a sequence of similar solves keeps from one solve to the next."""

from __future__ import annotations

from os import PathLike
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from lowrank_inverse._io import Format
from lowrank_inverse._typing import RNG, Array, OperatorLike
from lowrank_inverse.arrays.checks import all_finite, check_finite, describe, namespace
from lowrank_inverse.arrays.conversion import is_traced, like_device, rows_like, to_host
from lowrank_inverse.arrays.spread import is_spread, reduced
from lowrank_inverse.iterative.recycling import joined_pairs
from lowrank_inverse.operators.differentiation import constant
from lowrank_inverse.results.solution import Pairs, Reason, Solution, ended
from lowrank_inverse.solvers.base import PreparedInverse
from lowrank_inverse.solvers.recycled import sampled_pairs

FILE = Format("HypergradientState.save")


class HypergradientState(NamedTuple):
    """What one solve of a sequence passes to the next; returned as `state`.

    Begin a sequence with ``HypergradientState()``, and pass the `state` of each result to the next
    call. Conjugate gradients then start from `value`, preconditioned by Ritz pairs of the products
    taken so far: the `recycle` pairs of largest magnitude. The products come from the directions
    of conjugate gradients and, in the first call, from the columns that NystromCG samples.

    Attributes
    ----------
    value : array, shape (n,) or (n, m), or None
        The last solution.
    vectors, products : array, shape (n, r), or None
        Orthonormal vectors, and their latest products with the Hessian without the ridge. Columns
        of zeros fill up the shape if there are fewer than r pairs.

    Notes
    -----
    Each solve combines the products of its directions with the pairs kept [1]_, [2]_, and drops
    pairs that the new products show to be outdated. The pairs belong to the Hessian without
    damping and ridge, so they remain valid when the damping or the ridge changes.

    An outer step takes one product to start, one per step and one to confirm the residual. The
    state holds ``n (2 r + 1)`` numbers. It is a pytree of arrays, so ``jax.jit`` and
    ``jax.lax.scan`` can carry it.

    References
    ----------
    .. [1] J. L. Morales, J. Nocedal. Automatic Preconditioning by Limited Memory Quasi-Newton
       Updating. SIAM J. Optim. 10, 2000.
    .. [2] M. L. Parks, E. de Sturler, G. Mackey, D. D. Johnson, S. Maiti. Recycling Krylov
       Subspaces for Sequences of Linear Systems. SIAM J. Sci. Comput. 28, 2006.

    Examples
    --------
    >>> import os, tempfile
    >>> import numpy as np
    >>> import lowrank_inverse as li
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = os.path.join(folder, "state.npz")
    ...     li.HypergradientState(np.ones(3)).save(path)
    ...     print(li.HypergradientState.load(path).value)
    [1. 1. 1.]
    """

    value: Array | None = None
    vectors: Array | None = None
    products: Array | None = None

    def save(self, path: str | PathLike[str]) -> None:
        """Write the arrays to a file without loss, as npz or safetensors by its ending."""
        FILE.save(path, {name: to_host(x) for name, x in self._asdict().items() if x is not None})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> HypergradientState:
        """Read a file of :meth:`save`, as NumPy arrays.

        The result can be passed to a hypergradient or a solve in any library.
        """
        return cls(**FILE.load(path))


class Continued(NamedTuple):
    """A solution, and the state for the next solve."""

    solution: Solution
    """Its `num_products` counts the preparation too."""
    inverse: PreparedInverse
    state: HypergradientState
    recycled: Any
    """Pairs that served as the preconditioner; None for solvers that keep none."""


def solve_from(
    state: HypergradientState | Solution | None,
    settings: Any,
    A: OperatorLike,
    b: Array,
    *,
    x0: Array | None = None,
    rng: RNG = 0,
) -> Continued:
    """Solve ``(A + damping * I) x = b`` with `settings`, starting from `state`."""
    state = adopt(state, b)
    x0 = start(state, b) if x0 is None else x0
    keeping = state is not None and (b.ndim == 1 or getattr(settings, "block_size", 1) > 1)
    size = min(getattr(settings, "recycle", 0), int(A.shape[0])) if keeping else 0
    if size == 0:
        inverse = settings.prepare(A, rng=rng, b=b)
        solution = _counted(inverse.solve(b, x0=x0), inverse)
        following = HypergradientState(_finite(constant(solution.value)))
        return Continued(solution, inverse, following, None)
    kept = _kept(state, b)
    inverse = settings.prepare(A, rng=rng, b=b, pairs=kept)
    solution = inverse.solve(b, x0=x0, keep=size)
    old = kept
    if old is None and inverse.approximation is not None:
        sampled = sampled_pairs(constant(A), constant(settings.damping), inverse.approximation)
        old = None if sampled is None else joined_pairs(None, sampled, size)
    if old is not None:  # what broke the solve does not serve the next
        xp = array_namespace(b)
        broken = ended(solution.reason, Reason.INDEFINITE_PRECONDITIONER, Reason.NONFINITE)
        old = Pairs(*(xp.where(xp.any(broken), 0 * x, x) for x in old))
    pairs = joined_pairs(old, solution.directions, size)
    solution = _counted(solution._replace(directions=None), inverse)
    following = HypergradientState(_finite(constant(solution.value)), *pairs)
    return Continued(solution, inverse, following, _number(kept))


def _counted(solution: Solution, inverse: PreparedInverse) -> Solution:
    return solution._replace(num_products=inverse.num_products + solution.num_products)


def _finite(x: Array) -> Array:
    xp = array_namespace(x)
    return xp.where(all_finite(x), x, xp.zeros_like(x))


def _number(pairs: Pairs | None) -> Any:
    """Count the pairs."""
    if pairs is None:
        return 0
    xp = array_namespace(pairs.vectors)
    used = reduced(xp.any(pairs.vectors != 0, axis=0))
    count = xp.sum(xp.astype(used, xp.int32), dtype=xp.int32)
    return count if is_traced(count) else int(count)


def _kept(state: Any, b: Array) -> Pairs | None:
    """Return the pairs in a state, if they fit."""
    vectors = getattr(state, "vectors", None)
    if vectors is None or vectors.shape[0] != b.shape[0] or vectors.dtype != b.dtype:
        return None
    return Pairs(vectors, state.products)


def start(state: Any, b: Array) -> Array | None:
    """Return the solution in `state` as a starting point for `b`; None without a state."""
    if state is None:
        return None
    if not isinstance(state, (Solution, HypergradientState)):
        raise TypeError(
            "`state` must be a HypergradientState, such as the `.state` of a hypergradient, or the "
            f"Solution of an earlier solve; got {describe(state)}."
        )
    value = state.value
    if value is None:
        return None
    namespace(b=b, state=value)
    if tuple(value.shape) != tuple(b.shape) or value.dtype != b.dtype:
        raise ValueError(
            f"`state` must come from a system of the same size, dtype {b.dtype} and shape "
            f"{tuple(b.shape)}; its value is {describe(value)}."
        )
    check_finite("state", value)
    return value


def adopt(state: Any, b: Array) -> Any:
    """Move a state read from a file to the library and device of `b`; return others unchanged.

    Of a Solution, take its state if it has one.
    """
    if isinstance(state, Solution) and state.state is not None:
        state = state.state
    loaded = isinstance(state, HypergradientState) and isinstance(state.value, np.ndarray)
    if not loaded or isinstance(b, np.ndarray):
        return state
    xp = array_namespace(b)
    if state.value.dtype.itemsize * 8 != xp.finfo(b.dtype).bits:  # refused by `start`, not rounded
        return HypergradientState(state.value)
    where = like_device(b)

    def moved(x: np.ndarray | None) -> Array | None:
        if x is None:
            return None
        if is_spread(b):
            return rows_like(x, b)
        # A copy: memory of the library's own, aligned as it likes, gives the same sums again.
        return xp.asarray(x, device=where, copy=True)

    return HypergradientState(*map(moved, state))
