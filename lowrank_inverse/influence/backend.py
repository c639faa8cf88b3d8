"""The interface between influence functions and a framework."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import numpy as np

from lowrank_inverse._typing import Array, Batch, Data
from lowrank_inverse.influence.dataset import Examples

T = TypeVar("T")


class Together(Protocol):
    """The processes that share the training examples."""

    size: int
    rank: int

    def together(self, function: Callable[[], T]) -> T:
        """Return what `function` returns; raise in all processes what it raises in one."""
        ...

    def everyone(self, value: T) -> list[T]:
        """Return the values of all processes, in their order."""
        ...

    def agree(self, **values: Any) -> None:
        """Raise in all processes unless each of `values` is the same in all of them."""
        ...


class Alone:
    """One process that has all examples."""

    size, rank = 1, 0

    def together(self, function: Callable[[], T]) -> T:
        """Return what `function` returns."""
        return function()

    def everyone(self, value: T) -> list[T]:
        """Return the value."""
        return [value]

    def agree(self, **values: Any) -> None:
        """Agree with itself."""


class Backend(Protocol):
    """What a framework supplies: derivatives of the loss of each example by n parameters."""

    n: int
    like: Array
    has_outputs: bool
    """Whether there is a Gauss-Newton matrix."""

    unit: float
    """Machine epsilon of the coarsest numbers that the model computes with."""

    def losses(self, batch: Batch, *, anew: bool = False) -> Array:
        """Return the loss of each example: what the user's function gives, summed over tokens.

        `anew`: with another random state, and as the function is now, not as it was compiled.
        """
        ...

    def measuring(self, loss: Callable[..., Any]) -> Any:
        """Return the same with another loss."""
        ...

    def operator(self, examples: Examples, curvature: str, weights: Any = None) -> Any:
        """Return ``1 / num * sum_i w_i C_i`` as an operator with its `gradient`."""
        ...

    def product_bytes(self, batch: Batch, curvature: str) -> int:
        """Measure the memory of a product with the curvature of one batch."""
        ...

    def gradients(self, batch: Batch) -> Array:
        """Return the gradient of each example of a batch as a column, shape (n, size)."""
        ...

    def slopes(self, batch: Batch, Z: Array) -> Array:
        """Return the inner products of all gradients with the columns of `Z`: (m, size)."""
        ...

    def token_slopes(self, batch: Batch, Z: Array) -> Array:
        """Return the same for the loss of each token: (m, size, tokens)."""
        ...

    def token_gradients(self, batch: Batch) -> Array:
        """Return the gradient of each token's loss in a batch of one example: (n, tokens)."""
        ...

    def total(self, examples: Examples, weights: np.ndarray) -> Array:
        """Return ``sum_i w_i g_i``, shape (n,)."""
        ...

    def vector(self) -> Array:
        """Return the parameters, shape (n,)."""
        ...

    def sizes(self) -> dict[str, int]:
        """Return the number of entries of each parameter by its name, in their order."""
        ...

    def ridge(self, ridge: Any) -> Any:
        """Return a ridge in the user's form as a number, or an array of shape (n,)."""
        ...

    def fingerprint(self) -> str:
        """Hash the weights, frozen ones too, and what else the model keeps."""
        ...

    def examples(self, data: Data, name: str, batch_size: int | None, budget: int) -> Examples:
        """Return a data set as examples."""
        ...
