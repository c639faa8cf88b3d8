"""Run a user's function so that the model comes back as it was, and check what it returned."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from lowrank_inverse.bilevel.diagnostics import HypergradientWarning
from lowrank_inverse_torch.mesh.sharded import WholeModule

RandomStates = dict[torch.device, Tensor]

Module = nn.Module | WholeModule


_LOCK = threading.RLock()
"""One thread at a time: the random state, modes, buffers and hooks are shared by all."""


_COMPILED = (
    "A compiled module has no second derivative. Evaluate the module that was passed to "
    "torch.compile (`compiled._orig_mod`)."
)


_NOT_REENTRANT = "Checkpoint with torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."


# Part of torch's message -> what to do about it.
_REMEDIES = (
    (
        "_scaled_dot_product",
        "Fused attention has no second derivative. Evaluate the model within `with "
        "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):`.",
    ),
    ("aot_autograd", _COMPILED),
    ("donated buffers", _COMPILED),
    ("use_reentrant", _NOT_REENTRANT),
    ("Checkpointing is not compatible with .grad()", _NOT_REENTRANT),
    (
        "once_differentiable",
        "A custom autograd Function marked @once_differentiable has no second derivative. Write "
        "its backward with differentiable operations, or remove it from the loss.",
    ),
    (
        "backward through the graph a second time",
        "The graph of the loss was freed by a backward pass. Pass a closure that returns the loss "
        "and does not call backward().",
    ),
    (
        "modified by an inplace operation",
        "A tensor of the loss was changed in place after the loss was evaluated. Create a new "
        "operator after each change.",
    ),
)


_DDP_FLAGS = ("require_backward_grad_sync", "require_forward_param_sync")


@contextmanager
def untouched(tensors: Sequence[Tensor], modules: Iterable[Module] = ()) -> Iterator[RandomStates]:
    """Put everything back on the way out that evaluating a model may change.

    Training mode and buffers of the modules, ``.grad`` of the tensors and of the modules'
    parameters, the random state of the CPU and of every other device in use. Within, grad mode is
    on, and the gradient hooks of those tensors are off: torch would apply them to each product
    with the Hessian. DistributedDataParallel sends nothing, and fully sharded modules have whole
    parameters. Buffers are not copied back, which would raise their version and break the user's
    own graphs: clones stand in for them meanwhile. Threads enter one after the other.

    Yields
    ------
    dict
        The random states met, for `set_random_states`.

    Raises
    ------
    RuntimeError
        Inside ``torch.inference_mode()``, where no graph can be built.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "Derivatives cannot be computed inside torch.inference_mode(). Make this call outside "
            "of it, or use torch.no_grad() instead."
        )
    with nullcontext() if _in_engine() else _LOCK:
        yield from _untouched(tensors, modules)


def twice_differentiable_attention() -> AbstractContextManager[Any]:
    """Compute attention from products and softmax: the fused kernels have no second derivative.

    Backward passes are to be within it too: they evaluate a checkpointed module anew.
    """
    if not hasattr(nn, "attention"):  # before torch 2.3
        return nullcontext()
    return nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH)


def _in_engine() -> bool:
    """Whether autograd itself runs this thread, for one that may hold the lock and waits for it."""
    return isinstance(threading.current_thread(), threading._DummyThread)


