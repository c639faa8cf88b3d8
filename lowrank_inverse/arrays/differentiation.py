"""Who differentiates what the core computes: the rules that the adapters bring."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Protocol

from array_api_compat import is_jax_array, is_torch_array

from lowrank_inverse._typing import Array
from lowrank_inverse.arrays.conversion import carries_gradient


class Rules(Protocol):
    """How a library differentiates a solve."""

    def constant(self, x: Array) -> Array:
        """Return `x` without derivatives."""
        ...

    def solve(
        self,
        A: Any,
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
