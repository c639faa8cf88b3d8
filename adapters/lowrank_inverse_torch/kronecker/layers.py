"""Layers whose gradient is a product of what goes in and what comes back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Layer:
    """A linear map or convolution; the gradient of an example is ``sum_r g_r a_r.T``.

    With a_r an input of the map, or a patch of the image that a convolution sees [1]_, a 1 appended
    for the bias, and g_r the gradient by the output there. r counts the positions in a sequence or
    an image, and the calls of the layer.

    Parameters
    ----------
    name : str
    module : Module
        For which `is_linear` holds.
    weight, bias : slice, slice or None
        Their places in the vector of all parameters.

    References
    ----------
    .. [1] R. Grosse, J. Martens. A Kronecker-factored Approximate Fisher Matrix for Convolution
       Layers. ICML 2016.
    """

    def __init__(self, name: str, module: nn.Module, weight: slice, bias: slice | None) -> None:
        self.name, self.module, self.weight, self.bias = name, module, weight, bias
        self._shape: tuple[int, ...] = tuple(module._parameters["weight"].shape)  # type: ignore[union-attr]
        self._transposed = not isinstance(module, (nn.Linear, *CONVOLUTIONS))

    @property
    def places(self) -> list[slice]:
        """Where its parameters are in the vector."""
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def inputs(self, calls: Sequence[tuple[Tensor, Tensor]], size: int) -> Tensor:
        """Return a_r of each example, shape (size, positions, i)."""
        rows = []
        for x, _ in calls:
            x = self._patches(x) if isinstance(self.module, CONVOLUTIONS) else x
            x = x.reshape(size, -1, x.shape[-1])
            rows.append(x if self.bias is None else torch.cat([x, torch.ones_like(x[..., :1])], -1))
        return torch.cat(rows, dim=1)

    def gradients(self, grads: Sequence[Tensor], size: int) -> Tensor:
        """Return g_r of each example, shape (size, positions, o), from those by its outputs."""
        if isinstance(self.module, CONVOLUTIONS):
            grads = [grad.flatten(2).mT for grad in grads]
        return torch.cat([grad.reshape(size, -1, grad.shape[-1]) for grad in grads], dim=1)

    def matrices(self, rows: Tensor) -> Tensor:
        """Return its part of some vectors, shape (m, n), as matrices, shape (m, o, i)."""
        m = len(rows)
        W = rows[:, self.weight].reshape(m, *self._shape)
        W = W.mT if self._transposed else W.flatten(2)
        return W if self.bias is None else torch.cat([W, rows[:, self.bias].unsqueeze(-1)], dim=-1)

    def put(self, rows: Tensor, M: Tensor) -> None:
        """Write matrices to their places in vectors."""
        if self.bias is not None:
            rows[:, self.bias] = M[..., -1]
            M = M[..., :-1]
        rows[:, self.weight] = (M.mT if self._transposed else M).reshape(len(rows), -1)

    def _patches(self, x: Tensor) -> Tensor:
        """Return what a convolution sees at each position, shape (size, *positions, i)."""
        conv: Any = self.module
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        x = nn.functional.pad(x, conv._reversed_padding_repeated_twice, mode=mode)
        num = len(conv.kernel_size)
        for axis in range(num):
            k, step, stride = (
                each[axis] for each in (conv.kernel_size, conv.dilation, conv.stride)
            )
            x = x.unfold(2 + axis, step * (k - 1) + 1, stride)[..., ::step]
        order = (0, *range(2, 2 + num), 1, *range(2 + num, 2 + 2 * num))
        return x.permute(order).flatten(1 + num)


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear map or a convolution with weights that all channels share."""
    if isinstance(module, CONVOLUTIONS):
        return module.groups == 1
    # The linear map of transformers' GPT-2, with a weight of shape (i, o).
    return isinstance(module, nn.Linear) or (
        type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    )


class Calls(dict[Layer, list[tuple[Tensor, Tensor]]]):
    """Inputs and outputs of layers, of each call while `recording`."""

    recording = True

    def outputs(self) -> list[Tensor]:
        """Return all outputs, layer by layer."""
        return [output for calls in self.values() for _, output in calls]

    def by_layer(self, values: Sequence[Any]) -> Iterator[tuple[Layer, list[Tensor]]]:
        """Yield each layer with its own of `values`, one for each of `outputs`."""
        start = 0
        for layer, calls in self.items():
            yield layer, list(values[start : start + len(calls)])
            start += len(calls)


@contextmanager
def recorded(layers: Sequence[Layer]) -> Iterator[Calls]:
    """Record the calls of layers; their modules come back without the hooks."""
    found = Calls({layer: [] for layer in layers})

    def hook_of(layer: Layer) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if found.recording and args and isinstance(output, Tensor) and output.requires_grad:
                found[layer].append((args[0].detach(), output))
            return output.clone() if isinstance(output, Tensor) else None

        return hook  # a copy goes on: what is written into it leaves the output as it is

    handles = [layer.module.register_forward_hook(hook_of(layer)) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
