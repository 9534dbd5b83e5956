"""Budget: what slots and cache take beside the shard, and what there is for them. Refuses what cannot fit."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vllm_dwdp.config import Options
from vllm_dwdp.errors import DWDPError
from vllm_dwdp.placement import Placement, spread_residents

if TYPE_CHECKING:  # its module imports torch, which nothing here needs
    from vllm_dwdp.kernels.device import Device

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSize:
    """One MoE layer: who owns its experts, and the bytes of one expert in each streamed tensor."""

    placement: Placement
    expert_bytes: list[int]

    @property
    def remote_experts(self) -> int:
        """The most that any rank does not own."""
        return self.placement.num_experts - min(len(self.placement.owned(r)) for r in range(self.placement.size))

    @property
    def remote_bytes(self) -> int:
        return self.remote_experts * sum(self.expert_bytes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryLimit:
    """What vLLM lets this engine take: a part of the device or, where the KV cache's bytes are given, all but those."""

    gpu_memory_utilization: float
    kv_cache_memory_bytes: int | None

    def room(self, device: "Device") -> tuple[int, str, str]:
        """Bytes that experts may still take, the setting that says so, and what to change for more."""
        device.release_cached()
        free, total, held = device.memory()
        if self.kv_cache_memory_bytes:
            setting = f"kv_cache_memory_bytes={self.kv_cache_memory_bytes}"
            return free - self.kv_cache_memory_bytes, setting, "a lower --kv-cache-memory-bytes"
        share = int(self.gpu_memory_utilization * total) - held
        setting = f"gpu_memory_utilization={self.gpu_memory_utilization}"
        return min(free, share), setting, "a higher --gpu-memory-utilization"


def cache_bytes(
    layers: Sequence[LayerSize], device: "Device", options: Options, limit: MemoryLimit, inbox_bytes: int = 0
) -> int:
    """Bytes of cache that `cache_gib` asks for and that fit beside the shard, which is allocated, slots and inbox.

    Raises DWDPError when slots or cache do not fit, naming what is missing or the largest cache that would fit.
    """
    room, setting, remedy = limit.room(device)
    remote = max(layer.remote_bytes for layer in layers)
    room -= options.slots * remote + inbox_bytes
    within = f"beside the shard within {setting}"
    inbox = f" and an inbox of {inbox_bytes / GIB:.2f} GiB" if inbox_bytes else ""
    if room < 0:
        remedies = ["more ranks", *["--dwdp-slots 2"] * (options.slots > 2), *["--dwdp-dispatch off"] * (inbox_bytes > 0)]
        raise DWDPError(
            f"{options.slots} slots of {remote / GIB:.2f} GiB{inbox} do not fit {within}: {-room / GIB:.2f} GiB are "
            f"missing; use {', '.join(remedies)} or {remedy}"
        )
    if options.cache_gib == "auto":
        floor = int(options.cache_floor_gib * GIB) - (limit.kv_cache_memory_bytes or 0)
        wanted = max(room - max(floor, 0), 0)
    else:
        wanted = int(options.cache_gib * GIB)
    wanted = min(wanted, remote * len(layers))
    if wanted > room:
        raise DWDPError(
            f"--dwdp-cache-gib {options.cache_gib} and {options.slots} slots{inbox} do not fit {within}: the largest cache "
            f"that does is --dwdp-cache-gib {room // (GIB // 100) / 100:.2f}"
        )
    return wanted


def plan_cache(layers: Sequence[LayerSize], nbytes: int) -> list[int]:
    """How many experts are resident in each layer, for `nbytes`."""
    return spread_residents(nbytes // max(sum(layer.expert_bytes) for layer in layers), len(layers))


def describe_cache(layers: Sequence[LayerSize], nbytes: int) -> str:
    """What `nbytes` of cache hold, in one line."""
    room = sum(plan_cache(layers, nbytes))
    if room >= (remote := sum(layer.remote_experts for layer in layers)):
        return f"DWDP cache: all {remote} remote experts are resident, {size_text(nbytes)}"
    return f"DWDP cache: {size_text(nbytes)}, room for {room} of {remote} remote experts"


def announce(
    layers: Sequence[LayerSize], *, rank: int, streamed_bytes: int, direct_max_tokens: int, held_bytes: int
) -> str:
    """What a rank does, in one line: `streamed_bytes` a step, and `held_bytes` of expert memory in all."""
    owned = [len(layer.placement.owned(rank)) for layer in layers]
    experts = [layer.placement.num_experts for layer in layers]
    if len(set(zip(owned, experts, strict=True))) == 1:
        share = f"{owned[0]} of {experts[0]} experts in each of {len(layers)} layers"
    else:
        share = f"{sum(owned)} of {sum(experts)} experts in {len(layers)} layers"
    moves = "streams nothing, as every remote expert is resident"
    if streamed_bytes:
        moves = f"streams {size_text(streamed_bytes)} in a step that is not dispatched and has more than {direct_max_tokens} tokens"
    return f"DWDP on: rank {rank} of {layers[0].placement.size} owns {share}, {moves}, holds {size_text(held_bytes)}"


def size_text(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB else f"{nbytes / 2**20:.2f} MiB"


def table(ranks: Sequence[dict[str, int]]) -> str:
    """Every rank's expert memory by kind, in GiB, as aligned text; `ranks` are StreamedModel.memory_bytes."""
    columns = [*ranks[0], "total"]
    rows = [[*(f"{nbytes / GIB:.3f}" for nbytes in (*kinds.values(), sum(kinds.values())))] for kinds in ranks]
    widths = [max(len(column), 7) for column in columns]
    lines = [("GiB", columns), *((f"rank {rank}", row) for rank, row in enumerate(rows))]
    return "\n".join(
        "  ".join([name.ljust(8), *(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))])
        for name, cells in lines
    )
