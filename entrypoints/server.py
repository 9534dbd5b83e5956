"""Sessions: a process and all that it starts, `vllm serve` among them, started, awaited within a bound, and ended."""

import contextlib
import http.client
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:  # from Python 3.11
    from typing import Self

VLLM = (sys.executable, "-m", "vllm.entrypoints.cli.main")
KILL_S = 10.0
TRACKER_S = 2.0
POLL_S = 0.1
LONGEST = 400  # characters of a log's line that are quoted
QUIT_S = 20.0  # an engine frees shared memory and sockets in good order within seconds


class SessionFailure(Exception):
    """A process ended, or did not do in time what was awaited; `str()` names it and its log."""


class Session:
    """A process in a session of its own, so that whatever it starts can be found and ended. A context manager."""

    def __init__(
        self, command: Sequence[str | Path], log: Path, *, environment: Mapping[str, str] | None = None,
        folder: Path | None = None, pass_fds: Sequence[int] = (),
    ):
        """Start `command` in `folder`. Its output goes to `log`."""
        self.log = log
        self.process = self._start([str(part) for part in command], environment, folder, pass_fds)

    def _start(
        self, command: list[str], environment: Mapping[str, str] | None, folder: Path | None, pass_fds: Sequence[int]
    ) -> "subprocess.Popen[bytes]":
        with self.log.open("wb") as output:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=folder,
                pass_fds=pass_fds, start_new_session=True,
            )

    def __enter__(self) -> "Self":
        return self

    def __exit__(self, *_: object) -> None:
        self.end(QUIT_S)

    def _last_line(self) -> str:
        lines = self.log.read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f", whose last line is: {last[:LONGEST]}" if last else ""

    def wait_until(
        self, done: Callable[[], bool], what: str, timeout_s: float, waiting: Callable[[float], None] = lambda _: None
    ) -> float:
        """Seconds until `done()`; meanwhile `waiting` is called with the seconds so far.

        Raises SessionFailure when the process ends first or `timeout_s` passes.
        """
        start_s = time.monotonic()
        while not done():
            elapsed_s = time.monotonic() - start_s
            if self.has_ended() and not done():
                raise SessionFailure(f"{what}: the process ended with status {self.process.returncode}, see {self.log}{self._last_line()}")
            if elapsed_s > timeout_s:
                raise SessionFailure(f"{what}: not done after {timeout_s:g} s, see {self.log}")
            waiting(elapsed_s)
            time.sleep(POLL_S)
        return time.monotonic() - start_s

    def has_ended(self) -> bool:
        return self.process.poll() is not None

    def members(self) -> list[psutil.Process]:
        return session_members(self.process.pid)

    def end(self, quit_s: float = 0.0) -> None:
        """Interrupt the process, give its session `quit_s` to end, then kill what is left. Repeats safely.

        A second Ctrl-C meanwhile cuts the wait short, not the killing.
        """
        try:
            if quit_s and self.process.poll() is None:
                self.process.send_signal(signal.SIGINT)
                deadline = time.monotonic() + quit_s
                while self.members() and time.monotonic() < deadline:
                    self.process.poll()
                    time.sleep(POLL_S)
        finally:
            kill_session(self.process.pid)
            with contextlib.suppress(subprocess.TimeoutExpired):  # only one stuck in the driver outlives SIGKILL
                self.process.wait(KILL_S)


class Server(Session):
    """`vllm serve` on a free port of the loopback interface."""

    def __init__(
        self, model: str | Path, arguments: Sequence[str], log: Path, *, environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ):
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.command = [*VLLM, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *arguments]
        super().__init__(self.command, log, environment=environment, folder=folder)

    def wait_until_ready(self, timeout_s: float, waiting: Callable[[float], None] = lambda _: None) -> float:
        """Seconds until all ranks serve. Raises SessionFailure as `wait_until` does."""
        return self.wait_until(self.is_healthy, "start", timeout_s, waiting)

    def is_healthy(self) -> bool:
        try:
            with self.get("health", timeout_s=5) as response:
                return response.status == 200
        except (OSError, http.client.HTTPException):
            return False

    def get(self, path: str, timeout_s: float = 30.0) -> http.client.HTTPResponse:
        return urllib.request.urlopen(f"{self.url}/{path}", timeout=timeout_s)

    def post(self, path: str, body: dict[str, Any], rank: int | str | None = None) -> http.client.HTTPResponse:
        """The response to a JSON body, from the rank named or from the one that vLLM's load balancer chooses."""
        headers = {"Content-Type": "application/json"} | ({} if rank is None else {"X-data-parallel-rank": str(rank)})
        request = urllib.request.Request(f"{self.url}/{path}", json.dumps(body).encode(), headers)
        return urllib.request.urlopen(request, timeout=120)

    def metrics(self) -> Iterator[tuple[str, dict[str, str], float]]:
        """Name, labels and value of every sample."""
        from prometheus_client.parser import text_string_to_metric_families

        with self.get("metrics") as response:
            text = response.read().decode()
        for family in text_string_to_metric_families(text):
            yield from ((sample.name, sample.labels, sample.value) for sample in family.samples)


def kill_session(session: int) -> None:
    """Kill all processes of a session but the caller; returns when none is left, or one is stuck in the driver.

    Python's resource trackers may live on for `TRACKER_S`: they free the shared memory of the dead, then end.
    """
    start_s = time.monotonic()
    while (members := session_members(session)) and time.monotonic() < start_s + KILL_S:
        for process in members:
            with contextlib.suppress(psutil.Error):
                tracks = "multiprocessing.resource_tracker" in " ".join(process.cmdline())
                if not tracks or time.monotonic() > start_s + TRACKER_S:
                    process.kill()
        time.sleep(0.02)


def session_members(session: int) -> list[psutil.Process]:
    """A session's processes but the caller, without zombies, which hold nothing any more."""
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            mine = os.getsid(process.pid) == session and process.pid != os.getpid()
            if mine and process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
    return members


_given: set[int] = set()


def free_port() -> int:
    """A TCP port of the loopback interface below those that the kernel hands out by itself; another one each time."""
    first = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    lowest, highest = (first // 2, first) if first > 2048 else (20_000, 30_000)  # some hosts' kernels hand out nearly all
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port := lowest + secrets.randbelow(highest - lowest)))
            if port not in _given:
                _given.add(port)
                return port
