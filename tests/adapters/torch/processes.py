"""Processes on this machine that form a group, and run functions of `mesh_cases` by name."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import socket
import traceback
from multiprocessing.connection import Connection
from typing import Any

START_SECONDS, CASE_SECONDS, GROUP_SECONDS = 180, 180, 60


def serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    """Join the group and run what is asked for, until None comes."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
        TORCH_CPP_LOG_LEVEL="ERROR",
    )
    import torch

    from tests.adapters.torch import mesh_cases

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", rank=rank, world_size=size, timeout=datetime.timedelta(seconds=GROUP_SECONDS)
    )
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (size,))
    pipe.send("ready")
    while (task := pipe.recv()) is not None:
        name, arguments = task
        try:
            pipe.send((True, getattr(mesh_cases, name)(mesh, **arguments)))
        except Exception as error:
            pipe.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))


class Group:
    """Some processes that wait for work."""

    def __init__(self, size: int) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # One process imports torch, and the others are copies of it.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.adapters.torch.mesh_cases"])
        pairs = [context.Pipe() for _ in range(size)]
        self.pipes = [mine for mine, _ in pairs]
        self.members = [
            context.Process(target=serve, args=(rank, size, port, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for member in self.members:
            member.start()
        for _, theirs in pairs:
            theirs.close()
        for pipe in self.pipes:
            assert self._received(pipe, START_SECONDS) == "ready"

    def run(self, name: str, **arguments: Any) -> list[Any]:
        """Return what a function returns in each process."""
        answers = self.answers(name, **arguments)
        for fine, answer in answers:
            assert fine, answer
        return [answer for _, answer in answers]

    def errors(self, name: str, **arguments: Any) -> list[str]:
        """Return the first line of the error that a function raises in each process."""
        answers = self.answers(name, **arguments)
        assert not any(fine for fine, _ in answers), answers
        return [answer.splitlines()[0] for _, answer in answers]

    def answers(self, name: str, **arguments: Any) -> list[Any]:
        """Return whether a function went well in each process, and what came of it."""
        for pipe in self.pipes:
            pipe.send((name, arguments))
        return [self._received(pipe, CASE_SECONDS) for pipe in self.pipes]

    def close(self) -> None:
        """End all processes."""
        for pipe, member in zip(self.pipes, self.members, strict=True):
            if member.is_alive():
                pipe.send(None)
        for member in self.members:
            member.join(5)
            member.kill()

    def _received(self, pipe: Connection, seconds: float) -> Any:
        if not pipe.poll(seconds):
            for member in self.members:
                member.kill()
            raise AssertionError(f"a process did not answer within {seconds} seconds")
        try:
            return pipe.recv()
        except EOFError:
            return False, "the process ended"
