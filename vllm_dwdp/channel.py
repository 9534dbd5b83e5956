"""Channels: stream sockets whose two ends prove to each other that they know a secret, and sign every frame.

An address is (host, port), or the name of an abstract Unix socket, which answers processes of the same user only.
"""

import contextlib
import errno
import hashlib
import hmac
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable

from vllm_dwdp.errors import DWDPError

Address = tuple[str, int] | str
# Environment variables, which children inherit: a group's secret, and that one process has started all of its ranks.
TOKEN, TOGETHER = "DWDP_GROUP_TOKEN", "DWDP_STARTED_TOGETHER"
_GREETING = b"vllm-dwdp "
_STARTS, _ENDS = b"+", b"-"  # what follows the greeting: a nonce, or why nobody is served
_NONCE_BYTES = _MAC_BYTES = 32
_HANDSHAKE_S = 5.0
_MAX_STRANGERS = 64  # connections that have not proved anything yet; the oldest is dropped first
_MAX_REASON_BYTES = 500


class Channel:
    """One end of a connection. `send` and `recv` carry frames of any size; frames that are not signed raise OSError."""

    def __init__(self, connection: socket.socket, key: bytes, *, serves: bool):
        self.socket, self._key = connection, key
        self._sent, self._received = (1, 0) if serves else (0, 1)  # counts by two: each direction has its own numbers

    @classmethod
    def accept(cls, connection: socket.socket, secret: bytes) -> "Channel":
        """The serving end. Raises OSError when the other end does not know the secret or is slow to show it."""
        connection.settimeout(_HANDSHAKE_S)
        mine = secrets.token_bytes(_NONCE_BYTES)
        connection.sendall(_GREETING + _STARTS + mine)
        theirs, proof = _read(connection, _NONCE_BYTES), _read(connection, _MAC_BYTES)
        knows = hmac.compare_digest(proof, _sign(secret, b"dials", mine, theirs))
        connection.sendall(_sign(secret, b"serves", mine, theirs) if knows else secrets.token_bytes(_MAC_BYTES))
        if not knows:
            raise ConnectionAbortedError("a stranger")
        return cls(connection, _sign(secret, b"frames", mine, theirs), serves=True)

    @classmethod
    def connect(cls, address: Address, secret: bytes, timeout_s: float) -> "Channel":
        """The dialling end; `timeout_s` bounds each send and receive after the handshake.

        Raises OSError when nobody answers, DWDPError when who answers serves nobody or does not know the secret.
        """
        if isinstance(address, str):
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            connection.settimeout(_HANDSHAKE_S)
        else:
            connection = socket.create_connection(address, timeout=_HANDSHAKE_S)
        try:
            if isinstance(address, str):
                connection.connect(address)
                if not _is_same_user(connection):
                    raise DWDPError(f"another user listens at {name(address)}: this rank tells it nothing")
            greeting = _read(connection, len(_GREETING) + 1)
            if greeting == _GREETING + _ENDS:
                raise DWDPError(connection.makefile("rb").read(_MAX_REASON_BYTES).decode())
            if greeting != _GREETING + _STARTS:
                raise DWDPError(f"what answers at {name(address)} is no DWDP group: choose another --dwdp-rendezvous")
            theirs, mine = _read(connection, _NONCE_BYTES), secrets.token_bytes(_NONCE_BYTES)
            connection.sendall(mine + _sign(secret, b"dials", theirs, mine))
            if not hmac.compare_digest(_read(connection, _MAC_BYTES), _sign(secret, b"serves", theirs, mine)):
                raise DWDPError(
                    f"the group at {name(address)} has another secret: give every rank the same DWDP_GROUP_TOKEN, or "
                    f"another --dwdp-rendezvous if that is another group"
                )
            connection.settimeout(timeout_s)
            return cls(connection, _sign(secret, b"frames", theirs, mine), serves=False)
        except BaseException:
            connection.close()
            raise

    def send(self, data: bytes) -> None:
        self.socket.sendall(struct.pack("<Q", len(data)) + self._signature(self._sent, data) + data)
        self._sent += 2

    def recv(self) -> bytes:
        (nbytes,) = struct.unpack("<Q", _read(self.socket, 8))
        signature, data = _read(self.socket, _MAC_BYTES), _read(self.socket, nbytes)
        if not hmac.compare_digest(signature, self._signature(self._received, data)):
            raise ConnectionAbortedError("a frame that the other end has not signed")
        self._received += 2
        return data

    def _signature(self, number: int, data: bytes) -> bytes:
        return hmac.digest(self._key, struct.pack("<Q", number) + data, hashlib.sha256)

    def close(self) -> None:
        self.socket.close()


