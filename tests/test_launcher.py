"""Invariant: what a launcher starts ends with it, and says why it ended when it does so by itself; without an engine."""

import asyncio
import multiprocessing
import os
import signal
import sys
import time
import types
from pathlib import Path

import psutil
import pytest

from vllm_dwdp import config, launcher
from vllm_dwdp.errors import DWDPError

from harness import await_that

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def unled(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (launcher.LAUNCHER, "DWDP_GROUP_TOKEN"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)


def fork(target, *args) -> multiprocessing.Process:
    process = FORK.Process(target=target, args=args)
    process.start()
    return process


def ended(process: multiprocessing.Process) -> int | None:
    process.join(20)
    return process.exitcode


def tell_both(depth: int) -> None:
    assert launcher.is_child() == (depth == 1)
    launcher.tell(DWDPError(f"from\n  depth {depth}"))
    launcher.tell(OSError(28, "No space " + "left " * 1000))
    if depth == 1:
        assert ended(fork(tell_both, 2)) == 0


def test_reasons_reach_the_launcher() -> None:
    """From its child and from a child's child, in order, each as one line; what the launcher itself tells is not heard."""
    assert launcher.launcher() is None and not launcher.is_child()
    launcher.tell(DWDPError("nobody listens"))
    reasons = launcher.Reasons()
    assert launcher.launcher() == os.getpid()
    launcher.tell(DWDPError("its own"))
    assert ended(fork(tell_both, 1)) == 0
    assert [said for said in reasons.heard if said.startswith("from")] == ["from depth 1", "from depth 2"]
    others = [said for said in reasons.heard if not said.startswith("from")]
    assert len(others) == 2 and all(said.startswith("OSError: [Errno 28] No space") and len(said) <= 1000 for said in others)


def test_a_stranger_is_not_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it wait: who has another secret finds nobody."""
    reasons = launcher.Reasons()
    monkeypatch.setenv(launcher.LAUNCHER, f"1-{'0' * 64}")
    launcher.tell(DWDPError("of another launcher"))
    assert reasons.heard == []


def follow(at: Path, stubborn: bool) -> None:
    if stubborn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    launcher._QUIT_S = 0.5
    launcher.follow_parent()
    launcher.follow_parent()
    at.write_text(str(os.getpid()))
    time.sleep(60)


def lead(at: Path) -> None:
    for stubborn in (False, True):
        fork(follow, at / str(stubborn), stubborn)
    time.sleep(60)


def test_children_end_with_a_killed_parent(tmp_path: Path) -> None:
    """Also one that does not heed SIGTERM."""
    parent = fork(lead, tmp_path)
    await_that(lambda: sum(bool(path.read_text()) for path in tmp_path.iterdir()) == 2, "both children", 20)
    children = [psutil.Process(int(path.read_text())) for path in tmp_path.iterdir()]
    os.kill(parent.pid, signal.SIGKILL)
    assert ended(parent) == -signal.SIGKILL
    await_that(lambda: not any(child.is_running() and child.status() != "zombie" for child in children), "their end", 5)


def test_a_person_s_process_follows_nobody() -> None:
    """Only what multiprocessing has started has a parent to follow."""
    before = os.listdir("/proc/self/task")
    launcher.follow_parent()
    assert os.listdir("/proc/self/task") == before


def test_servers_of_a_supervisor_meet_at_a_port_that_stays_free() -> None:
    """Below those that the kernel hands out: between its choice and rank 0's listening no connection takes it."""
    from vllm_dwdp.integration import commands

    lowest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    args = types.SimpleNamespace(
        additional_config={config.KEY: {}}, data_parallel_size=2, data_parallel_size_local=2,
    )

    async def supervise(self) -> None:
        pass

    asyncio.run(commands._supervise(supervise)(types.SimpleNamespace(args=args, _processes=[])))
    host, port = args.additional_config[config.KEY]["rendezvous"].split(":")
    assert host == "127.0.0.1" and int(port) < lowest
