"""The transport of a machine without a GPU: memfd shared memory, mapped page by page; a thread copies.

memfd has no name in the file system, so nothing is left behind however a rank ends.
"""

import ctypes
import mmap
import os
import queue
import threading
import time
from collections.abc import Callable, Sequence

import psutil
import torch

from vllm_dwdp.errors import DWDPError
from vllm_dwdp.kernels.device import Block, CopyStream, Device, Region
from vllm_dwdp.kernels.tokens import InboxMap, TokenExchange
from vllm_dwdp.kernels.tokens_host import HostTokens

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MAP_FIXED = 0x10
_MAP_NORESERVE = 0x4000
_RESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
_WAIT_TIMEOUT_S = 120.0


def _mmap(address: int | None, nbytes: int, protection: int, flags: int, fd: int) -> int:
    result = _libc.mmap(address, nbytes, protection, flags, fd, 0)
    if result in (None, ctypes.c_void_p(-1).value):
        raise DWDPError(f"mmap of {nbytes} bytes failed: {os.strerror(ctypes.get_errno())}")
    return result


class HostBlock(Block):
    def __init__(self, fd: int, nbytes: int, owner: "HostDevice | None" = None):
        self.fd, self.nbytes, self._owner = fd, nbytes, owner

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            if self._owner is not None:
                self._owner.allocated_bytes -= self.nbytes


class HostRegion(Region):
    def __init__(self, nbytes: int):
        self.device = torch.device("cpu")
        self.nbytes = nbytes
        self.address = _mmap(None, nbytes, 0, _RESERVED, -1)

    def map(self, at: int, block: Block, *, writable: bool) -> None:
        assert isinstance(block, HostBlock) and at + block.nbytes <= self.nbytes
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        _mmap(self.address + at, block.nbytes, protection, mmap.MAP_SHARED | _MAP_FIXED, block.fd)

    def close(self) -> None:
        if self.address:
            _libc.munmap(self.address, self.nbytes)
            self.address = 0


class HostDevice(Device):
    page_bytes = mmap.PAGESIZE
    handle_kind = "fd"
    keeps_descriptors = True
    name = "host"
    visible = frozenset({name})

    def allocate(self, nbytes: int) -> HostBlock:
        assert nbytes % self.page_bytes == 0
        fd = os.memfd_create("vllm-dwdp")
        os.fchmod(fd, 0o400)  # nor does another user who gets a descriptor open it again for writing
        try:
            os.posix_fallocate(fd, 0, nbytes)
        except OSError as error:
            os.close(fd)
            raise DWDPError(f"cannot allocate {nbytes} bytes of shared memory: {error.strerror}") from None
        self.allocated_bytes += nbytes
        return HostBlock(fd, nbytes, self)

    def export(self, block: Block, *, writable: bool = False) -> int:
        assert isinstance(block, HostBlock)
        if writable:
            return os.dup(block.fd)
        return os.open(f"/proc/self/fd/{block.fd}", os.O_RDONLY)  # a peer that gets it cannot map it writable

    def zero(self, block: Block) -> None:
        """New shared memory is zero."""

    def tokens(
        self, rank: int, at: InboxMap, inboxes: Sequence[int], owners: Sequence[list[list[int]]],
        is_alive: Callable[[int], bool],
    ) -> TokenExchange:
        return HostTokens(rank, at, inboxes, owners, is_alive)

    def adopt(self, handle: int | bytes, nbytes: int) -> HostBlock:
        assert isinstance(handle, int)
        return HostBlock(os.dup(handle), nbytes)

    def reserve(self, nbytes: int) -> HostRegion:
        return HostRegion(nbytes)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        ctypes.memmove(target, source, nbytes)

    def memory(self) -> tuple[int, int, int]:
        memory = psutil.virtual_memory()
        return memory.available, memory.total, psutil.Process().memory_info().rss

    def release_cached(self) -> None:
        pass

    def stream(self, *, timing: bool) -> "HostStream":
        return HostStream(timing=timing)


class HostEvent:
    """Like a CUDA event: `record` starts a new flag, a wait keeps the flag that was current when it was issued."""

    def __init__(self) -> None:
        self.flag = threading.Event()
        self.flag.set()


class HostStream(CopyStream):
    def __init__(self, *, timing: bool):
        self._timing = timing
        self._waited_ms = self._copied_ms = 0.0
        self._error: BaseException | None = None
        self._work: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="dwdp-copy", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                if self._error is None:
                    work()
            except BaseException as error:
                self._error = error

    @property
    def exposed_wait_ms(self) -> float | None:
        return self._waited_ms if self._timing else None

    @property
    def copy_ms(self) -> float | None:
        return self._copied_ms if self._timing else None

    def event(self) -> HostEvent:
        return HostEvent()

    def plan(self, copies: Sequence[tuple[int, int, int]]) -> Sequence[tuple[int, int, int]]:
        return copies

    def copy(self, plan: Sequence[tuple[int, int, int]]) -> None:
        self._work.put(lambda: self._copy(plan))

    def _copy(self, copies: Sequence[tuple[int, int, int]]) -> None:
        start = time.perf_counter()
        for target, source, nbytes in copies:
            ctypes.memmove(target, source, nbytes)
        if self._timing:
            self._copied_ms += 1e3 * (time.perf_counter() - start)

    def record(self, event: HostEvent) -> None:
        flag = event.flag = threading.Event()
        self._work.put(flag.set)

    def wait(self, event: HostEvent) -> None:
        flag = event.flag
        self._work.put(lambda: self._block(flag, "the computing thread to free a slot"))

    def compute_record(self, event: HostEvent) -> None:
        event.flag = threading.Event()
        event.flag.set()

    def compute_wait(self, event: HostEvent) -> None:
        start = time.perf_counter()
        self._block(event.flag, "the copy thread to fill a slot")
        if self._timing:
            self._waited_ms += 1e3 * (time.perf_counter() - start)

    def _block(self, flag: threading.Event, whom: str) -> None:
        deadline = time.monotonic() + _WAIT_TIMEOUT_S
        while not flag.wait(timeout=0.1):
            if self._error is not None:
                raise DWDPError(f"the copy thread failed: {self._error}")
            if time.monotonic() > deadline:
                raise DWDPError(f"waited {_WAIT_TIMEOUT_S:.0f} s for {whom}")

    def is_done(self, event: HostEvent) -> bool:
        return event.flag.is_set()

    def is_capturing(self) -> bool:
        return False

    def drain(self) -> None:
        event = self.event()
        self.record(event)
        self._block(event.flag, "the copy thread")

    def close(self) -> None:
        self._work.put(None)
        self._thread.join(timeout=_WAIT_TIMEOUT_S)
