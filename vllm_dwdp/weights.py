"""Weights: the full tensors of every layer, made of the shard, residents, slots and peers' memory.

Each streamed tensor of each layer gets two address ranges, both of them one contiguous [E, ...] tensor:

    streamed view   slot k      | held pages        | slot k        one slot block below and one above, shared by
                                                                    all layers that use slot k
    direct view     peers' pages | the same held pages | peers' pages    static

Everything is mapped read-only but the slots: a stray store must not reach weights that every peer reads.

Held pages are the shard's segments, which peers import, and this rank's residents, which they do not.
"""

import contextlib
import dataclasses
import itertools
from collections.abc import Sequence

import torch

from vllm_dwdp.kernels.device import Block, Device, Region
from vllm_dwdp.layout import Layout, interleave
from vllm_dwdp.schedule import DIRECT, STREAMED, Schedule, View


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One streamed parameter: `shape` and `stride` (elements) are the full tensor's, [E, ...]."""

    name: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    layout: Layout


class FullTensor:
    """One streamed tensor of one layer: its blocks, its two regions, its two views, its copies."""

    def __init__(self, spec: TensorSpec, rank: int):
        self.spec = spec
        self._rank = rank
        self.shard: list[tuple[range, Block]] = []  # (pages, block): what peers import
        self.residents: list[tuple[range, Block]] = []  # (pages, block): this rank's own
        self._peers: list[tuple[int, range, Block]] = []  # (owner, pages, imported block)
        self._regions: list[Region] = []
        self._missing: list[tuple[int, range]] = []  # (owner, pages): the direct view's segments of peers
        self.views: dict[View, torch.Tensor] = {}

    @property
    def held(self) -> list[tuple[range, Block]]:
        return self.shard + self.residents

    def migrate(self, device: Device, source: torch.Tensor) -> None:
        """Move the shard, `source` [owned, ...], into new shareable blocks, and make room for residents.

        Raises DWDPError when the device has no memory left; the blocks made so far are closed by `close`.
        """
        layout, page = self.spec.layout, device.page_bytes
        for pages in layout.segments(self._rank):
            self.shard.append((pages, device.allocate(len(pages) * page)))
        held, owned = layout.held_pages(self._rank), layout.owned_pages(self._rank)
        for pages in (range(held.start, owned.start), range(owned.stop, held.stop)):
            if pages:
                self.residents.append((pages, device.allocate(len(pages) * page)))
        home = layout.bytes_of(layout.placement.owned(self._rank))
        assert source.untyped_storage().nbytes() >= len(home)
        with contextlib.closing(device.reserve(len(owned) * page)) as region:
            for pages, block in self.shard:
                region.map((pages.start - owned.start) * page, block, writable=True)
            device.copy(region.address + home.start - owned.start * page, source.data_ptr(), len(home))

    def attach(self, owner: int, blocks: Sequence[Block]) -> None:
        """Take over the blocks imported from `owner`, in the order in which it exported them."""
        pages = self.spec.layout.segments(owner)
        self._peers += [(owner, span, block) for span, block in zip(pages, blocks, strict=True)]

    def fill(self, device: Device) -> None:
        """Copy in what this rank holds without owning: the far halves of its edge pages, and its residents."""
        page = device.page_bytes
        for owner, span in self.spec.layout.fills(self._rank):
            for pages, block in [(p, b) for o, p, b in self._peers if o == owner]:
                there = range(max(span.start, pages.start * page), min(span.stop, pages.stop * page))
                for mine, held in self.held if there else ():
                    part = range(max(there.start, mine.start * page), min(there.stop, mine.stop * page))
                    if part:
                        self._copy_between(device, held, mine, block, pages, part)

    @staticmethod
    def _copy_between(device: Device, target: Block, at: range, source: Block, source_at: range, part: range) -> None:
        """Copy the tensor bytes `part` from one block to another; `at` and `source_at` are the blocks' pages."""
        page = device.page_bytes
        with (
            contextlib.closing(device.reserve(target.nbytes)) as here,
            contextlib.closing(device.reserve(source.nbytes)) as there,
        ):
            here.map(0, target, writable=True)
            there.map(0, source, writable=False)
            begin, source_begin = at.start * page, source_at.start * page
            device.copy(here.address + part.start - begin, there.address + part.start - source_begin, len(part))

    def compose(self, device: Device, slot: "tuple[Block | None, Block | None]") -> None:
        """Build both views. `slot` is the slot's block below the held pages and above."""
        layout, page = self.spec.layout, device.page_bytes
        below, above = layout.missing(self._rank)
        before = (slot[0].nbytes if slot[0] else 0) - len(below) * page  # a slot block may be larger than this layer
        streamed = self._region(device, before + layout.cuts[-1] * page + (slot[1].nbytes if slot[1] else 0))
        direct = self._region(device, layout.cuts[-1] * page)
        for pages, block in self.held:
            streamed.map(before + pages.start * page, block, writable=False)
            direct.map(pages.start * page, block, writable=False)
        for part, slot_block, at in ((below, slot[0], 0), (above, slot[1], before + above.start * page)):
            if part and slot_block:
                streamed.map(at, slot_block, writable=True)
            self._missing += layout.sources(self._rank, part)
        for owner, pages in self._missing:
            direct.map(pages.start * page, self._block_of(owner, pages), writable=False)
        spec = self.spec
        self.views = {
            STREAMED: streamed.tensor(before, spec.shape, spec.stride, spec.dtype),
            DIRECT: direct.tensor(0, spec.shape, spec.stride, spec.dtype),
        }

    def _block_of(self, owner: int, pages: range) -> Block:
        return next(b for o, p, b in self._peers if o == owner and p == pages)

    def copies(self, slice_bytes: int) -> list[tuple[int, int, int]]:
        """What fills the slot, as (destination, source, bytes) addresses in order."""
        layout = self.spec.layout
        pieces: list[tuple[int, range]] = []  # (owner, bytes)
        for owner, pages in self._missing:
            span = range(pages.start * layout.page_bytes, min(pages.stop * layout.page_bytes, layout.total_bytes))
            if pieces and pieces[-1][0] == owner and pieces[-1][1].stop == span.start:
                span = range(pieces.pop()[1].start, span.stop)
            pieces.append((owner, span))
        streamed, direct = self.views[STREAMED].data_ptr(), self.views[DIRECT].data_ptr()
        order = interleave(pieces, self._rank, layout.placement.size, slice_bytes)
        return [(streamed + span.start, direct + span.start, len(span)) for span in order]

    def _region(self, device: Device, nbytes: int) -> Region:
        self._regions.append(device.reserve(nbytes))
        return self._regions[-1]

    def close(self) -> None:
        for region in self._regions:
            region.close()
        for block in itertools.chain((b for _, b in self.held), (b for _, _, b in self._peers)):
            block.close()


