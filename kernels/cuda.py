"""The transport of NVIDIA GPUs: CUDA virtual memory (cuMem*), and a side stream that drives the copy engines.

The only caller of the driver. Peers import each other's memory by POSIX file descriptor, or by FABRIC handle where
every rank can export one (multi-node NVLink).
"""

import contextlib
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from cuda.bindings import driver

from vllm_dwdp.errors import DWDPError
from vllm_dwdp.kernels.device import Block, CopyStream, Device, Region
from vllm_dwdp.kernels.driver import CudaError, check
from vllm_dwdp.kernels.tokens import InboxMap, TokenExchange

_FD = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
_MAX_SINGLE_COPIES = 4
_FABRIC = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_FABRIC


class CudaBlock(Block):
    def __init__(self, handle: Any, nbytes: int, owner: "CudaDevice | None" = None):
        self.handle, self.nbytes, self._owner = handle, nbytes, owner

    def close(self) -> None:
        if self.handle is not None:
            check("cuMemRelease", driver.cuMemRelease(self.handle))
            self.handle = None
            if self._owner is not None:
                self._owner.allocated_bytes -= self.nbytes


class CudaRegion(Region):
    def __init__(self, device: torch.device, nbytes: int, page_bytes: int):
        self.device, self.nbytes = device, nbytes
        self.address = int(check("cuMemAddressReserve", driver.cuMemAddressReserve(nbytes, page_bytes, 0, 0)))
        self._mapped: dict[int, int] = {}  # offset: bytes

    def map(self, at: int, block: Block, *, writable: bool) -> None:
        assert isinstance(block, CudaBlock) and at + block.nbytes <= self.nbytes
        address = self.address + at
        check("cuMemMap", driver.cuMemMap(address, block.nbytes, 0, block.handle, 0))
        self._mapped[at] = block.nbytes
        access = driver.CUmemAccessDesc()
        access.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        access.location.id = self.device.index
        flags = driver.CUmemAccess_flags
        access.flags = flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE if writable else flags.CU_MEM_ACCESS_FLAGS_PROT_READ
        try:
            check("cuMemSetAccess", driver.cuMemSetAccess(address, block.nbytes, [access], 1))
        except CudaError as error:
            raise DWDPError(
                f"{self.device} cannot read a peer's memory ({error}): DWDP needs NVLink or PCIe peer access between "
                f"all GPUs of the group; `nvidia-smi topo -p2p r` shows which pairs have it"
            ) from None

    def close(self) -> None:
        while self._mapped:
            at, nbytes = self._mapped.popitem()
            check("cuMemUnmap", driver.cuMemUnmap(self.address + at, nbytes))
        if self.address:
            check("cuMemAddressFree", driver.cuMemAddressFree(self.address, self.nbytes))
            self.address = 0