class Listener:
    """Listens at `address` and gives every channel whose other end knows `secret` to `serve`, in a thread of its own.

    `serve` ends its channel by returning; an OSError of it is the other end's and is dropped. Raises OSError when the
    address cannot be had.
    """

    def __init__(self, address: Address, secret: bytes, serve: Callable[[Channel], None]):
        self._secret, self._serve = secret, serve
        self._farewell: bytes | None = None
        self._strangers: list[socket.socket] = []
        self._closed = False
        if isinstance(address, str):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self._socket.bind(address)
            self._socket.listen(_MAX_STRANGERS)
        else:
            self._socket = _listen(*address)
        threading.Thread(target=self._accept, name="dwdp-listener", daemon=True).start()

    def retire(self, reason: str) -> None:
        """From now on answer whoever connects with `reason`, one line, and read nothing."""
        self._farewell = _GREETING + _ENDS + reason.encode()[:_MAX_REASON_BYTES]

    def close(self) -> None:
        """Stop listening. Repeats safely."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._socket.accept()
            except OSError:  # closed, or no descriptor is free for a moment
                time.sleep(0.05)
                continue
            if not _is_same_user(connection):
                connection.close()
            elif self._farewell is not None:
                with connection, contextlib.suppress(OSError):
                    connection.settimeout(_HANDSHAKE_S)
                    connection.sendall(self._farewell)
            else:
                self._strangers.append(connection)
                if len(self._strangers) > _MAX_STRANGERS:
                    with contextlib.suppress(OSError):
                        self._strangers.pop(0).shutdown(socket.SHUT_RDWR)
                threading.Thread(target=self._meet, args=(connection,), name="dwdp-serve", daemon=True).start()

    def _meet(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            try:
                channel = Channel.accept(connection, self._secret)
            finally:
                with contextlib.suppress(ValueError):
                    self._strangers.remove(connection)
            connection.settimeout(None)
            self._serve(channel)


def _listen(host: str, port: int) -> socket.socket:
    """At the first address of `host` that this machine has: a name may stand for one of a family that it lacks."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for number, (family, *_, address) in enumerate(found, 1):
        try:
            return socket.create_server(address, family=family, backlog=_MAX_STRANGERS)
        except OSError as error:
            if number == len(found) or error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
    raise AssertionError("getaddrinfo returns an address or raises")


def private(secret: bytes, purpose: bytes) -> str:
    """The abstract Unix socket that those who know `secret` use for `purpose`."""
    return "\0vllm-dwdp-" + hmac.new(secret, purpose, hashlib.sha256).hexdigest()


def together() -> dict[str, str]:
    """The environment in which all ranks of a group meet without an address."""
    return {TOKEN: secrets.token_hex(32), TOGETHER: "1"}


def parse(text: str) -> Address:
    """HOST:PORT, where HOST is a name, an IPv4 address or an IPv6 address in brackets."""
    host, port = text.rsplit(":", 1)
    return host.strip("[]"), int(port)


def name(address: Address) -> str:
    if isinstance(address, str):
        return address.strip("\0")
    return "[{}]:{}".format(*address) if ":" in address[0] else "{}:{}".format(*address)


def _is_same_user(connection: socket.socket) -> bool:
    """Whether the other end is a process of this user, as the kernel tells of Unix sockets. Of TCP it cannot be told."""
    if connection.family != socket.AF_UNIX:
        return True
    _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return uid == os.geteuid()


def _read(connection: socket.socket, nbytes: int) -> bytes:
    data = bytearray()
    while len(data) < nbytes:
        more = connection.recv(min(nbytes - len(data), 2**20))
        if not more:
            raise ConnectionResetError("the other end has closed the connection")
        data += more
    return bytes(data)


def _sign(secret: bytes, role: bytes, server_nonce: bytes, client_nonce: bytes) -> bytes:
    return hmac.digest(secret, role + server_nonce + client_nonce, hashlib.sha256)