def _untouched(tensors: Sequence[Tensor], modules: Iterable[Module]) -> Iterator[RandomStates]:
    modules = list(modules)
    parts = list(dict.fromkeys(part for module in modules for part in module.modules()))
    modes = [(part, part.training) for part in parts]
    buffers = [
        (part, key, buffer)
        for part in parts
        for key, buffer in part._buffers.items()
        if buffer is not None
    ]
    owned = chain.from_iterable(part.parameters(recurse=False) for part in parts)
    leaves = {id(tensor): tensor for tensor in chain(tensors, owned) if tensor.is_leaf}
    grads = [(leaf, leaf.grad) for leaf in leaves.values() if leaf.grad is not None]
    hooked = {id(tensor): tensor for tensor in chain(tensors, leaves.values())}
    hooks = [(held, dict(held)) for t in hooked.values() if (held := t._backward_hooks)]
    replicated = [part for part in parts if isinstance(part, nn.parallel.DistributedDataParallel)]
    synchronous = [(part, key, getattr(part, key)) for part in replicated for key in _DDP_FLAGS]
    devices = {tensor.device for tensor in chain(leaves.values(), (b for _, _, b in buffers))}
    devices.update(tensor.device for tensor in tensors)
    states = random_states(devices)
    clones: dict[int, Tensor] = {}  # by identity: shared buffers stay shared
    try:
        for part, key, buffer in buffers:
            if id(buffer) not in clones:
                # One that requires grad cannot be written to, and a derivative may be wanted.
                clones[id(buffer)] = buffer if buffer.requires_grad else buffer.clone()
            part._buffers[key] = clones[id(buffer)]
        for leaf, _ in grads:
            leaf.grad = None
        for held, _ in hooks:
            held.clear()  # autograd reads this very dict
        for part, key, _ in synchronous:  # what one process does alone, the others would wait for
            setattr(part, key, False)
        with torch.enable_grad(), ExitStack() as stack:
            for module in modules:
                if isinstance(module, WholeModule):
                    stack.enter_context(module.in_place())
            yield states
    finally:
        for held, own in hooks:
            held.update(own)
        for part, key, value in synchronous:
            setattr(part, key, value)
        for part, key, buffer in buffers:
            part._buffers[key] = buffer
        for part, mode in modes:
            part.training = mode
        for leaf in leaves.values():
            leaf.grad = None
        for leaf, grad in grads:
            leaf.grad = grad
        set_random_states(states)


def random_states(devices: Iterable[torch.device]) -> RandomStates:
    """Read the state of the default generator of the CPU and of each device."""
    states = {torch.device("cpu"): torch.get_rng_state()}
    for device in devices:
        if device.type in ("cpu", "meta"):
            continue
        backend: Any = getattr(torch, device.type)
        states[device] = backend.get_rng_state(*([] if device.type == "mps" else [device]))
    return states


def set_random_states(states: RandomStates) -> None:
    """Set the generators back to states that `random_states` read."""
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            backend: Any = getattr(torch, device.type)
            backend.set_rng_state(state, *([] if device.type == "mps" else [device]))


def evaluate_loss(loss: Tensor | Callable[[], Tensor], *, name: str = "loss") -> Tensor:
    """Return the scalar that `loss` is or that it returns when called.

    Raises
    ------
    TypeError
        It is no real floating-point tensor.
    ValueError
        It is not a scalar, or not finite.
    """
    value = loss() if callable(loss) else loss
    if not isinstance(value, Tensor):
        raise TypeError(
            f"`{name}` must be a scalar tensor, or a closure that returns one; "
            f"got {type(value).__name__}."
        )
    if not value.is_floating_point():
        raise TypeError(f"`{name}` must be real and floating-point; got {value.dtype}.")
    if value.numel() != 1:
        raise ValueError(
            f"`{name}` must be a scalar; got shape {tuple(value.shape)}. Take its mean or its sum."
        )
    if not torch.isfinite(value).all():
        raise ValueError(f"`{name}` must be finite; got {value.item()}.")
    return value.reshape(())


@contextmanager
def explained(*, batched: bool = False) -> Iterator[None]:
    """Add to an error of torch's autograd, in its own type, what can be done about it."""
    try:
        yield
    except RuntimeError as error:
        message = str(error)
        remedies = [remedy for part, remedy in _REMEDIES if part in message]
        if batched and not remedies and type(error) is RuntimeError:  # not out of memory
            remedies = ["If vmap cannot batch these products, chunk_size=1 takes them one by one."]
        if not remedies or type(error) is not RuntimeError:
            raise
        raise RuntimeError("\n".join([message, *remedies])) from error


def warn_of_ranks() -> None:
    """Warn where several ranks each see a part of the data."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    num_ranks = distributed.get_world_size()
    if num_ranks > 1:
        warnings.warn(
            f"Each of the {num_ranks} ranks differentiates its own losses. If each has a part of "
            "one batch, neither the result nor its mean over the ranks is the hypergradient of the "
            "whole batch. Pass `mesh`, such as "
            f"torch.distributed.device_mesh.init_device_mesh(device_type, ({num_ranks},)).",
            HypergradientWarning,
            stacklevel=3,
        )
