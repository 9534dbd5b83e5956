"""The hot cache: residents chosen by how often the direct view reads them, refilled while the rank serves.

Its unit is a bundle, the fewest experts that fill whole pages; its memory is single pages, which hold any bundle.

    count     the device counts the experts that each forward over the direct view reads
    choose    every `REFRESH_STEPS` steps the counts travel to the host, beside the step, and name the hottest bundles
    stage     the side stream copies some of them from their owners into free pages, beside the next steps
    settle    between two steps, with the device idle, the direct view shows those pages in place of the owners', and
              owners' pages in place of the coldest bundles, whose pages are free again

Addresses never change, so CUDA graphs go on, and slots are filled through the direct view, so from the pages here. The
bytes under an address are the same expert's before, during and after.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from vllm_dwdp.errors import DWDPError
from vllm_dwdp.kernels.device import CopyStream, Device
from vllm_dwdp.prefetch import Prefetcher
from vllm_dwdp.weights import FullTensor, LayerWeights

REFRESH_STEPS = 256
STAGED_BYTES = 64 * 2**20  # copied beside a few steps, mapped between two
RETENTION = 1.25  # how much hotter than a resident a bundle must be to take its place


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Bundle:
    """Some remote experts of one layer, and their segments in its tensors."""

    layer: LayerWeights
    experts: range
    segments: tuple[tuple[FullTensor, range], ...]

    @property
    def num_pages(self) -> int:
        return sum(len(pages) for _, pages in self.segments)

    @property
    def rows(self) -> tuple[int, slice]:
        """Where its experts are in an array of [layers, experts]."""
        return self.layer.ordinal, slice(self.experts.start, self.experts.stop)


class HotCache:
    """Owns the cache's pages. Only the thread that runs the model may call it."""

    def __init__(
        self, layers: Sequence[LayerWeights], device: Device, stream: CopyStream, prefetcher: Prefetcher, *, rank: int,
        num_pages: int, slice_bytes: int,
    ):
        self.swapped = 0
        self.direct_bytes = 0  # read in place from peers, by the counts read so far
        self._device, self._stream, self._prefetcher, self._slice_bytes = device, stream, prefetcher, slice_bytes
        self._bundles = bundles_of(layers)
        self._pages = np.array([bundle.num_pages for bundle in self._bundles])
        if num_pages < 2 * self._pages.max():
            least = 2 * self._pages.max() * device.page_bytes / 2**30
            raise DWDPError(f"cache_policy=hot cannot swap in so small a cache: set --dwdp-cache-gib to {least:.4f} up")
        self._layer_of = np.array([bundle.layer.ordinal for bundle in self._bundles])
        self._start_of = np.array([bundle.experts.start for bundle in self._bundles])
        self._stop_of = np.array([bundle.experts.stop for bundle in self._bundles])
        placements = [layer.tensors[0].spec.layout.placement for layer in layers]
        width = max(placement.num_experts for placement in placements)
        # What a read of an expert takes from peers, without the cache and beside it.
        self._uncached_bytes = np.zeros((len(layers), width), dtype=np.int64)
        for layer, placement in zip(layers, placements, strict=True):
            remote = sorted(set(range(placement.num_experts)) - set(placement.owned(rank)))
            self._uncached_bytes[layer.ordinal, remote] = sum(t.spec.layout.expert_bytes for t in layer.tensors)
        self._remote_bytes = self._uncached_bytes.copy()
        self._blocks = [device.allocate(device.page_bytes) for _ in range(num_pages)]
        self._region = device.reserve(num_pages * device.page_bytes)
        for number, block in enumerate(self._blocks):
            self._region.map(number * device.page_bytes, block, writable=True)
        self._free = list(range(num_pages))
        staged = max(STAGED_BYTES // device.page_bytes, self._pages.max())
        self._spare = int(min(staged, max(num_pages // 8, self._pages.max())))
        self._resident: dict[int, list[int]] = {}  # bundle number: its pages
        self._incoming: list[int] = []
        self._outgoing: list[int] = []
        self._staged: dict[int, list[int]] = {}
        self._steps = 0
        where = self._region.device
        self._experts = torch.arange(width, device=where)
        self._reads = torch.zeros(len(layers), width, dtype=torch.int64, device=where)
        self._counted = torch.zeros_like(self._reads, device="cpu", pin_memory=where.type == "cuda")
        self._heat = np.zeros((len(layers), width))
        self._chosen_at = self._billed_at = np.zeros((len(layers), width), dtype=np.int64)
        self._counting = False
        self._count_done, self._stage_done = stream.event(), stream.event()

    @property
    def nbytes(self) -> int:
        return sum(block.nbytes for block in self._blocks)

    def start(self) -> None:
        """Fill the cache evenly over the layers, as nothing is known yet. Waits."""
        self._choose()
        while self._incoming:
            self._stage()
            self._settle()

    def count(self, layer: LayerWeights, topk_ids: torch.Tensor) -> None:
        """Enqueue the count of a direct forward's experts. `topk_ids` is [tokens, top-k], any integer dtype."""
        self._reads[layer.ordinal] += (topk_ids.reshape(-1, 1) == self._experts).any(0)

    def advance(self) -> None:
        """Go one stage on. To be called between two steps; waits for the device to settle, and for nothing else."""
        self._steps += 1
        if self._staged:
            if self._stream.is_done(self._stage_done):
                self._settle()
        elif self._incoming:
            self._stage()
        elif self._counting:
            if self._stream.is_done(self._count_done):
                self._counting = False
                self._choose()
        elif self._steps >= REFRESH_STEPS:
            self._steps = 0
            self._counted.copy_(self._reads, non_blocking=True)
            self._stream.compute_record(self._count_done)
            self._counting = True

    def _choose(self) -> None:
        """Name what comes and what may go. Reads of earlier refreshes count half as much each time."""
        counted = self._counted.numpy().copy()
        self._heat = self._heat / 2 + (counted - self._chosen_at)
        self._chosen_at = counted
        sums = np.pad(self._heat.cumsum(axis=1), ((0, 0), (1, 0)))
        heat = (sums[self._layer_of, self._stop_of] - sums[self._layer_of, self._start_of]) / self._pages
        heat[list(self._resident)] *= RETENTION
        is_new = np.ones(len(heat))
        is_new[list(self._resident)] = 0
        ranked = np.lexsort((is_new, -heat))
        fits = np.cumsum(self._pages[ranked]) <= len(self._blocks) - self._spare
        wanted = ranked[fits].tolist()
        self._incoming = [number for number in wanted if number not in self._resident]
        self._outgoing = [number for number in ranked[~fits].tolist() if number in self._resident]

    def _stage(self) -> None:
        copies: list[tuple[int, int, int]] = []
        while self._incoming and self._pages[self._incoming[0]] <= min(len(self._free), self._spare - len(copies)):
            number = self._incoming.pop(0)
            mine = self._staged[number] = [self._free.pop() for _ in range(self._pages[number])]
            at = iter(mine)
            for tensor, pages in self._bundles[number].segments:
                page, source = tensor.spec.layout.page_bytes, tensor.direct_address
                copies += [(self._region.address + next(at) * page, source + n * page, page) for n in pages]
        self._plan = self._stream.plan(copies)  # kept until it has run
        self._stream.copy(self._plan)
        self._stream.record(self._stage_done)

    def _settle(self) -> None:
        """Swap what is staged for what is coldest. The only wait: no kernel and no copy may be reading."""
        self._device.synchronize()
        self._stream.drain()
        self.bill()
        changed = set()
        for number, mine in self._staged.items():
            bundle, at = self._bundles[number], iter(mine)
            for tensor, pages in bundle.segments:
                tensor.localize(pages, [self._blocks[next(at)] for _ in pages])
            self._remote_bytes[bundle.rows] = 0
            changed.add(bundle.layer)
        self._resident |= self._staged
        self.swapped += len(self._staged)
        self._staged = {}
        while len(self._free) < self._spare:
            number = self._outgoing.pop()
            bundle = self._bundles[number]
            for tensor, pages in bundle.segments:
                tensor.restore(pages)
            self._remote_bytes[bundle.rows] = self._uncached_bytes[bundle.rows]
            self._free += self._resident.pop(number)
            changed.add(bundle.layer)
        for layer in changed:
            layer.plan(self._slice_bytes)
            self._prefetcher.replan(layer)

    def bill(self) -> None:
        """Bring `direct_bytes` up to date. Waits for the device."""
        reads = self._reads.cpu().numpy().copy()
        self.direct_bytes += int(((reads - self._billed_at) * self._remote_bytes).sum())
        self._billed_at = reads

    def close(self) -> None:
        self._region.close()
        for block in self._blocks:
            block.close()


def bundles_of(layers: Sequence[LayerWeights]) -> list[Bundle]:
    """Every bundle with remote experts, the first ones of all layers first: in that order the cache begins even."""
    found: dict[tuple[int, int], list[tuple[FullTensor, range]]] = {}
    for layer in layers:
        for tensor in layer.tensors:
            for bundle, pages in tensor.missing():
                found.setdefault((bundle, layer.ordinal), []).append((tensor, pages))
    bundles = []
    for (bundle, ordinal), segments in sorted(found.items(), key=lambda item: item[0]):
        layout = layers[ordinal].tensors[0].spec.layout
        first = bundle * layout.bundle
        experts = range(first, min(first + layout.bundle, layout.placement.num_experts))
        bundles.append(Bundle(layer=layers[ordinal], experts=experts, segments=tuple(segments)))
    return bundles
