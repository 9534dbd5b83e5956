"""All ranks of one mode of the bench as processes: loaded, asked at the same time, awaited within a bound, and ended."""

import contextlib
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from vllm_dwdp.entrypoints.bench.modes import Settings, load_arguments, visible_devices
from vllm_dwdp.entrypoints.bench.rank import Rank
from vllm_dwdp.entrypoints.server import free_port, kill_session

LOAD_S, ASK_S, END_S = 280, 60, 10

Answerer = Callable[[Rank], Callable[[Any], Any]]  # in a rank's process: once it has loaded, what answers each request


def serve(keywords: dict[str, Any], devices: str | None, answerer: Answerer, pipe: Connection) -> None:
    """A rank."""
    os.setsid()
    if devices is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = devices
    rank = Rank()
    rank.load(**keywords)
    answer = answerer(rank)
    pipe.send("ready")
    with contextlib.suppress(EOFError, OSError):
        while (asked := pipe.recv()) is not None:
            pipe.send(answer(asked))
    kill_session(os.getsid(0))


class Mode:
    """A mode's ranks. The first answer of each is "ready"."""

    def __init__(
        self, settings: Settings, name: str, devices: list[str] | None, answerer: Answerer,
        engine: Callable[[int], dict[str, Any]] = lambda rank: {},
    ):
        """Start the ranks; `engine` gives further arguments of each one's engine. `answerer` is a module's function."""
        self.name, self.pipes, self.processes = name, [], []
        context = multiprocessing.get_context("spawn")
        seen = visible_devices(name, devices, settings.size)
        for rank, keywords in enumerate(load_arguments(settings, name, settings.input_len, free_port())):
            keywords["engine"] |= engine(rank)
            pipe, child = context.Pipe()
            self.processes.append(context.Process(target=serve, args=(keywords, seen[rank], answerer, child)))
            self.processes[-1].start()
            child.close()
            self.pipes.append(pipe)

    def ask(self, *asked: Any, timeout_s: float = ASK_S) -> list[Any]:
        """What each rank answers: to the request of its place, or all to the one."""
        for pipe, request in zip(self.pipes, asked * (len(self.pipes) if len(asked) == 1 else 1), strict=True):
            pipe.send(request)
        return self.answers(timeout_s)

    def answers(self, timeout_s: float) -> list[Any]:
        for rank, pipe in enumerate(self.pipes):
            assert pipe.poll(timeout_s), f"{self.name}: rank {rank} did not answer within {timeout_s} s"
        return [self._answer(rank) for rank in range(len(self.pipes))]

    def _answer(self, rank: int) -> Any:
        try:
            return self.pipes[rank].recv()
        except EOFError:
            raise EOFError(f"{self.name}: rank {rank} has ended") from None

    def end(self) -> None:
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(END_S)
            kill_session(process.pid)
            process.kill()
