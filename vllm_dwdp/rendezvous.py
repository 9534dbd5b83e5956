"""Rendezvous: how the ranks of a group find each other and agree. Used while starting, never after.

Everything goes through a torch TCPStore (rank 0 or vLLM's launcher hosts it). Every wait has a timeout, says every so often whom it waits for, and ends early when a peer reports why
it stopped.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any, ClassVar, TypeVar

import msgspec
from torch.distributed import PrefixStore, Store, TCPStore

from vllm_dwdp.errors import DWDPError

logger = logging.getLogger("vllm.dwdp.rendezvous")
T = TypeVar("T")
_POLL_S = 0.05
_REPORT_S = 15.0
_FAREWELL_S = 5.0
_PART_BYTES = 4 * 2**20


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank says of itself before it loads. All of it must be alike but `OWN`."""

    OWN: ClassVar = ("rank", "host", "device_name", "handles")

    rank: int
    size: int
    plugin: str
    vllm: str
    model: str
    options: dict[str, Any]
    device: str
    host: str
    device_name: str
    handles: str


class TensorManifest(msgspec.Struct, frozen=True, kw_only=True):
    """One expert tensor of one layer: its shape and strides (elements) for a single expert, and how it is held."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: str
    streamed: bool


class LayerManifest(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    num_experts: int
    residents: int
    tensors: list[TensorManifest]


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank has loaded. `digest` fingerprints the weights that every rank holds alike."""

    digest: str
    page_bytes: int
    layers: list[LayerManifest]


class PeerStopped(DWDPError):
    """A peer's own reason for stopping, passed on word for word."""


