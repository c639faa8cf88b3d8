"""The inputs of layers, and the gradients by their outputs, a batch of examples at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, autograd, nn

from lowrank_inverse._typing import RNG, Batch, Data, PyTree
from lowrank_inverse.arrays.checks import check_rng
from lowrank_inverse.influence.dataset import Examples
from lowrank_inverse.influence.loss_checks import measure_losses
from lowrank_inverse_torch.curvature.gradient_graph import Values, dense
from lowrank_inverse_torch.influence.backend import TorchBackend
from lowrank_inverse_torch.influence.calls import rows_of
from lowrank_inverse_torch.influence.data import flatten
from lowrank_inverse_torch.influence.example_losses import Split
from lowrank_inverse_torch.kronecker.layers import Calls, Layer, is_linear, recorded
from lowrank_inverse_torch.kronecker.output_roots import (
    MOST_OUTPUTS,
    Root,
    output_root,
    signs,
)
from lowrank_inverse_torch.model_guard import explained

MOST_EXAMPLES = 128
"""In a batch: more of them are no faster, and fewer batches estimate the diagonal worse."""
FEW = 4


def measured(
    model: nn.Module,
    loss: Callable[[Any, Any], Tensor],
    train: Data,
    params: PyTree,
    split: Split | None,
    batch_size: int | None,
    memory_budget: int,
) -> tuple[TorchBackend, Examples]:
    """Return the backend of a model, and its training examples with their losses measured."""
    backend = TorchBackend(model, loss, params, split, 1)
    examples = backend.examples(train, "train", batch_size, memory_budget)
    measure_losses(backend, examples)
    return backend, examples


def seed_of(rng: RNG) -> int:
    """Return a seed for a generator of torch."""
    return int(check_rng(rng).integers(2**63))


@dataclass
class Outputs:
    """Of a batch that went through the network.

    Attributes
    ----------
    values : Tensor, shape (size, ...)
        Those that the loss depends on.
    root : callable
        As `output_root` returns it.
    pull : callable (Tensor) -> list of Tensor or None
        Pulls a vector at the outputs back to those of the layers, and to the tensors.
    read : callable (structure) -> Tensor
        Returns the same of the outputs of another batch.
    """

    values: Tensor
    root: Root
    pull: Callable[[Tensor], Values]
    read: Callable[[Any], Tensor]


@contextmanager
def opened(
    backend: TorchBackend,
    batch: Batch,
    generator: torch.Generator,
    layers: Sequence[Layer] = (),
    tensors: Sequence[Tensor] = (),
) -> Iterator[tuple[Calls, Outputs]]:
    """Run a batch, with the calls of `layers`."""
    with backend.evaluating(), recorded(layers) as calls, explained():
        output, target = backend.forward(batch)
        losses = backend.loss(output, target)
        calls.recording = False  # a checkpointed layer runs again in a backward pass
        leaves, rebuild = flatten(output)
        own, size = _read_by(losses, leaves), len(losses)
        widths = [leaves[i][0].numel() for i in own]

        def separate(z: Tensor) -> list[Tensor]:
            parts = z.reshape(size, -1).split(widths, dim=1)
            return [part.reshape(leaves[i].shape) for i, part in zip(own, parts, strict=True)]

        def read(output: Any) -> Tensor:
            found = [flatten(output)[0][i] for i in own]
            # One tensor keeps its shape, of which the last axis may be that of a softmax.
            return found[0] if len(own) == 1 else torch.cat([x.flatten(1) for x in found], dim=1)

        def loss_at(z: Tensor) -> Tensor:
            values = list(leaves)
            for i, part in zip(own, separate(z), strict=True):
                values[i] = part
            return backend.loss(rebuild(values), target)

        def pull(v: Tensor) -> Values:
            outputs = calls.outputs()
            grads = autograd.grad(
                [leaves[i] for i in own],
                [*outputs, *tensors],
                separate(v),
                retain_graph=True,
                allow_unused=True,
            )
            by_output = zip(grads, outputs, strict=False)
            filled = [torch.zeros_like(y) if g is None else g for g, y in by_output]
            return [*filled, *dense(grads[len(outputs) :])]

        z = read(output).detach()
        yield calls, Outputs(z, output_root(loss_at, z, generator), pull, read)


def vectors_at(
    outputs: Tensor, num_samples: int | None, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield vectors e at the outputs with the sum of ``e e.T`` the identity, or so in the mean.

    All unit vectors where `num_samples` is None and an example has few outputs. Signs are drawn for
    each example: the square of the gradient of a batch has the mean of the sum over its examples.
    """
    size, num = len(outputs), outputs[0].numel()
    if num_samples is None and num <= MOST_OUTPUTS:
        for c in range(num):
            e = outputs.new_zeros(size, num)
            e[:, c] = signs(e[:, c], generator)
            yield e.reshape(outputs.shape)
        return
    for _ in range(num_samples or 1):
        yield signs(outputs, generator) * (num_samples or 1) ** -0.5


@dataclass
class Piece:
    """A batch that went through the network.

    Attributes
    ----------
    inputs : callable (Layer) -> Tensor, shape (size, positions, i)
    gradients : callable () -> iterator
        For each vector at the outputs, a pair: the gradients by the outputs of each layer, a dict
        of Tensors of shape (size, positions, o), and those by the other parameters.
    """

    inputs: Callable[[Layer], Tensor]
    gradients: Callable[[], Iterator[tuple[dict[Layer, Tensor], Values]]]


