"""Invariant: what a launcher starts ends with it, and says why it ended when it does so by itself; without an engine."""

import asyncio
import itertools
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
from vllm_dwdp.channel import private
from vllm_dwdp.entrypoints import server
from vllm_dwdp.entrypoints.server import free_port
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.integration import commands

from harness import await_that

FORK = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def unled(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (launcher.LAUNCHER, "DWDP_GROUP_TOKEN", "DWDP_STARTED_TOGETHER"):
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


def tell_when_told() -> None:
    def tell(*_: object) -> None:
        launcher.tell(DWDPError("rank 0 ended without a word"))
        os._exit(3)

    signal.signal(signal.SIGTERM, tell)
    time.sleep(60)


@pytest.mark.parametrize(
    ("words", "told"),
    [("Frontend process failed during engine core initialization. Failed frontend proc(s): {'ApiServer_0': None}", None),
     ("Engine core initialization failed. Failed core proc(s): {'EngineCore_DP1': 1}", "the worker of rank 1 has ended")],
)
def test_engines_that_go_on_have_not_the_last_line(monkeypatch: pytest.MonkeyPatch, capsys, words: str, told: str | None) -> None:
    """Engines that know nothing of the failure would say more until vLLM ends them: they are ended before the sentence."""
    monkeypatch.setattr(commands, "LAST_WORDS_S", 1.0)
    commands.lead()
    engine = FORK.Process(target=tell_when_told, name="EngineCore_DP0")
    engine.start()
    if told:
        fork(lambda: launcher.tell(DWDPError(told)))
    time.sleep(0.3)
    sys.excepthook(RuntimeError, RuntimeError(words), None)
    assert engine.exitcode == 3
    assert capsys.readouterr().err.splitlines()[-1] == f"vllm-dwdp: error: {told or f'RuntimeError: {words}'}"


@pytest.mark.parametrize(
    ("says", "last"),
    [("rank 1 ended without a word", "rank 1 ended without a word"), (None, "RuntimeError: Engine core 1 failed")],
)
def test_the_last_line_is_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys, says: str | None, last: str) -> None:
    """A child's, also where vLLM's own error is earlier, or vLLM's; an error of the person's own program has none."""
    monkeypatch.setattr(commands, "LAST_WORDS_S", 5.0 if says else 0.1)
    commands.lead()
    if says:
        fork(lambda: (time.sleep(0.3), launcher.tell(DWDPError(says))))
    sys.excepthook(RuntimeError, RuntimeError("Engine core 1\nfailed"), None)
    assert capsys.readouterr().err.splitlines()[-1] == f"vllm-dwdp: error: {last}"
    if not says:
        sys.excepthook(KeyError, KeyError("mine"), None)
        assert "vllm-dwdp" not in capsys.readouterr().err


def test_an_engine_has_the_last_line_where_an_api_server_ends_before_it(capsys) -> None:
    """An API server sees its engine fail and ends; the launcher hears of it while the engine still says why."""
    commands.lead()
    fork(lambda: (time.sleep(0.3), launcher.tell(DWDPError("the worker of rank 1 has ended"))))
    sys.excepthook(RuntimeError, RuntimeError("Process ApiServer_1 (PID: 5) died with exit code None"), None)
    assert capsys.readouterr().err.splitlines()[-1] == "vllm-dwdp: error: the worker of rank 1 has ended"


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


def test_a_free_port_stays_free() -> None:
    """Below those that the kernel hands out: between its choice and its use no connection takes it."""
    assert free_port() < int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])


def test_no_port_is_given_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that listens where the launcher of its other ranks does answers nobody."""
    numbers = (number // 2 for number in itertools.count())  # each twice
    monkeypatch.setattr(server, "_given", set())
    monkeypatch.setattr(server.secrets, "randbelow", lambda _: next(numbers))
    assert len({free_port() for _ in range(3)}) == 3


def test_servers_of_a_supervisor_meet_by_its_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes by their environment, so what vLLM hashes into the key of its compile cache is the same at every start."""
    from vllm_dwdp.integration import checks, joining

    async def run(self) -> None:
        pass

    apart = types.SimpleNamespace(
        data_parallel_size=2, data_parallel_size_local=1, data_parallel_rank_local=None, data_parallel_external_lb=True,
        data_parallel_hybrid_lb=False, _coord_store_port=0, _api_process_count=1,
    )
    assert checks._ranks_start_apart(apart)
    secrets, met = [], []
    monkeypatch.setattr(joining.Group, "connect", lambda **given: met.append((given["address"], given["secret"])))
    for _ in range(2):
        options = {"slots": 3}
        args = types.SimpleNamespace(
            additional_config={config.KEY: options}, data_parallel_size=2, data_parallel_size_local=2,
        )
        asyncio.run(commands._supervise(run, types.SimpleNamespace(args=args, _processes=[])))
        assert args.additional_config == {config.KEY: options} and options == {"slots": 3}
        secrets.append(os.environ[joining.TOKEN].encode())
        joining.give_token()  # as each server does
        assert not checks._ranks_start_apart(apart)
        joining.connect(types.SimpleNamespace(parallel_config=apart), config.Options(size=2), rank=1, size=2)
    assert secrets[0] != secrets[1] and met == [(private(secret, b"rendezvous"), secret) for secret in secrets]


@pytest.mark.parametrize(("rendezvous", "size_local"), [("HOST:1", 2), (None, 1)])
def test_servers_that_a_supervisor_does_not_bring_together(rendezvous: str | None, size_local: int) -> None:
    """Those with a meeting point of their user's, and those whose peers have another supervisor."""
    from vllm_dwdp.integration import joining

    async def run(self) -> None:
        pass

    args = types.SimpleNamespace(
        additional_config={config.KEY: {"rendezvous": rendezvous}}, data_parallel_size=2, data_parallel_size_local=size_local,
    )
    asyncio.run(commands._supervise(run, types.SimpleNamespace(args=args, _processes=[])))
    assert not joining.are_together() and not os.environ[joining.TOKEN]
