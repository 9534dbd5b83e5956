"""Invariant: every wait of the rendezvous ends - in agreement, or within its timeout naming rank and reason."""

import contextlib
import itertools
import math
import os
import resource
import socket
import time
import types
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from vllm_dwdp import descriptors, rendezvous
from vllm_dwdp.channel import Channel, Listener, name, parse
from vllm_dwdp.config import Options
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.handover import PeerClient, PeerServer
from vllm_dwdp.kernels.host import HostDevice
from vllm_dwdp.manifests import Hello
from vllm_dwdp.rendezvous import Group, PeerStopped, agree, agree_where_common

from harness import await_that, free_port

HELLO = Hello(
    rank=0, size=3, plugin="1", vllm="2", model={"layers": 3}, options={"slots": 2, "deep": {"a": [1, 2]}}, device="cpu",
    host="here", boot="here", network=1, user=0, device_name="gpu0", handles="fd",
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
        Group.connect(rank=rank, size=size, address=("127.0.0.1", port), secret=b"s", timeout_s=timeout_s)
        for rank in range(size)
    ]
    with ThreadPoolExecutor(size) as pool:
        answers = list(pool.map(run, groups))
    for group in groups:
        group.close()
    return answers


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
        ({"model": {"layers": 4}}, "model is layers: 3 and 4"),
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
            group.gather("pages", 1) if group.rank == 1 else time.sleep(2)
        finally:
            took.append(time.monotonic() - start)

    said = together(work, timeout_s=1.0)[1]
    assert "rank 1 waits for ranks 0, 2 to say 'pages': nothing within startup_timeout_s=1 s" in said
    assert "--dwdp-startup-timeout-s" in said and 1 <= min(took) < 1.9


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
    at = {"size": 2, "address": ("127.0.0.1", free_port()), "secret": b"s", "timeout_s": 60.0}
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


@pytest.mark.parametrize(("timeout_s", "until_s"), [(1.0, math.inf), (60.0, 1.0)], ids=["timeout", "vLLM gives up"])
@pytest.mark.parametrize("address", [("127.0.0.1", 1), "\0vllm-dwdp-nobody"], ids=["TCP", "Unix"])
def test_nobody_there(address, timeout_s: float, until_s: float) -> None:
    """A rank that finds no store says where it looked, how long, and who should have opened it."""
    until_s += time.monotonic()
    with pytest.raises(DWDPError, match=f"no rendezvous at {name(address)} within 1 s: rank 0 opens it"):
        Group.connect(rank=1, size=2, address=address, secret=b"s", timeout_s=timeout_s, until_s=until_s)


@pytest.fixture
def engine_of_2_s(monkeypatch):
    """`joining`, where this process was started 2 s ago."""
    from vllm_dwdp.integration import joining

    started = time.time() - 2
    monkeypatch.setattr(joining.psutil.Process, "create_time", lambda _: started)
    return joining


@pytest.mark.parametrize(("servers", "timeout_s", "ends_in_s"), [(1, 4, math.inf), (2, 4, 1), (2, 600, 588)])
def test_when_vllm_gives_up(monkeypatch, engine_of_2_s, servers: int, timeout_s: int, ends_in_s: float) -> None:
    """Several API servers do, less a margin, so long after the engine's start; a single one waits on."""
    monkeypatch.setattr(engine_of_2_s.envs, "VLLM_ENGINE_READY_TIMEOUT_S", timeout_s, raising=False)
    found = engine_of_2_s.vllm_gives_up_at(SimpleNamespace(_api_process_count=servers))
    assert found == pytest.approx(time.monotonic() + ends_in_s, abs=0.8)


