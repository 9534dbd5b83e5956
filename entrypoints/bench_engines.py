"""The processes of one benchmark mode: started, commanded together, and all gone at the end."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path

import msgspec

from vllm_dwdp.entrypoints.bench_rank import Command, Failed, Quit, Reply

RANK_COMMAND = (sys.executable, "-m", "vllm_dwdp.entrypoints.bench_rank")
POLL_S = 0.1
QUIT_S = 20.0  # an engine frees shared memory and sockets in good order within seconds
KILL_S = 10.0
TRACKER_S = 2.0
LOG_TAIL_BYTES = 200_000
EXCEPTION = re.compile(r"(?:^|[\s\])])((?:\w+\.)*\w*(?:Error|Exception|Exit))(?:: (.+))?$")
FRAME = re.compile(r'File ".+", line \d+, in (\S+)')


class EngineFailure(Exception):
    """One rank of a mode could not go on; `str()` is one line."""

    def __init__(self, *, rank: int, phase: str, reason: str):
        super().__init__(reason)
        self.rank, self.phase, self.reason = rank, phase, reason


class RankProcess:
    """A rank in a session of its own, so that whatever it starts can be found and ended."""

    def __init__(self, *, log: Path, environment: dict[str, str]):
        parent, child = socket.socketpair()
        self.log = log
        with log.open("wb") as output, child:
            self.process = subprocess.Popen(
                [*RANK_COMMAND, str(child.fileno())],
                stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment,
                pass_fds=[child.fileno()], start_new_session=True,
            )
        self.connection = Connection(parent.detach())

    def send(self, command: Command) -> None:
        with contextlib.suppress(OSError):  # a rank that is gone is noticed while its reply is awaited
            self.connection.send_bytes(msgspec.json.encode(command))

    def receive(self) -> Reply | None:
        """The reply, or None when the rank ended without one."""
        try:
            return msgspec.json.decode(self.connection.recv_bytes(), type=Reply)
        except (EOFError, OSError):
            return None

    def failure(self, phase: str, rank: int, reported: str | None) -> EngineFailure:
        """The most telling reason: vLLM often reports only that another process has said why."""
        with self.log.open("rb") as log:
            log.seek(max(self.log.stat().st_size - LOG_TAIL_BYTES, 0))
            logged = last_exception(log.read().decode(errors="replace"))
        if reported is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(KILL_S)
            ended = f"the process ended with exit code {self.process.returncode}"
            reported = f"{ended}; its log's last exception: {logged}" if logged else ended
        elif "root cause" in reported:
            reported = logged or reported
        return EngineFailure(rank=rank, phase=phase, reason=reported)

    def kill(self) -> None:
        """End the whole session; returns when nothing of it runs any more.

        Python's resource trackers may live on for `TRACKER_S`: they free the shared memory of the dead, then end.
        """
        start_s = time.monotonic()
        while (members := session_members(self.process.pid)) and time.monotonic() < start_s + KILL_S:
            spared = resource_trackers(members) if time.monotonic() < start_s + TRACKER_S else set()
            for pid in set(members) - spared:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(POLL_S / 4)
        with contextlib.suppress(subprocess.TimeoutExpired):  # only a process stuck in the driver outlives SIGKILL
            self.process.wait(KILL_S)
        self.connection.close()


class Engines:
    """All ranks of one mode. `close` repeats safely and leaves nothing running."""

    def __init__(self, *, mode: str, name: str, visible_devices: Sequence[str | None], logs: Path, timeout_s: float):
        """Start one process a rank. `visible_devices` is each rank's CUDA_VISIBLE_DEVICES, None without CUDA."""
        self.mode = mode
        self.ranks: list[RankProcess] = []
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("VLLM_DP_")}
        inherited.setdefault("VLLM_ENGINE_READY_TIMEOUT_S", str(int(timeout_s)))
        try:
            for rank, devices in enumerate(visible_devices):
                environment = inherited if devices is None else inherited | {"CUDA_VISIBLE_DEVICES": devices}
                self.ranks.append(RankProcess(log=logs / f"{name}-rank{rank}.log", environment=environment))
        except BaseException:
            self.close(orderly=False)
            raise

    def ask(self, commands: Sequence[Command], *, phase: str, timeout_s: float) -> list[Reply]:
        """Give every rank its command at once and return all replies in rank order.

        Raises EngineFailure as soon as one rank fails or ends, and when one has not answered after `timeout_s`.
        """
        for rank, command in zip(self.ranks, commands, strict=True):
            rank.send(command)
        deadline = time.monotonic() + timeout_s
        replies: dict[int, Reply] = {}
        while len(replies) < len(self.ranks):
            waiting = {rank.connection: index for index, rank in enumerate(self.ranks) if index not in replies}
            for connection in wait(list(waiting), POLL_S):
                index = waiting[connection]
                reply = self.ranks[index].receive()
                if reply is None or isinstance(reply, Failed):
                    raise self.ranks[index].failure(phase, index, reply.reason if reply else None)
                replies[index] = reply
            for index in waiting.values():
                rank = self.ranks[index]
                if index not in replies and rank.process.poll() is not None and not rank.connection.poll():
                    raise rank.failure(phase, index, None)
            if len(replies) < len(self.ranks) and time.monotonic() > deadline:
                index = next(i for i in range(len(self.ranks)) if i not in replies)
                reason = f"{self.mode} rank {index} has not finished to {phase} after {timeout_s:g} s (--timeout)"
                raise EngineFailure(rank=index, phase=phase, reason=reason)
        return [replies[index] for index in range(len(self.ranks))]

    def close(self, *, orderly: bool) -> None:
        """Ask the engines to shut down, if `orderly`, then end whatever is left."""
        if orderly:
            for rank in self.ranks:
                rank.send(Quit())
            deadline = time.monotonic() + QUIT_S
            while time.monotonic() < deadline and any(rank.process.poll() is None for rank in self.ranks):
                time.sleep(POLL_S)
        for rank in self.ranks:
            rank.kill()
        self.ranks = []


def session_members(session: int) -> list[int]:
    """Process ids of a session, without zombies, which hold nothing any more."""
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _parent, _group, owner = stat.read_text().rpartition(")")[2].split()[:4]
            if int(owner) == session and state != "Z":
                members.append(int(stat.parent.name))
    return members


def resource_trackers(pids: Sequence[int]) -> set[int]:
    """Those of `pids` that track what multiprocessing shares."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            if b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.add(pid)
    return found


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


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
