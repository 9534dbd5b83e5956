"""Store: what ranks say to each other while a group starts, kept by rank 0. Later it only says that the group runs."""

import threading
import time
from typing import Any

import msgspec

from vllm_dwdp.channel import Address, Channel, Listener
from vllm_dwdp.errors import DWDPError

STOPPED = "stopped/{}"  # the key under which a rank says why it stopped
_POLL_S = 0.05


class StoreServer:
    """Rank 0's half. A rank joins once; one that goes without taking leave is taken for stopped."""

    def __init__(self, address: Address, secret: bytes):
        self._values: dict[str, bytes] = {}
        self._joined: dict[int, str] = {}  # rank: since when
        self._connected: set[int] = set()
        self._is_retired = False
        self._lock = threading.Lock()
        self._listener = Listener(address, secret, self._serve)

    def retire(self, timeout_s: float) -> None:
        """Wait until every rank has taken leave, then answer nothing but that the group runs.

        A rank that is late, as it was stopped meanwhile, still reads what was said; then all of it is dropped.
        """
        deadline = time.monotonic() + timeout_s
        while self._connected and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        self._listener.retire(
            f"the DWDP group runs since {_now()}, and a rank that comes again cannot join it: stop and restart all "
            f"ranks of the group"
        )
        self._is_retired = True
        self._forget()

    def close(self) -> None:
        self._listener.close()

    def _serve(self, channel: Channel) -> None:
        rank = msgspec.msgpack.decode(channel.recv(), type=int)
        with self._lock:
            if since := self._joined.get(rank):
                channel.send(
                    f"a rank {rank} joined this DWDP group at {since}: give each rank its own number, or, if that one "
                    f"has ended, stop and restart all ranks of the group".encode()
                )
                return
            self._joined[rank] = _now()
            self._connected.add(rank)
        try:
            channel.send(b"")
            while request := channel.recv():
                channel.send(self._answer(*msgspec.msgpack.decode(request)))
        except OSError:
            self._values.setdefault(STOPPED.format(rank), f"rank {rank} ended without a word: see its log".encode())
        finally:
            self._connected.discard(rank)
            self._forget()

    def _forget(self) -> None:
        if self._is_retired and not self._connected:
            self._values.clear()

    def _answer(self, action: str, key: str, value: bytes = b"") -> bytes:
        if action == "set":
            self._values[key] = value
        return self._values[key] if action == "get" else str(key in self._values).encode()


class StoreClient:
    """A rank's half. Every method raises OSError when rank 0 is gone."""

    def __init__(self, channel: Channel, rank: int):
        """Raises DWDPError when this rank has joined before."""
        self._channel = channel
        channel.send(msgspec.msgpack.encode(rank))
        if refusal := channel.recv():
            raise DWDPError(refusal.decode())

    def set(self, key: str, value: bytes) -> None:
        self._request("set", key, value)

    def has(self, key: str) -> bool:
        return self._request("has", key) == b"True"

    def get(self, key: str) -> bytes:
        """The value of a key that is there."""
        return self._request("get", key)

    def leave(self) -> None:
        self._channel.send(b"")
        self._channel.close()

    def close(self) -> None:
        self._channel.close()

    def _request(self, *request: Any) -> bytes:
        self._channel.send(msgspec.msgpack.encode(request))
        return self._channel.recv()


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %Z")