def test_a_wait_for_a_peer_ends_before_vllm_gives_up(monkeypatch, engine_of_2_s) -> None:
    """vLLM would name nobody."""
    monkeypatch.setattr(engine_of_2_s.envs, "VLLM_ENGINE_READY_TIMEOUT_S", 4, raising=False)
    began, config = time.monotonic(), SimpleNamespace(parallel_config=SimpleNamespace(_api_process_count=2))
    group = engine_of_2_s.connect(config, Options(rendezvous=f"127.0.0.1:{free_port()}"), 0, 2)
    said = "rank 0 waits for rank 1 to say 'hello': nothing within 1 s, when vLLM gives up too; .* or raise VLLM_ENGINE_READY_TIMEOUT_S"
    with pytest.raises(DWDPError, match=said):
        group.gather("hello", 0)
    assert time.monotonic() - began < 4 - 2
    group.close()


class Peer:
    """All that handing over asks of a group."""

    rank, size, timeout_s = 1, 2, 1.0

    def raise_reported(self) -> None:
        pass


def test_handles() -> None:
    """Any number of descriptors arrives in order, and neither side keeps one open."""
    def export(layer: int) -> list[int]:
        return [os.memfd_create(f"{layer}-{n}") for n in range(300)]

    server = PeerServer(Peer(), handles=export)
    client = PeerClient(Peer(), 1, server.address, server.key)
    with client.fetch(1, 300):
        pass
    before = len(os.listdir("/proc/self/fd"))
    for layer in (0, 7):
        with client.fetch(layer, 300) as fds:
            names = [os.readlink(f"/proc/self/fd/{fd}") for fd in fds]
        assert names == [f"/memfd:{layer}-{n} (deleted)" for n in range(300)]
    client.close()
    server.close()
    await_that(lambda: len(os.listdir("/proc/self/fd")) <= before, "the serving thread to close its descriptors", 5)


def test_a_receiver_that_may_open_no_more_says_so() -> None:
    """At once: the kernel drops the descriptors that it has no room for, and the peer has sent all."""
    address, limits = f"\0test-{os.getpid()}-few", resource.getrlimit(resource.RLIMIT_NOFILE)

    def hand_over(channel: Channel) -> None:
        channel.recv()
        channel.send(b"+")
        socket.send_fds(channel.socket, [b"+"], [sent.fileno()] * 20)
        channel.recv()

    listener = Listener(address, b"key", hand_over)
    client = PeerClient(Peer(), 1, address, b"key")
    with open(os.devnull) as sent:
        opened = set(map(int, os.listdir("/proc/self/fd")))
        few = next(limit for limit in itertools.count(10) if limit - sum(fd < limit for fd in opened) == 10)
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (few, limits[1]))
            said = f"{few} open files are too few .* raise ulimit -n"
            with pytest.raises(DWDPError, match=said), descriptors.named(), client.fetch(3, 20):
                pass
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        client.close()
    listener.close()


@pytest.mark.parametrize("kind", ["handles", "contents"])
def test_why_a_peer_cannot_hand_over(kind: str) -> None:
    """An error in the thread that serves is the peer's own reason, in one line."""
    def fail(layer: int) -> None:
        raise OSError("too many\n open files")

    server = PeerServer(Peer(), **{kind: fail})
    client = PeerClient(Peer(), 1, server.address, server.key)
    with pytest.raises(PeerStopped, match=r"^rank 1 stopped: too many open files$"):
        if kind == "contents":
            client.read(3)
        with client.fetch(3, 2):
            pass
    client.close()
    server.close()


@pytest.mark.parametrize(
    ("answers", "named"),
    [(True, "rank 1 ended while it handed over layer 3"), (False, "rank 1 did not hand over layer 3 within 1 s")],
)
def test_lost_handles(answers: bool, named: str) -> None:
    """A peer that closes early or says nothing is named with the layer, and what had arrived is closed."""
    address = f"\0test-{os.getpid()}-{answers}"

    def hand_over_one(channel: Channel) -> None:
        channel.recv()
        channel.send(b"+")
        sent = os.memfd_create("lost")
        socket.send_fds(channel.socket, [b"+"], [sent])
        os.close(sent)
        if not answers:
            time.sleep(2)

    listener = Listener(address, b"key", hand_over_one)
    client = PeerClient(Peer(), 1, address, b"key")
    with pytest.raises(DWDPError, match=named), client.fetch(3, 2):
        pass
    opened = [path for fd in range(3, 256) if os.path.exists(path := f"/proc/self/fd/{fd}")]
    assert not [path for path in opened if "memfd:lost" in os.readlink(path)]
    client.close()
    listener.close()