class CudaDevice(Device):
    """GPU `index` of this process. Raises DWDPError when its driver lacks virtual memory or shareable handles."""

    def __init__(self, index: int):
        self.device = torch.device("cuda", index)
        torch.cuda.set_device(self.device)
        torch.cuda.current_stream().synchronize()  # makes torch's primary context current before the first driver call
        attributes = driver.CUdevice_attribute
        vmm = attributes.CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED
        if not check("cuDeviceGetAttribute", driver.cuDeviceGetAttribute(vmm, index)):
            raise DWDPError(f"{self.device} has no CUDA virtual memory management: DWDP needs it (driver 470 or newer)")
        names = [str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())]
        self.name, self.visible = names[index], frozenset(names)
        self._properties = driver.CUmemAllocationProp()
        self._properties.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._properties.location.id = index
        self.use_handles("fabric" if self.can_export("fabric") else "fd")

    def use_handles(self, kind: str) -> None:
        """Allocate with "fabric" or "fd" handles from now on."""
        self.handle_kind = kind
        self._properties.requestedHandleTypes = _FABRIC if kind == "fabric" else _FD
        flag = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_RECOMMENDED
        granularity = driver.cuMemGetAllocationGranularity(self._properties, flag)
        self.page_bytes = int(check("cuMemGetAllocationGranularity", granularity))

    def can_export(self, kind: str) -> bool:
        """Whether the driver gives "fabric" or "fd" handles here. Call `use_handles` afterwards."""
        wanted = self._properties.requestedHandleTypes = _FABRIC if kind == "fabric" else _FD
        with contextlib.suppress(CudaError):
            handle = check("cuMemCreate", driver.cuMemCreate(2 * 2**20, self._properties, 0))
            exported, found = driver.cuMemExportToShareableHandle(handle, wanted, 0)
            driver.cuMemRelease(handle)
            if exported == driver.CUresult.CUDA_SUCCESS and kind == "fd":
                os.close(int(found))
            return exported == driver.CUresult.CUDA_SUCCESS
        return False

    def allocate(self, nbytes: int) -> CudaBlock:
        assert nbytes % self.page_bytes == 0
        try:
            handle = check("cuMemCreate", driver.cuMemCreate(nbytes, self._properties, 0))
        except CudaError as error:
            free, total, _ = self.memory()
            raise DWDPError(
                f"cannot allocate {nbytes / 2**20:.0f} MiB on {self.device}, {free / 2**20:.0f} of "
                f"{total / 2**20:.0f} MiB are free ({error}): end what else uses the GPU, lower --gpu-memory-utilization, or use more ranks"
            ) from None
        self.allocated_bytes += nbytes
        return CudaBlock(handle, nbytes, self)

    def export(self, block: Block, *, writable: bool = False) -> int | bytes:
        assert isinstance(block, CudaBlock)
        kind = _FABRIC if self.handle_kind == "fabric" else _FD
        handle = check("cuMemExportToShareableHandle", driver.cuMemExportToShareableHandle(block.handle, kind, 0))
        return bytes(handle.data) if self.handle_kind == "fabric" else int(handle)

    def adopt(self, handle: int | bytes, nbytes: int) -> CudaBlock:
        kind = _FD if isinstance(handle, int) else _FABRIC
        result = driver.cuMemImportFromShareableHandle(handle, kind)
        return CudaBlock(check("cuMemImportFromShareableHandle", result), nbytes)

    def reserve(self, nbytes: int) -> CudaRegion:
        return CudaRegion(self.device, nbytes, self.page_bytes)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        stream = torch.cuda.current_stream(self.device)
        check("cuMemcpyAsync", driver.cuMemcpyAsync(target, source, nbytes, stream.cuda_stream))
        stream.synchronize()

    def zero(self, block: Block) -> None:
        with contextlib.closing(self.reserve(block.nbytes)) as region:
            region.map(0, block, writable=True)
            region.tensor(0, (block.nbytes,), (1,), torch.uint8).zero_()
            torch.cuda.synchronize(self.device)

    def tokens(
        self, rank: int, at: InboxMap, inboxes: Sequence[int], owners: Sequence[list[list[int]]],
        is_alive: Callable[[int], bool],
    ) -> TokenExchange:
        from vllm_dwdp.kernels.tokens_cuda import CudaTokens  # imports Triton

        return CudaTokens(self.device, rank, at, inboxes, owners)

    def memory(self) -> tuple[int, int, int]:
        held = torch.cuda.memory_reserved(self.device) + self.allocated_bytes
        return *torch.cuda.mem_get_info(self.device), held

    def release_cached(self) -> None:
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()

    def stream(self, *, timing: bool) -> "CudaStream":
        return CudaStream(self.device, timing=timing)


class _Intervals:
    """Sums the time between pairs of events without waiting for them: finished pairs are collected and reused."""

    def __init__(self) -> None:
        self.total_ms = 0.0
        self._open: list[tuple[Any, Any]] = []
        self._spare: list[tuple[Any, Any]] = []

    @contextlib.contextmanager
    def measure(self, stream: int) -> Iterator[None]:
        self.collect()
        pair = self._spare.pop() if self._spare else (_event(timing=True), _event(timing=True))
        check("cuEventRecord", driver.cuEventRecord(pair[0], stream))
        yield
        check("cuEventRecord", driver.cuEventRecord(pair[1], stream))
        self._open.append(pair)

    def collect(self) -> None:
        while self._open and driver.cuEventQuery(self._open[0][1])[0] == driver.CUresult.CUDA_SUCCESS:
            pair = self._open.pop(0)
            self.total_ms += check("cuEventElapsedTime", driver.cuEventElapsedTime(*pair))
            self._spare.append(pair)


