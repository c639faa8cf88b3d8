"""Fully sharded modules (FSDP2) with whole parameters for the length of a call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lowrank_inverse.arrays.spread import gathered, is_spread


def whole_leaf(tensor: Tensor) -> Tensor:
    """Return a leaf of its own with all the values of a DTensor."""
    return gathered(tensor.detach()).clone().requires_grad_(tensor.requires_grad)


class WholeModule:
    """A module some of whose parameters are DTensors, and the whole tensors that stand for them.

    `torch.distributed.fsdp.fully_shard` gathers parameters in hooks, behind which a second
    derivative sees nothing. Within `in_place` the module has the whole tensors, and no such hook.
    """

    def __init__(self, module: nn.Module, wholes: dict[int, Tensor]) -> None:
        self._module = module
        self._places = [
            (part, key, parameter, wholes[id(parameter)])
            for part in module.modules()
            for key, parameter in part._parameters.items()
            if is_spread(parameter)
        ]

    def modules(self) -> Iterator[nn.Module]:
        """Yield all parts of the module."""
        return self._module.modules()

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the module have the whole tensors."""
        tables: list[Any] = []
        for part in self.modules():
            tables += [part._forward_pre_hooks, part._forward_hooks]
        kept = [(table, dict(table)) for table in tables if any(map(_gathers, table.values()))]
        try:
            for table, hooks in kept:
                for number, hook in hooks.items():
                    if _gathers(hook):
                        del table[number]
            for part, key, _, whole in self._places:
                part._parameters[key] = whole  # type: ignore[assignment]
            yield
        finally:
            for part, key, parameter, _ in self._places:
                part._parameters[key] = parameter
            for table, hooks in kept:
                table.clear()
                table.update(hooks)


def _gathers(hook: Any) -> bool:
    """Whether a hook is one of fully_shard's."""
    return type(getattr(hook, "__self__", None)).__name__ == "FSDPState"


def with_whole_modules(
    modules: Iterable[nn.Module], leaves: Iterable[Any]
) -> tuple[list[Any], dict[int, Tensor]]:
    """Return modules with whole parameters, and the whole tensors by the ids of the DTensors.

    Frozen parameters are gathered too. To be called by all processes.
    """
    modules = list(modules)
    parameters = (p for module in modules for p in module.parameters())
    spread = {id(p): p for p in (*leaves, *parameters) if is_spread(p)}
    wholes = {place: whole_leaf(tensor) for place, tensor in spread.items()}
    return [
        WholeModule(one, wholes) if any(map(is_spread, one.parameters())) else one
        for one in modules
    ], wholes