class Collection:
    """Batches of examples for the Kronecker factors of the layers of a network.

    Parameters
    ----------
    backend, examples
        Of the influence function.
    num_samples : int or None
        Random vectors at the outputs for each batch; None for all unit vectors, if they are few.
    generator : torch.Generator
    memory_budget : int

    Attributes
    ----------
    layers : list of Layer
    others : list of int
        Positions of the other tensors among the parameters.
    num_vectors : int
        At the outputs, for each batch.
    """

    def __init__(
        self,
        backend: TorchBackend,
        examples: Examples,
        num_samples: int | None,
        generator: torch.Generator,
        memory_budget: int,
    ) -> None:
        self._backend, self._examples, self._generator = backend, examples, generator
        self._num_samples, params, candidates = num_samples, backend.params, _candidates(backend)
        batch = examples.get(0)
        few = rows_of(batch, 0, min(FEW, examples.size(batch)))
        with opened(backend, few, generator, candidates, params.tensors) as (calls, out):
            size = len(out.values)
            self.num_vectors = len(list(vectors_at(out.values, num_samples, generator)))
            grads = out.pull(out.root(signs(out.values, generator)))
            whole = params.flatten(grads[len(calls.outputs()) :])
            self.layers = [
                layer
                for layer, own in calls.by_layer(grads)
                if _is_product(layer, calls, own, whole, size)
            ]
            held = sum(x.numel() + 2 * y.numel() for own in calls.values() for x, y in own)
            held += sum(layer.inputs(calls[layer], size).numel() for layer in self.layers)
        covered = {place.start for layer in self.layers for place in layer.places}
        self.others = [i for i, start in enumerate(params.offsets[:-1]) if start not in covered]
        each = 2 * held * params.dtype.itemsize // size
        self._limit = max(1, min(MOST_EXAMPLES, memory_budget // 4 // max(each, 1)))

    def pieces(self) -> Iterator[AbstractContextManager[Piece]]:
        """Yield a context for each batch, which gives the Piece."""
        for _, batch in self._examples.parts(self._limit):
            yield self._piece(batch)

    @contextmanager
    def _piece(self, batch: Batch) -> Iterator[Piece]:
        tensors = [self._backend.params.tensors[i] for i in self.others]
        with opened(self._backend, batch, self._generator, self.layers, tensors) as (calls, out):
            size, num = len(out.values), len(calls.outputs())

            def gradients() -> Iterator[tuple[dict[Layer, Tensor], Values]]:
                for e in vectors_at(out.values, self._num_samples, self._generator):
                    grads = out.pull(out.root(e))
                    own = calls.by_layer(grads)
                    yield {layer: layer.gradients(g, size) for layer, g in own}, grads[num:]

            yield Piece(lambda layer: layer.inputs(calls[layer], size), gradients)


def _read_by(losses: Tensor, leaves: list[Any]) -> list[int]:
    """Return the positions of the outputs that the losses depend on."""
    live = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.requires_grad]
    tensors = [leaves[i] for i in live]
    grads: Any = [None] * len(live)
    if live and losses.requires_grad:
        grads = autograd.grad(losses.sum(), tensors, retain_graph=True, allow_unused=True)
    own = [i for i, grad in zip(live, grads, strict=True) if grad is not None]
    if not own:
        raise ValueError(
            "`loss` must depend on `params` through the outputs of `model`; it does not. "
            "Were they evaluated under torch.no_grad(), or detached?"
        )
    for i in own:
        if leaves[i].ndim == 0 or len(leaves[i]) != len(losses):
            raise ValueError(
                f"the outputs of `model` must have one row for each of {len(losses)} examples; got "
                f"shape {tuple(leaves[i].shape)}."
            )
    return own


def _candidates(backend: TorchBackend) -> list[Layer]:
    """Return the layers whose weight belongs to one module, and is to be differentiated by."""
    params = backend.params
    places = {
        id(tensor): slice(start, stop)
        for tensor, start, stop in zip(
            params.tensors, params.offsets[:-1], params.offsets[1:], strict=True
        )
    }
    modules = list(backend.model.named_modules())
    uses = Counter(id(p) for _, module in modules for p in module._parameters.values())

    def place(tensor: Tensor | None) -> slice | None:
        return None if tensor is None or uses[id(tensor)] > 1 else places.get(id(tensor))

    found = []
    for name, module in modules:
        weight = place(module._parameters.get("weight")) if is_linear(module) else None
        if weight is not None:
            found.append(Layer(name, module, weight, place(module._parameters.get("bias"))))
    return found


def _is_product(layer: Layer, calls: Calls, grads: list[Tensor], whole: Tensor, size: int) -> bool:
    """Whether the gradient by its parameters is what inputs and gradients make of it.

    It is not where the weight is used elsewhere too, or a module does more than its name says.
    """
    own = calls[layer]
    if not own or any(len(x) % size or len(y) % size for x, y in own):
        return False
    a, g = layer.inputs(own, size).flatten(0, 1), layer.gradients(grads, size).flatten(0, 1)
    if len(a) != len(g) or (g.shape[1], a.shape[1]) != layer.matrices(whole[None]).shape[1:]:
        return False
    difference = g.mT @ a - layer.matrices(whole[None])[0]
    return bool(difference.norm() <= torch.finfo(a.dtype).eps ** 0.5 * (g.norm() * a.norm()))
