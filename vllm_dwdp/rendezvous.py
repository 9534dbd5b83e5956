"""Rendezvous: how the ranks of a group find each other and agree. Used while starting, never after.

Everything goes through the store of rank 0. Every wait has a timeout, says every so often whom it waits for, and ends
early when a peer reports why it stopped or is gone.
"""

import contextlib
import errno
import logging
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import msgspec

from vllm_dwdp.channel import Address, Channel, name
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.store import STOPPED, StoreClient, StoreServer

logger = logging.getLogger("vllm.dwdp.rendezvous")
T = TypeVar("T")
_POLL_S = 0.05
REPORT_S = 15.0
READY_TIMEOUT = "VLLM_ENGINE_READY_TIMEOUT_S"
_FAREWELL_S = 5.0
_RETRY_S = 0.2


class PeerStopped(DWDPError):
    """A peer's own reason for stopping, passed on word for word."""


class Group:
    """This rank's connection to its peers while the group starts. Rank 0 keeps what they say."""

    def __init__(
        self, client: StoreClient, server: StoreServer | None, *, rank: int, size: int, timeout_s: float, until_s: float
    ):
        self.rank, self.size, self.timeout_s, self._until_s = rank, size, timeout_s, until_s
        self.peers = [(rank + step) % size for step in range(1, size)]
        self._client, self._server = client, server
        self._gathered: set[str] = set()

    @classmethod
    def connect(
        cls, *, rank: int, size: int, address: Address, secret: bytes, timeout_s: float, until_s: float = math.inf
    ) -> "Group":
        """Join at `address`, which rank 0 opens to those who know `secret`.

        Every wait ends after `timeout_s`, and at `until_s` of the monotonic clock, when vLLM itself would give up.
        Raises DWDPError at once when the group runs already, this rank has joined it before or another secret rules
        there, and after such a wait without an answer.
        """
        server, where = None, name(address)
        if rank == 0:
            try:
                server = StoreServer(address, secret)
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    _hear_of_running_group(address, secret)
                raise DWDPError(
                    f"rank 0 cannot open its rendezvous at {where}: {_one_line(error)}; it must be a free port of an "
                    f"address that rank 0's host has"
                ) from None
        start = reported = time.monotonic()
        while True:
            try:
                client = StoreClient(Channel.connect(address, secret, timeout_s), rank)
                return cls(client, server, rank=rank, size=size, timeout_s=timeout_s, until_s=until_s)
            except OSError as error:
                now = time.monotonic()
                if now > min(start + timeout_s, until_s):
                    raise DWDPError(
                        f"rank {rank} found no rendezvous at {where} within {now - start:.0f} s: rank 0 opens it; check "
                        f"that rank 0 runs and that its host is reachable ({_one_line(error)})"
                    ) from None
                if now - reported > REPORT_S:
                    reported = now
                    logger.info("DWDP rank %d waits for rank 0 at %s", rank, where)
                time.sleep(_RETRY_S)
            except BaseException:
                if server is not None:
                    server.close()
                raise

    def gather(self, what: str, mine: T) -> list[T]:
        """Publish `mine` and return every rank's, in rank order. `mine` is anything msgspec encodes, `what` used once.

        Raises DWDPError when a peer reports a failure, or has said nothing within the timeout.
        """
        assert what not in self._gathered, f"'{what}' was gathered before: its keys would answer for the past"
        self._gathered.add(what)
        with self._hearing():
            self._client.set(f"{what}/{self.rank}", msgspec.msgpack.encode(mine))
            self._wait_for(what)
            everyone = [self._client.get(f"{what}/{rank}") for rank in range(self.size)]
        return [msgspec.msgpack.decode(said, type=type(mine)) for said in everyone]

    def _wait_for(self, what: str) -> None:
        missing = list(range(self.size))
        start = reported = time.monotonic()
        while missing := [rank for rank in missing if not self._client.has(f"{what}/{rank}")]:
            self.raise_reported()
            now = time.monotonic()
            waited = f"rank {self.rank} waits for {_ranks(missing)} to say '{what}'"
            if now > min(start + self.timeout_s, self._until_s):
                limit, raised = f"startup_timeout_s={self.timeout_s:.0f} s", "--dwdp-startup-timeout-s"
                if now > self._until_s:
                    limit, raised = f"{now - start:.0f} s, when vLLM gives up too", READY_TIMEOUT
                raise DWDPError(
                    f"{waited}: nothing within {limit}; see the log of {_ranks(missing)}, or raise {raised}; a rank "
                    f"that runs since an earlier start does not come: restart all ranks of the group"
                )
            if now - reported > REPORT_S:
                reported = now
                logger.info(
                    "DWDP %s (%.0f s so far); one that runs since an earlier start must be restarted too", waited,
                    now - start,
                )
            time.sleep(_POLL_S)

    def settle(self) -> None:
        """Every rank has all it needs and takes leave. Rank 0 drops what was said once all have, and from then on
        tells who comes only that the group runs."""
        self.barrier("running")
        with self._hearing():
            self._client.leave()
        if self._server is not None:
            self._server.retire(_FAREWELL_S)

    def close(self) -> None:
        """Answer nobody any more. Repeats safely."""
        self._client.close()
        if self._server is not None:
            self._server.close()

    def barrier(self, what: str) -> None:
        self.gather(what, self.rank)

    @contextlib.contextmanager
    def reporting(self) -> Iterator[None]:
        """Tell the peers why this rank stops, if the body raises, so that none waits out its timeout.

        Rank 0 takes the store along when it ends: it stays until its peers have heard, a few seconds at most.
        """
        try:
            yield
        except BaseException as error:
            reason = "" if isinstance(error, PeerStopped) else f"rank {self.rank} stopped: {_one_line(error)}"
            with contextlib.suppress(Exception):
                self._client.set(STOPPED.format(self.rank), reason.encode())
                deadline = time.monotonic() + _FAREWELL_S
                while self._server is not None and time.monotonic() < deadline:
                    if all(self._client.has(STOPPED.format(peer)) for peer in self.peers):
                        break
                    time.sleep(_POLL_S)
            self.close()
            raise

    def raise_reported(self) -> None:
        """Raises PeerStopped with the reason of a peer that has stopped."""
        for peer in self.peers:
            key = STOPPED.format(peer)
            if self._client.has(key) and (reason := self._client.get(key).decode()):
                raise PeerStopped(reason)

    @contextlib.contextmanager
    def _hearing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DWDPError(
                f"rank {self.rank} lost the rendezvous: rank 0, which hosts it, has ended; see its log "
                f"({_one_line(error)})"
            ) from None


