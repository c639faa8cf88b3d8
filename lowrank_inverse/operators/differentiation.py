"""Derivatives of solves with respect to the arrays that define an operator.

Each adapter registers the rules by which its library differentiates.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from array_api_compat import is_jax_array, is_torch_array

from lowrank_inverse._typing import Array, Indices, OperatorLike, Scalar
from lowrank_inverse.arrays import graph
from lowrank_inverse.arrays.conversion import carries_gradient, is_array
from lowrank_inverse.arrays.linalg import times_diagonal
from lowrank_inverse.operators.base import Operator
from lowrank_inverse.operators.product import ProductOnly

_local = threading.local()

Run = Callable[[Array, Array | None, int], Any]


class Rules(Protocol):
    """How a library differentiates a solve."""

    def solve(
        self,
        A: OperatorLike,
        damping: Any,
        b: Array,
        make: Any,
        x0: Any,
        keep: int,
        found: Any,
        noted: bool,
    ) -> Any:
        """Return ``make(A, damping)(b, x0, keep)`` with the derivative of the exact solution.

        `found` is that Solution where it is known already, else None; `noted` says that an
        operator in A that does not tell its arrays has derivatives.
        """
        ...

    def recomputed(self, function: Callable[..., Any], *arrays: Any) -> Any:
        """Return ``function(*arrays)``, which is evaluated again where it is differentiated."""
        ...


_RULES: dict[str, Rules] = {}


def register(library: str, rules: Rules) -> None:
    """Take `rules` for ``"torch"`` or ``"jax"``."""
    _RULES[library] = rules


def rules_of(x: Any) -> Rules | None:
    """Return the rules for the library of an array; None where there are no derivatives."""
    library = "torch" if is_torch_array(x) else "jax" if is_jax_array(x) else None
    if library is None:
        return None
    if library not in _RULES:  # of this same distribution: it registers them
        importlib.import_module(f"lowrank_inverse_{library}.differentiation")
    return _RULES[library]


def recomputed(function: Callable[..., Any], *arrays: Array) -> Any:
    """Return ``function(*arrays)``; a derivative evaluates it again, and holds nothing inside it.

    `function` reads no other arrays that a derivative is asked for.
    """
    live = [x for x in arrays if carries_gradient(x)]
    rules = rules_of(live[0]) if live else None
    return function(*arrays) if rules is None else rules.recomputed(function, *arrays)


def mapped(x: Any, function: Callable[[Any], Any]) -> Any:
    """Return `x` with what `function` makes of its arrays in their places.

    `x` is an array, an operator, or a tuple of them; what is neither, such as a number, stays. An
    operator that does not tell its arrays is given to `function` itself.
    """
    if is_array(x):
        return function(x)
    if isinstance(x, tuple):
        parts = tuple(mapped(part, function) for part in x)
        return x if all(a is b for a, b in zip(x, parts, strict=True)) else parts
    if isinstance(x, ProductOnly) and x._parts is not None:
        return x._with_parts({name: mapped(getattr(x, name), function) for name in x._parts})
    return function(x) if hasattr(x, "shape") else x


def constant(x: Any, *, silent: bool = False) -> Any:
    """Return arrays and operators without their derivatives; `x` itself if they can have none.

    Unless `silent`, :func:`noting` lists the operators whose products then prove to have some.
    """

    def fixed(part: Any) -> Any:
        if is_array(part):
            return graph.constant(part) if carries_gradient(part) else part
        return part if rules_of(getattr(part, "like", None)) is None else Opaque(part, silent)

    return mapped(x, fixed)


class Opaque(Operator):
    """An operator that does not tell its arrays, without the derivatives of its products."""

    _parts = ()

    def __init__(self, A: OperatorLike, silent: bool) -> None:
        own = getattr(A, "without_graph", None)
        self.A, self.silent, self.live = A if own is None else own(), silent, own is not None
        self.shape, self.dtype, self.like = tuple(A.shape), A.like.dtype, A.like

    def _fixed(self, product: Array) -> Array:
        if not carries_gradient(product) and not self.live:
            return product
        for notes in () if self.silent else getattr(_local, "notes", ()):
            notes.append(self.A)
        return constant(product)

    def _multiply(self, block: Array) -> Array:
        return self._fixed(self.A @ block)

    def columns(self, indices: Indices) -> Array:
        """Return the columns at `indices`, shape (n, k)."""
        own = getattr(self.A, "columns", None)
        return super().columns(indices) if own is None else self._fixed(own(indices))

    def diagonal(self) -> Array:
        """Return the diagonal, shape (n,)."""
        own = getattr(self.A, "diagonal", None)
        return super().diagonal() if own is None else self._fixed(own())


@contextmanager
def noting() -> Iterator[list[Any]]:
    """List the operators that do not tell their arrays, but by whose products show derivatives."""
    notes: list[Any] = []
    stack = _local.__dict__.setdefault("notes", [])
    stack.append(notes)
    try:
        yield notes
    finally:
        stack.remove(notes)


def parts(x: Any) -> tuple[list[Array], list[Any]]:
    """Return the arrays that `x` is made of, and the operators in it that do not tell theirs."""
    found: list[Any] = []

    def note(part: Any) -> Any:
        found.append(part)
        return part

    mapped(x, note)
    return [p for p in found if is_array(p)], [p for p in found if not is_array(p)]


def made_of(x: Any, arrays: Iterable[Array]) -> Any:
    """Return `x` with other arrays in the places of its own, in the order of :func:`parts`."""
    others = iter(arrays)
    return mapped(x, lambda part: next(others) if is_array(part) else part)


def damped_product(A: OperatorLike, damping: Scalar, x: Array) -> Array:
    """Return ``(A + damping * I) @ x``."""
    return A @ x + times_diagonal(damping, x)


def implicit(
    A: OperatorLike,
    damping: Scalar,
    b: Array,
    make: Callable[[Any, Scalar], Run],
    *,
    x0: Array | None = None,
    keep: int = 0,
    noted: bool = False,
) -> Any:
    """Solve ``(A + damping * I) x = b``, and let the `value` of the Solution be differentiated.

    Parameters
    ----------
    A, damping, b, x0, keep
        As in :func:`lowrank_inverse.cg`.
    make : callable (A, damping) -> run
        Returns what solves for constants: a function ``run(b, x0, keep) -> Solution``.
    noted : bool
        Whether a product with an operator that does not tell its arrays showed derivatives.

    Notes
    -----
    By the implicit function theorem: ``dx = run(db - (dA + d damping * I) x)``, one more solve.
    """
    rules = rules_of(b)
    if rules is None:
        return make(A, damping)(b, x0, keep)
    arrays, opaque = parts((A, damping, b))
    x0, found = constant(x0), None
    if not any(carries_gradient(x) for x in arrays):
        with noting() as notes:
            found = make(constant(A), damping)(b, x0, keep)
        noted = noted or bool(notes)
        if not opaque or not noted:
            return found
    return rules.solve(A, damping, b, make, x0, keep, found, noted)
