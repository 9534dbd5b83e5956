"""Invariant: who is not a rank of the group gets nothing from it and cannot disturb it, starting or running.

The group here is all of DWDP but a model: rendezvous, handles and small tensors of shards in shared memory.
"""

import contextlib
import hashlib
import multiprocessing
import os
import random
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from vllm_dwdp.channel import _GREETING, Channel
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.handover import PeerClient, PeerServer
from vllm_dwdp.kernels.host import HostDevice
from vllm_dwdp.rendezvous import Group
from vllm_dwdp.store import STOPPED

from harness import free_port

NOBODY = 65534
NUM_MESSAGES = 10_000
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")


class Ranks:
    """Two ranks of this process that have met and serve their memory, over TCP or at a Unix socket."""

    def __init__(self, kind: str, secret: bytes = b"secret"):
        self.secret = secret
        self.address = ("127.0.0.1", free_port()) if kind == "TCP" else f"\0vllm-dwdp-test-{secrets.token_hex(8)}"
        self.groups = [
            Group.connect(rank=rank, size=2, address=self.address, secret=secret, timeout_s=30) for rank in range(2)
        ]
        self.device = HostDevice()
        self.block = self.device.allocate(self.device.page_bytes)
        self.server = PeerServer(self.groups[1], handles=lambda _: [self.device.export(self.block)])
        self.small = PeerServer(self.groups[1], contents=lambda _: b"rows")
        self._rounds = 0

    @property
    def addresses(self) -> list:
        return [self.address, self.server.address, self.small.address]

    def gather(self) -> list[list[int]]:
        self._rounds += 1
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda group: group.gather(f"round {self._rounds}", group.rank), self.groups))

    def check(self) -> None:
        """They start as if nobody else were there."""
        assert self.gather() == [[0, 1]] * 2
        client = PeerClient(self.groups[0], 1, self.server.address, self.server.key)
        with client.fetch(0, 1) as fds:
            assert os.fstat(fds[0]).st_size == self.block.nbytes
        client.close()
        client = PeerClient(self.groups[0], 1, self.small.address, self.small.key)
        assert client.read(0) == b"rows"
        client.close()

    def settle(self) -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(Group.settle, self.groups))

    def close(self) -> None:
        for thing in (self.server, self.small, *self.groups, self.block):
            thing.close()


@pytest.fixture(params=["TCP", "Unix"])
def ranks(request) -> Iterator[Ranks]:
    ranks = Ranks(request.param)
    yield ranks
    ranks.close()


def as_another_user(work: Callable[..., Any], *args: Any) -> Any:
    """What `work` returns in a forked child that has become nobody."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def run() -> None:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        sender.send(work(*args))

    child = multiprocessing.get_context("fork").Process(target=run)
    child.start()
    assert receiver.poll(60), "the stranger ended without an answer"
    answer = receiver.recv()
    child.join(10)
    return answer


def dial(address: Any) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
    connection.settimeout(10)
    connection.connect(address)
    return connection


def listen_to(addresses: list) -> list[tuple[bytes, int]]:
    """All bytes and the number of descriptors that a stranger gets who connects to each address and says nothing."""
    heard = []
    for address in addresses:
        data, count = b"", 0
        with dial(address) as connection, contextlib.suppress(ConnectionError):
            while True:
                more, fds, _, _ = socket.recv_fds(connection, 4096, 16)
                data, count = data + more, count + len(fds)
                if not more:
                    break
        heard.append((data, count))
    return heard


def try_with(addresses: list, keys: list[bytes]) -> list[str]:
    """What a stranger gets who knows the protocol, and even the keys."""
    outcomes = []
    for address, key in zip(addresses, keys, strict=True):
        try:
            channel = Channel.connect(address, key, 10)
            channel.send(msgspec.msgpack.encode(1))
            outcomes.append(f"served {channel.recv()!r}")
        except (OSError, DWDPError) as error:
            outcomes.append(type(error).__name__)
    return outcomes


def throw_at(addresses: list, seed: int) -> int:
    """Random bytes, whole or broken off, some of them begun as the protocol begins; returns how many messages."""
    rng = random.Random(seed)
    for number in range(NUM_MESSAGES):
        for address in addresses:
            begin = rng.choice([b"", _GREETING + b"+", struct.pack("<Q", rng.randrange(100)), rng.randbytes(64)])
            with contextlib.suppress(OSError), dial(address) as connection:
                connection.sendall(begin + rng.randbytes(rng.choice([0, 1, 8, 64, 300])))
                if number % 50 == 0:
                    connection.recv(100)
    return NUM_MESSAGES


@as_root
def test_another_user_gets_nothing(ranks: Ranks) -> None:
    """Of a starting group: at Unix sockets not a byte, even who knows the keys; over TCP a nonce."""
    heard = as_another_user(listen_to, ranks.addresses)
    assert heard[1:] == [(b"", 0)] * 2
    data, count = heard[0]
    assert count == 0 and (data == b"" if isinstance(ranks.address, str) else len(data) == len(_GREETING) + 33)
    keys = [ranks.secret if isinstance(ranks.address, str) else b"guessed", ranks.server.key, ranks.small.key]
    assert not [said for said in as_another_user(try_with, ranks.addresses, keys) if "served" in said]
    ranks.check()


@as_root
def test_another_user_gets_nothing_from_a_running_group(ranks: Ranks) -> None:
    """Over TCP the line for a rank that comes again, and that is all: no store is there any more."""
    ranks.settle()
    (data, count), = as_another_user(listen_to, ranks.addresses[:1])
    assert count == 0 and (data == b"" if isinstance(ranks.address, str) else b"the DWDP group runs since" in data)
    assert as_another_user(try_with, ranks.addresses[:1], [ranks.secret])[0] in ("DWDPError", "ConnectionResetError",
                                                                              "BrokenPipeError")


@pytest.mark.slow
def test_random_messages_change_nothing(ranks: Ranks) -> None:
    """10,000 to each socket and port of a starting group, by the same user, whom the kernel lets in everywhere."""
    before = threading.active_count()
    assert throw_at(ranks.addresses, seed=1) == NUM_MESSAGES
    ranks.check()
    deadline = time.monotonic() + 15  # a handshake that is broken off is given up
    while threading.active_count() > before + 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert threading.active_count() <= before + 4, "threads pile up"


def test_random_messages_at_a_running_group_change_nothing(ranks: Ranks) -> None:
    """Then it still says that it runs to who comes again."""
    ranks.settle()
    throw_at(ranks.addresses[:1], seed=2)
    with pytest.raises(DWDPError, match="the DWDP group runs since"):
        Group.connect(rank=1, size=2, address=ranks.address, secret=ranks.secret, timeout_s=10)


def test_a_crowd_that_says_nothing_does_not_keep_ranks_out() -> None:
    """Connections that prove nothing are dropped, the oldest first, while a rank connects."""
    address = ("127.0.0.1", free_port())
    host = Group.connect(rank=0, size=2, address=address, secret=b"s", timeout_s=30)
    before = threading.active_count()
    crowd = [dial(address) for _ in range(200)]
    deadline = time.monotonic() + 2
    while threading.active_count() > before + 66 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before + 66
    start = time.monotonic()
    peer = Group.connect(rank=1, size=2, address=address, secret=b"s", timeout_s=30)
    assert time.monotonic() - start < 4
    for thing in (*crowd, peer, host):
        thing.close()


@pytest.mark.parametrize("secret", [b"", b"another"])
def test_a_rank_without_the_secret_is_told(ranks: Ranks, secret: bytes) -> None:
    """At once and how to give it; the group goes on."""
    with pytest.raises(DWDPError, match="has another secret: give every rank the same DWDP_GROUP_TOKEN"):
        Group.connect(rank=1, size=2, address=ranks.address, secret=secret, timeout_s=10)
    ranks.check()


def test_a_port_of_something_else_is_told() -> None:
    """A web server, for instance."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        def answer() -> None:
            connection, _ = listener.accept()
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(DWDPError, match="is no DWDP group"):
            Group.connect(rank=1, size=2, address=listener.getsockname(), secret=b"s", timeout_s=10)


