"""Checks of the loss of each example: one finite number, the same at each evaluation."""

from __future__ import annotations

from typing import Any

import numpy as np

from lowrank_inverse._typing import Array, Batch
from lowrank_inverse.arrays.checks import describe, namespace
from lowrank_inverse.arrays.conversion import is_array, to_host
from lowrank_inverse.influence.dataset import Examples


def measure_losses(backend: Any, examples: Examples) -> None:
    """Set `examples.losses`, if there is one finite loss for each example, of it alone.

    Raises
    ------
    TypeError
        The loss is no floating-point array.
    ValueError
        It has another shape than (size,), is not finite, depends on the other examples of its
        batch, or is random.
    RuntimeError
        The data are others when they are read again.
    """
    name, found = examples.name, []
    for start, batch in examples.parts():
        losses = _checked(backend, batch, examples, start)
        bad = np.flatnonzero(~np.isfinite(losses))
        if bad.size:
            raise ValueError(
                f"`loss` must be finite; it is {losses[bad[0]]} for example {start + bad[0]} of "
                f"`{name}`, and not finite for {bad.size} of the {losses.size} in its batch. "
                "Remove the examples, or look for NaN in them and for labels out of range."
            )
        if start == 0:
            again = _checked(backend, batch, examples, start, anew=True)
            if (i := first_difference(losses, again, backend.unit)) is not None:
                raise ValueError(
                    f"`loss` must be the same at each evaluation; that of example {i} of `{name}` "
                    f"is {losses[i]:.6g} at first and {again[i]:.6g} then. Something in the model "
                    "or the loss is random in evaluation too, such as F.dropout without "
                    "`training=self.training`."
                )
            _check_alone(backend, examples, batch, losses)
        found.append(losses)
    examples.losses = np.concatenate(found)
    _check_first(backend, examples, found[0])


def check_unchanged(backend: Any, examples: Examples) -> None:
    """Raise if the losses of any example are others than when they were measured."""
    assert examples.losses is not None
    for start, batch in examples.parts():
        losses = _checked(backend, batch, examples, start, anew=start == 0)
        before = examples.losses[start : start + losses.size]
        if (i := first_difference(before, losses, backend.unit)) is not None:
            raise RuntimeError(
                f"The loss of example {start + i} of `{examples.name}` was {before[i]:.6g} when "
                f"this influence function was made and is {losses[i]:.6g} now. Weights (frozen "
                "ones too), buffers, data or constants of the loss were changed in place after "
                "that, or the data differ each time they are read. Create a new influence function."
            )


def first_difference(a: np.ndarray, b: np.ndarray, unit: float = 0.0) -> int | None:
    """Return where the losses differ by more than another order of sums; None if nowhere."""
    if a.shape != b.shape:
        return 0
    differs = ~(np.abs(a - b) <= tolerance(np.maximum(np.abs(a), np.abs(b)), unit))
    return int(np.argmax(differs)) if differs.any() else None


def tolerance(losses: np.ndarray, unit: float = 0.0) -> float:
    """Return what rounding, to `unit` where that is coarser, may change in some losses."""
    unit = max(unit, float(np.finfo(losses.dtype).eps))
    # The logarithm of a probability near 1 is known to the rounding of 1, however small it is.
    return unit**0.5 * float(np.abs(losses).max()) + 16 * unit


def check_gradients(G: Array, examples: Examples, start: int) -> None:
    """Raise unless the gradients of the examples from `start` on, columns of `G`, are finite."""
    xp = namespace(G=G)
    finite = to_host(xp.all(xp.isfinite(G), axis=0))
    if not finite.all():
        i = start + int(np.argmin(finite))
        raise ValueError(
            f"the gradient of `loss` must be finite; that of example {i} of `{examples.name}` is "
            "not, though the loss is. Look for a root, a norm or a logarithm at 0, or a division "
            "that torch.where or jax.numpy.where hides: mask its argument too."
        )


def check_tokens(losses: Array) -> Array:
    """Return losses if there is one for each token, shape (size, tokens)."""
    if losses.ndim != 2:
        raise ValueError(
            "scores of tokens need a `loss` that returns one number per token, shape (size, "
            f"tokens), 0 for ignored ones; got shape {tuple(losses.shape)}. Do not sum over "
            "tokens."
        )
    return losses


def _check_first(backend: Any, examples: Examples, losses: np.ndarray) -> None:
    first = examples.read_first(losses.size)
    again = losses[:0] if first is None else _checked(backend, first, examples, 0)
    i = first_difference(losses[: again.size], again, backend.unit) if again.size else 0
    if i is not None:
        now = f"is {again[i]:.6g}" if again.size else "is gone"
        raise RuntimeError(
            f"`{examples.name}` must give the same examples each time it is read; the loss of "
            f"example {i} was {losses[i]:.6g} at first and {now} when it was read again. Remove "
            f"augmentation and shuffling, or pass list({examples.name}), which reads the batches "
            "once."
        )


def _checked(
    backend: Any, batch: Batch, examples: Examples, start: int, *, anew: bool = False
) -> np.ndarray:
    size = examples.size(batch)
    where = f"examples {start} to {start + size - 1} of `{examples.name}`"
    try:
        losses = backend.losses(batch, anew=anew)
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
            f"`loss` must return one number per example, shape ({size},), or per token, shape "
            f"({size}, tokens); got shape {tuple(losses.shape)} on {where}. Use reduction='none', "
            "and sum over all axes but the first."
        )
    host = to_host(losses)
    return host if host.dtype == np.float64 else host.astype(np.float32)


def _check_alone(backend: Any, examples: Examples, batch: Batch, losses: np.ndarray) -> None:
    if losses.size == 1:
        return
    alone = _checked(backend, examples.rows(batch, 0, 1), examples, 0)
    if abs(alone[0] - losses[0]) > tolerance(np.append(losses, alone), backend.unit):
        raise ValueError(
            f"`loss` must not depend on other examples; that of example 0 of `{examples.name}` is "
            f"{losses[0]:.6g} in a batch and {alone[0]:.6g} by itself. Something in the model "
            "or the loss mixes the examples of a batch, or is random."
        )
