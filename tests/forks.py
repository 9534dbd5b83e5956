"""Servers forked from a process that has imported vLLM, which takes a core 10 s, and that fork their engines likewise.

What `python -m vllm.entrypoints.cli.main serve` does otherwise, with processes of its own, is what test_serve.py's first server,
the demo and the bench's tests show.
"""

import atexit
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from multiprocessing import context, resource_tracker
from pathlib import Path

from prometheus_client import values

from vllm_dwdp.entrypoints import server

from conftest import ROOT
from harness import CONTEXT


class Fork:
    """What a session uses of `subprocess.Popen`."""

    def __init__(
        self, arguments: list[str], log: Path, environment: Mapping[str, str], folder: Path | None,
        first: Callable[[], object] | None = None,
    ):
        """`first` is called in the process before vLLM is."""
        self._process = CONTEXT.Process(target=_become, args=(arguments, log, dict(environment), folder, first))
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout_s: float | None = None) -> int:
        self._process.join(timeout_s)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("vllm", timeout_s or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


class ForkedSession(server.Session):
    """A session whose command is one of vLLM's."""

    first: Callable[[], object] | None = None

    def _start(self, command, environment, folder, pass_fds):
        assert command[: len(server.VLLM)] == list(server.VLLM)
        environment = os.environ if environment is None else environment
        return Fork(command[len(server.VLLM) :], self.log, environment, folder, self.first)


class ForkedServer(ForkedSession, server.Server):
    """`vllm serve`."""


def run(arguments: list[str], log: Path, timeout_s: float, first: Callable[[], object] | None = None) -> tuple[int, str]:
    """The status and the output of a command of vLLM's that ends by itself."""
    process = Fork(arguments, log, os.environ, ROOT, first)
    try:
        return process.wait(timeout_s), log.read_text()
    finally:
        server.kill_session(process.pid)


def _become(
    arguments: list[str], log: Path, environment: dict[str, str], folder: Path | None, first: Callable[[], object] | None
) -> None:
    os.setsid()
    with log.open("wb") as output, open(os.devnull) as nothing:
        for stream, file in enumerate((nothing, output, output)):
            os.dup2(file.fileno(), stream)
    if folder is not None:
        os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})  # else vLLM takes no "uni" executor on CPU
    context._concrete_contexts["spawn"] = context._concrete_contexts["fork"]  # on CPU vLLM spawns whatever it is told
    tracker = resource_tracker._resource_tracker
    tracker._fd = tracker._pid = None  # those of the tests: the session gets its own, which frees what its dead leave
    (metrics := log.with_suffix(".metrics")).mkdir()
    os.environ.setdefault("PROMETHEUS_MULTIPROC_DIR", str(metrics))
    values.ValueClass = values.get_value_class()  # chosen by this variable, where it is imported
    sys.argv = ["vllm", *arguments]
    if first is not None:
        first()
    from vllm.entrypoints.cli import main

    try:
        main.main()
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()