def test_a_changed_frame_is_not_obeyed() -> None:
    """Whoever sits on the connection cannot say that a rank has stopped: the frame is dropped with its connection."""
    ranks = Ranks("TCP")
    channel = Channel.connect(ranks.address, ranks.secret, 5)
    channel.send(msgspec.msgpack.encode(7))
    assert channel.recv() == b""
    request = msgspec.msgpack.encode(("set", STOPPED.format(1), b"lies"))
    channel.socket.sendall(struct.pack("<Q", len(request)) + hashlib.sha256(request).digest() + request)
    with pytest.raises(OSError):
        channel.recv()
    ranks.check()
    ranks.close()


def test_a_repeated_frame_is_not_obeyed() -> None:
    """A recorded frame sent twice is signed for another place in the row."""
    ranks = Ranks("TCP")
    channel = Channel.connect(ranks.address, ranks.secret, 5)
    sent = []
    plain = channel.socket
    channel.socket = SimpleNamespace(sendall=lambda data: (sent.append(data), plain.sendall(data)), recv=plain.recv)
    channel.send(msgspec.msgpack.encode(7))
    assert channel.recv() == b""
    channel.send(msgspec.msgpack.encode(("set", "key", b"value")))
    assert channel.recv() == b"True"
    plain.sendall(sent[-1])
    with pytest.raises(OSError):
        channel.recv()
    ranks.close()


def test_who_proves_nothing_is_hung_up_on(ranks: Ranks) -> None:
    """A wrong proof ends the connection: no thread waits for what a stranger says next."""
    for address in ranks.addresses:
        with dial(address) as connection:
            connection.settimeout(3)
            connection.sendall(secrets.token_bytes(64))
            said = b""
            while more := connection.recv(4096):
                said += more
            assert len(said) == len(_GREETING) + 1 + 32 + 32


def test_the_store_listens_at_its_address_only() -> None:
    """Not at every interface of the host."""
    ranks = Ranks("TCP")
    port = f":{ranks.address[1]:04X}"
    rows = [row.split() for name in ("tcp", "tcp6") for row in Path(f"/proc/net/{name}").read_text().splitlines()[1:]]
    listening = [row[1] for row in rows if row[1].endswith(port) and row[3] == "0A"]
    assert listening == [f"0100007F{port}"]
    ranks.close()


def test_handed_memory_cannot_be_written() -> None:
    """The descriptor maps for reading, not for writing, and does not open again for writing to another user."""
    import mmap

    device = HostDevice()
    block = device.allocate(device.page_bytes)
    fd = device.export(block)
    mmap.mmap(fd, block.nbytes, prot=mmap.PROT_READ).close()
    with pytest.raises(PermissionError):
        mmap.mmap(fd, block.nbytes)
    with pytest.raises(OSError):
        os.write(fd, b"x")
    if os.geteuid() == 0:
        assert as_another_user(_opens_for_writing, fd) == "PermissionError"
    os.close(fd)
    block.close()


def _opens_for_writing(fd: int) -> str:
    try:
        os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDWR))
        return "opened"
    except OSError as error:
        return type(error).__name__