def test_a_peer_gone_in_the_middle_is_named_by_its_reason() -> None:
    """Not by the connection that it took along."""
    def work(group: Group) -> None:
        if group.rank == 0:
            raise DWDPError("the disk is full")
        time.sleep(0.5)
        PeerClient(group, 0, "\0vllm-dwdp-nobody", b"")

    assert together(work, size=2) == ["the disk is full", "rank 0 stopped: the disk is full"]


def test_a_peer_that_ends_without_a_word_is_heard_at_once() -> None:
    """Its connection tells: nobody waits out startup_timeout_s."""
    at = {"size": 2, "address": ("127.0.0.1", free_port()), "secret": b"s", "timeout_s": 60.0}
    host, peer = Group.connect(rank=0, **at), Group.connect(rank=1, **at)
    peer.close()
    start = time.monotonic()
    with pytest.raises(PeerStopped, match=r"^rank 1 ended without a word: see its log$"):
        host.gather("pages", 1)
    assert time.monotonic() - start < 5
    host.close()


@pytest.mark.parametrize("address", ["TCP", "Unix"])
def test_a_rank_that_comes_again(address: str) -> None:
    """While the group starts and while it runs, at once, with what to do; the group is not disturbed."""
    where = ("127.0.0.1", free_port()) if address == "TCP" else f"\0test-again-{os.getpid()}"
    at = {"size": 2, "address": where, "secret": b"s", "timeout_s": 60.0}
    groups = [Group.connect(rank=rank, **at) for rank in range(2)]

    def refused(rank: int, why: str) -> None:
        start = time.monotonic()
        with pytest.raises(DWDPError, match=f"{why}.* restart all ranks of the group"):
            Group.connect(rank=rank, **at)
        assert time.monotonic() - start < 5

    refused(1, "a rank 1 joined this DWDP group at")
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(lambda group: group.gather("first", group.rank), groups)) == [[0, 1]] * 2
        list(pool.map(Group.settle, groups))
    for rank in (0, 1):
        refused(rank, "the DWDP group runs since")
    for group in groups:
        group.close()


def test_peers_have_read_everything_when_the_store_closes() -> None:
    """Rank 0 ends right after it has settled; a peer that is slower to read gets all that it was told."""
    values = {"a": "x" * 2_000_000}

    def work(group: Group) -> list:
        if group.rank:
            time.sleep(0.5)
        answer = group.gather("big", values)
        group.settle()
        group.close()
        return answer

    assert together(work) == [[values] * 3] * 3


