"""Checks of the loss of each example."""

from __future__ import annotations

from typing import Any

import numpy as np

from lowrank_inverse.arrays.checks import describe, namespace
from lowrank_inverse.arrays.conversion import eps, is_array, to_host
from lowrank_inverse.influence.dataset import Examples


def check_losses(backend: Any, examples: Examples) -> float:
    """Return the mean loss, if there is one finite loss for each example, of it alone.

    Raises
    ------
    TypeError
        The loss is no floating-point array.
    ValueError
        It has another shape than (size,), is not finite, or the loss of an example depends on the
        others in its batch.
    """
    name, total = examples.name, 0.0
    for start, batch in examples.parts():
        size = examples.size(batch)
        losses = _checked(
            backend, batch, size, f"examples {start} to {start + size - 1} of `{name}`"
        )
        bad = np.flatnonzero(~np.isfinite(losses))
        if bad.size:
            raise ValueError(
                f"`loss` must be finite; it is {losses[bad[0]]} for example {start + bad[0]} of "
                f"`{name}`, and not finite for {bad.size} of the {size} in its batch. Remove the "
                "examples, or look for NaN in them and for labels out of range."
            )
        if start == 0 and size > 1:
            _check_alone(backend, examples, batch, losses)
        total += float(losses.sum())
    return total / examples.num


def _checked(backend: Any, batch: Any, size: int, where: str) -> np.ndarray:
    try:
        losses = backend.losses(batch)
    except IndexError as error:
        raise ValueError(
            f"`loss` failed on {where}: {error}. Are all labels within the number of outputs?"
        ) from error
    if not is_array(losses):
        raise TypeError(f"`loss` must return an array; got {describe(losses)}.")
    if not namespace(loss=losses).isdtype(losses.dtype, "real floating"):
        raise TypeError(f"`loss` must be real and floating-point; got {describe(losses)}.")
    if tuple(losses.shape) != (size,):
        raise ValueError(
            f"`loss` must return one number per example, shape ({size},); got shape "
            f"{tuple(losses.shape)} on {where}. Use reduction='none', and sum over all axes but "
            "the first."
        )
    return to_host(losses).astype(np.float64)


def _check_alone(backend: Any, examples: Examples, batch: Any, losses: np.ndarray) -> None:
    alone = _checked(backend, examples.rows(batch, 0, 1), 1, f"example 0 of `{examples.name}`")
    unit = eps(backend.like)
    if abs(alone[0] - losses[0]) > unit**0.5 * max(abs(alone[0]), float(np.abs(losses).max())):
        raise ValueError(
            f"`loss` must depend on each example alone; that of example 0 of `{examples.name}` is "
            f"{losses[0]:.6g} beside others and {alone[0]:.6g} by itself. Something in the model "
            "or the loss mixes the examples of a batch, or is random."
        )
