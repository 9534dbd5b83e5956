"""What doctor knows of GPUs: their memory, their shareable handles, and the links between them, measured."""

import contextlib
import dataclasses
import itertools

import torch

from vllm_dwdp.entrypoints.doctor.facts import Gpu, Link
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.kernels.cuda import CudaDevice

COPY_BYTES, REPEATS = 2**28, 5


def look() -> tuple[list[Gpu], list[Link]]:
    """Every GPU, and for every ordered pair of them a link."""
    gpus, devices = [], {}
    for index in range(torch.cuda.device_count()):
        fault, handles = "", frozenset[str]()
        try:
            devices[index] = device = CudaDevice(index)
            handles = frozenset(kind for kind in ("fd", "fabric") if device.can_export(kind))
            device.use_handles("fd" if "fd" in handles else "fabric")
        except DWDPError as error:
            fault = str(error)
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        gpus.append(Gpu(name=name, free_bytes=free, total_bytes=total, fault=fault, handles=handles))
    return gpus, [link(devices, *pair) for pair in itertools.permutations(range(len(gpus)), 2)]


def link(devices: dict[int, CudaDevice], reader: int, owner: int) -> Link:
    has_access = torch.cuda.can_device_access_peer(reader, owner)
    found = Link(reader=reader, owner=owner, kind=link_kind(reader, owner), has_access=has_access)
    if not has_access or not {reader, owner} <= devices.keys():
        return dataclasses.replace(found, fault=f"GPU {reader} cannot map memory of GPU {owner}")
    try:
        return dataclasses.replace(found, gb_per_s=bandwidth(devices[reader], devices[owner]))
    except DWDPError as error:
        return dataclasses.replace(found, fault=str(error))


def link_kind(one: int, other: int) -> str:
    """NVLink or PCIe, as NVML says of two GPUs; they are found by UUID, as NVML does not know CUDA_VISIBLE_DEVICES."""
    from vllm.third_party import pynvml

    try:
        pynvml.nvmlInit()
        uuids = [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in (one, other)]
        handles = [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
        status = pynvml.nvmlDeviceGetP2PStatus(*handles, pynvml.NVML_P2P_CAPS_INDEX_NVLINK)
    except pynvml.NVMLError:
        return "link of unknown kind"
    return "NVLink" if status == pynvml.NVML_P2P_STATUS_OK else "PCIe"


def bandwidth(reader: CudaDevice, owner: CudaDevice) -> float:
    """GB/s at which `reader` copies 256 MiB of `owner`'s memory, mapped as peers' experts are: the best of five.

    Raises DWDPError where it cannot be mapped, or either has no memory left.
    """
    page = max(reader.page_bytes, owner.page_bytes)
    nbytes = -(-COPY_BYTES // page) * page
    with torch.cuda.device(reader.device), contextlib.ExitStack() as undo:

        def address_of_memory(device: CudaDevice) -> int:
            block = device.allocate(nbytes)
            undo.callback(block.close)
            region = reader.reserve(nbytes)
            undo.callback(region.close)
            region.map(0, block, writable=device is reader)
            return region.address

        stream = reader.stream(timing=True)
        undo.callback(stream.close)
        plan, took_ms = stream.plan([(address_of_memory(reader), address_of_memory(owner), nbytes)]), []
        for _ in range(REPEATS):
            before_ms = stream.copy_ms or 0.0
            stream.copy(plan)
            stream.drain()
            took_ms.append((stream.copy_ms or 0.0) - before_ms)
    return nbytes / min(took_ms) / 1e6
