"""Processes forked from one that has imported vLLM, which takes a core 10 s; what they start is forked in turn.

What vLLM's commands do with processes of their own is what test_serve.py's first server, the demo and the bench's tests show.
"""

import atexit
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import context, resource_tracker
from pathlib import Path
from typing import Any

import setproctitle
from prometheus_client import values

from vllm_dwdp.entrypoints import server

from conftest import ROOT
from harness import CONTEXT, keep_imports


class Fork:
    """A process that calls a function in a session of its own: what a session uses of `subprocess.Popen`."""

    def __init__(
        self, target: Callable[..., object], arguments: Sequence[Any], log: Path, environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ):
        environment = dict(os.environ if environment is None else environment)
        self._process = CONTEXT.Process(target=_become, args=(log, environment, folder, target, *arguments))
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

    def _start(self, command, environment, folder, pass_fds):
        assert command[: len(server.VLLM)] == list(server.VLLM)
        return Fork(vllm, (command[len(server.VLLM) :],), self.log, environment, folder)


class ForkedServer(ForkedSession, server.Server):
    """`vllm serve`."""


def run(
    target: Callable[..., object], *arguments: Any, log: Path, timeout_s: float, environment: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """The status and the output of a process that ends by itself."""
    process = Fork(target, arguments, log, environment, ROOT)
    try:
        return process.wait(timeout_s), log.read_text()
    finally:
        server.kill_session(process.pid)


def vllm(arguments: Sequence[str], first: Callable[[], object] | None = None) -> None:
    """A command of vLLM's, in this process; `first` is called before it."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # else vLLM takes no "uni" executor on CPU
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        (folder := Path("/proc/self/fd/1").resolve().with_suffix(".metrics")).mkdir()
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
        values.ValueClass = values.get_value_class()
    sys.argv = ["vllm", *arguments]
    if first is not None:
        first()
    from vllm.entrypoints.cli import main

    main.main()


def script(code: str, *arguments: str) -> None:
    """What `python -c` does, in this process."""
    sys.argv = ["-c", *arguments]
    exec(code, {"__name__": "__main__"})


def _forget_signals() -> None:
    """What its parent does upon a signal is nothing to a child, as if it had been spawned."""
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _become(
    log: Path, environment: dict[str, str], folder: Path | None, target: Callable[..., object], *arguments: Any
) -> None:
    keep_imports()
    os.setsid()
    setproctitle.getproctitle()  # looks once where titles have room: before the environment goes, which is beside it
    with log.open("wb") as output, open(os.devnull) as nothing:
        for stream, file in enumerate((nothing, output, output)):
            os.dup2(file.fileno(), stream)
    if folder is not None:
        os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    values.ValueClass = values.get_value_class()  # chosen by the environment, where it is imported
    context._concrete_contexts["spawn"] = context._concrete_contexts["fork"]  # on CPU vLLM spawns whatever it is told
    tracker = resource_tracker._resource_tracker
    tracker._fd = tracker._pid = None  # those of the tests
    tracker.ensure_running()  # the session's own, which all of it inherits, frees what its dead leave
    os.register_at_fork(after_in_child=_forget_signals)
    try:
        target(*arguments)
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()
