"""The interface of a transport: shareable memory, address ranges made of it, and one copy stream.

Two implementations: `host.HostDevice` (shared memory, a thread) and `cuda.CudaDevice` (virtual memory, a CUDA stream).
Both are page based in the same way, so that everything above them is one code.
"""

import abc
from collections.abc import Callable, Sequence
from typing import Any

import torch

from vllm_dwdp.kernels.tokens import InboxMap, TokenExchange


class Block(abc.ABC):
    """Physical memory of `nbytes`, a whole number of pages: allocated here, or imported from a peer."""

    nbytes: int

    @abc.abstractmethod
    def close(self) -> None:
        """Drop this reference; the memory lives on while it is mapped anywhere. Repeats safely."""


class Region(abc.ABC):
    """A reserved range of addresses into which blocks are mapped."""

    address: int
    nbytes: int
    device: torch.device

    @abc.abstractmethod
    def map(self, at: int, block: Block, *, writable: bool) -> None:
        """Map the whole of `block` at byte offset `at`, a page multiple."""

    @abc.abstractmethod
    def close(self) -> None:
        """Unmap everything and give the addresses back. No tensor over it may be used any more. Repeats safely."""

    def tensor(self, at: int, shape: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A tensor over this memory whose first element lies at byte offset `at`.

        The device is given, not asked of the driver: the first byte may be a peer's.
        """
        nbytes = (1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))) * dtype.itemsize
        storage = torch._C._construct_storage_from_data_pointer(self.address + at, self.device, nbytes)
        return torch.empty(0, dtype=dtype, device=self.device).set_(storage, 0, tuple(shape), tuple(stride))


class CopyStream(abc.ABC):
    """The side stream, and the events between it and the stream that computes.

    An event is what `event()` returns; a wait waits for the latest record made before the wait was issued.
    `exposed_wait_ms` and `copy_ms` accumulate when made with timing, else stay None.
    """

    @property
    def exposed_wait_ms(self) -> float | None:
        return None

    @property
    def copy_ms(self) -> float | None:
        return None

    @abc.abstractmethod
    def event(self) -> Any: ...

    @abc.abstractmethod
    def plan(self, copies: Sequence[tuple[int, int, int]]) -> Any:
        """Prepare (destination address, source address, bytes) copies, done in order, for `copy` to repeat."""

    @abc.abstractmethod
    def copy(self, plan: Any) -> None:
        """Enqueue the copies of a plan."""

    @abc.abstractmethod
    def record(self, event: Any) -> None:
        """The side stream records `event`."""

    @abc.abstractmethod
    def wait(self, event: Any) -> None:
        """The side stream waits for `event`."""

    @abc.abstractmethod
    def compute_record(self, event: Any) -> None:
        """The computing stream records `event`."""

    @abc.abstractmethod
    def compute_wait(self, event: Any) -> None:
        """The computing stream waits for `event`."""

    @abc.abstractmethod
    def is_done(self, event: Any) -> bool:
        """Whether the latest record of `event` has been reached, without waiting."""

    @abc.abstractmethod
    def is_capturing(self) -> bool:
        """Whether the computing stream is being captured into a graph."""

    @abc.abstractmethod
    def drain(self) -> None:
        """Block until every copy issued so far has ended, and bring the timings up to date."""

    @abc.abstractmethod
    def close(self) -> None: ...


class Device(abc.ABC):
    """One rank's device. `allocated_bytes` counts blocks allocated here and not yet closed."""

    page_bytes: int
    allocated_bytes: int = 0
    handle_kind: str
    keeps_descriptors = False  # whether a block holds a file descriptor for as long as it lives
    name: str  # tells the devices of a host apart
    visible: frozenset[str]  # the names of all devices that this process sees

    def use_handles(self, kind: str) -> None:
        """Export memory allocated from now on as `kind`, "fd" or "fabric"."""
        assert kind == self.handle_kind

    @abc.abstractmethod
    def allocate(self, nbytes: int) -> Block:
        """New shareable memory; `nbytes` is a page multiple. Raises DWDPError when there is not enough."""

    @abc.abstractmethod
    def export(self, block: Block, *, writable: bool = False) -> int | bytes:
        """A handle with which a peer imports `block`: a file descriptor (the caller closes it) or FABRIC bytes.

        `writable` lets the peer map it so, where the transport can tell.
        """

    @abc.abstractmethod
    def adopt(self, handle: int | bytes, nbytes: int) -> Block:
        """Import a peer's memory by its handle; a file descriptor stays the caller's to close."""

    @abc.abstractmethod
    def reserve(self, nbytes: int) -> Region: ...

    @abc.abstractmethod
    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy between addresses and wait for it: for set-up only."""

    @abc.abstractmethod
    def zero(self, block: Block) -> None:
        """Fill `block` with zeros and wait for it: for set-up only."""

    @abc.abstractmethod
    def tokens(
        self, rank: int, at: InboxMap, inboxes: Sequence[int], owners: Sequence[list[list[int]]],
        is_alive: Callable[[int], bool],
    ) -> TokenExchange:
        """The exchange over `inboxes`, the addresses of every rank's; `owners` are `tokens.owners_of`, by layer."""

    @abc.abstractmethod
    def memory(self) -> tuple[int, int, int]:
        """(free, total, held) bytes of this device: the first two as the driver or the kernel sees them, the last what
        this process holds of it."""

    @abc.abstractmethod
    def release_cached(self) -> None:
        """Wait for the device, and give memory that the framework caches without using it back to `allocate`."""

    @abc.abstractmethod
    def stream(self, *, timing: bool) -> CopyStream: ...