class LayerWeights:
    """The full tensors of one MoE layer, and which view its parameters show."""

    def __init__(self, ordinal: int, name: str, tensors: list[FullTensor]):
        self.ordinal, self.name, self.tensors = ordinal, name, tensors
        self.parameters: list[torch.nn.Parameter] = []
        self.copies: list[tuple[int, int, int]] = []
        self.copied_bytes = 0
        self._view: View | None = None

    def plan(self, slice_bytes: int) -> None:
        """Find out `copies` and their bytes, once the tensors are composed."""
        self.copies = [copy for tensor in self.tensors for copy in tensor.copies(slice_bytes)]
        self.copied_bytes = sum(nbytes for *_, nbytes in self.copies)

    def bind(self, view: View) -> None:
        """Point the layer's parameters at `view`. A host-side assignment, and only when the view changes."""
        if view != self._view:
            for parameter, tensor in zip(self.parameters, self.tensors, strict=True):
                parameter.data = tensor.views[view]
            self._view = view


class Slots:
    """The K buffers: for every tensor name a block below and one above the held pages, as large as any layer needs."""

    def __init__(self, device: Device, layers: Sequence[LayerWeights], schedule: Schedule, rank: int):
        self._blocks: dict[tuple[int, str, int], Block] = {}
        need: dict[tuple[int, str, int], int] = {}
        for layer in layers:
            for tensor in layer.tensors:
                for side, pages in enumerate(tensor.spec.layout.missing(rank)):
                    key = (schedule.slot(layer.ordinal), tensor.spec.name, side)
                    need[key] = max(need.get(key, 0), len(pages) * device.page_bytes)
        try:
            for key, nbytes in need.items():
                if nbytes:
                    self._blocks[key] = device.allocate(nbytes)
        except BaseException:
            self.close()
            raise
        self.schedule = schedule
        self.nbytes = sum(block.nbytes for block in self._blocks.values())

    def of(self, layer: LayerWeights, name: str) -> tuple[Block | None, Block | None]:
        slot = self.schedule.slot(layer.ordinal)
        return self._blocks.get((slot, name, 0)), self._blocks.get((slot, name, 1))

    def close(self) -> None:
        for block in self._blocks.values():
            block.close()
