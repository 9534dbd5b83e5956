"""Invariant: every wait of the rendezvous ends - in agreement, or within its timeout naming rank and reason."""

import contextlib
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from harness import free_port

from vllm_dwdp.errors import DWDPError
from vllm_dwdp.exchange import HandleClient, HandleServer
from vllm_dwdp.rendezvous import Group, Hello, agree

HELLO = Hello(
    rank=0, size=3, plugin="1", vllm="2", model="m", options={"slots": 2, "deep": {"a": [1, 2]}}, device="cpu",
    host="here", device_name="gpu0", handles="fd",
)


def together(work: Callable[[Group], Any], size: int = 3, timeout_s: float = 20.0) -> list[Any]:
    """`work(group)` in a thread per rank, over one store; what each returned, or the error it raised."""
    port = free_port()

    def run(group: Group) -> Any:
        try:
            with group.reporting():
                return work(group)
        except DWDPError as error:
            return str(error)

    groups = [  # one after the other, rank 0 first: connecting holds the interpreter
        Group.connect(rank=rank, size=size, host="127.0.0.1", port=port, hosted=False, timeout_s=timeout_s)
        for rank in range(size)
    ]
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, groups))


def test_gather() -> None:
    """Every rank gets everyone's word in rank order, in as many rounds as there are names."""
    def work(group: Group) -> list:
        return [group.gather("first", group.rank * 10), group.gather("second", [group.rank])]

    assert together(work) == [[[0, 10, 20], [[0], [1], [2]]]] * 3


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"plugin": "9"}, "plugin is '1' and '9'"),
        ({"vllm": "9"}, "vllm is '2' and '9'"),
        ({"model": "x"}, "model is 'm' and 'x'"),
        ({"size": 4}, "size is 3 and 4"),
        ({"device": "cuda"}, "device is 'cpu' and 'cuda'"),
        ({"options": {"slots": 3, "deep": {"a": [1, 2]}}}, "options is slots: 2 and 3"),
        ({"options": {"slots": 2, "deep": {"a": [1, 5]}}}, "options is deep: a: 2 and 5"),
        ({"options": {"deep": {"a": [1, 2]}}}, "options is slots: 2 and None"),
    ],
    ids=str,
)
def test_disagreement(change: dict, named: str) -> None:
    """All ranks raise the same line, which names the field, both values and the rank that differs."""
    def work(group: Group) -> list:
        mine = msgspec.structs.replace(HELLO, rank=group.rank, **(change if group.rank == 2 else {}))
        return agree(group, "hello", mine, own=Hello.OWN)

    for said in together(work):
        assert f"ranks disagree in hello: {named} on rank 0 and rank 2; " in said


def test_own_fields_may_differ() -> None:
    """Rank, host and kind of handles are a rank's own business, and come back from every rank."""
    def work(group: Group) -> list:
        mine = msgspec.structs.replace(HELLO, rank=group.rank, host=f"h{group.rank}", handles=f"k{group.rank}")
        return [(said.rank, said.host, said.handles) for said in agree(group, "hello", mine, own=Hello.OWN)]

    assert together(work) == [[(r, f"h{r}", f"k{r}") for r in range(3)]] * 3


def test_silence() -> None:
    """Who waits names every rank that was silent, and the setting to raise, when the timeout has passed."""
    took = []

    def work(group: Group) -> None:
        start = time.monotonic()
        try:
            group.gather("pages", 1) if group.rank == 1 else time.sleep(3)
        finally:
            took.append(time.monotonic() - start)

    said = together(work, timeout_s=1.0)[1]
    assert "rank 1 waits for ranks 0, 2 to say 'pages': nothing within startup_timeout_s=1 s" in said
    assert "--dwdp-startup-timeout-s" in said and 1 <= min(took) < 2.5


def test_reported_failure() -> None:
    """A rank that raises ends its peers' waits with its reason, in one line, long before the timeout."""
    def work(group: Group) -> list[int]:
        if group.rank == 1:
            raise DWDPError("the disk\n  is full")
        return group.gather("pages", 1)

    start = time.monotonic()
    answers = together(work, timeout_s=300.0)
    assert answers.pop(1) == "the disk\n  is full"
    assert answers == ["rank 1 stopped: the disk is full"] * 2
    assert time.monotonic() - start < 20