def agree(group: Group, what: str, mine: T, *, own: Sequence[str] = ()) -> list[T]:
    """Gather a struct or dict from every rank and demand that all fields but `own` are equal to rank 0's.

    Raises DWDPError on every rank, naming the first rank and field that differ.
    """
    everyone = group.gather(what, mine)
    demand_alike(what, everyone, own=own)
    return everyone


def demand_alike(what: str, everyone: Sequence[Any], *, own: Sequence[str] = ()) -> None:
    """Raises DWDPError as `agree` does, for what has been gathered already."""
    reference = msgspec.to_builtins(everyone[0])
    for rank, said in enumerate(everyone):
        said = msgspec.to_builtins(said)
        for field in dict.fromkeys([*reference, *said]):
            if field not in own:
                _demand_equal(what, field, reference.get(field), said.get(field), 0, rank)


def agree_where_common(group: Group, what: str, mine: dict[str, str]) -> None:
    """Demand that ranks which speak of the same thing say the same of it. Raises DWDPError on every rank."""
    seen: dict[str, tuple[int, str]] = {}
    for rank, said in enumerate(group.gather(what, mine)):
        for thing, value in said.items():
            first, known = seen.setdefault(thing, (rank, value))
            _demand_equal(what, thing, known, value, first, rank)


def _demand_equal(what: str, field: str, known: Any, said: Any, first: int, rank: int) -> None:
    if known != said:
        raise DWDPError(
            f"ranks disagree in {what}: {field} is {_difference(known, said)} on rank {first} and rank {rank}; start "
            f"every rank with the same model, settings and versions"
        )


def _hear_of_running_group(address: Address, secret: bytes) -> None:
    """Raises DWDPError with what the group that holds `address` has to say."""
    with contextlib.suppress(OSError):
        Channel.connect(address, secret, _FAREWELL_S).close()


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"


def _one_line(error: BaseException) -> str:
    if isinstance(error, SystemExit):
        return "it was told to end, or what started it has ended"
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
