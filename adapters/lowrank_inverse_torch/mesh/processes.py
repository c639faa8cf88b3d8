"""The processes of a mesh: what they send each other, agree on, and fail in together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from lowrank_inverse_torch.parameters import Parameters

OLDEST = "2.11"
"""The version of PyTorch from which the tests of several processes pass."""

T = TypeVar("T")


class Processes:
    """The processes of a one-dimensional mesh.

    Vectors of n numbers are spread over them: a DTensor of placement ``Shard(0)``, of which each
    process has ``ceil(n / size)`` rows or fewer. All methods but `laid` are to be called by all
    processes, in the same order.

    Parameters
    ----------
    mesh : DeviceMesh
        Of one dimension, such as ``init_device_mesh("cuda", (num_processes,))`` or ``mesh["dp"]``.
    params : Parameters
        Whose n, dtype and device the vectors have.

    Attributes
    ----------
    size, rank : int
        Number of processes, and that of this one.
    rows : range
        Those of n that this process has.
    """

    def __init__(self, mesh: Any, params: Parameters) -> None:
        if torch.torch_version.TorchVersion(torch.__version__) < OLDEST:
            raise RuntimeError(
                f"`mesh` needs PyTorch {OLDEST} or newer, whose DTensor has the operations that "
                f"solvers use; got {torch.__version__}. Update it, or leave `mesh` out."
            )
        if not isinstance(mesh, DeviceMesh):
            raise TypeError(
                f"`mesh` must be a DeviceMesh; got {type(mesh).__name__}. Make one with "
                'torch.distributed.device_mesh.init_device_mesh("cuda", (num_processes,)).'
            )
        if mesh.ndim != 1:
            raise ValueError(
                f"`mesh` must have one dimension, that of the data-parallel processes; got "
                f'{mesh.ndim}. Pass that dimension, such as mesh["dp"].'
            )
        self.mesh, self.group = mesh, mesh.get_group()
        self.size, self.rank = mesh.size(), mesh.get_local_rank()
        self.n, self.dtype, self.device = params.n, params.dtype, params.device
        self._most = -(-self.n // self.size)  # rows of a process, as DTensor cuts them
        start = min(self.n, self.rank * self._most)
        self.rows = range(start, min(self.n, start + self._most))

    # What is k-sized or a number.

    def total(self, numbers: Tensor) -> Tensor:
        """Return the sum over processes of a tensor that is whole on each."""
        numbers = numbers.clone()
        distributed.all_reduce(numbers, group=self.group)
        return numbers

    def everywhere(self, numbers: Tensor) -> list[Tensor]:
        """Return the tensors of all processes, of one shape, in their order."""
        parts = [torch.empty_like(numbers) for _ in range(self.size)]
        distributed.all_gather(parts, numbers, group=self.group)
        return parts

    def total_of(self, function: Callable[[], np.ndarray], size: int) -> np.ndarray:
        """Return the sum over processes of `size` numbers that `function` returns in each."""
        numbers, error = self.attempt(function)
        given = np.zeros(size) if numbers is None else numbers
        flagged = torch.tensor([*given, error is not None], dtype=torch.float64)
        totals = self.total(flagged.to(self.device)).cpu().numpy()
        if totals[-1] != 0:
            self.fail(error)
        return totals[:-1]

    def everyone(self, value: T) -> list[T]:
        """Return the values of all processes, in their order."""
        found: list[Any] = [None] * self.size
        distributed.all_gather_object(found, value, group=self.group)
        return found

    # What has n rows.

    def laid(self, vector: Tensor) -> DTensor:
        """Return the spread form of a plain vector or block that each process has."""
        return self.spread(vector[self.rows.start : self.rows.stop])

    def spread(self, rows: Tensor) -> DTensor:
        """Return the spread vector or block of which this process has `rows`."""
        shape = torch.Size((self.n, *rows.shape[1:]))
        stride = (1,) if len(shape) == 1 else (shape[1], 1)
        return DTensor.from_local(
            rows, self.mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
        )

    def own_sum(self, vector: Tensor | None, error: Exception | None = None) -> Tensor:
        """Return the own rows of the sum over processes of plain vectors, shape (n,).

        None stands for zeros. An `error` of any process is raised in all of them: whether there is
        one travels with the numbers, one number for each process.
        """
        most = self._most
        buffer = torch.zeros((self.size, most + 1), dtype=self.dtype, device=self.device)
        if vector is not None:
            full = self.n // most
            buffer[:full, :most] = vector[: full * most].view(full, most)
            if full < self.size:
                buffer[full, : self.n - full * most] = vector[full * most :]
        buffer[:, most] = float(error is not None)
        own = buffer.new_empty(most + 1)
        distributed.reduce_scatter(own, list(buffer.unbind(0)), group=self.group)
        if own[most] != 0:
            self.fail(error)
        return own[: len(self.rows)]

    def summed_each(
        self, values: Sequence[Tensor | None], like: Sequence[Tensor], error: Exception | None
    ) -> list[Tensor | None]:
        """Return the sums over processes of tensors, None where all of them have None.

        A DTensor among `like` is spread itself, such as one weight for each example: a process
        keeps what it has. An `error` is raised as in `own_sum`.
        """
        common = [i for i, one in enumerate(like) if not isinstance(one, DTensor)]
        given = [float(values[i] is not None) for i in common] if error is None else []
        flags = torch.zeros(len(common) + 1, dtype=like[0].dtype, device=self.device)
        flags[-1] = float(error is not None)
        flags[: len(given)] = torch.tensor(given)
        parts = [values[i] if error is None else None for i in common]
        flat = [
            like[i].new_zeros(like[i].numel()) if part is None else part.reshape(-1)
            for i, part in zip(common, parts, strict=True)
        ]
        totals = self.total(torch.cat([*flat, flags]))
        if totals[-1] != 0:
            self.fail(error)
        result = list(values)
        start = 0
        for place, i in enumerate(common):
            stop = start + like[i].numel()
            known = totals[len(totals) - len(flags) + place] != 0
            result[i] = totals[start:stop].view(like[i].shape) if known else None
            start = stop
        return result

    # Failure and agreement.

    def attempt(self, function: Callable[[], T]) -> tuple[T | None, Exception | None]:
        """Return what `function` returns, or the error it raises, for the next exchange to tell."""
        try:
            return function(), None
        except Exception as error:
            return None, error

    def together(self, function: Callable[[], T]) -> T:
        """Return what `function` returns, if it raises in no process; else raise in all of them."""
        result, error = self.attempt(function)
        failed = torch.tensor([float(error is not None)], device=self.device)
        if self.total(failed) != 0:
            self.fail(error)
        return result  # type: ignore[return-value]

    def fail(self, error: Exception | None) -> None:
        """Raise in all processes what some of them met, in the words of the first."""
        found = self.everyone(None if error is None else (type(error).__name__, str(error)))
        rank, (kind, message) = next((i, one) for i, one in enumerate(found) if one is not None)
        kinds = {one.__name__: one for one in (ValueError, TypeError, RuntimeError)}
        prefix = "" if kind in kinds else f"{kind}: "
        raise kinds.get(kind, RuntimeError)(
            f"process {rank} of {self.size}: {prefix}{message}"
        ) from error

    def agree(self, **values: Any) -> None:
        """Raise in all processes unless each of `values` is the same in all of them.

        Tensors are compared by a `fingerprint`, settings by their fields that have values.
        """
        mine = torch.tensor([_digest(value) for value in values.values()], device=self.device)
        rows = self.everywhere(mine)
        for j, name in enumerate(values):
            odd = [i for i, row in enumerate(rows) if row[j] != rows[0][j]]
            if odd:
                what = name.replace("_", " ")
                raise RuntimeError(
                    f"the processes disagree on the {what}: those of rank {odd} differ from rank "
                    f"0. {_REMEDIES.get(name, 'Pass the same to all of them.')}"
                )


_REMEDIES = {
    "parameters": "Load the same weights in all of them: torch.distributed.broadcast(p, src=0) "
    "for each, or wrap the module in DistributedDataParallel, which does that.",
    "columns": "Draw them with the same `rng` in all of them.",
    "rng": "Pass the same whole number as `rng` to all of them.",
    "vector": "Pass the same vector to all of them, or a DTensor of which each has its own rows.",
}


def fingerprint(tensors: Sequence[Tensor]) -> int:
    """Return a number that changes with the bits of the tensors, at one pass over them."""
    total = torch.zeros((), dtype=torch.int64)
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    for i, tensor in enumerate(tensors):
        bits = tensor.detach().contiguous().view(kinds[tensor.element_size()]).long()
        # Wrapping around, as whole numbers do. The square tells two changes from their sum.
        own = bits.sum() + 3 * (bits * bits).sum()
        total = 31 * total + (i + 1) * own.cpu() + tensor.numel()
    return int(total)


def _digest(value: Any) -> int:
    """Return 63 bits that stand for a value."""
    text = repr(_plain(value)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def _plain(value: Any) -> Any:
    """Return what processes can compare: addresses in memory are no part of a value."""
    if isinstance(value, np.random.Generator):
        return value.bit_generator.state
    if is_dataclass(value) and not isinstance(value, type):
        told = [(f.name, _plain(getattr(value, f.name))) for f in fields(value)]
        return type(value).__qualname__, told
    if isinstance(value, Tensor):
        return None if isinstance(value, DTensor) else fingerprint([value])
    if isinstance(value, (str, int, float, type(None), np.number, torch.dtype, torch.Size)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return [(key, _plain(part)) for key, part in value.items()]
    return type(value).__qualname__