def test_the_host_stays_until_its_peers_have_heard() -> None:
    """Rank 0 takes the store along when it ends: it waits for a peer that is busy, and no longer."""
    at = {"size": 2, "host": "127.0.0.1", "port": free_port(), "hosted": False, "timeout_s": 60.0}
    host, peer = Group.connect(rank=0, **at), Group.connect(rank=1, **at)
    heard = []

    def load_and_gather() -> None:
        with contextlib.suppress(DWDPError), peer.reporting():
            time.sleep(1)
            try:
                peer.gather("pages", 1)
            except DWDPError as error:
                heard.append(str(error))
                raise

    def stop(reason: str) -> None:
        with pytest.raises(DWDPError, match=reason), host.reporting():
            raise DWDPError(reason)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(load_and_gather)
        stop("the disk is full")
        assert heard == ["rank 0 stopped: the disk is full"]
    start = time.monotonic()
    stop("and broken")
    assert time.monotonic() - start < 2, "the peer has said that it stopped"


@pytest.mark.parametrize(("hosted", "opener"), [(False, "rank 0"), (True, "vLLM's launcher")])
def test_nobody_there(hosted: bool, opener: str) -> None:
    """A rank that finds no store says where it looked, how long, and who should have opened it."""
    port = free_port()
    with pytest.raises(DWDPError, match=f"no rendezvous at 127.0.0.1:{port} within 1 s: {opener} opens it"):
        Group.connect(rank=1, size=2, host="127.0.0.1", port=port, hosted=hosted, timeout_s=1.0)


class Peer:
    """All that the handle exchange asks of a group."""

    size, timeout_s = 2, 1.0


def test_handles() -> None:
    """Any number of descriptors arrives in order, and neither side keeps one open."""
    def export(layer: int) -> list[int]:
        return [os.memfd_create(f"{layer}-{n}") for n in range(300)]

    server = HandleServer(Peer(), export)
    client = HandleClient(Peer(), 1, server.address)
    before = len(os.listdir("/proc/self/fd"))
    for layer in (0, 7):
        with client.fetch(layer, 300) as fds:
            names = [os.readlink(f"/proc/self/fd/{fd}") for fd in fds]
        assert names == [f"/memfd:{layer}-{n} (deleted)" for n in range(300)]
    client.close()
    server.close()
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize(
    ("answers", "named"),
    [(True, "rank 1 ended while it handed over layer 3's memory"), (False, "rank 1 did not hand over layer 3")],
)
def test_lost_handles(answers: bool, named: str) -> None:
    """A peer that closes early or says nothing is named with the layer, and what had arrived is closed."""
    address = f"\0test-{os.getpid()}-{answers}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(address)
        listener.listen()
        client = HandleClient(Peer(), 1, address)
        connection, _ = listener.accept()
        before = len(os.listdir("/proc/self/fd"))
        with open(os.devnull) as sent:
            socket.send_fds(connection, [b"+"], [sent.fileno()])
        if answers:
            connection.shutdown(socket.SHUT_WR)
        with pytest.raises(DWDPError, match=named), client.fetch(3, 2):
            pass
        assert len(os.listdir("/proc/self/fd")) == before
        connection.close()
        client.close()


def test_a_peer_whose_gpu_is_not_visible_is_named(monkeypatch) -> None:
    """Of this host only: another host's GPUs are reached by FABRIC handles."""
    from vllm_dwdp.integration import worker

    said = []
    monkeypatch.setattr(worker.logger, "warning", lambda text, *values: said.append(text % values))
    group = [
        msgspec.structs.replace(HELLO, rank=rank, host=host, device_name=name)
        for rank, (host, name) in enumerate([("here", "gpu0"), ("here", "gpu1"), ("there", "gpu2"), ("here", "gpu3")])
    ]
    worker.warn_of_hidden_peers(SimpleNamespace(visible={"gpu0", "gpu1", "gpu3"}), group[0], group)
    assert not said
    worker.warn_of_hidden_peers(SimpleNamespace(visible={"gpu0"}), group[0], group)
    assert len(said) == 1 and "rank 0 does not see the GPU of rank 1, 3:" in said[0]