def test_a_rank_that_is_stopped_while_it_settles_still_hears(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 waits for it a while and serves on; what was said is dropped once it has read it."""
    monkeypatch.setattr(rendezvous, "_FAREWELL_S", 0.2)

    def work(group: Group) -> None:
        if group.rank == 1:
            has = group._client.has
            monkeypatch.setattr(group._client, "has", lambda key: (time.sleep(0.5), has(key))[1])
        group.settle()
        if (server := group._server) is not None:
            assert server._values, "rank 1 has not read it yet"
            await_that(lambda: not server._values, "rank 1 to have read it", 5)

    assert together(work, size=2, timeout_s=5) == [None] * 2


def test_what_is_common_must_be_alike() -> None:
    """Ranks speak of other experts; of those that two own, they must say the same."""
    def work(group: Group) -> None:
        agree_where_common(group, "weights", {"w[0]": "a"} if group.rank == 0 else {"w[1]": "b"})
        agree_where_common(group, "more", [{"w[0]": "a"}, {"w[1]": "b", "w[2]": "c"}, {"w[2]": "d"}][group.rank])

    for said in together(work):
        assert "ranks disagree in more: w[2] is 'c' and 'd' on rank 1 and rank 2; " in said


def test_who_shares_a_host() -> None:
    """Containers with names of their own do, if they share a network; two machines do not."""
    from vllm_dwdp.integration import joining

    device, other = HostDevice(), msgspec.structs.replace(HELLO, rank=1, host="container")
    joining.choose_handles(device, [HELLO, other])
    fabric, chosen = [msgspec.structs.replace(said, handles="fabric") for said in (HELLO, other)], []
    for changed in ({}, {"network": 2}, {"user": 1}, {"boot": "there"}):
        joining.choose_handles(types.SimpleNamespace(use_handles=chosen.append), [fabric[0], msgspec.structs.replace(fabric[1], **changed)])
    assert chosen == ["fd"], "on one host small steps dispatch, whatever its driver exports; ranks apart keep FABRIC handles"
    with pytest.raises(DWDPError, match="containers container, here of one host have a network each: "):
        joining.choose_handles(device, [HELLO, msgspec.structs.replace(other, network=2)])
    with pytest.raises(DWDPError, match="ranks on container, here run as several users: "):
        joining.choose_handles(device, [HELLO, msgspec.structs.replace(other, user=1)])
    with pytest.raises(DWDPError, match="ranks on container, here cannot share memory: "):
        joining.choose_handles(device, [HELLO, msgspec.structs.replace(other, boot="there")])


@pytest.mark.parametrize("host", ["localhost", "[::1]", "127.0.0.1"])
def test_a_name_or_an_address_of_any_family(host: str) -> None:
    """Rank 0 listens there and its peer finds it; what a rank says of the address is how it was written."""
    from vllm_dwdp import config

    written = f"{host}:{free_port()}"
    address = parse(config.parse({"dwdp": {"rendezvous": written}}).rendezvous)
    assert name(address) == written
    try:
        heard: list[bytes] = []
        listener = Listener(address, b"s", lambda channel: heard.append(channel.recv()))
    except OSError as error:  # of a machine without the family
        pytest.skip(str(error))
    channel = Channel.connect(address, b"s", 5)
    channel.send(b"here")
    await_that(lambda: heard == [b"here"], "the listener to hear")
    channel.close()
    listener.close()


def test_a_name_whose_first_family_is_absent(monkeypatch) -> None:
    """A name may stand for an address that this machine does not have, beside one that it has."""
    port = free_port()
    absent, found = (socket.AF_INET, ("192.0.2.1", port)), (socket.AF_INET, ("127.0.0.1", port))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [
        (family, socket.SOCK_STREAM, 0, "", address) for family, address in (absent, found)
    ])
    Listener(("both", port), b"s", lambda _: None).close()


def test_a_peer_whose_gpu_is_not_visible_is_named(monkeypatch) -> None:
    """Of this host only: another host's GPUs are reached by FABRIC handles."""
    from vllm_dwdp.integration import joining

    said = []
    monkeypatch.setattr(joining.logger, "warning", lambda text, *values: said.append(text % values))
    group = [
        msgspec.structs.replace(HELLO, rank=rank, boot=host, device_name=name)
        for rank, (host, name) in enumerate([("here", "gpu0"), ("here", "gpu1"), ("there", "gpu2"), ("here", "gpu3")])
    ]
    joining.warn_of_hidden_peers(SimpleNamespace(visible={"gpu0", "gpu1", "gpu3"}), group[0], group)
    assert not said
    joining.warn_of_hidden_peers(SimpleNamespace(visible={"gpu0"}), group[0], group)
    assert len(said) == 1 and "rank 0 does not see the GPU of rank 1, 3:" in said[0]