class Group:
    """This rank's connection to its peers while the group starts. `host` names who runs the store."""

    def __init__(self, store: Store, *, rank: int, size: int, host: str, timeout_s: float):
        self.rank, self.size, self.host, self.timeout_s = rank, size, host, timeout_s
        self.peers = [(rank + step) % size for step in range(1, size)]
        self._store = PrefixStore("dwdp", store)
        self._gathered: set[str] = set()

    @classmethod
    def connect(cls, *, rank: int, size: int, host: str, port: int, hosted: bool, timeout_s: float) -> "Group":
        """Join at `host`:`port`, where vLLM's launcher runs the store if `hosted`, else rank 0.

        Raises DWDPError after `timeout_s` without an answer.
        """
        deadline = time.monotonic() + timeout_s
        where = "vLLM's launcher" if hosted else "rank 0"
        while True:
            patience = min(_REPORT_S, max(deadline - time.monotonic(), 0.1))
            try:
                store = TCPStore(
                    host, port, is_master=rank == 0 and not hosted, wait_for_workers=False,
                    timeout=timedelta(seconds=patience),
                )
                return cls(store, rank=rank, size=size, host=where, timeout_s=timeout_s)
            except RuntimeError as error:
                if rank == 0 and not hosted:
                    raise DWDPError(f"rank 0 cannot open its rendezvous at {host}:{port}: {_one_line(error)}") from None
                if time.monotonic() >= deadline:
                    raise DWDPError(
                        f"rank {rank} found no rendezvous at {host}:{port} within {timeout_s:.0f} s: {where} opens it; "
                        f"check that rank 0 runs and that its host is reachable"
                    ) from None
                logger.info("DWDP rank %d waits for %s at %s:%d", rank, where, host, port)

    def gather(self, what: str, mine: T) -> list[T]:
        """Publish `mine` and return every rank's, in rank order. `mine` is anything msgspec encodes, `what` used once.

        Raises DWDPError when a peer reports a failure, or has said nothing within the timeout.
        """
        assert what not in self._gathered, f"'{what}' was gathered before: its keys would answer for the past"
        self._gathered.add(what)
        self._call(lambda: self._publish(f"{what}/{self.rank}", msgspec.msgpack.encode(mine)))
        missing = list(range(self.size))
        start = reported = time.monotonic()
        while missing := [r for r in missing if not self._call(lambda r=r: self._store.check([f"{what}/{r}"]))]:
            self._raise_reported()
            now = time.monotonic()
            waited = f"rank {self.rank} waits for {_ranks(missing)} to say '{what}'"
            if now - start > self.timeout_s:
                raise DWDPError(
                    f"{waited}: nothing within startup_timeout_s={self.timeout_s:.0f} s; see the log of "
                    f"{_ranks(missing)}, or raise --dwdp-startup-timeout-s"
                )
            if now - reported > _REPORT_S:
                reported = now
                logger.info("DWDP %s (%.0f s so far)", waited, now - start)
            time.sleep(_POLL_S)
        kind = type(mine)
        return [
            msgspec.msgpack.decode(self._call(lambda r=r: self._published(f"{what}/{r}")), type=kind)
            for r in range(self.size)
        ]

    def _publish(self, key: str, value: bytes) -> None:
        """The store takes 8 MiB at a time: parts first, then their number under the key itself."""
        starts = range(0, len(value), _PART_BYTES)
        for number, at in enumerate(starts):
            self._store.set(f"{key}/{number}", value[at : at + _PART_BYTES])
        self._store.set(key, str(len(starts)))

    def _published(self, key: str) -> bytes:
        return b"".join(self._store.get(f"{key}/{number}") for number in range(int(self._store.get(key))))

    def barrier(self, what: str) -> None:
        self.gather(what, self.rank)

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Tell the peers why this rank stops, if the body raises, so that none waits out its timeout.

        The rank that hosts the store takes it along when it ends: it stays until its peers have heard, a few seconds
        at most.
        """
        try:
            yield
        except BaseException as error:
            reason = "" if isinstance(error, PeerStopped) else f"rank {self.rank} stopped: {_one_line(error)}"
            with contextlib.suppress(Exception):
                self._store.set(f"stopped/{self.rank}", reason)
                deadline = time.monotonic() + _FAREWELL_S
                while self.host == f"rank {self.rank}" and time.monotonic() < deadline:
                    if all(self._store.check([f"stopped/{peer}"]) for peer in self.peers):
                        break
                    time.sleep(_POLL_S)
            raise

    def _raise_reported(self) -> None:
        for peer in self.peers:
            if self._call(lambda peer=peer: self._store.check([f"stopped/{peer}"])):
                if reason := self._call(lambda peer=peer: self._store.get(f"stopped/{peer}")).decode():
                    raise PeerStopped(reason)

    def _call(self, request: Callable[[], Any]) -> Any:
        try:
            return request()
        except RuntimeError as error:
            raise DWDPError(
                f"rank {self.rank} lost the rendezvous: {self.host}, which hosts it, has ended; see its log "
                f"({_one_line(error)})"
            ) from None


def agree(group: Group, what: str, mine: T, *, own: Sequence[str] = ()) -> list[T]:
    """Gather a struct from every rank and demand that all fields but `own` are equal to rank 0's.

    Raises DWDPError on every rank, naming the first rank and field that differ.
    """
    everyone = group.gather(what, mine)
    reference = msgspec.to_builtins(everyone[0])
    for rank, said in enumerate(everyone):
        for field, value in msgspec.to_builtins(said).items():
            if field not in own and value != reference[field]:
                raise DWDPError(
                    f"ranks disagree in {what}: {field} is {_difference(reference[field], value)} on rank 0 and rank "
                    f"{rank}; start every rank with the same model, settings and versions"
                )
    return everyone


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500] or type(error).__name__


def _difference(a: Any, b: Any) -> str:
    """The first place at which two msgspec builtins differ, as 'X and Y'."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            if a.get(key) != b.get(key):
                return f"{key}: {_difference(a.get(key), b.get(key))}"
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for x, y in zip(a, b, strict=True):
            if x != y:
                return _difference(x, y)
    return f"{a!r} and {b!r}"