def _event(*, timing: bool) -> Any:
    flags = driver.CUevent_flags
    flag = flags.CU_EVENT_DEFAULT if timing else flags.CU_EVENT_DISABLE_TIMING
    return check("cuEventCreate", driver.cuEventCreate(flag))


class CudaStream(CopyStream):
    """Driver calls on raw handles: torch's wrappers take 6 us to look the current stream up, these take 1 to 2 us."""

    def __init__(self, device: torch.device, *, timing: bool):
        # Copies use no SMs; high priority only lets their events be seen promptly.
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._raw = driver.CUstream(self._stream.cuda_stream)
        self._device = device
        self._waits = _Intervals() if timing else None
        self._copies = _Intervals() if timing else None

    @property
    def exposed_wait_ms(self) -> float | None:
        return None if self._waits is None else self._waits.total_ms

    @property
    def copy_ms(self) -> float | None:
        return None if self._copies is None else self._copies.total_ms

    def _compute(self) -> int:
        return torch._C._cuda_getCurrentRawStream(self._device.index)

    def event(self) -> Any:
        return _event(timing=False)

    def plan(self, copies: Sequence[tuple[int, int, int]]) -> Callable[[], None]:
        """A few copies are issued one by one, 7 us each; many become a graph of copies that one call launches.

        While a graph is captured, which takes no other graph in, all are issued one by one.
        """
        at = driver.CUdeviceptr
        arguments = [(at(target), at(source), nbytes, self._raw) for target, source, nbytes in copies]

        def issue() -> None:
            for each in arguments:
                check("cuMemcpyAsync", driver.cuMemcpyAsync(*each))

        if len(arguments) <= _MAX_SINGLE_COPIES:
            return issue
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        check("cuStreamBeginCapture", driver.cuStreamBeginCapture(self._raw, mode))
        issue()
        graph = check("cuStreamEndCapture", driver.cuStreamEndCapture(self._raw))
        executable = check("cuGraphInstantiate", driver.cuGraphInstantiate(graph, 0))
        check("cuGraphDestroy", driver.cuGraphDestroy(graph))

        def launch() -> None:
            if self.is_capturing():
                return issue()
            check("cuGraphLaunch", driver.cuGraphLaunch(executable, self._raw))

        weakref.finalize(launch, driver.cuGraphExecDestroy, executable).atexit = False
        return launch

    def _timed(self, intervals: _Intervals | None, stream: Any) -> contextlib.AbstractContextManager:
        """Times the body on `stream`, but in a graph, whose events have no times."""
        return intervals.measure(stream) if intervals and not self.is_capturing() else contextlib.nullcontext()

    def copy(self, plan: Callable[[], None]) -> None:
        with self._timed(self._copies, self._raw):
            plan()

    def record(self, event: Any) -> None:
        check("cuEventRecord", driver.cuEventRecord(event, self._raw))

    def wait(self, event: Any) -> None:
        check("cuStreamWaitEvent", driver.cuStreamWaitEvent(self._raw, event, 0))

    def compute_record(self, event: Any) -> None:
        check("cuEventRecord", driver.cuEventRecord(event, self._compute()))

    def compute_wait(self, event: Any) -> None:
        stream = self._compute()
        with self._timed(self._waits, stream):
            check("cuStreamWaitEvent", driver.cuStreamWaitEvent(stream, event, 0))

    def is_done(self, event: Any) -> bool:
        (code,) = driver.cuEventQuery(event)
        if code == driver.CUresult.CUDA_ERROR_NOT_READY:
            return False
        check("cuEventQuery", (code,))
        return True

    def is_capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def drain(self) -> None:
        self._stream.synchronize()
        for intervals in (self._waits, self._copies):
            if intervals:
                torch.cuda.synchronize(self._device)
                intervals.collect()

    def close(self) -> None:
        torch.cuda.synchronize(self._device)  # a step may be under way, which reads what is unmapped next
