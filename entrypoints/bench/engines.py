"""The processes of one benchmark mode: started, asked together, and all gone at the end."""

import contextlib
import os
import re
import sys
import time
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from vllm_dwdp.entrypoints.bench.rank import Failed, Ran
from vllm_dwdp.entrypoints.server import POLL_S, QUIT_S, Session

RANK_COMMAND = (
    sys.executable, "-c", "import sys; from vllm_dwdp.entrypoints.bench.rank import main; main(int(sys.argv[1]))"
)
LOG_TAIL_BYTES = 200_000
EXCEPTION = re.compile(r"(?:^|[\s\])])((?:\w+\.)*\w*(?:Error|Exception|Exit))(?:: (.+))?$")
FRAME = re.compile(r'File ".+", line \d+, in (\S+)')


class EngineFailure(Exception):
    """One rank of a mode could not go on; `str()` is one line that names it."""


class RankProcess(Session):
    """A rank, and the pipe through which it is asked."""

    def __init__(self, log: Path, environment: dict[str, str]):
        self.connection, child = Pipe()
        with child:
            command = [*RANK_COMMAND, str(child.fileno())]
            super().__init__(command, log, environment=environment, pass_fds=[child.fileno()])

    def send(self, method: str, keywords: dict[str, Any]) -> None:
        with contextlib.suppress(OSError):  # a rank that is gone is noticed while its reply is awaited
            self.connection.send((method, keywords))

    def receive(self) -> Any:
        """The reply, or None while there is none."""
        with contextlib.suppress(EOFError, OSError):
            return self.connection.recv() if self.connection.poll() else None

    def reason(self, reported: str | None) -> str:
        """The most telling reason of a failure: vLLM often reports only that another process has said why."""
        with self.log.open("rb") as log:
            log.seek(max(self.log.stat().st_size - LOG_TAIL_BYTES, 0))
            logged = last_exception(log.read().decode(errors="replace"))
        if reported is None:
            ended = f"the process ended with exit code {self.process.returncode}"
            return f"{ended}; its log's last exception: {logged}" if logged else ended
        return logged or reported if "root cause" in reported else reported

    def kill(self) -> None:
        """End the whole session; returns when nothing of it runs any more."""
        self.end()
        self.connection.close()


class Engines:
    """All ranks of one mode. `close` repeats safely and leaves nothing running."""

    def __init__(self, *, name: str, visible_devices: Sequence[str | None], logs: Path, timeout_s: float):
        """Start one process a rank. `visible_devices` is each rank's CUDA_VISIBLE_DEVICES, None without CUDA."""
        self.timeout_s = timeout_s
        self.last_run: list[Ran] = []
        self.ranks: list[RankProcess] = []
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_DP_")}
        inherited.setdefault("VLLM_ENGINE_READY_TIMEOUT_S", str(int(timeout_s)))
        try:
            for rank, devices in enumerate(visible_devices):
                environment = inherited if devices is None else inherited | {"CUDA_VISIBLE_DEVICES": devices}
                self.ranks.append(RankProcess(logs / f"{name}-rank{rank}.log", environment))
        except BaseException:
            self.close(orderly=False)
            raise

    def ask(self, phase: str, method: str, *keywords: dict[str, Any]) -> list[Any]:
        """`tell`, then `replies`."""
        self.tell(method, *keywords)
        return self.replies(phase)

    def tell(self, method: str, *keywords: dict[str, Any]) -> None:
        """Call `method` of all ranks at once, with keywords for each or the same for all."""
        for rank, own in zip(self.ranks, keywords * len(self.ranks) if len(keywords) == 1 else keywords, strict=True):
            rank.send(method, own)

    def replies(self, phase: str) -> list[Any]:
        """What the ranks answer to what they were told, in rank order.

        Raises EngineFailure as soon as one rank fails or ends, and when one has not answered after `timeout_s`.
        """
        pending = dict(enumerate(self.ranks))
        deadline = time.monotonic() + self.timeout_s
        replies: dict[int, Any] = {}
        while pending:
            wait([rank.connection for rank in pending.values()], POLL_S)
            for index, rank in list(pending.items()):
                ended = rank.has_ended()  # asked first: what it said before it ended counts
                reply = rank.receive()
                if isinstance(reply, Failed) or (ended and reply is None):
                    raise EngineFailure(f"rank {index}, {phase}: {rank.reason(reply.reason if isinstance(reply, Failed) else None)}")
                if reply is not None:
                    replies[index] = reply
                    del pending[index]
                elif time.monotonic() > deadline:
                    raise EngineFailure(f"rank {index}, {phase}: not finished after {self.timeout_s:g} s (--timeout)")
        return [replies[index] for index in range(len(self.ranks))]

    def close(self, *, orderly: bool) -> None:
        """Ask the engines to shut down, if `orderly`, then end whatever is left."""
        if orderly:
            for rank in self.ranks:
                rank.send("close", {})
            deadline = time.monotonic() + QUIT_S
            while time.monotonic() < deadline and any(rank.process.poll() is None for rank in self.ranks):
                time.sleep(POLL_S)
        while self.ranks:
            self.ranks[-1].kill()
            self.ranks.pop()


def last_exception(log: str) -> str | None:
    """The last exception that a log names, without vLLM's prefix; None if there is none.

    One without a message is told with the function that raised it. Warnings and references to a "root cause"
    elsewhere do not count.
    """
    found, function = None, None
    for line in log.splitlines():
        if frame := FRAME.search(line):
            function = frame[1]
        match = EXCEPTION.search(line.rstrip())
        if match and "root cause" not in line and "WARNING" not in line:
            kind, text = match[1].rpartition(".")[2], match[2]
            found = f"{kind}: {text}" if text else f"{kind} in {function}" if function else kind
    return found
